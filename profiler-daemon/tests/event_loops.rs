//! Event loops: whatever a loop does in between, each request has its own CPU time and nobody else's.
//!
//! Oracle: the server (`apps/loops`) burns CPU in functions that no other request has, measures it, and has a task of
//! nobody's that burns all the while.

mod support;

use std::collections::{BTreeMap, HashSet};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::http::{Client, Exchange};
use support::interpreters;
use support::process::{Group, free_port};
use support::{Daemon, Python, skip, wait_for};

const PROBE: &str = "contexts of event loops";
const KINDS: [&str; 5] = ["alone", "gather", "thread", "behind", "pool"];
const CLIENTS: usize = 12;
const ROUNDS: usize = 25;
/// Of the CPU time that was burned so much is seen at least; samples are a measurement.
const SEEN: f64 = 0.95;

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

/// All kinds on all connections at once.
fn load(port: u16) -> Vec<Exchange> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                scope.spawn(move || {
                    let mut connection = Client::new(port);
                    let ask = |round: usize| {
                        let kind = KINDS[(round + client) % KINDS.len()];
                        let target = format!("/{kind}/{}", client * ROUNDS + round);
                        connection.request("GET", &target, b"").unwrap_or_else(|e| panic!("{target}: {e}"))
                    };
                    (0..ROUNDS).map(ask).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("answers")).collect()
    })
}

fn compare(name: &str, command: Command, event_loop: &str) {
    let server = start(command, event_loop);
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "999"]);
    wait_for("the probes on contexts", || {
        daemon.status()["probes"][PROBE]["detail"].as_str()?.starts_with("in 1 processes").then_some(())
    });
    let done = load(server.port);
    let records = daemon.records_by_path("", done.len());
    assert_eq!(records.len(), done.len());
    let mut sums = BTreeMap::<&str, (u64, u64)>::new();
    for exchange in &done {
        let record = &records[exchange.path()];
        assert_eq!(record["attribution"], "context", "{record:#}");
        let (kind, number) = exchange.path()[1..].split_once('/').expect("two parts");
        let (burned, seen) = sums.entry(kind).or_default();
        *burned += exchange.number("x-burned-ns");
        if record["profile"] != true {
            continue;
        }
        let id = record["id"].as_str().expect("an id");
        let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded&view=cpu")).text();
        for line in stacks.lines() {
            let (stack, micros) = line.rsplit_once(' ').expect("a stack and its time");
            let names: HashSet<&str> = stack.split(';').filter_map(|frame| frame.split(' ').next()).collect();
            let mut owners = names.iter().filter_map(|name| name.strip_prefix("own_"));
            assert!(owners.all(|of| of == number), "another request's time: {record:#}\n{line}");
            for nobodys in ["nobodys", "shareds"] {
                assert!(!names.contains(nobodys), "nobody's time: {record:#}\n{line}");
            }
            if names.contains(&*format!("own_{number}")) {
                *seen += micros.parse::<u64>().expect("a time") * 1000;
            }
        }
    }
    for (kind, (burned, seen)) in &sums {
        let share = *seen as f64 / *burned as f64;
        println!("{name}: /{kind}: {seen} ns seen of {burned}: {share:.3}");
        assert!(share >= SEEN, "{name}: /{kind}: {seen} ns of {burned} were seen");
    }
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
    if !support::can_run(test) {
        return;
    }
    match support::first_build(version) {
        Ok(build) => compare(&build.name(), build.command(), "asyncio"),
        Err(reason) => skip(test, reason),
    }
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
