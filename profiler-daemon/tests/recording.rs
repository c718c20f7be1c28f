//! `reqprof record` with what the daemon has, when it is asked for: a store and a page.

mod support;

use std::fs;
use std::process::Stdio;

use serde_json::Value;
use support::daemon::reqprof;
use support::http::Client;
use support::process::{Group, free_port};
use support::{Gunicorn, wait_for};
use tempfile::TempDir;

#[test]
fn a_recording_that_is_told_to_keeps_a_store_and_serves_it() {
    let Some(python) = support::any_python("a_recording_that_is_told_to_keeps_a_store_and_serves_it") else {
        return;
    };
    let server = Gunicorn::start(&python, 1, &[]);
    let dir = TempDir::new().expect("a directory");
    let (port, store) = (free_port(), dir.path().join("store"));
    let mut command = reqprof();
    command.args(["record", "--pid", &server.master().to_string()]);
    command.args(["--listen", &format!("127.0.0.1:{port}"), "--store"]).arg(&store);
    command.arg("-o").arg(dir.path().join("profiles")).stdout(Stdio::null());
    command.stderr(fs::File::create(dir.path().join("log")).expect("a file for messages"));
    let mut recording = Group::spawn(&mut command);
    wait_for("the recording to be ready", || {
        let answer = Client::new(port).request("GET", "/-/ready", b"").ok()?;
        (answer.status == 200).then_some(())
    });
    for n in 0..5 {
        Client::new(server.port).request("GET", &format!("/a/{n}"), b"").expect("an answer");
    }
    let rows = wait_for("the records", || {
        let answer = Client::new(port).request("GET", "/api/v1/requests", b"").ok()?.json();
        let rows: Vec<Value> = answer["requests"].as_array()?.clone();
        (rows.len() == 5).then_some(rows)
    });
    assert!(rows.iter().all(|row| row["route"] == "/a/{id}"), "{rows:#?}");
    recording.signal(libc::SIGINT);
    assert_eq!(recording.wait().code(), Some(130));
    assert!(store.join("reqprof.db").exists());
    assert_eq!(fs::read_dir(dir.path().join("profiles")).expect("the directory").count(), 5);
}
