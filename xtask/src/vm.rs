//! `cargo xtask vm`: a command on other kernels, in QEMU under software emulation.
//!
//! In: names of kernels, a command. Out: what the command printed and how it ended, for each kernel; an error if it did
//! not succeed on all. Without a command it runs the tests of `tests/kernels.rs`, which load every program and profile a
//! real server.
//!
//! The guest's root is this machine's, read through virtiofs, under a layer in memory that takes the writes: whatever is
//! installed here runs there as it is. Kernels are Debian's for clouds, unpacked without being installed and cached, with
//! an initrd of our own, under `target/vm`. Software emulation is ten to twenty times slower than the machine: what runs
//! there may count and compare, never measure.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{apt, sh};

mod image;

/// Longer than the slowest test run took here, tenfold; a guest that hangs must not hang the caller.
const LIMIT: Duration = Duration::from_secs(20 * 60);
/// What the tests and a real server of Python need.
const MEMORY: &str = "2G";
/// What the guest prints in front of the command's exit status, last of all.
const STATUS: &str = "vm exit status ";
const TAG: &str = "host";

/// A kernel and where Debian has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub name: &'static str,
    suite: &'static str,
    security: bool,
}

/// The oldest that we support, the distributions', and the newest there is.
const KERNELS: [Kernel; 5] = [
    Kernel { name: "5.10", suite: "bullseye-security", security: true },
    Kernel { name: "6.1", suite: "bookworm", security: false },
    Kernel { name: "6.12", suite: "trixie", security: false },
    Kernel { name: "6.18", suite: "trixie-backports", security: false },
    Kernel { name: "7.2", suite: "trixie-backports", security: false },
];

const PACKAGES: [&str; 7] =
    ["qemu-system-x86", "qemu-system-common", "busybox-static", "cpio", "kmod", "zstd", "xz-utils"];

#[derive(clap::Args)]
pub struct Options {
    /// Kernels, separated by commas [default: the oldest and the newest]
    #[arg(long, value_delimiter = ',', value_parser = kernel, conflicts_with = "all")]
    kernel: Vec<Kernel>,
    /// All kernels
    #[arg(long)]
    all: bool,
    /// A command to run there instead of the tests
    #[arg(last = true)]
    command: Vec<String>,
}

fn kernel(name: &str) -> Result<Kernel> {
    let known = || KERNELS.map(|kernel| kernel.name).join(", ");
    KERNELS
        .into_iter()
        .find(|kernel| kernel.name == name)
        .with_context(|| format!("there is no kernel `{name}` here; known are {}", known()))
}

pub fn run(options: &Options) -> Result<()> {
    let kernels = match options {
        Options { all: true, .. } => KERNELS.to_vec(),
        Options { kernel, .. } if kernel.is_empty() => oldest_and_newest().to_vec(),
        Options { kernel, .. } => kernel.clone(),
    };
    let command = if options.command.is_empty() { tests()? } else { options.command.join(" ") };
    let mut failed = Vec::new();
    for kernel in kernels {
        if let Err(error) = on(kernel, &command, &mut |line| println!("{line}")) {
            println!("{}: {error:#}", kernel.name);
            failed.push(kernel.name);
        }
    }
    ensure!(failed.is_empty(), "it failed on {}", failed.join(", "));
    Ok(())
}

pub fn oldest_and_newest() -> [Kernel; 2] {
    [KERNELS[0], KERNELS[KERNELS.len() - 1]]
}

/// Builds the tests and gives the command that runs them.
pub fn tests() -> Result<String> {
    let mut build = sh::cargo();
    build.args(["test", "--locked", "--package", "profiler-daemon", "--test", "kernels", "--no-run"]);
    let messages = sh::capture(build.args(["--message-format", "json"]))?;
    let program = messages.lines().filter_map(test_program).next_back();
    let program = program.context("cargo names no test program")?;
    Ok(format!(
        "cd {} && REQPROF_E2E=1 {program} --test-threads=1 --show-output --color=never",
        quoted(&sh::root().join("profiler-daemon").display().to_string())
    ))
}

/// Cargo prints an object per line; an artifact with a program has `executable`.
fn test_program(line: &str) -> Option<String> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    (message["target"]["name"] == "kernels").then(|| message["executable"].as_str().map(quoted))?
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// All that QEMU emulates but `cmpxchg16b`, which leaves garbage in the flags now and then: Linux 6.12, whose allocator
/// lives by it, died of that in half of its runs. Without it kernels have another way.
const CPU: &str = "max,-cx16";

/// Fetches what is needed to run something on a kernel.
pub fn prepare(kernel: Kernel) -> Result<()> {
    apt::install(&PACKAGES, &sh::root().join("target/apt")).context("installing QEMU and its like")?;
    image::prepare(kernel).map(drop)
}

/// Runs a shell command on a kernel and hands on each line that it prints. Anything but exit status 0 is an error.
pub fn on(kernel: Kernel, command: &str, each: &mut dyn FnMut(&str)) -> Result<()> {
    apt::install(&PACKAGES, &sh::root().join("target/apt")).context("installing QEMU and its like")?;
    let image = image::prepare(kernel)?;
    let work = image.folder.join("run");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let script = work.join("command");
    fs::write(
        &script,
        format!("export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root\n{command}\n"),
    )?;

    let _files = FileServer::start(&work)?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-machine", "q35", "-m", MEMORY, "-smp", "2"])
        .args(["-nodefaults", "-nographic", "-no-reboot"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        // The file server reads the guest's memory.
        .args(["-object", &format!("memory-backend-memfd,id=memory,size={MEMORY},share=on")])
        .args(["-numa", "node,memdev=memory"])
        .args(["-chardev", &format!("socket,id=files,path={}", work.join("files").display())])
        .args(["-device", &format!("vhost-user-fs-pci,chardev=files,tag={TAG}")])
        .args(["-serial", &format!("file:{}", work.join("console").display()), "-serial", "stdio"])
        .args(["-append", &format!("console=ttyS0 panic=-1 mitigations=off vm.command={}", script.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(work.join("errors"))?);
    let mut guest = Guest(qemu.spawn().context("cannot start qemu-system-x86_64")?);
    let output = guest.0.stdout.take().context("QEMU has no output")?;
    let watched = guest.0.id();
    let (over, waits) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if waits.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // SAFETY: a signal to our own child, which is waited for only after this thread.
            unsafe { libc::kill(watched as libc::pid_t, libc::SIGKILL) };
        }
    });
    let begun = Instant::now();
    let mut status = None;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("reading the guest's output")?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        match line.strip_prefix(STATUS) {
            Some(number) => status = number.trim().parse::<i32>().ok(),
            None => each(line),
        }
    }
    drop(over);
    let _ = watchdog.join();
    match status {
        Some(0) => Ok(()),
        Some(status) => bail!("the command ended with status {status}"),
        None if begun.elapsed() >= LIMIT => bail!("the guest did not end within {LIMIT:?}"),
        None => bail!("the guest died:\n{}", last_words(&work)),
    }
}

/// What QEMU said, and the kernel at last.
fn last_words(work: &Path) -> String {
    let read = |name: &str| fs::read(work.join(name)).unwrap_or_default();
    let text = String::from_utf8_lossy(&[read("errors"), read("console")].concat()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets the guest read this machine's files. It ends when the guest does, or with this value.
struct FileServer(Child);

impl FileServer {
    fn start(work: &Path) -> Result<Self> {
        let socket = work.join("files");
        // QEMU's own up to Debian 12, Rust's after.
        let (old, new) = (PathBuf::from("/usr/lib/qemu/virtiofsd"), PathBuf::from("/usr/libexec/virtiofsd"));
        let mut command = if old.is_file() {
            let mut command = Command::new(old);
            command.args(["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always", "-f"]);
            command
        } else {
            if !new.is_file() {
                apt::install(&["virtiofsd"], &sh::root().join("target/apt"))?;
            }
            let mut command = Command::new(new);
            command.args(["--shared-dir=/", "--sandbox=chroot", "--cache=always"]);
            command
        };
        command.arg(format!("--socket-path={}", socket.display()));
        let log = fs::File::create(work.join("files.log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let mut server = Self(child.context("cannot start virtiofsd")?);
        let limit = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            let ended = server.0.try_wait()?.is_some();
            ensure!(
                !ended && Instant::now() < limit,
                "virtiofsd does not start: {}",
                fs::read_to_string(work.join("files.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_known_by_their_version() {
        assert_eq!(kernel("6.1").unwrap().suite, "bookworm");
        let error = kernel("6").unwrap_err().to_string();
        assert!(error.contains("`6`") && error.contains("5.10, 6.1"), "{error}");
        assert_eq!(oldest_and_newest().map(|kernel| kernel.name), ["5.10", "7.2"]);
    }

    #[test]
    fn the_test_program_is_the_one_that_cargo_names() {
        let line =
            r#"{"reason":"compiler-artifact","target":{"name":"kernels"},"executable":"/a b/kernels-1"}"#;
        assert_eq!(test_program(line).as_deref(), Some("'/a b/kernels-1'"));
        assert_eq!(test_program(r#"{"target":{"name":"attach"},"executable":"/x"}"#), None);
        assert_eq!(test_program("   Compiling"), None);
    }

    #[test]
    fn words_survive_the_shell() {
        let word = "it's $HOME";
        let said =
            sh::capture(Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))])).unwrap();
        assert_eq!(said, word);
    }
}
