//! `cargo xtask run`: build `reqprof` and become it.
//!
//! In: arguments for `reqprof`. Out: `reqprof` itself, as root, in place of this process, so that signals and the exit
//! status are its own. Cargo builds as the calling user; only the program runs with root's rights.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::sh;

#[derive(Args)]
pub struct Options {
    /// Build with optimisation, as for measuring
    #[arg(long)]
    release: bool,
    /// Arguments for reqprof
    #[arg(last = true)]
    args: Vec<String>,
}

/// Returns only if reqprof could not be built or started.
pub fn run(options: &Options) -> Result<()> {
    let reqprof = build(options.release)?;
    let mut command = sh::as_root(&reqprof)?;
    command.args(&options.args);
    let error = command.exec();
    Err(error).with_context(|| format!("starting `{}`", sh::show(&command)))
}

/// Builds the daemon and returns its executable, wherever cargo's settings put it.
pub fn build(release: bool) -> Result<PathBuf> {
    let mut cargo = sh::cargo();
    cargo.args(["build", "--locked", "--package", "profiler-daemon", "--bin", "reqprof"]);
    cargo.arg("--message-format=json-render-diagnostics");
    if release {
        cargo.arg("--release");
    }
    let mut executable = None;
    sh::lines(&mut cargo, |line| executable = executable_in(line).or(executable.take()))?;
    executable.context("cargo named no executable for reqprof")
}

/// The executable that one of cargo's JSON messages announces, if any.
fn executable_in(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    message["executable"].as_str().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::executable_in;

    #[test]
    fn only_an_executable_artifact_counts() {
        let library = r#"{"reason":"compiler-artifact","target":{"name":"x"},"executable":null}"#;
        let binary =
            r#"{"reason":"compiler-artifact","target":{"name":"reqprof"},"executable":"/t/debug/reqprof"}"#;
        assert_eq!(executable_in(library), None);
        assert_eq!(executable_in(binary), Some("/t/debug/reqprof".into()));
        assert_eq!(executable_in("not JSON"), None);
    }
}
