//! Finds a CPython 3.11 and makes a virtual environment with it, on machines with pyenv, with Debian's packages, or
//! with a bare Debian interpreter that came without `ensurepip`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::run_logged;

/// Overrides the search.
const OVERRIDE: &str = "REQPROF_DEMO_PYTHON";
const WANTED: &str = "3.11";

pub struct Interpreter {
    pub path: PathBuf,
    /// `3.11.2`, for people and for stamps.
    pub version: String,
    has_pip: bool,
}

/// The first interpreter of the wanted version that can make environments by itself; else the first at all.
pub fn find() -> Result<Interpreter> {
    let mut candidates = candidates();
    if let Some(chosen) = std::env::var_os(OVERRIDE) {
        candidates = vec![PathBuf::from(chosen)];
    }
    let mut found: Vec<Interpreter> = candidates.iter().filter_map(|path| probe(path)).collect();
    let best = found.iter().position(|interpreter| interpreter.has_pip).unwrap_or(0);
    if best < found.len() {
        return Ok(found.swap_remove(best));
    }
    bail!(
        "no CPython {WANTED} found (looked for python{WANTED} on PATH, in pyenv's versions and in /usr/bin).\n\
         Remedy: `apt-get install python{WANTED}-venv` on Debian 12, or `pyenv install {WANTED}`, or name one in {OVERRIDE}"
    )
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
    const QUESTION: &str = "import importlib.util as u, platform, sys; \
        print(platform.python_implementation(), platform.python_version(), \
        all(map(u.find_spec, ('venv', 'ensurepip'))), sys.executable)";
    let output =
        Command::new(path).args(["-c", QUESTION]).output().ok().filter(|out| out.status.success())?;
    let answer = String::from_utf8(output.stdout).ok()?;
    let [implementation, version, has_pip, executable]: [&str; 4] =
        answer.trim_end().splitn(4, ' ').collect::<Vec<_>>().try_into().ok()?;
    (implementation == "CPython" && version.starts_with(&format!("{WANTED}."))).then(|| Interpreter {
        path: executable.into(),
        version: version.into(),
        has_pip: has_pip == "True",
    })
}

/// Makes `folder` a fresh environment with pip in it.
pub fn make_environment(interpreter: &Interpreter, folder: &Path, log: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let mut venv = Command::new(&interpreter.path);
    venv.args(["-m", "venv"]).arg(folder);
    if interpreter.has_pip {
        return run_logged(venv, log);
    }
    venv.arg("--without-pip");
    run_logged(venv, log)?;
    let wheel = debian_pip_wheel(&folder.join("debian"), log)?;
    // A wheel is a zip file, and pip runs from inside its own (pip's documented way to bootstrap).
    let mut runnable: OsString = wheel.into();
    runnable.push("/pip");
    let mut install = Command::new(folder.join("bin/python"));
    install.arg(runnable).args(["install", "--disable-pip-version-check", "--quiet", "pip"]);
    run_logged(install, log)
}

/// Debian ships pip's wheel in a package of its own. It is unpacked beside the environment, not installed: making a
/// demo must not change the system.
fn debian_pip_wheel(folder: &Path, log: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let mut download = Command::new("apt-get");
    download.args(["download", "python3-pip-whl"]).current_dir(folder);
    run_logged(download, log).context(
        "this Python has no ensurepip, and Debian's package of pip could not be fetched.\n\
         Remedy: `apt-get update && apt-get install python3.11-venv`",
    )?;
    let package = only_file(folder, "deb")?;
    let mut unpack = Command::new("dpkg");
    unpack.arg("-x").arg(package).arg(folder);
    run_logged(unpack, log)?;
    only_file(&folder.join("usr/share/python-wheels"), "whl")
}

fn only_file(folder: &Path, extension: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == extension))
        .collect();
    ensure!(files.len() == 1, "{}: expected one .{extension} file, found {}", folder.display(), files.len());
    Ok(files.remove(0))
}
