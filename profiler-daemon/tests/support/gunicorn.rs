//! The ground-truth application under gunicorn.

use std::process::{Command, Stdio};

use super::http::Client;
use super::process::{Group, children, free_port};
use super::python::{Python, app_dir};
use super::wait_for;

/// A running server; ends with this value.
#[derive(Debug)]
pub struct Gunicorn {
    pub port: u16,
    group: Group,
}

/// The command line that serves the application here.
pub fn command(python: &Python, port: u16, arguments: &[&str]) -> Command {
    let mut command = Command::new(&python.program);
    command
        .args(["-m", "gunicorn", "--log-level", "error", "--worker-tmp-dir", "/dev/shm", "--chdir"])
        .arg(app_dir())
        .args(["--bind", &format!("127.0.0.1:{port}")])
        .args(arguments)
        .arg("truth:application")
        // The application's folder is part of the sources.
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

impl Gunicorn {
    /// Starts it and waits until it answers, with as many workers as were asked for.
    pub fn start(python: &Python, workers: usize, arguments: &[&str]) -> Self {
        let port = free_port();
        let count = workers.to_string();
        let mut all = vec!["--workers", &count];
        all.extend(arguments);
        let group = Group::spawn(&mut command(python, port, &all));
        let server = Self { port, group };
        answers(port);
        wait_for("all workers", || (server.workers().len() >= workers).then_some(()));
        // `cargo xtask test` fails when it may use the kernel and no test got as far as this.
        println!("PROFILED gunicorn on {}", python.name);
        server
    }

    pub fn master(&self) -> u32 {
        self.group.pid()
    }

    /// The workers there are now, oldest first.
    pub fn workers(&self) -> Vec<u32> {
        children(self.master())
    }

    pub fn signal(&self, signal: i32) {
        self.group.signal(signal);
    }
}

/// Waits until a server answers there.
pub fn answers(port: u16) {
    wait_for("the server to answer", || Client::new(port).request("GET", "/empty", b"").ok());
}
