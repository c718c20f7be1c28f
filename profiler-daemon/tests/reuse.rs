//! Code objects that die: what is remembered of one is never taken for what lies in its place afterwards.
//!
//! Oracle: the server's program, in which each request runs a function with a name of its own, and where it says that the
//! code was.

mod support;

use std::collections::{HashMap, HashSet};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::http::Client;
use support::process::{Group, free_port};
use support::{Daemon, wait_for};

const ROUNDS: u64 = 2;
const AT_ONCE: u64 = 10;
const LAST: u64 = ROUNDS * AT_ONCE;
/// The version on which so many die that the probe goes.
const STORMY: &str = "3.11";
const PROBE: &str = "deaths of code objects";

fn start(mut command: Command) -> (u16, Group) {
    let port = free_port();
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/reuse/server.py"))
        .arg(port.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let group = Group::spawn(&mut command);
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    (port, group)
}

/// What is said of the probe, once there is something and it is as wanted.
fn probe(daemon: &Daemon, what: &str, wanted: &str) -> String {
    wait_for(what, || {
        let status = daemon.status();
        let found = status["probes"].get(PROBE)?.to_string();
        found.contains(wanted).then_some(found)
    })
}

fn burned(daemon: &Daemon, record: &Value) -> HashSet<String> {
    let id = record["id"].as_str().expect("an id");
    let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded&view=cpu")).text();
    let names = stacks.lines().flat_map(|line| line.split(';')).filter_map(|frame| frame.split(' ').next());
    names.filter(|name| name.starts_with("burn_")).map(str::to_owned).collect()
}

fn check(test: &str, version: &'static str) {
    let Some(build) = support::first_build(test, version) else { return };
    let (port, group) = start(build.command());
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
    println!("{}: {}", build.name(), probe(&daemon, "the probe", "in 1 processes"));
    let mut client = Client::new(port);
    let mut places = HashMap::new();
    let mut seen = 0;
    for round in 0..ROUNDS {
        let numbers = round * AT_ONCE..(round + 1) * AT_ONCE;
        for n in numbers.clone() {
            let answer = client.request("GET", &format!("/burn/{n}"), b"").expect("an answer");
            *places.entry(answer.number("x-code")).or_insert(0) += 1;
        }
        // The functions are there until their stacks are known.
        let records = daemon.records_by_path("", ((AT_ONCE + 1) * (round + 1) - 1) as usize);
        assert_eq!(client.request("GET", &format!("/clear/{round}"), b"").expect("an answer").status, 200);
        for n in numbers {
            let (path, expected) = (format!("/burn/{n}"), format!("burn_{n}"));
            if records[&path]["profile"] != true {
                continue;
            }
            let burned = burned(&daemon, &records[&path]);
            seen += u64::from(burned.contains(&expected));
            let others: Vec<&String> = burned.iter().filter(|name| **name != expected).collect();
            assert!(others.is_empty(), "{path}: {others:?}");
        }
    }
    let (all, again) = (ROUNDS * AT_ONCE, places.values().filter(|times| **times > 1).count());
    println!("{seen} of {all} functions seen, {again} places used again");
    assert!(again as u64 >= AT_ONCE / 2, "{places:?}");
    assert!(seen >= all * 9 / 10, "{seen} of {all}");
    if version != STORMY {
        return;
    }
    // Where so many die that the probe costs more than it saves, it goes, and code objects are read again.
    for n in 0..2 {
        assert_eq!(client.request("GET", &format!("/storm/{n}"), b"").expect("an answer").status, 200);
    }
    probe(&daemon, "the probe to go", "code objects died in a second");
    let last = client.request("GET", &format!("/burn/{LAST}"), b"").expect("an answer");
    assert_eq!(burned(&daemon, &daemon.record_of(last.path())), HashSet::from([format!("burn_{LAST}")]));
}

mod code_that_took_anothers_place {
    crate::support::interpreters::each_version!(super::check);
}
