//! Processes come and go: workers die, are replaced and added, servers start later than the daemon, and the daemon
//! itself is killed. Whatever happens, what was served is recorded, and the service never notices.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;

use serde_json::Value;
use support::daemon::reqprof;
use support::http::{Client, Exchange};
use support::load::Background;
use support::process::{Group, bpf_programs, free_port, still_loaded};
use support::{Daemon, Gunicorn, gunicorn, tree, wait_for};
use tempfile::TempDir;

#[track_caller]
fn get(port: u16, target: &str) -> Exchange {
    let answer = Client::new(port).request("GET", target, b"");
    let answer = answer.unwrap_or_else(|e| panic!("{target}: {e}"));
    assert_eq!(answer.status, 200, "{target}");
    answer
}

fn follow(server: &Gunicorn) -> Daemon {
    Daemon::start(&["--pid", &server.master().to_string(), "--freq", "999"])
}

/// The names of all Python functions in a request's tree.
fn python_names(daemon: &Daemon, record: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    if record["profile"] != true {
        return names;
    }
    let id = record["id"].as_str().unwrap_or_default();
    let profile = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
    tree::walk(&profile, &mut |_, node| {
        if node["kind"] == "python" {
            names.extend(node["name"].as_str().map(str::to_owned));
        }
    });
    names
}

#[test]
fn a_worker_that_dies_ends_its_request() {
    let Some(python) = support::any_python("a_worker_that_dies_ends_its_request") else { return };
    let server = Gunicorn::start(&python, 2, &[]);
    let daemon = follow(&server);
    let cut_off = Client::new(server.port).request("GET", "/kill/1", b"");
    assert!(cut_off.is_err(), "the worker killed itself");
    let record = daemon.record_of("/kill/1");
    assert_eq!(record["outcome"], "exit", "{record:#}");
    assert_eq!((&record["method"], &record["status"]), (&"GET".into(), &200.into()), "{record:#}");
    // The master replaces it, and both the other and the new one are still seen.
    wait_for("the worker's successor", || (server.workers().len() == 2).then_some(()));
    let answers: Vec<Exchange> = (2..22).map(|n| get(server.port, &format!("/a/{n}"))).collect();
    let records = daemon.records_by_path("route=/a/{id}", answers.len());
    for answer in &answers {
        assert_eq!(records[answer.path()]["pid"], answer.number("x-pid"));
    }
}

#[test]
fn a_worker_killed_before_it_answers_leaves_no_status() {
    let Some(python) = support::any_python("a_worker_killed_before_it_answers_leaves_no_status") else {
        return;
    };
    let server = Gunicorn::start(&python, 1, &[]);
    let daemon = follow(&server);
    let worker = server.workers()[0];
    let port = server.port;
    let client = std::thread::spawn(move || Client::new(port).request("GET", "/sleep/1?ms=10000", b""));
    wait_for("the request to be open", || (daemon.status()["requests"]["open"] == 1).then_some(()));
    assert_eq!(daemon.status()["rates"]["sample_hz"], 999);
    // The master and its worker; the thread that serves. The capacities are those that ARCHITECTURE.md names.
    wait_for("the fill of the kernel side's tables", || {
        let text = daemon.get("/metrics").text();
        let says = |line: &str| text.lines().any(|l| l.strip_prefix("reqprof_map_") == Some(line));
        let full = says(r#"entries{map="targets"} 2"#) && says(r#"entries{map="active"} 1"#);
        let room = [("targets", 16_384), ("connections", 65_536), ("active", 16_384), ("transfers", 4_096)];
        let room = room.iter().all(|(map, n)| says(&format!("capacity{{map=\"{map}\"}} {n}")));
        (full && room).then_some(())
    });
    support::process::signal(worker, libc::SIGKILL);
    assert!(client.join().expect("no panic").is_err(), "nobody was left to answer");
    let record = daemon.record_of("/sleep/1");
    assert_eq!(record["outcome"], "exit", "{record:#}");
    assert!(record["status"].is_null(), "{record:#}");
    assert_eq!(record["pid"], worker);
}

#[test]
fn recycled_workers_lose_nothing() {
    let Some(python) = support::any_python("recycled_workers_lose_nothing") else { return };
    let server = Gunicorn::start(&python, 2, &["--max-requests", "5"]);
    let daemon = follow(&server);
    let answers: Vec<Exchange> = (0..80).map(|n| get(server.port, &format!("/d/{n}"))).collect();
    let records = daemon.records_by_path("route=/d/{id}", answers.len());
    assert_eq!(records.len(), answers.len());
    let mut pids = BTreeSet::new();
    let (mut named, mut sampled) = (0, 0);
    for answer in &answers {
        let record = &records[answer.path()];
        assert_eq!(record["pid"], answer.number("x-pid"), "{record:#}");
        assert_eq!((&record["status"], &record["outcome"]), (&200.into(), &"complete".into()), "{record:#}");
        pids.insert(answer.number("x-pid"));
        if record["samples"].as_u64() >= Some(3) {
            sampled += 1;
            let names = python_names(&daemon, record);
            // The last requests of a worker may be looked at when it is gone: it can no longer be asked for names, or even
            // for its interpreter. Their stacks say so: `<python code 0x2ea530d0: gone>`.
            let says_why = |name: &String| name.starts_with("<python code ");
            if names.contains("burn_d") {
                named += 1;
            } else {
                assert!(names.iter().any(says_why), "{names:?} of {record:#}");
            }
        }
    }
    let errors = &daemon.status()["unwind_errors"];
    println!("{named} of {sampled} stacks of short-lived workers have names; {errors:#}");
    assert!(pids.len() >= 10, "only {} workers", pids.len());
    assert!(sampled >= 40, "only {sampled} requests were long enough to be sampled");
    // Of five requests that a worker serves it is the last, if any. On a machine that is busy the daemon may come to look when
    // most workers are gone: how many is a matter of time, that some have names is not.
    assert!(named * 5 >= sampled, "only {named} of {sampled} stacks have names; {errors:#}");
    let counted =
        errors.as_object().is_some_and(|errors| errors.keys().any(|key| key.starts_with("python.")));
    assert!(named == sampled || counted, "{errors:#}");
    wait_for("dead workers to be forgotten", || (daemon.target_pids().len() <= 4).then_some(()));
    // Workers that serve clear text pay for no probes on TLS.
    let targets = daemon.json("/api/v1/targets")["targets"].clone();
    for target in targets.as_array().expect("an array").iter().filter(|t| t["pid"] != server.master()) {
        let detail = target["tls"]["detail"].as_str().expect("text");
        assert!(detail.contains("when TLS is met") || detail.contains("maps no OpenSSL"), "{target:#}");
    }
}

#[test]
fn a_worker_that_is_added_is_seen() {
    let Some(python) = support::any_python("a_worker_that_is_added_is_seen") else { return };
    let server = Gunicorn::start(&python, 1, &[]);
    let daemon = follow(&server);
    let first = server.workers()[0];
    server.signal(libc::SIGTTIN);
    let added = wait_for("another worker", || server.workers().into_iter().find(|pid| *pid != first));
    wait_for("the new target", || daemon.target_pids().contains(&added).then_some(()));
    // Which worker takes a connection is the kernel's choice.
    let mut number = 0;
    let answer = wait_for("an answer of the new worker", || {
        number += 1;
        let answer = get(server.port, &format!("/b/{number}"));
        (answer.number("x-pid") == u64::from(added)).then_some(answer)
    });
    assert_eq!(daemon.record_of(answer.path())["pid"], added);
}

#[test]
fn pid_means_that_server_and_no_other() {
    let Some(python) = support::any_python("pid_means_that_server_and_no_other") else { return };
    let (ours, other) = (Gunicorn::start(&python, 2, &[]), Gunicorn::start(&python, 1, &[]));
    let daemon = follow(&ours);
    for n in 0..20 {
        get(ours.port, &format!("/a/{n}"));
        get(other.port, &format!("/b/{n}"));
    }
    // After all of them, so that what was seen of the others would be there too.
    get(ours.port, "/c/1");
    daemon.record_of("/c/1");
    let records = daemon.records_by_path("", 21);
    assert_eq!(records.len(), 21);
    let workers = ours.workers();
    for (path, record) in records {
        assert!(!path.starts_with("/b"), "{record:#}");
        assert!(workers.iter().any(|pid| record["pid"] == *pid), "{record:#}");
    }
    for pid in other.workers() {
        assert!(!daemon.target_pids().contains(&pid));
    }
}

#[test]
fn a_server_that_starts_later_is_found() {
    let Some(python) = support::any_python("a_server_that_starts_later_is_found") else { return };
    // Everything on this machine: the default.
    let daemon = Daemon::start(&["--freq", "999"]);
    let server = Gunicorn::start(&python, 2, &[]);
    let answers: Vec<Exchange> = (0..40).map(|n| get(server.port, &format!("/d/{n}"))).collect();
    for worker in server.workers() {
        let served: Vec<_> = answers.iter().filter(|a| a.number("x-pid") == u64::from(worker)).collect();
        let records = daemon.records_by_path(&format!("pid={worker}&route=/d/{{id}}"), served.len());
        assert_eq!(records.len(), served.len());
        for answer in served {
            assert_eq!(records[answer.path()]["status"], 200);
        }
    }
    // The interpreter is looked for in the background.
    let mut number = answers.len();
    wait_for("Python frames of the new server", || {
        number += 1;
        let path = format!("/d/{number}");
        get(server.port, &path);
        python_names(&daemon, &daemon.record_of(&path)).contains("burn_d").then_some(())
    });
}

/// Nothing may be left in the kernel, the service must not notice, and what was written must be readable.
#[test]
fn a_killed_daemon_harms_nobody() {
    let Some(python) = support::any_python("a_killed_daemon_harms_nobody") else { return };
    let server = Gunicorn::start(&python, 2, &[]);
    let dir = TempDir::new().expect("a directory");
    let master = server.master().to_string();
    let arguments = ["--pid", &master, "--freq", "999"];
    let daemon = Daemon::start_in(dir.path(), &arguments);
    let load = Background::start(server.port, 4);
    let before = wait_for("some records", || {
        let records = daemon.records("");
        (records.len() >= 40).then_some(records)
    });
    let programs = bpf_programs(daemon.pid());
    assert_eq!(still_loaded(&programs), programs, "as many as it holds");
    assert!(!programs.is_empty());
    daemon.end(libc::SIGKILL);
    wait_for("the kernel to let go of everything", || still_loaded(&programs).is_empty().then_some(()));
    let daemon = Daemon::start_in(dir.path(), &arguments);
    let old: Vec<Value> = daemon.records("");
    for record in &before {
        assert!(old.contains(record), "lost: {record:#}");
        if record["profile"] == true {
            let id = record["id"].as_str().unwrap_or_default();
            daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree"));
        }
    }
    wait_for("new records", || (daemon.records("").len() >= old.len() + 40).then_some(()));
    let exchanges = load.finish();
    assert!(exchanges.iter().all(|exchange| exchange.status == 200));
    let get = get(server.port, "/a/999999999");
    assert_eq!(daemon.record_of("/a/999999999")["pid"], get.number("x-pid"));
    let programs = bpf_programs(daemon.pid());
    assert_eq!(daemon.end(libc::SIGTERM).code(), Some(0));
    wait_for("the kernel to let go of everything", || still_loaded(&programs).is_empty().then_some(()));
}

/// The numbers in a column of a summary, added up; it is the last, or stands before the columns with units.
fn counted(table: &str, name: &str) -> u64 {
    let mut lines = table.lines();
    let head: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let column = head.iter().position(|title| *title == name).expect(table);
    let cell = |line: &str| {
        let mut words = line.split_whitespace();
        if column + 1 == head.len() { words.next_back() } else { words.nth(column) }?.parse::<u64>().ok()
    };
    lines.filter_map(cell).sum()
}

#[test]
fn a_recording_is_a_file_per_request_and_a_table() {
    let Some(python) = support::any_python("a_recording_is_a_file_per_request_and_a_table") else { return };
    let server = Gunicorn::start(&python, 2, &[]);
    let dir = TempDir::new().expect("a directory");
    let out = dir.path().join("profiles");
    let load = Background::start(server.port, 2);
    let output = reqprof()
        .args(["record", "-d", "3s", "--freq", "999", "-p", &server.master().to_string(), "-o"])
        .arg(&out)
        .output()
        .expect("the program runs");
    load.finish();
    let (table, messages) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{messages}");
    let requests = counted(&table, "count");
    assert!(!messages.contains("requests"), "progress is for terminals: {messages}");
    assert!(table.contains("/d/{id}"), "{table}");
    let files: Vec<_> = fs::read_dir(&out).expect("the directory").flatten().collect();
    assert_eq!(files.len() as u64, requests, "{messages}");
    assert!(counted(&table, "samples") > 0, "{table}");
    let burning =
        files.iter().filter(|file| fs::read_to_string(file.path()).is_ok_and(|text| text.contains("burn_")));
    assert!(burning.count() > 0, "profiles without the functions that burn");
}

#[test]
fn a_recorded_command_ends_with_ctrl_c() {
    let Some(python) = support::any_python("a_recorded_command_ends_with_ctrl_c") else { return };
    let dir = TempDir::new().expect("a directory");
    let out = dir.path().join("profiles");
    let port = free_port();
    let served = gunicorn::command(&python, port, &["--workers", "2"]);
    let mut command = reqprof();
    command.args(["record", "--freq", "999", "-o"]).arg(&out).arg("--");
    command.arg(served.get_program()).args(served.get_args()).env("PYTHONDONTWRITEBYTECODE", "1");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut recording = Group::spawn(&mut command);
    gunicorn::answers(port);
    let texts = || -> Vec<String> {
        let files = fs::read_dir(&out).into_iter().flatten().flatten();
        files.filter_map(|file| fs::read_to_string(file.path()).ok()).collect()
    };
    // The interpreter is looked for in the background.
    let mut number = 0;
    wait_for("a profile with the function that burns", || {
        number += 1;
        get(port, &format!("/d/{number}"));
        texts().iter().any(|text| text.contains("burn_d")).then_some(())
    });
    recording.signal(libc::SIGINT);
    assert_eq!(recording.wait().code(), Some(130));
    assert!(Client::new(port).request("GET", "/empty", b"").is_err(), "the command goes on");
    assert!(texts().len() > number, "{} files of {number} requests and the first", texts().len());
}
