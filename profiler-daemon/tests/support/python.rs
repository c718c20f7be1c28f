//! The interpreters that serve the ground-truth application, each with its packages below `target/`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version that serves it here; `tests/versions.rs` looks at all of them.
const VERSION: &str = "3.11";

/// Where the application is.
pub fn app_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/truth")
}

/// An interpreter with gunicorn.
#[derive(Clone, Debug)]
pub struct Python {
    pub name: &'static str,
    /// The virtual environment's own.
    pub program: PathBuf,
}

impl Python {
    /// The distribution's, or why there is none.
    pub fn debian() -> Result<Self, String> {
        let program = PathBuf::from(format!("/usr/bin/python{VERSION}"));
        Self::prepare("debian", &program)
    }

    /// One that pyenv built, or why there is none. `REQPROF_PYTHONS` lists interpreters as `PATH` lists folders.
    pub fn pyenv() -> Result<Self, String> {
        let listed = std::env::var_os("REQPROF_PYTHONS").unwrap_or_default();
        let mut candidates: Vec<PathBuf> = std::env::split_paths(&listed)
            .filter(|path| !path.starts_with("/usr/bin"))
            .filter_map(|path| Some(path.parent()?.join(format!("python{VERSION}"))))
            .collect();
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".pyenv"));
        let root = std::env::var_os("PYENV_ROOT").map(PathBuf::from).or(home);
        let versions = root.and_then(|root| fs::read_dir(root.join("versions")).ok());
        candidates.extend(
            versions.into_iter().flatten().flatten().map(|v| v.path().join(format!("bin/python{VERSION}"))),
        );
        match candidates.into_iter().find(|path| path.exists()) {
            Some(program) => Self::prepare("pyenv", &program),
            None => Err(format!("pyenv has no CPython {VERSION} here")),
        }
    }

    /// Makes the virtual environment, unless one of the same interpreter and packages is there.
    fn prepare(name: &'static str, interpreter: &Path) -> Result<Self, String> {
        if !interpreter.exists() {
            return Err(format!("{} is not installed", interpreter.display()));
        }
        let requirements = app_dir().join("requirements.txt");
        let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let dir = base.join(format!("python-{name}"));
        let program = dir.join("bin/python");
        let io = |e: std::io::Error| format!("{}: {e}", dir.display());
        fs::create_dir_all(base).map_err(io)?;
        // Another test program may be at it.
        let lock = File::create(base.join(format!("python-{name}.lock"))).map_err(io)?;
        lock.lock().map_err(io)?;
        let stamp = dir.join("stamp");
        let wanted = format!(
            "{}\n{}\n{}",
            interpreter.display(),
            output(Command::new(interpreter).arg("--version"))?,
            fs::read_to_string(&requirements).map_err(io)?
        );
        if fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
            return Ok(Self { name, program });
        }
        // What an interrupted attempt left is no use.
        let _ = fs::remove_dir_all(&dir);
        output(Command::new(interpreter).args(["-m", "venv"]).arg(&dir))?;
        let mut pip = Command::new(&program);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]).arg(&requirements);
        output(&mut pip)?;
        fs::write(&stamp, wanted).map_err(io)?;
        Ok(Self { name, program })
    }
}

fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }
}
