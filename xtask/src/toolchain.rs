//! What building the BPF object needs beyond stable Rust.
//!
//! In: the machine. Out: a [`Toolchain`]: a rustc whose sysroot holds the standard library's source (the BPF target has no
//! prebuilt `core`), bpf-linker, and LLVM's binary tools. Missing parts are fetched into `target/bpf-toolchain`, or the
//! folder that `REQPROF_BPF_TOOLCHAIN` names, which several checkouts can share. What is there already is used again.
//!
//! The versions are fixed because the object is committed and rebuilt byte for byte: another compiler makes other bytes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{apt, sh};

/// The compiler of the committed object.
const RUSTC_VERSION: &str = "1.95.0";
/// The LLVM inside that rustc. bpf-linker reads rustc's bitcode, so it must be linked with the same major version.
const LLVM_MAJOR: &str = "22";
const BPF_LINKER_VERSION: &str = "0.13.0";
/// Debian suites that carry, or will carry, a package `rust-src`, the most likely first.
const RUST_SRC_SUITES: [&str; 3] = ["trixie-backports", "forky", "sid"];

pub struct Toolchain {
    /// The rustc to build with. Its sysroot has `lib/rustlib/src/rust/library`.
    pub rustc: PathBuf,
    /// That `library` folder.
    pub library: PathBuf,
    pub linker: PathBuf,
    /// The folder of llvm-strip and its kin.
    pub llvm_bin: PathBuf,
}

impl Toolchain {
    /// Finds or makes everything. The second call only looks.
    pub fn ensure() -> Result<Self> {
        let dir = std::env::var_os("REQPROF_BPF_TOOLCHAIN")
            .map_or_else(|| sh::root().join("target/bpf-toolchain"), PathBuf::from);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("resolving {}", dir.display()))?;

        let sysroot = active_sysroot()?;
        let (rustc, library) =
            rust_source(&sysroot, &dir).context("getting the standard library's source")?;
        let llvm = PathBuf::from(format!("/usr/lib/llvm-{LLVM_MAJOR}"));
        let llvm_bin = llvm.join("bin");
        if !llvm_bin.join("llvm-strip").is_file() {
            apt::install(&[&format!("llvm-{LLVM_MAJOR}")], &dir.join("apt"))?;
        }
        let linker = bpf_linker(&dir, &llvm).context("getting bpf-linker")?;
        Ok(Self { rustc, library, linker, llvm_bin })
    }

    /// What decides about the object's bytes besides its source, one tool per line. LLVM is a shared library of the
    /// distribution, so its patch level may change under a bpf-linker that stays.
    pub fn versions(&self) -> Result<String> {
        let strip = sh::capture(Command::new(self.llvm_bin.join("llvm-strip")).arg("--version"))?;
        let llvm = strip.lines().find_map(|line| line.split_once("LLVM version ")).map_or("?", |(_, it)| it);
        Ok(format!("rustc {RUSTC_VERSION}\nbpf-linker {BPF_LINKER_VERSION}\nLLVM {llvm}\n"))
    }
}

/// A cargo that the caller's own build settings cannot reach: they would change the object's bytes.
pub fn isolated_cargo() -> Command {
    let mut command = sh::cargo();
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        let prefixed = ["CARGO_PROFILE_", "CARGO_BUILD_", "CARGO_TARGET_", "CARGO_UNSTABLE_"];
        if prefixed.iter().any(|prefix| name.starts_with(prefix))
            || [
                "CARGO_ENCODED_RUSTFLAGS",
                "CARGO_INCREMENTAL",
                "RUSTFLAGS",
                "RUSTC",
                "RUSTC_WORKSPACE_WRAPPER",
            ]
            .contains(&name.as_ref())
        {
            command.env_remove(&key);
        }
    }
    // Empty means none, and also overrules a wrapper from cargo's configuration files.
    command.env("RUSTC_WRAPPER", "");
    command
}

/// Whether the compiler is the one that the project is checked with. No toolchain file pins it: where rustup may not
/// download, that would stop every build, also those for which another compiler will do.
pub fn check_compiler() -> Result<()> {
    let version = sh::capture(Command::new("rustc").current_dir(sh::root()).arg("-vV"))?;
    right_release(&version)
}

/// `version`: what `rustc -vV` prints.
fn right_release(version: &str) -> Result<()> {
    let release = version.lines().find_map(|line| line.strip_prefix("release: ")).unwrap_or_default();
    if release != RUSTC_VERSION {
        bail!(
            "this is rustc {release}, and format, lints and the BPF object's bytes are those of {RUSTC_VERSION}. \
             Remedy: `rustup toolchain install {RUSTC_VERSION} --component rustfmt,clippy,rust-src`, then \
             `cargo +{RUSTC_VERSION} xtask …`"
        );
    }
    Ok(())
}

fn active_sysroot() -> Result<PathBuf> {
    check_compiler()?;
    Ok(sh::capture(Command::new("rustc").current_dir(sh::root()).args(["--print", "sysroot"]))?.trim().into())
}

/// Where a sysroot keeps the standard library's source.
const LIBRARY: &str = "lib/rustlib/src/rust/library";

/// A rustc with its library source, from the active toolchain, from rustup, or from Debian.
fn rust_source(sysroot: &Path, dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let own = (sysroot.join("bin/rustc"), sysroot.join(LIBRARY));
    let complete =
        |library: &Path| library.join("Cargo.lock").is_file() && library.join("core/src/lib.rs").is_file();
    if complete(&own.1) {
        return Ok(own);
    }
    let with_source = dir.join(format!("sysroot-{RUSTC_VERSION}"));
    let (wrapper, library) = (with_source.join("bin/rustc"), with_source.join(LIBRARY));
    if complete(&library) {
        mirror(sysroot, &with_source)?;
        return Ok((wrapper, library));
    }
    if sh::on_path("rustup").is_some() {
        let mut add = Command::new("timeout");
        add.args(["300", "rustup", "component", "add", "rust-src"]).env("RUSTUP_MAX_RETRIES", "1");
        match sh::run(add.current_dir(sh::root())) {
            Ok(()) if complete(&own.1) => return Ok(own),
            Ok(()) => println!("rustup added rust-src to another toolchain than {}", sysroot.display()),
            Err(error) => println!("{error:#}"),
        }
        println!("rustup cannot give the standard library's source; trying Debian's package");
    }
    debian_source(dir, &with_source.join("lib/rustlib/src/rust"))?;
    if !complete(&library) {
        bail!("Debian's package rust-src is not laid out as expected: no {}/core", library.display());
    }
    mirror(sysroot, &with_source)?;
    Ok((wrapper, library))
}

/// Unpacks Debian's `rust-src` and moves the source to `to` in one step, so that an interrupted run leaves nothing half.
fn debian_source(dir: &Path, to: &Path) -> Result<()> {
    let fresh = dir.join("rust-src.partial");
    let mut refusals = Vec::new();
    for suite in RUST_SRC_SUITES {
        if fresh.exists() {
            fs::remove_dir_all(&fresh).with_context(|| format!("removing {}", fresh.display()))?;
        }
        match apt::unpack("rust-src", RUSTC_VERSION, suite, &dir.join("apt-rust"), &fresh) {
            Ok(()) => {
                let source = fresh.join(format!("usr/src/rustc-{RUSTC_VERSION}"));
                let parent = to.parent().context("a sysroot has parents")?;
                fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
                fs::rename(&source, to)
                    .with_context(|| format!("moving {} to {}", source.display(), to.display()))?;
                return fs::remove_dir_all(&fresh).with_context(|| format!("removing {}", fresh.display()));
            }
            Err(error) => refusals.push(format!("{suite}: {error:#}")),
        }
    }
    bail!("no source of exactly rustc {RUSTC_VERSION} in Debian:\n{}", refusals.join("\n"))
}

/// Makes `to` a sysroot that has everything of the active one by symbolic links, next to the source it was given, and a
/// rustc that uses it.
///
/// Cargo hashes a `core` built from source by its path relative to the sysroot, and that hash ends up in symbol names.
/// Only a source inside the sysroot therefore gives the same object on every machine.
fn mirror(sysroot: &Path, to: &Path) -> Result<()> {
    let rustlib = to.join("lib/rustlib");
    let from = sysroot.join("lib/rustlib");
    for entry in fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))? {
        let name = entry?.file_name();
        if name != "src" {
            let link = rustlib.join(&name);
            if link.is_symlink() {
                fs::remove_file(&link).with_context(|| format!("removing {}", link.display()))?;
            }
            symlink(from.join(&name), &link).with_context(|| format!("linking {}", link.display()))?;
        }
    }
    let bin = to.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("creating {}", bin.display()))?;
    let rustc = bin.join("rustc");
    let script = format!(
        "#!/bin/sh\nexec '{}' --sysroot '{}' \"$@\"\n",
        sysroot.join("bin/rustc").display(),
        to.display()
    );
    // Written only when it changes: cargo asks rustc anew, and rebuilds, when its file is newer.
    if fs::read_to_string(&rustc).is_ok_and(|old| old == script) {
        return Ok(());
    }
    fs::write(&rustc, script).with_context(|| format!("writing {}", rustc.display()))?;
    fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("making {} executable", rustc.display()))
}

fn bpf_linker(dir: &Path, llvm: &Path) -> Result<PathBuf> {
    let own = dir.join("bin/bpf-linker");
    if let Some(found) =
        [Some(own.clone()), sh::on_path("bpf-linker")].into_iter().flatten().find(|f| fits(f))
    {
        return Ok(found);
    }
    let dev = [format!("llvm-{LLVM_MAJOR}-dev"), format!("libpolly-{LLVM_MAJOR}-dev")];
    apt::install(&[&dev[0], &dev[1], "libzstd-dev", "zlib1g-dev"], &dir.join("apt"))?;
    println!("building bpf-linker {BPF_LINKER_VERSION} (a few minutes, once)");
    let build = dir.join("build");
    let mut install = isolated_cargo();
    install
        .args(["install", "bpf-linker", "--version", BPF_LINKER_VERSION, "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{LLVM_MAJOR}"), "--root"])
        .arg(dir)
        .arg("--target-dir")
        .arg(&build)
        .env("LLVM_PREFIX", llvm)
        .current_dir(dir);
    sh::run(&mut install)?;
    if !fits(&own) {
        bail!(
            "{} was built but does not run, or is linked with another LLVM than {LLVM_MAJOR}",
            own.display()
        );
    }
    fs::remove_dir_all(&build).with_context(|| format!("removing {}", build.display()))?;
    Ok(own)
}

/// Whether this bpf-linker runs, is the version we use, and is linked with the right LLVM. Its `--version` does not say
/// the last; the name of the shared library, or the version string of a linked-in one, does.
fn fits(linker: &Path) -> bool {
    let version = sh::capture(Command::new(linker).arg("--version"));
    if version.ok().as_deref().map(str::trim) != Some(&format!("bpf-linker {BPF_LINKER_VERSION}")) {
        return false;
    }
    let Ok(bytes) = fs::read(linker) else { return false };
    [format!("libLLVM.so.{LLVM_MAJOR}"), format!("libLLVM-{LLVM_MAJOR}"), format!("LLVM{LLVM_MAJOR}.")]
        .iter()
        .any(|mark| bytes.windows(mark.len()).any(|window| window == mark.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_compiler_is_named_with_the_remedy() {
        let printed =
            |release: &str| format!("rustc {release} (0123 2026-04-14)\nhost: x\nrelease: {release}\n");
        right_release(&printed(RUSTC_VERSION)).unwrap();
        for other in ["1.95.1", "1.96.0", "1.95.0-nightly", ""] {
            let error = right_release(&printed(other)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("this is rustc {other}, ")), "{error}");
            assert!(error.contains("rustup toolchain install 1.95.0"), "{error}");
        }
    }
}
