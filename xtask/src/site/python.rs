//! Finds a CPython 3.11 and makes a virtual environment with it: pyenv's or Debian's build, and where there is none,
//! Debian's package is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{apt, sh};

/// Overrides the search.
const OVERRIDE: &str = "REQPROF_DEMO_PYTHON";
const WANTED: &str = "3.11";

pub struct Interpreter {
    pub path: PathBuf,
    /// `3.11.2`, for people and for stamps.
    pub version: String,
}

/// The first interpreter of the wanted version that can make environments with pip in them.
pub fn find() -> Result<Interpreter> {
    if let Some(chosen) = std::env::var_os(OVERRIDE).map(PathBuf::from) {
        return probe(&chosen).with_context(|| {
            format!("{OVERRIDE}: {} is no CPython {WANTED} with venv and ensurepip", chosen.display())
        });
    }
    if let Some(found) = search() {
        return Ok(found);
    }
    // Debian splits what `venv` needs off the interpreter's own package.
    let packages = [format!("python{WANTED}"), format!("python{WANTED}-venv")];
    let installed = apt::install(&packages.each_ref().map(String::as_str), &sh::root().join("target/apt"));
    let remedy = format!(
        "no CPython {WANTED} with venv and ensurepip found: not as python{WANTED} on PATH, in pyenv's versions nor in /usr/bin.\n\
         Of Debian's releases only 12 has it. Remedy: there `apt-get install {}`, elsewhere `pyenv install {WANTED}`, or name one in {OVERRIDE}",
        packages.join(" ")
    );
    installed.with_context(|| remedy.clone())?;
    search().context(remedy)
}

fn search() -> Option<Interpreter> {
    candidates().iter().find_map(|path| probe(path))
}

fn candidates() -> Vec<PathBuf> {
    let name = format!("python{WANTED}");
    let mut paths: Vec<PathBuf> = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .map(|folder| folder.join(&name))
        .collect();
    let pyenv = std::env::var_os("PYENV_ROOT").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".pyenv"));
    if let Some(root) = pyenv.or(home)
        && let Ok(versions) = fs::read_dir(root.join("versions"))
    {
        let mut versions: Vec<PathBuf> = versions.flatten().map(|entry| entry.path()).collect();
        versions.sort();
        paths.extend(versions.into_iter().rev().map(|version| version.join("bin").join(&name)));
    }
    paths.extend(["/usr/bin", "/usr/local/bin"].map(|folder| Path::new(folder).join(&name)));
    paths
}

/// Asks an interpreter for its version and its real path: a pyenv shim is a script that may also refuse.
fn probe(path: &Path) -> Option<Interpreter> {
    const QUESTION: &str = "import ensurepip, platform, sys, venv; \
        print(platform.python_implementation(), platform.python_version(), sys.executable)";
    let answer = sh::capture(Command::new(path).args(["-c", QUESTION])).ok()?;
    understand(&answer)
}

fn understand(answer: &str) -> Option<Interpreter> {
    let mut words = answer.trim_end().splitn(3, ' ');
    let (implementation, version, executable) = (words.next()?, words.next()?, words.next()?);
    let wanted = implementation == "CPython" && version.starts_with(&format!("{WANTED}."));
    wanted.then(|| Interpreter { path: executable.into(), version: version.into() })
}

/// Makes `folder` a fresh environment with pip in it.
pub fn make_environment(interpreter: &Interpreter, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    sh::capture(Command::new(&interpreter.path).args(["-m", "venv"]).arg(folder)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cpython_of_the_wanted_version_will_do() {
        let found = understand("CPython 3.11.2 /opt/my python/bin/python3.11\n").unwrap();
        assert_eq!(found.version, "3.11.2");
        assert_eq!(found.path, Path::new("/opt/my python/bin/python3.11"));
        for other in ["PyPy 3.11.2 /x", "CPython 3.1.5 /x", "CPython 3.12.1 /x", "CPython 3.11.2", ""] {
            assert!(understand(other).is_none(), "{other}");
        }
    }
}
