//! Which processes are recorded: those that were selected, whatever else serves on this host.

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use support::http::Client;
use support::reader::Reader;
use support::{Daemon, Gunicorn};

/// One that starts after the daemon, so that it is looked at several times, and is met in between.
#[test]
fn a_new_server_that_is_not_selected_stays_so() {
    let Some(python) = support::any_python("a_new_server_that_is_not_selected_stays_so") else { return };
    let ours = Gunicorn::start(&python, 1, &[]);
    let daemon = Daemon::start(&["--port", &ours.port.to_string()]);
    let began = Instant::now();
    let other = Reader::start(&python, "read");
    let ask = |port, target: &str| {
        let answer = Client::new(port).request("GET", target, b"");
        assert_eq!(answer.unwrap_or_else(|e| panic!("{target}: {e}")).status, 200);
    };
    let filtered = || daemon.status()["requests"]["filtered"].as_u64().expect("a number");
    // Nothing tells that a process was looked at for the last time, 3 s after its start, but the time.
    support::wait_for("the last look", || {
        ask(other.port, "/b/1");
        (began.elapsed() > Duration::from_secs(5)).then_some(())
    });
    // What follows is behind it in the ring.
    ask(ours.port, "/c/1");
    daemon.record_of("/c/1");
    let (adopted, before) = (daemon.status()["adopted"].clone(), filtered());
    assert!(adopted.as_u64() > Some(0), "the test met no stranger");
    for n in 0..20 {
        ask(other.port, &format!("/b/{n}"));
    }
    ask(ours.port, "/c/2");
    daemon.record_of("/c/2");
    assert_eq!((filtered(), &daemon.status()["adopted"]), (before, &adopted), "it is followed again");
    assert!(daemon.records("").iter().all(|record| record["pid"] != other.pid()));
}

#[test]
fn a_port_means_its_server_and_no_other() {
    let Some(python) = support::any_python("a_port_means_its_server_and_no_other") else { return };
    let ours = Gunicorn::start(&python, 2, &[]);
    let daemon = Daemon::start(&["--port", &ours.port.to_string()]);
    let mut strangers = BTreeSet::new();
    // Each time processes that nobody has looked at, which answer before anyone can.
    for round in 0..4 {
        let other = Gunicorn::start(&python, 4, &[]);
        strangers.extend(other.workers());
        for n in 0..40 {
            let target = format!("/b/{round}{n}");
            let answer = Client::new(other.port).request("GET", &target, b"");
            assert_eq!(answer.unwrap_or_else(|e| panic!("{target}: {e}")).status, 200);
        }
    }
    for n in 0..20 {
        let answer = Client::new(ours.port).request("GET", &format!("/a/{n}"), b"").expect("an answer");
        assert_eq!(answer.status, 200);
    }
    // After all others, so that what was seen of them would be there too.
    Client::new(ours.port).request("GET", "/c/1", b"").expect("an answer");
    daemon.record_of("/c/1");
    let workers: BTreeSet<u32> = ours.workers().into_iter().collect();
    let pid = |record: &serde_json::Value| record["pid"].as_u64().unwrap_or_default() as u32;
    for record in daemon.records("") {
        assert!(workers.contains(&pid(&record)), "a stranger's request: {record:#}");
        assert_ne!(record["service"], "unknown", "{record:#}");
        assert!(!strangers.contains(&pid(&record)));
    }
    let status = daemon.status();
    assert!(status["adopted"].as_u64() > Some(0), "the test met no stranger: {status:#}");
    assert_eq!(status["lost"]["profile.process_undecided"], 0, "{status:#}");
    support::wait_for("the strangers' requests to be closed", || {
        (daemon.status()["requests"]["open"] == 0).then_some(())
    });
}
