//! What is secret in a request is nowhere afterwards: not in the store's files, not in files per request, in no message, no
//! metric and no answer of the API.
//!
//! Oracle: the bytes themselves, searched for in everything that the daemon has written or said.

mod support;

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::daemon::reqprof;
use support::http::{Client, unread};
use support::process::{Group, free_port};
use support::{Daemon, wait_for};

/// Each where it could be found again: none is part of another.
const SECRETS: [&str; 9] = [
    "query-of-the-first",
    "a-cookie-of-mine",
    "bearer-of-a-token",
    "an-api-key-of-old",
    "body-of-a-form",
    "password-in-a-url",
    "query-in-a-url",
    "fragment-behind-it",
    "header-in-a-second-piece",
];

/// Sends a request in two pieces, so that the second is no continuation of anything that is at hand.
fn send(port: u16, method: &str, path: &str, first: &str, second: &str) {
    let mut raw = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    raw.write_all(first.as_bytes()).expect("sent");
    wait_for("the server to read", || (unread(&raw) == Some(0)).then_some(()));
    let answer = Client::on(raw).expect("a connection").send(method, path, second.as_bytes());
    assert_eq!(answer.expect("an answer").status, 200);
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    entries
        .flat_map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

#[track_caller]
fn holds_none(what: &str, bytes: &[u8]) {
    for secret in SECRETS {
        assert!(memchr::memmem::find(bytes, secret.as_bytes()).is_none(), "{secret} is in {what}");
    }
}

#[test]
fn nothing_secret_is_kept() {
    const NAME: &str = "nothing_secret_is_kept";
    let Some(python) = support::any_python(NAME) else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("unused");
    std::fs::write(&file, "").expect("written");
    let port = free_port();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/transfers/server.py");
    let mut server = Command::new(&python.program);
    server.arg(program).arg(port.to_string()).arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
    let server = Group::spawn(&mut server);
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());

    let kept = tempfile::tempdir().expect("a directory");
    let profiles = kept.path().join("profiles");
    let mut program = reqprof();
    program.env("RUST_LOG", "debug,profiler_ebpf=debug");
    let pid = server.pid().to_string();
    let at = profiles.display().to_string();
    let arguments =
        ["--pid", &pid, "--freq", "999", "--prof-path", &at, "--format", "tree", "--format", "svg"];
    let daemon = Daemon::start_with(program, kept.path(), &arguments);

    let [query, cookie, bearer, key, body, password, in_url, fragment, second] = SECRETS;
    let headers = format!(
        "Host: x\r\nCookie: session={cookie}\r\nAuthorization: Bearer {bearer}\r\nX-Api-Key: {key}\r\n"
    );
    let first = format!("GET /first?token={query} HTTP/1.1\r\n{headers}");
    send(port, "GET", "/first", &first, &format!("X-More: {second}\r\n\r\n"));
    let url = format!("http://me:{password}@127.0.0.1/second?token={in_url}#{fragment}");
    send(port, "GET", "/second", &format!("GET {url} HTTP/1.1\r\n{headers}"), "\r\n");
    let form = format!("name={body}");
    let third = format!("POST /third HTTP/1.1\r\n{headers}Content-Length: {}\r\n", form.len());
    send(port, "POST", "/third", &third, &format!("\r\n{form}"));

    let records = daemon.records_by_path("", 3);
    for path in ["/first", "/second", "/third"] {
        assert!(records.contains_key(path), "{records:#?}");
    }
    for target in ["/api/v1/requests", "/api/v1/routes", "/api/v1/status", "/api/v1/targets", "/metrics", "/"]
    {
        holds_none(target, &daemon.get(target).body);
    }
    for record in records.values() {
        let id = record["id"].as_str().expect("an id");
        for format in ["tree", "text", "folded", "svg", "pprof", "speedscope"] {
            let answer = daemon.get(&format!("/api/v1/requests/{id}/profile?format={format}"));
            holds_none(format, &answer.body);
        }
    }
    drop(server);
    assert!(daemon.end(libc::SIGTERM).success());
    let files = files(kept.path());
    assert!(files.iter().any(|file| file.starts_with(&profiles)), "{files:?}");
    for file in files {
        holds_none(&file.display().to_string(), &std::fs::read(&file).expect("a file"));
        holds_none("a file's name", file.as_os_str().as_encoded_bytes());
    }
}
