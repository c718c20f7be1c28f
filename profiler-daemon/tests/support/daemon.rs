//! A running `reqprof daemon` with a store of its own, and what it answers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::http::{Client, Exchange};
use super::process::{Group, free_port};
use super::wait_for;

/// The program under test.
pub fn reqprof() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reqprof"));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// A running daemon; ends with this value.
#[derive(Debug)]
pub struct Daemon {
    pub port: u16,
    group: Group,
    dir: PathBuf,
    /// `None`: the directory is another's, and stays.
    _own: Option<TempDir>,
}

impl Daemon {
    /// Starts it and waits until it is ready.
    pub fn start(arguments: &[&str]) -> Self {
        let own = TempDir::new().expect("a directory");
        let mut daemon = Self::start_in(own.path(), arguments);
        daemon._own = Some(own);
        daemon
    }

    /// The same with a store that outlives it.
    pub fn start_in(dir: &Path, arguments: &[&str]) -> Self {
        Self::start_with(reqprof(), dir, arguments)
    }

    /// The same with a program that runs `reqprof` in its own way.
    pub fn start_with(mut program: Command, dir: &Path, arguments: &[&str]) -> Self {
        let port = free_port();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log"));
        program
            .arg("daemon")
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .arg("--store")
            .arg(dir.join("store"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a file for messages"));
        let group = Group::spawn(&mut program);
        let mut daemon = Self { port, group, dir: dir.to_owned(), _own: None };
        wait_for("the daemon to be ready", || {
            if let Some(status) = daemon.group.try_wait() {
                panic!("the daemon ended with {status}: {}", daemon.messages());
            }
            let answer = Client::new(port).request("GET", "/-/ready", b"").ok()?;
            (answer.status == 200).then_some(())
        });
        daemon
    }

    pub fn signal(&self, signal: i32) {
        self.group.signal(signal);
    }

    pub fn pid(&self) -> u32 {
        self.group.pid()
    }

    /// What it wrote to stderr.
    pub fn messages(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn is_running(&mut self) -> bool {
        self.group.try_wait().is_none()
    }

    /// Ends it by a signal and says how it ended.
    pub fn end(mut self, signal: i32) -> ExitStatus {
        self.group.signal(signal);
        self.group.wait()
    }

    pub fn get(&self, target: &str) -> Exchange {
        let answer = Client::new(self.port).request("GET", target, b"");
        answer.unwrap_or_else(|e| panic!("{target}: {e}; {}", self.messages()))
    }

    #[track_caller]
    pub fn json(&self, target: &str) -> Value {
        let answer = self.get(target);
        assert_eq!(answer.status, 200, "{target}: {}", answer.text());
        answer.json()
    }

    pub fn status(&self) -> Value {
        self.json("/api/v1/status")
    }

    /// All records, oldest first. `filter`: as in a query string, or empty.
    pub fn records(&self, filter: &str) -> Vec<Value> {
        let (mut records, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.json(&format!("/api/v1/requests?limit=1000&sort=start&{filter}{cursor}"));
            records.extend(page["requests"].as_array().expect("an array").iter().cloned());
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return records,
            }
        }
    }

    /// Waits until there are at least this many records, and returns them by path.
    #[track_caller]
    pub fn records_by_path(&self, filter: &str, at_least: usize) -> HashMap<String, Value> {
        let mut seen = 0;
        let deadline = std::time::Instant::now() + super::process::PATIENCE;
        let records = loop {
            let records = self.records(filter);
            seen = seen.max(records.len());
            if records.len() >= at_least {
                break records;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "{seen} of {at_least} requests were recorded; {:#}",
                self.status()
            );
            std::thread::sleep(std::time::Duration::from_millis(100));
        };
        let count = records.len();
        let by_path: HashMap<String, Value> =
            records.into_iter().map(|r| (r["path"].as_str().unwrap_or_default().to_owned(), r)).collect();
        assert_eq!(by_path.len(), count, "two records of one request");
        by_path
    }

    /// These exchanges were recorded exactly, nothing else was, nothing was lost and nothing is left open.
    #[track_caller]
    pub fn recorded_exactly(&self, exchanges: &[Exchange]) {
        let records = self.records_by_path("", exchanges.len());
        assert_eq!(records.len(), exchanges.len(), "{records:#?}");
        for exchange in exchanges {
            let record = &records[exchange.path()];
            let (sent, received) = (exchange.sent, exchange.received);
            let about = format!("{record:#}\n{} {sent} {received}", exchange.target);
            assert_eq!(record["method"], exchange.method, "{about}");
            assert_eq!(record["status"], exchange.status, "{about}");
            assert_eq!(record["outcome"], "complete", "{about}");
            assert_eq!(record["request_bytes"], sent, "{about}");
            assert_eq!(record["response_bytes"], received, "{about}");
        }
        let status = self.status();
        for (place, count) in status["lost"].as_object().expect("an object") {
            assert_eq!(count, 0, "lost at {place}: {status:#}");
        }
        assert_eq!(status["requests"]["open"], 0, "{status:#}");
    }

    /// Waits for the record of one path.
    #[track_caller]
    pub fn record_of(&self, path: &str) -> Value {
        wait_for(&format!("a record of {path}"), || {
            self.records("").into_iter().find(|record| record["path"] == path)
        })
    }

    /// The processes that it looks at.
    pub fn target_pids(&self) -> Vec<u32> {
        let targets = self.json("/api/v1/targets");
        let targets = targets["targets"].as_array().expect("an array");
        targets.iter().filter_map(|target| target["pid"].as_u64()).map(|pid| pid as u32).collect()
    }
}
