//! `cargo xtask ebpf`: the BPF object.
//!
//! In: `profiler-ebpf`. Out: [`OBJECT`], stripped of DWARF, with BTF. The object is committed and embedded in the daemon,
//! so that a build of the daemon needs only stable Rust. `--verify` rebuilds it and compares bytes, so the committed
//! object is always what the source says; for that, no path of the machine may reach the object.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::sh;
use crate::toolchain::{self, Toolchain};

/// The committed object, relative to the workspace's root.
pub const OBJECT: &str = "profiler-daemon/bpf/reqprof.bpf.o";
/// What the committed object was built with: explains a difference that is not the source's.
const BUILT_WITH: &str = "profiler-daemon/bpf/built-with.txt";
const TARGET: &str = "bpfel-unknown-none";
const PROFILE: &str = "bpf";
/// Build folder of its own: another target and other flags must not evict the daemon's build, nor `CARGO_TARGET_DIR`
/// move this one.
const BUILD_DIR: &str = "target/bpf";

#[derive(Args)]
pub struct Options {
    /// Rebuild and compare with the committed object instead of replacing it
    #[arg(long)]
    verify: bool,
    /// Print the size of every program and function, in instructions
    #[arg(long)]
    size: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let toolchain = Toolchain::ensure()?;
    let built = build(&toolchain)?;
    if options.verify {
        compare(&toolchain, &built)?;
    } else {
        let committed = sh::root().join(OBJECT);
        let parent = committed.parent().context("the object has a folder")?;
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        fs::copy(&built, &committed).with_context(|| format!("writing {}", committed.display()))?;
        let built_with = sh::root().join(BUILT_WITH);
        fs::write(&built_with, toolchain.versions()?)
            .with_context(|| format!("writing {}", built_with.display()))?;
        println!("{OBJECT}: {} bytes", fs::metadata(&committed)?.len());
    }
    if options.size {
        print_sizes(&toolchain, &built)?;
    }
    Ok(())
}

/// Rebuilds the object; a difference from the committed one is an error.
pub fn verify(toolchain: &Toolchain) -> Result<()> {
    compare(toolchain, &build(toolchain)?)
}

/// Clippy on the kernel side, under the flags of the build.
pub fn clippy(toolchain: &Toolchain) -> Result<()> {
    let mut command = cargo(toolchain, "clippy")?;
    sh::run(command.args(["--", "-D", "warnings"]))
}

/// Builds and strips. Returns the object's path in the build folder.
fn build(toolchain: &Toolchain) -> Result<PathBuf> {
    sh::run(&mut cargo(toolchain, "build")?)?;
    let dir = sh::root().join(BUILD_DIR).join(TARGET).join(PROFILE);
    let stripped = dir.join("reqprof.bpf.o");
    let mut strip = Command::new(toolchain.llvm_bin.join("llvm-strip"));
    sh::run(strip.arg("--strip-debug").arg("-o").arg(&stripped).arg(dir.join("profiler-ebpf")))?;
    Ok(stripped)
}

/// Cargo with everything the BPF target needs, up to where a subcommand's own arguments go.
fn cargo(toolchain: &Toolchain, subcommand: &str) -> Result<Command> {
    let mut flags = vec![
        // Which registers the context structs have; aya-ebpf reads it.
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Clink-arg=--btf".to_owned(),
        // Small structures are then cleared and copied in place. Otherwise each is a call of a byte-by-byte loop, which
        // costs time and has the verifier follow every byte.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        // 32-bit registers and comparisons, in every kernel from 5.1 on.
        "-Ctarget-cpu=v3".to_owned(),
    ];
    flags.extend(
        remaps(toolchain)?.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())),
    );

    let mut command = toolchain::isolated_cargo();
    command
        .args([
            subcommand,
            "--locked",
            "--package",
            "profiler-ebpf",
            "--bin",
            "profiler-ebpf",
            "--features",
            "kernel",
        ])
        .args(["--profile", PROFILE, "--target", TARGET, "-Z", "build-std=core", "--target-dir", BUILD_DIR])
        // The target is tier 3: its `core` has to be built from source, which stable cargo does only when told so.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", &toolchain.rustc)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(command)
}

/// Every folder that source comes from, with the name it has in the object. Line information would carry the paths.
fn remaps(toolchain: &Toolchain) -> Result<Vec<(PathBuf, &'static str)>> {
    let metadata = sh::capture(sh::cargo().args(["metadata", "--format-version=1", "--locked"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata).context("reading cargo's metadata")?;
    let packages = metadata["packages"].as_array().context("cargo's metadata lists no packages")?;
    // The registry's folder is named after its address, and a mirror's is another.
    let registries: BTreeSet<PathBuf> = packages
        .iter()
        .filter(|package| !package["source"].is_null())
        .filter_map(|package| {
            Path::new(package["manifest_path"].as_str()?).parent()?.parent().map(Path::to_owned)
        })
        .collect();
    let root = sh::root();
    let mut remaps = vec![(root.clone(), "/reqprof")];
    let library = [(toolchain.library.clone(), "/rust/library")];
    for (dir, name) in library.into_iter().chain(registries.into_iter().map(|dir| (dir, "/registry"))) {
        // Cargo gives rustc relative paths for what lies inside the workspace, as `target/bpf-toolchain` does.
        if let Ok(inside) = dir.strip_prefix(&root) {
            remaps.push((inside.to_owned(), name));
        }
        remaps.push((dir, name));
    }
    Ok(remaps)
}

fn compare(toolchain: &Toolchain, built: &Path) -> Result<()> {
    let committed = sh::root().join(OBJECT);
    let fresh = fs::read(built).with_context(|| format!("reading {}", built.display()))?;
    let Ok(old) = fs::read(&committed) else { bail!("{} does not exist: {REMEDY}", committed.display()) };
    if let Some(at) = first_difference(&old, &fresh) {
        bail!(
            "{} ({} bytes) is not what its source builds ({}, {} bytes): they differ from byte {at} on; {}",
            committed.display(),
            old.len(),
            built.display(),
            fresh.len(),
            cause(
                &fs::read_to_string(sh::root().join(BUILT_WITH)).unwrap_or_default(),
                &toolchain.versions()?
            ),
        );
    }
    println!("{OBJECT} is what its source builds");
    Ok(())
}

const REMEDY: &str = "run `cargo xtask ebpf` and commit the object together with its source";

/// Why two objects may differ, from what each was built with: another tool makes other bytes from the same source.
fn cause(committed: &str, here: &str) -> String {
    if committed == here {
        return format!("both were built with the same tools, so the source has changed: {REMEDY}");
    }
    let indented = |text: &str| text.lines().map(|line| format!("\n    {line}")).collect::<String>();
    format!(
        "the tools differ too, so the source may be innocent.\n  The committed one was built with{}\n  and this one with{}\n  \
         Compare under the same tools, or {REMEDY}",
        indented(committed),
        indented(here)
    )
}

/// The offset of the first byte that differs, or where the shorter one ends.
fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let common = a.iter().zip(b).position(|(x, y)| x != y);
    common.or_else(|| (a.len() != b.len()).then(|| a.len().min(b.len())))
}

fn print_sizes(toolchain: &Toolchain, object: &Path) -> Result<()> {
    let mut nm = Command::new(toolchain.llvm_bin.join("llvm-nm"));
    let symbols = sh::capture(nm.args(["--defined-only", "--demangle", "--format=posix"]).arg(object))?;
    let mut sizes = function_sizes(&symbols);
    sizes.sort_by_key(|(name, size)| (std::cmp::Reverse(*size), name.clone()));
    for (name, instructions) in sizes {
        println!("{instructions:>7}  {name}");
    }
    Ok(())
}

/// Functions and their instructions out of `llvm-nm --format=posix`: `name type value size`, numbers in hex. An
/// instruction is 8 bytes (the 16-byte load of a 64-bit constant counts as two, as in the kernel's limit).
fn function_sizes(symbols: &str) -> Vec<(String, u64)> {
    let function = |line: &str| {
        let mut fields = line.rsplitn(4, ' ');
        let size = u64::from_str_radix(fields.next()?, 16).ok()?;
        let kind = fields.nth(1)?;
        let name = fields.next()?;
        (matches!(kind, "T" | "t" | "W" | "w") && size > 0).then(|| (name.to_owned(), size / 8))
    };
    symbols.lines().filter_map(function).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_found_and_a_prefix_is_one() {
        assert_eq!(first_difference(b"abc", b"abc"), None);
        assert_eq!(first_difference(b"abc", b"abd"), Some(2));
        assert_eq!(first_difference(b"abc", b"abcd"), Some(3));
        assert_eq!(first_difference(b"", b"x"), Some(0));
    }

    #[test]
    fn other_tools_are_named_as_a_possible_cause() {
        let same = cause("LLVM 22.1.8\n", "LLVM 22.1.8\n");
        assert!(same.contains("the source has changed"), "{same}");
        let other = cause("LLVM 22.1.8\n", "LLVM 22.1.9\n");
        assert!(
            other.contains("built with\n    LLVM 22.1.8\n  and this one with\n    LLVM 22.1.9\n"),
            "{other}"
        );
    }

    #[test]
    fn sizes_are_in_instructions_and_data_is_left_out() {
        let nm = "sample T 0 118\nprofiler_ebpf::walk t 0 b8\nRING D 1c 1c\nmemcmp W 218 80\nLICENSE R 0 4\n";
        let expected = [("sample", 35), ("profiler_ebpf::walk", 23), ("memcmp", 16)];
        assert_eq!(function_sizes(nm), expected.map(|(name, size)| (name.to_owned(), size)));
    }
}
