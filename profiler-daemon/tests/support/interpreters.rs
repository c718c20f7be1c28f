//! The builds of CPython that there are on this machine, of every version whose frames are known.
//!
//! They come from the distribution (static, stripped), from pyenv (shared, with symbols) and, for versions that the
//! distribution is too old for, from packages of a later one that `cargo xtask test` unpacks below `target/pythons`:
//! these run with the C library that they were built for. The unit tests of the library include this file too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The supported ones.
pub const VERSIONS: [&str; 7] = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"];

/// A build of an interpreter.
#[derive(Clone, Debug)]
pub struct Interpreter {
    pub version: &'static str,
    /// Which one it is, for people.
    pub name: String,
    /// The program with the arguments that make it run.
    line: Vec<OsString>,
    /// Its headers, if they are installed: folders to be searched.
    pub headers: Vec<PathBuf>,
}

impl Interpreter {
    /// A command that runs it; arguments can be added.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.line[0]);
        command.args(&self.line[1..]);
        command
    }

    fn new(version: &'static str, program: PathBuf, line: Vec<OsString>, include: &Path) -> Self {
        let own = include.join(format!("python{version}"));
        // Debian has the file that differs between machines beside the others.
        let machine = include.join(format!("x86_64-linux-gnu/python{version}"));
        let headers =
            if own.join("internal").is_dir() { vec![own, include.to_owned(), machine] } else { Vec::new() };
        Self { version, name: program.display().to_string(), line, headers }
    }
}

/// The builds of a version, or why there is none.
pub fn of_version(version: &'static str) -> Result<Vec<Interpreter>, String> {
    let mut found = Vec::new();
    let distribution = PathBuf::from(format!("/usr/bin/python{version}"));
    if distribution.exists() {
        let line = vec![distribution.clone().into()];
        found.push(Interpreter::new(version, distribution, line, Path::new("/usr/include")));
    }
    for folder in pyenv(version) {
        let program = folder.join(format!("bin/python{version}"));
        if program.exists() {
            let line = vec![program.clone().into()];
            found.push(Interpreter::new(version, program, line, &folder.join("include")));
        }
    }
    let root = unpacked();
    let program = root.join(format!("usr/bin/python{version}"));
    if program.exists() {
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let loader = libraries.join("ld-linux-x86-64.so.2");
        let line = [loader.as_path(), Path::new("--library-path"), &libraries, &program];
        let line = line.map(|word| word.as_os_str().to_owned()).to_vec();
        found.push(Interpreter::new(version, program, line, &root.join("usr/include")));
    }
    if found.is_empty() {
        return Err(format!(
            "no CPython {version}: not in /usr/bin, not among pyenv's, not below {}",
            root.display()
        ));
    }
    Ok(found)
}

/// Where pyenv has builds of a version.
fn pyenv(version: &str) -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".pyenv"));
    let root = std::env::var_os("PYENV_ROOT").map(PathBuf::from).or(home);
    let entries = root.and_then(|root| std::fs::read_dir(root.join("versions")).ok());
    let prefix = format!("{version}.");
    let mut found: Vec<PathBuf> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Where packages of a later distribution are unpacked.
pub fn unpacked() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/pythons/root");
    std::env::var_os("REQPROF_PYTHON_ROOT").map_or_else(default, PathBuf::from)
}
