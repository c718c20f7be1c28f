//! Other people's programs that read what we write: Node with its modules, and a headless Chromium. What is not
//! installed is named as skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::skip::skip;

/// What a consumer printed; `None`, with the reason printed, when it is not installed.
pub fn run(test: &str, command: &mut Command) -> Option<String> {
    match command.stdin(Stdio::null()).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command:?}: {text}{errors}");
            Some(text)
        }
        Err(error) => {
            skip(test, format_args!("{} does not run: {error}", command.get_program().to_string_lossy()));
            None
        }
    }
}

/// Runs a script with Node, which finds the tools' modules.
pub fn node(test: &str, modules: &[&str], script: &str, arguments: &[&Path]) -> Option<String> {
    let Some(tools) = std::env::var_os("REQPROF_TOOLS_DIR").map(PathBuf::from) else {
        skip(test, "REQPROF_TOOLS_DIR is not set");
        return None;
    };
    for module in modules {
        if !tools.join("node_modules").join(module).is_dir() {
            skip(test, format_args!("{} has no node_modules/{module}", tools.display()));
            return None;
        }
    }
    run(test, Command::new("node").current_dir(&tools).args(["-e", script, "--"]).args(arguments))
}

pub fn chromium(test: &str) -> Option<PathBuf> {
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).find_map(|directory| {
            ["chromium", "chromium-browser", "google-chrome"]
                .into_iter()
                .map(|name| directory.join(name))
                .find(|file| file.is_file())
        })
    });
    if found.is_none() {
        skip(test, "no chromium in PATH");
    }
    found
}
