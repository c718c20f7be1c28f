//! The demo shop as a running server: an environment with the pinned packages, a seeded database and gunicorn with
//! several sync workers on a free loopback port. Everything it makes is under `target/demo`; what did not change
//! since the last time is not made again.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::load::client;
use crate::sh;
use service::{Lifetime, Service, children_of};

pub mod python;
pub mod register;
pub mod service;

/// Long enough for a loaded machine to import Django in every worker.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Between choosing a free port and binding it, another program may take it.
const PORT_ATTEMPTS: usize = 3;

/// The shop's sources with an environment that can run them.
pub struct Install {
    sources: PathBuf,
    /// `target/demo`.
    pub home: PathBuf,
}

#[derive(Clone)]
pub struct ServeOptions {
    /// Names the log file.
    pub name: String,
    pub workers: usize,
    pub database_url: String,
    /// A profiler's middleware and the folder that it writes to.
    pub middleware: Option<(String, PathBuf)>,
    pub lifetime: Lifetime,
}

/// A running server; stopped on drop.
pub struct Site {
    pub addr: SocketAddr,
    /// gunicorn's master; its children are the workers.
    pub service: Service,
}

impl Install {
    /// Makes or updates the environment. Takes a minute the first time, nothing later.
    pub fn prepare() -> Result<Self> {
        let home = sh::root().join("target/demo");
        fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
        let interpreter = python::find()?;
        let install = Self { sources: sh::root().join("deploy/demo"), home };
        let made_with = format!("{} {}", interpreter.path.display(), interpreter.version);
        install.once(&install.environment(), "made-with", &made_with, || {
            eprintln!("Making a virtual environment with CPython {} …", interpreter.version);
            python::make_environment(&interpreter, &install.environment())
        })?;
        install.add_packages("requirements.txt")?;
        Ok(install)
    }

    /// Installs one of the demo's requirements files, unless this very content is installed already.
    pub fn add_packages(&self, file: &str) -> Result<()> {
        let list = self.sources.join(file);
        let wanted = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
        self.once(&self.environment(), file, &wanted, || {
            eprintln!("Installing {file} from PyPI …");
            let mut pip = Command::new(self.program("python"));
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]);
            sh::capture(pip.arg(&list)).map(drop)
        })
    }

    /// A program of the environment.
    pub fn program(&self, name: &str) -> PathBuf {
        self.environment().join("bin").join(name)
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.home.join(format!("{name}.log"))
    }

    /// The SQLite database, migrated and seeded; returns its URL.
    pub fn sqlite(&self) -> Result<String> {
        let file = self.home.join("shop.sqlite3");
        let url = format!("sqlite:///{}", file.display());
        self.once(&file, "shop.sqlite3", &self.schema()?, || {
            for suffix in ["", "-wal", "-shm"] {
                let path = self.home.join(format!("shop.sqlite3{suffix}"));
                if path.exists() {
                    fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
                }
            }
            self.fill(&url)
        })?;
        Ok(url)
    }

    /// Creates and fills the tables of any database.
    pub fn fill(&self, database_url: &str) -> Result<()> {
        eprintln!("Filling the shop's database …");
        for arguments in [["migrate", "--verbosity=0"], ["seed", "--verbosity=0"]] {
            let mut manage = Command::new(self.program("python"));
            manage.arg(self.sources.join("manage.py")).args(arguments).env("DATABASE_URL", database_url);
            sh::capture(&mut self.with_bytecode_elsewhere(manage))?;
        }
        Ok(())
    }

    /// The site's own tests, in a database that Django makes for them and removes again.
    pub fn own_tests(&self) -> Result<()> {
        let mut manage = Command::new(self.program("python"));
        manage.arg("manage.py").arg("test").current_dir(&self.sources).env_remove("DATABASE_URL");
        sh::capture(&mut self.with_bytecode_elsewhere(manage)).map(drop)
    }

    /// Starts gunicorn and returns when every worker is there and one has answered.
    pub fn serve(&self, options: &ServeOptions) -> Result<Site> {
        let mut outcome = self.try_serve(options);
        for _ in 1..PORT_ATTEMPTS {
            if outcome.as_ref().is_ok_and(Option::is_none) {
                outcome = self.try_serve(options);
            }
        }
        outcome?.context("no loopback port stayed free long enough for gunicorn to bind it")
    }

    /// `None`: the port was taken by somebody else in the meantime.
    fn try_serve(&self, options: &ServeOptions) -> Result<Option<Site>> {
        let addr = free_port()?;
        let mut gunicorn = Command::new(self.program("gunicorn"));
        gunicorn
            .arg("shopsite.wsgi:application")
            .arg("--chdir")
            .arg(&self.sources)
            .args(["--bind", &addr.to_string(), "--workers", &options.workers.to_string()])
            .args(["--worker-class", "sync", "--log-level", "warning"])
            .env("DATABASE_URL", &options.database_url);
        if let Some((profiler, folder)) = &options.middleware {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
            gunicorn.env("SHOP_PROFILER", profiler).env("SHOP_PROFILE_DIR", folder);
        }
        let log = self.log(&options.name);
        let mut service =
            Service::start("gunicorn", self.with_bytecode_elsewhere(gunicorn), &log, &options.lifetime)?;
        let master = service.pid();
        let workers = options.workers;
        let ready = service.wait_for("ready", START_LIMIT, || {
            let answers = || client::get(addr, "/healthz").is_ok_and(|response| response.status == 200);
            (children_of(master).len() == workers && answers()).then_some(())
        });
        let port_taken = || fs::read_to_string(&log).is_ok_and(|text| text.contains("Connection in use"));
        match ready {
            Ok(()) => Ok(Some(Site { addr, service })),
            Err(_) if port_taken() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn environment(&self) -> PathBuf {
        self.home.join("venv")
    }

    /// What decides about the database's content: when it changes, the database is made again.
    fn schema(&self) -> Result<String> {
        let shop = self.sources.join("shop");
        let mut files: Vec<PathBuf> =
            fs::read_dir(shop.join("migrations"))?.flatten().map(|entry| entry.path()).collect();
        files.retain(|path| path.extension().is_some_and(|ending| ending == "py"));
        files.sort();
        files.push(shop.join("management/commands/seed.py"));
        files
            .iter()
            .map(|path| fs::read_to_string(path).with_context(|| path.display().to_string()))
            .collect()
    }

    /// Runs `work`, which makes or changes `made`, unless it succeeded before with the same `input` and `made` is still
    /// there. The stamp that says so lies in it, if it is a folder (and is gone when that is), else beside it.
    fn once(&self, made: &Path, name: &str, input: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let folder = if made == self.environment() { made } else { &self.home };
        let stamp = folder.join(format!("{name}.stamp"));
        if made.exists() && fs::read_to_string(&stamp).is_ok_and(|done| done == input) {
            return Ok(());
        }
        // Work that is done again and fails half way has undone what the stamp speaks of.
        if stamp.exists() {
            fs::remove_file(&stamp).with_context(|| format!("cannot remove {}", stamp.display()))?;
        }
        work()?;
        fs::write(&stamp, input).with_context(|| format!("cannot write {}", stamp.display()))
    }

    /// The sources stay clean: compiled modules go under `target`.
    fn with_bytecode_elsewhere(&self, mut command: Command) -> Command {
        command.env("PYTHONPYCACHEPREFIX", self.home.join("pycache"));
        command
    }
}

impl Site {
    pub fn workers(&self) -> Vec<u32> {
        children_of(self.service.pid())
    }
}

/// A loopback address that nobody listens on at the moment.
pub fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free loopback port")?;
    Ok(listener.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_or_was_half_made_is_made_again() {
        let home = std::env::temp_dir().join(format!("reqprof-site-once-{}", std::process::id()));
        fs::create_dir_all(&home).unwrap();
        let install = Install { sources: home.clone(), home: home.clone() };
        let file = home.join("shop.sqlite3");
        let make = |input: &str, succeeds: bool| {
            let mut ran = false;
            let outcome = install.once(&file, "shop.sqlite3", input, || {
                ran = true;
                fs::write(&file, input)?;
                anyhow::ensure!(succeeds, "half way");
                Ok(())
            });
            assert_eq!(outcome.is_ok(), succeeds || !ran);
            ran
        };
        assert!(make("one", true));
        assert!(!make("one", true), "nothing has changed");
        fs::remove_file(&file).unwrap();
        assert!(make("one", true), "its stamp is still there, it is not");
        assert!(make("two", false));
        assert!(make("one", true), "the stamp spoke of what is overwritten");
        assert!(!make("one", true));
        fs::remove_dir_all(home).unwrap();
    }
}
