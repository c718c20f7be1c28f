//! Programs that no probe in a C library sees: requests are found at their system calls.
//!
//! Oracles: the client's own log, and what Go's own tool says of the program.

mod support;

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::http::{Client, Exchange};
use support::process::{Group, free_port};
use support::{Daemon, skip, wait_for};

const PROBE: &str = "system calls";
const CLIENTS: u64 = 4;
const ROUNDS: u64 = 50;

/// Go's own server, built without a C library, and its version.
fn build(folder: &Path) -> Result<(PathBuf, String), String> {
    let program = folder.join("server");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/golang/main.go");
    let go = |arguments: &[&str]| {
        let mut command = Command::new("go");
        command
            .args(arguments)
            .env("CGO_ENABLED", "0")
            .env("GOCACHE", folder.join("cache"))
            .env("GOFLAGS", "");
        let output =
            command.stdin(Stdio::null()).output().map_err(|error| format!("no Go compiler: {error}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    let (to, from) = (program.display().to_string(), source.display().to_string());
    go(&["build", "-o", &to, &from])?;
    // `/path/server: go1.19.8`
    let said = go(&["version", &to])?;
    let version = said.trim().rsplit_once(": go").ok_or("Go's tool does not know its version")?.1.to_owned();
    Ok((program, version))
}

#[test]
fn a_static_program_is_seen_and_its_threads_are_not_trusted() {
    const NAME: &str = "a_static_program_is_seen_and_its_threads_are_not_trusted";
    if !support::can_run(NAME) {
        return;
    }
    let folder = tempfile::tempdir().expect("a directory");
    let (program, version) = match build(folder.path()) {
        Ok(built) => built,
        Err(reason) => return skip(NAME, reason),
    };
    let port = free_port();
    let mut command = Command::new(program);
    let server = Group::spawn(command.arg(port.to_string()).stdin(Stdio::null()).stdout(Stdio::null()));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    // Connected before the daemon looks.
    let mut early = Client::new(port);
    early.request("GET", "/unseen", b"").expect("an answer");

    let daemon = Daemon::start(&["--pid", &server.pid().to_string(), "--freq", "999"]);
    let target = daemon.json("/api/v1/targets")["targets"][0].clone();
    assert_eq!(target["runtime"], serde_json::json!({"name": "go", "version": version}), "{target:#}");
    assert!(
        target["boundary"]["detail"].as_str().is_some_and(|text| text.starts_with("syscall")),
        "{target:#}"
    );
    assert_eq!(target["attribution"]["works"], false, "{target:#}");
    assert_eq!(daemon.status()["probes"][PROBE]["state"], "active");

    let mut done: Vec<Exchange> = vec![early.request("GET", "/early", b"").expect("an answer")];
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                scope.spawn(move || {
                    let mut connection = Client::new(port);
                    let ask = |round: u64| {
                        let target = format!(
                            "/{}/{client}/{round}",
                            ["burn", "wait", "stream", "body"][(round % 4) as usize]
                        );
                        let body = vec![b'x'; if round % 4 == 3 { 50_000 } else { 0 }];
                        let method = if body.is_empty() { "GET" } else { "POST" };
                        connection.request(method, &target, &body).unwrap_or_else(|e| panic!("{target}: {e}"))
                    };
                    (0..ROUNDS).map(ask).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().for_each(|client| done.extend(client.join().expect("answers")));
    });
    daemon.recorded_exactly(&done);
    for record in daemon.records("") {
        assert_eq!(
            (&record["boundary"], &record["attribution"]),
            (&"syscall".into(), &"none".into()),
            "{record:#}"
        );
        assert_eq!((&record["samples"], &record["profile"]), (&0.into(), &false.into()), "{record:#}");
    }
    drop(server);
    wait_for("the tracepoints to go with their only process", || {
        daemon.status()["probes"].get(PROBE).is_none().then_some(())
    });
}
