//! A server that reads with `read` or `readv`, and answers with one `write`.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::process::{Group, free_port};
use super::{Daemon, Python, wait_for};

/// A running server; ends with this value.
pub struct Reader {
    pub port: u16,
    group: Group,
}

impl Reader {
    pub fn start(python: &Python, call: &str) -> Self {
        let port = free_port();
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/reader/reader.py");
        let mut command = Command::new(&python.program);
        command.arg(program).args([&port.to_string(), call]).stdin(Stdio::null()).stdout(Stdio::null());
        let group = Group::spawn(&mut command);
        wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
        Self { port, group }
    }

    pub fn pid(&self) -> u32 {
        self.group.pid()
    }

    pub fn daemon(&self) -> Daemon {
        Daemon::start(&["--pid", &self.pid().to_string()])
    }
}
