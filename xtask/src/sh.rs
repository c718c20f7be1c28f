//! Running other programs.
//!
//! In: a `Command`. Out: success, its output, or an error that names the command, how it ended and what it said. Every
//! other file of xtask starts programs through here, so that a failure always reads the same way.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's root: the folder above this crate, taken from cargo at run time so that a target folder shared
/// between checkouts cannot point one checkout's commands at another.
pub fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// The cargo that runs us, in the workspace's root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs with our own input and output; anything but exit status 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_start(command))?;
    check(command, status, "")
}

/// Runs quietly and returns standard output.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    check(command, output.status, &String::from_utf8_lossy(&output.stderr))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs with standard output handed to `each`, line by line as it comes. Standard error stays ours.
pub fn lines(command: &mut Command, mut each: impl FnMut(&str)) -> Result<()> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| cannot_start(command))?;
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .with_context(|| format!("reading from `{}`", show(command)))?
            > 0
        {
            each(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
            line.clear();
        }
    }
    let status = child.wait().with_context(|| format!("waiting for `{}`", show(command)))?;
    check(command, status, "")
}

/// The command as one would type it, for messages.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The first executable of this name on `PATH`.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A command that runs with root's rights: directly when we have them, else through sudo.
pub fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let Some(sudo) = on_path("sudo") else {
        bail!("`{}` needs root: run this as root, or install sudo", program.as_ref().to_string_lossy());
    };
    let mut command = Command::new(sudo);
    command.arg("--").arg(program);
    Ok(command)
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}`", show(command))
}

fn check(command: &Command, status: ExitStatus, stderr: &str) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let said = stderr.trim();
    let separator = if said.is_empty() { "" } else { "\n" };
    bail!("`{}` failed: {status}{separator}{said}", show(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_the_status_and_the_complaint() {
        let error =
            capture(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c"), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("broken"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = format!("{:#}", run(&mut Command::new("/nonexistent/tool")).unwrap_err());
        assert!(error.starts_with("cannot start `/nonexistent/tool`: "), "{error}");
    }

    #[test]
    fn lines_arrive_in_order_and_without_their_ends() {
        let mut seen = Vec::new();
        lines(Command::new("printf").arg("a\\n\\nb"), |line| seen.push(line.to_owned())).unwrap();
        assert_eq!(seen, ["a", "", "b"]);
    }
}
