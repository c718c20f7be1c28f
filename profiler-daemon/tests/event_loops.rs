//! Event loops: whatever a loop does in between, each request has its own CPU time and nobody else's.
//!
//! Oracle: the server (`apps/loops`) burns CPU in functions that no other request has, measures it, and has a task of
//! nobody's that burns all the while.

mod support;

use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::burned;
use support::http::Client;
use support::interpreters;
use support::process::{Group, free_port};
use support::{Daemon, Python, skip, wait_for};

const PROBE: &str = "contexts of event loops";
const KINDS: [&str; 5] = ["alone", "gather", "thread", "behind", "pool"];
const CLIENTS: usize = 12;
const ROUNDS: usize = 25;

struct Server {
    port: u16,
    group: Group,
}

fn start(mut command: Command, event_loop: &str) -> Server {
    let port = free_port();
    let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/loops/server.py");
    command.arg("-B").arg(app).arg(port.to_string()).arg(event_loop);
    let group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    Server { port, group }
}

fn compare(name: &str, command: Command, event_loop: &str) {
    let server = start(command, event_loop);
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "999"]);
    wait_for("the probes on contexts", || {
        daemon.status()["probes"][PROBE]["detail"].as_str()?.starts_with("in 1 processes").then_some(())
    });
    let done = burned::load(server.port, None, (CLIENTS, ROUNDS), &KINDS, |_| Vec::new());
    let records = daemon.records_by_path("", done.len());
    assert_eq!(records.len(), done.len());
    let sums = burned::seen(&daemon, &records, &done, "context", &["nobodys", "shareds"]);
    burned::nearly_all(name, &sums);
    let samples = daemon.status()["samples"].clone();
    // What was burned for nobody, and for requests that were answered already.
    let unattributed = &samples["unattributed"];
    assert!(unattributed["outside_request"].as_u64() > Some(100), "{samples:#}");
    assert!(unattributed["after_response"].as_u64() > Some(100), "{samples:#}");
    assert_eq!(
        (&unattributed["revoked"], &unattributed["interleaved"]),
        (&0.into(), &0.into()),
        "{samples:#}"
    );
    println!("PROFILED {name}");
}

fn check(test: &str, version: &'static str) {
    let Some(build) = support::first_build(test, version) else { return };
    compare(&build.name(), build.command(), "asyncio");
}

interpreters::each_version!(check);

/// It reads before it enters a context, and all its connections share one.
#[test]
fn uvloop() {
    const NAME: &str = "uvloop";
    if !support::can_run(NAME) {
        return;
    }
    match Python::debian().or_else(|_| Python::pyenv()) {
        Ok(python) => compare("uvloop", Command::new(&python.program), "uvloop"),
        Err(reason) => skip(NAME, reason),
    }
}

/// A thread that waits for events within a request is a loop if its connection is waited for, or is not blocked on; else
/// what it waits for is the request's.
mod waiting_within_a_request {
    use super::*;

    fn check(name: &str, mode: &str, attribution: &str, burned: Option<&str>) {
        if !support::can_run(name) {
            return;
        }
        let folder = tempfile::tempdir().expect("a directory");
        let program = folder.path().join("waiting");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/loops/waiting.c");
        match Command::new("cc").args(["-O1", "-g", "-o"]).arg(&program).arg(source).status() {
            Ok(status) => assert!(status.success()),
            Err(error) => return skip(name, format!("no C compiler: {error}")),
        }
        let port = free_port();
        let mut command = Command::new(&program);
        let group = Group::spawn(command.arg(port.to_string()).arg(mode).stdin(Stdio::null()));
        wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
        let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
        let done: Vec<_> = (0..20)
            .map(|n| Client::new(port).request("GET", &format!("/{n}"), b"").expect("an answer"))
            .collect();
        daemon.recorded_exactly(&done);
        for record in daemon.records("") {
            assert_eq!(record["attribution"], attribution, "{record:#}");
            assert_eq!(record["profile"], burned.is_some(), "{record:#}");
            if let Some(burned) = burned {
                let id = record["id"].as_str().expect("an id");
                let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded")).text();
                assert!(stacks.contains(&format!(";{burned} ")), "{stacks}");
            }
        }
    }

    #[test]
    fn on_a_connection_that_is_waited_for() {
        check("on_a_connection_that_is_waited_for", "registered", "none", None);
    }
    #[test]
    fn on_a_connection_that_does_not_block() {
        check("on_a_connection_that_does_not_block", "asked", "none", None);
    }
    #[test]
    fn on_one_that_blocks() {
        check("on_one_that_blocks", "inside", "thread", Some("ours"));
    }
}
