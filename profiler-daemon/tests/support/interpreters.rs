//! The builds of CPython that there are on this machine, of every version whose frames are known.
//!
//! They come from the distribution (static, stripped), from pyenv (shared, with symbols), and from packages of other
//! releases of the distribution, which `cargo xtask test` unpacks below `target/pythons` (or the folder that
//! `REQPROF_PYTHON_ROOTS` names): these run with the C library that they were built for. The unit tests of the library include this file too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The supported ones.
pub const VERSIONS: [&str; 7] = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"];

/// A test for each of them: the function gets the test's name and the version.
macro_rules! each_version {
    ($check:path) => {
        #[test]
        fn python_3_8() {
            $check(concat!(module_path!(), "::python_3_8"), "3.8");
        }
        #[test]
        fn python_3_9() {
            $check(concat!(module_path!(), "::python_3_9"), "3.9");
        }
        #[test]
        fn python_3_10() {
            $check(concat!(module_path!(), "::python_3_10"), "3.10");
        }
        #[test]
        fn python_3_11() {
            $check(concat!(module_path!(), "::python_3_11"), "3.11");
        }
        #[test]
        fn python_3_12() {
            $check(concat!(module_path!(), "::python_3_12"), "3.12");
        }
        #[test]
        fn python_3_13() {
            $check(concat!(module_path!(), "::python_3_13"), "3.13");
        }
        #[test]
        fn python_3_14() {
            $check(concat!(module_path!(), "::python_3_14"), "3.14");
        }
    };
}
pub(crate) use each_version;

/// A build of an interpreter.
#[derive(Clone, Debug)]
pub struct Interpreter {
    pub version: &'static str,
    pub program: PathBuf,
    /// The program with the arguments that make it run.
    pub line: Vec<OsString>,
    /// Variables that make it run.
    pub variables: Vec<(OsString, OsString)>,
    /// Its headers, if they are installed: folders to be searched.
    pub headers: Vec<PathBuf>,
    /// Where it and its library lie; `None` = the machine's own.
    pub prefix: Option<PathBuf>,
}

impl Interpreter {
    /// A command that runs it; arguments can be added.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.line[0]);
        command.args(&self.line[1..]).envs(self.variables.iter().cloned());
        command
    }

    /// The same with another program in its place, which finds its library where this one does.
    pub fn running(&self, program: PathBuf) -> Self {
        let mut line = self.line.clone();
        if let Some(last) = line.last_mut() {
            *last = program.clone().into();
        }
        let home = self.prefix.as_ref().map(|prefix| ("PYTHONHOME".into(), prefix.clone().into()));
        Self { program, line, variables: home.into_iter().collect(), ..self.clone() }
    }

    /// For people.
    pub fn name(&self) -> String {
        self.program.display().to_string()
    }

    fn new(version: &'static str, program: PathBuf, prefix: Option<PathBuf>) -> Self {
        let include = prefix.as_deref().unwrap_or(Path::new("/usr")).join("include");
        let own = include.join(format!("python{version}"));
        // Debian has the file that differs between machines beside the others.
        let machine = include.join(format!("x86_64-linux-gnu/python{version}"));
        let headers = if own.join("internal").is_dir() { vec![own, include, machine] } else { Vec::new() };
        let line = vec![program.clone().into()];
        Self { version, program, line, variables: Vec::new(), headers, prefix }
    }

    /// A program that has this interpreter's shared library in it and runs it, as uWSGI does; before, it makes so many
    /// thread-specific keys that the interpreter's is not among the first. `None`: there is no such library.
    pub fn embedded(&self, folder: &Path) -> Option<Result<Self, String>> {
        let prefix = self.prefix.as_ref()?;
        let libraries = ["lib", "lib/x86_64-linux-gnu"].map(|folder| prefix.join(folder));
        let name = format!("libpython{}.so", self.version);
        let library = libraries.iter().find(|folder| folder.join(&name).exists())?;
        let (source, program) = (folder.join("embedding.c"), folder.join("embedding"));
        let build = || {
            std::fs::write(&source, EMBEDDING).map_err(|error| error.to_string())?;
            let mut compiler = Command::new("cc");
            compiler.args(self.headers.iter().map(|folder| format!("-I{}", folder.display())));
            compiler.arg("-w").arg("-o").arg(&program).arg(&source).arg(library.join(&name));
            // What the library needs of a newer C library is there when the program runs.
            compiler.args(["-pthread", "-Wl,--allow-shlib-undefined"]);
            compiler.arg(format!("-Wl,-rpath,{}", library.display()));
            let built = compiler.output().map_err(|error| format!("no C compiler: {error}"))?;
            if !built.status.success() {
                return Err(String::from_utf8_lossy(&built.stderr).into_owned());
            }
            Ok(self.running(program.clone()))
        };
        (!self.headers.is_empty()).then(build)
    }
}

const EMBEDDING: &str = r#"
#include <Python.h>
#include <pthread.h>
int main(int argc, char **argv) {
    pthread_key_t key;
    for (int n = 0; n < 40; n++)
        if (pthread_key_create(&key, 0)) return 99;
    return Py_BytesMain(argc, argv);
}
"#;

/// The builds of a version, or why there is none; never none without a reason.
pub fn of_version(version: &'static str) -> Result<Vec<Interpreter>, String> {
    let mut found = Vec::new();
    let distribution = PathBuf::from(format!("/usr/bin/python{version}"));
    if distribution.exists() {
        found.push(Interpreter::new(version, distribution, None));
    }
    for folder in pyenv(version) {
        let program = folder.join(format!("bin/python{version}"));
        if program.exists() {
            found.push(Interpreter::new(version, program, Some(folder)));
        }
    }
    for root in roots() {
        let program = root.join(format!("usr/bin/python{version}"));
        let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|folder| root.join(folder));
        let loader =
            folders.iter().map(|folder| folder.join("ld-linux-x86-64.so.2")).find(|path| path.exists());
        if let (true, Some(loader)) = (program.exists(), loader) {
            let search = folders.map(|folder| folder.display().to_string()).join(":");
            let line = vec![loader.into(), "--library-path".into(), search.into(), program.clone().into()];
            found.push(Interpreter { line, ..Interpreter::new(version, program, Some(root.join("usr"))) });
        }
    }
    if found.is_empty() {
        return Err(format!(
            "no CPython {version}: not in /usr/bin, nor among pyenv's, nor below target/pythons"
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

/// Folders in which packages of other releases are unpacked.
pub fn roots() -> Vec<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/pythons");
    let folder = std::env::var_os("REQPROF_PYTHON_ROOTS").map_or_else(default, PathBuf::from);
    let folder = folder.canonicalize().unwrap_or(folder);
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.map(|entry| entry.path().join("usr")).filter(|path| path.is_dir()).collect();
    found.sort();
    found.iter().filter_map(|path| Some(path.parent()?.to_owned())).collect()
}
