//! TLS that the profiled process ends itself: its requests in clear text, each once and each with its own CPU time.
//!
//! Oracles: the client's log (by a TLS library of its own), and CPU time that each request burns, and measures, in a
//! function that no other has.

mod support;

use std::collections::{BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::http::{Client, Exchange};
use support::process::{Group, free_port};
use support::tls::{self, Trust};
use support::{Daemon, burned, gunicorn, interpreters, skip, wait_for};

struct Server {
    port: u16,
    group: Group,
    trust: Trust,
    _files: tempfile::TempDir,
}

fn start(command: Command, app: &str) -> Server {
    start_with(command, &format!("tls/{app}"), &[])
}

fn start_with(mut command: Command, app: &str, arguments: &[&str]) -> Server {
    let folder = tempfile::tempdir().expect("a directory");
    let (files, trust) = tls::certificate(folder.path());
    let port = free_port();
    let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps").join(app);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.arg(app).arg(port.to_string()).args(arguments).arg(files.certificate).arg(files.key);
    let group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    Server { port, group, trust, _files: folder }
}

impl Server {
    fn client(&self) -> Client {
        Client::trusting(self.port, Some(self.trust.clone()))
    }

    fn daemon(&self) -> Daemon {
        Daemon::start(&["--pid", &self.group.pid().to_string(), "--freq", "999"])
    }
}

/// `SSL_read` and `SSL_write` up to 3.9, those with `_ex` since.
fn check(test: &str, version: &'static str) {
    let Some(build) = support::first_build(test, version) else { return };
    let has_ssl = build.command().args(["-c", "import ssl"]).stderr(Stdio::null()).status();
    if !has_ssl.is_ok_and(|status| status.success()) {
        return skip(test, format!("{} has no ssl module", build.name()));
    }
    let server = start(build.command(), "server.py");
    let daemon = server.daemon();
    let body = |round: usize| vec![b'x'; if round % 5 == 1 { 200_000 } else { 0 }];
    let done = burned::load(server.port, Some(server.trust.clone()), (8, 20), &["burn", "fetch"], body);
    assert!(done.iter().all(|exchange| exchange.status == 200));
    let inner = done.iter().filter(|exchange| exchange.target.starts_with("/fetch/")).count();
    let records = daemon.records_by_path("", done.len() + inner);
    assert_eq!(records.len(), done.len() + inner);
    assert!(records.values().all(|record| record["boundary"] == "tls"), "{records:#?}");
    same_bytes(&records, &done);
    burned::nearly_all(&build.name(), &burned::seen(&daemon, &records, &done, "thread", &[]));
    seen_of_inner(&daemon, &records, "thread", &[]);
    assert_eq!(targets(&daemon, "other_protocols"), "[]");
    println!("PROFILED {}", build.name());
}

interpreters::each_version!(check);

/// What a server asked itself for has its own time, and none of whoever asked.
fn seen_of_inner(daemon: &Daemon, records: &HashMap<String, Value>, attribution: &str, nobodys: &[&str]) {
    let inner = records.iter().filter_map(|(path, record)| Some((path.strip_prefix("/inner/")?, record)));
    let seen = inner.map(|(number, record)| {
        burned::seen_in(daemon, record, &format!("inner_{number}"), attribution, nobodys)
    });
    assert!(seen.sum::<u64>() > 0, "nothing of what they burned");
}

fn same_bytes(records: &HashMap<String, Value>, done: &[Exchange]) {
    for exchange in done {
        let record = &records[exchange.path()];
        let bytes = (record["request_bytes"].as_u64(), record["response_bytes"].as_u64());
        assert_eq!(bytes, (Some(exchange.sent), Some(exchange.received)), "{record:#}");
    }
}

/// What the daemon says of its targets, of a field.
fn targets(daemon: &Daemon, field: &str) -> String {
    let all = daemon.json("/api/v1/targets")["targets"].clone();
    all.as_array().expect("a list").iter().map(|target| target[field].to_string()).collect()
}

/// In one thread: sessions of connections that came in, and of such as it makes within a request, one after the other.
fn loops(test: &str, event_loop: &str) {
    let Some(python) = support::any_python(test) else { return };
    let server = start_with(Command::new(&python.program), "loops/server.py", &[event_loop]);
    let daemon = server.daemon();
    wait_for("the probes on contexts", || {
        let detail = daemon.status()["probes"]["contexts of event loops"]["detail"].clone();
        detail.as_str()?.starts_with("in 1 processes").then_some(())
    });
    let done =
        burned::load(server.port, Some(server.trust.clone()), (10, 30), &["alone", "fetch"], |_| Vec::new());
    let inner = done.iter().filter(|exchange| exchange.target.starts_with("/fetch/")).count();
    let records = daemon.records_by_path("", done.len() + inner);
    assert_eq!(records.len(), done.len() + inner);
    assert_eq!(records.keys().filter(|path| path.starts_with("/inner/")).count(), inner);
    same_bytes(&records, &done);
    let nobodys = ["nobodys"];
    burned::nearly_all(test, &burned::seen(&daemon, &records, &done, "context", &nobodys));
    seen_of_inner(&daemon, &records, "context", &nobodys);
    assert_eq!(daemon.status()["lost"]["kernel.tls_request_unseen"], 0, "{:#}", daemon.status());
}

#[test]
fn sessions_of_an_asyncio_loop() {
    loops("sessions_of_an_asyncio_loop", "asyncio");
}
#[test]
fn sessions_of_a_uvloop() {
    loops("sessions_of_a_uvloop", "uvloop");
}

/// The handshake was over before anybody looked. Its thread waits in a call whose end is not seen, because its beginning was
/// not, so the next request is lost; which is counted.
#[test]
fn connections_that_were_open_already() {
    const TEST: &str = "connections_that_were_open_already";
    let Some(python) = support::any_python(TEST) else { return };
    let server = start(Command::new(&python.program), "server.py");
    let mut kept: Vec<Client> = (0..4).map(|_| server.client()).collect();
    for (n, client) in kept.iter_mut().enumerate() {
        client.request("GET", &format!("/sized/{n}"), b"").expect("an answer");
    }
    let daemon = server.daemon();
    let done: Vec<Exchange> = (0..40)
        .map(|n| {
            let target = format!("/sized/{}", 1000 + 700 * n);
            kept[n % 4].request("GET", &target, b"").expect("an answer")
        })
        .collect();
    wait_for("what was lost", || {
        (daemon.status()["lost"]["kernel.tls_request_unseen"] == kept.len()).then_some(())
    });
    let seen = &done[kept.len()..];
    let records = daemon.records_by_path("", seen.len());
    assert_eq!(records.len(), seen.len());
    same_bytes(&records, seen);
}

/// A worker gets its probes when it is forked if its service is known to speak TLS; else when TLS is met on one of its
/// connections, or of its siblings'. What was lost by then is counted.
#[test]
fn workers_that_are_forked() {
    const TEST: &str = "workers_that_are_forked";
    let Some(python) = support::any_python(TEST) else { return };
    let folder = tempfile::tempdir().expect("a directory");
    let (files, trust) = tls::certificate(folder.path());
    let (port, file) = (free_port(), |path: &Path| path.to_str().expect("text").to_owned());
    let (certificate, key) = (file(&files.certificate), file(&files.key));
    let tls = ["--workers", "1", "--max-requests", "4", "--certfile", &certificate, "--keyfile", &key];
    let group = Group::spawn(&mut gunicorn::command(&python, port, &tls));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
    // Nobody knows yet what they speak.
    group.signal(libc::SIGTTIN);
    wait_for("another worker", || (targets(&daemon, "tls").contains("when TLS is met")).then_some(()));
    let ask = |n| Client::trusting(port, Some(trust.clone())).request("GET", &format!("/a/{n}"), b"");
    let mut done: Vec<Exchange> = Vec::new();
    for n in 0..40 {
        done.push(ask(n).expect("an answer"));
        // Those that are there now have theirs, since TLS was met.
        wait_for("probes in all workers", || {
            let tls = targets(&daemon, "tls");
            (!tls.contains("when TLS is met")).then_some(())
        });
    }
    let workers: BTreeSet<u64> = done.iter().map(|exchange| exchange.number("x-pid")).collect();
    assert!(workers.len() >= 5, "{workers:?}");
    let (records, early) = wait_for("all to be recorded or counted", || {
        let status = daemon.status();
        let early = status["lost"]["manager.tls_connection_early"].as_u64().expect("a number");
        let records = daemon.records("");
        // A connection that is counted may have been followed all the same.
        let all = status["requests"]["open"] == 0 && records.len() as u64 + early >= done.len() as u64;
        all.then_some((records, early))
    });
    println!("{} recorded and {early} connections early, of {}", records.len(), done.len());
    // How many is a matter of time.
    assert!(records.len() * 4 > done.len(), "{} of {}", records.len(), done.len());
    let seen = |exchange: &&Exchange| records.iter().any(|record| record["path"] == exchange.path());
    assert_eq!(done.iter().filter(seen).count(), records.len(), "each once");
}

/// What is inside TLS need not be HTTP/1.
#[test]
fn another_protocol_inside() {
    const TEST: &str = "another_protocol_inside";
    let Some(python) = support::any_python(TEST) else { return };
    let server = start(Command::new(&python.program), "server.py");
    let daemon = server.daemon();
    let stream = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
    let mut wire = server.trust.over(stream).expect("TLS");
    wire.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").expect("a preface is sent");
    // The server takes it for something wrong.
    let _ = wire.read(&mut [0; 1024]);
    wait_for("the protocol", || (targets(&daemon, "other_protocols") == r#"["HTTP/2"]"#).then_some(()));
    let done = [server.client().request("GET", "/sized/10", b"").expect("an answer")];
    daemon.recorded_exactly(&done);
}

/// Node has OpenSSL linked into its program.
#[test]
fn node() {
    const TEST: &str = "node";
    if !support::can_run(TEST) {
        return;
    }
    if Command::new("node").arg("--version").stdout(Stdio::null()).status().is_err() {
        return skip(TEST, "node is not installed");
    }
    let server = start_with(Command::new("node"), "matrix/with_node.js", &[]);
    let daemon = server.daemon();
    let mut kept: Vec<Client> = (0..4).map(|_| server.client()).collect();
    let done: Vec<Exchange> = (0..100)
        .map(|n| {
            let body = vec![b'x'; if n % 7 == 1 { 100_000 } else { 0 }];
            let method = if body.is_empty() { "GET" } else { "POST" };
            kept[n % 4].request(method, &format!("/burn/{n}"), &body).expect("an answer")
        })
        .collect();
    daemon.recorded_exactly(&done);
    let tls = targets(&daemon, "tls");
    assert!(tls.contains(r#""works":true"#), "{tls}");
}
