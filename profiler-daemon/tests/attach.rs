//! What was going on before the daemon came: connections that are open and requests that are under way.
//!
//! The server reads with `read` or `readv`, where a descriptor says nothing about being a connection.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::http::{Client, Exchange, unread};
use support::process::{Group, free_port};
use support::reader::Reader;
use support::{Daemon, wait_for};

#[track_caller]
fn ask(client: &mut Client, method: &str, target: &str, body: &[u8]) -> Exchange {
    let answer = client.request(method, target, body).unwrap_or_else(|e| panic!("{target}: {e}"));
    assert_eq!(answer.status, 200, "{target}");
    assert_eq!(answer.text(), format!("{}\n", body.len()), "{target}");
    answer
}

const CALLS: [&str; 2] = ["read", "readv"];

#[test]
fn requests_on_a_connection_that_was_open_are_recorded() {
    let name = "requests_on_a_connection_that_was_open_are_recorded";
    let Some(python) = support::any_python(name) else { return };
    for call in CALLS {
        let server = Reader::start(&python, call);
        let (mut used, mut unused) = (Client::new(server.port), Client::new(server.port));
        ask(&mut used, "GET", "/before/1", b"");
        ask(&mut unused, "GET", "/before/2", b"");
        let daemon = server.daemon();
        let mut done: Vec<Exchange> = Vec::new();
        for number in 0..10 {
            done.push(ask(&mut used, "GET", &format!("/get/{number}"), b""));
            done.push(ask(&mut used, "POST", &format!("/post/{number}"), &vec![b'x'; 1000 * number]));
        }
        // One that rested longer, and one that came later.
        done.push(ask(&mut unused, "GET", "/get/rested", b""));
        done.push(ask(&mut Client::new(server.port), "GET", "/get/later", b""));
        daemon.recorded_exactly(&done);
    }
}

/// The rest of a request that began before is none itself, even where it begins with an upper-case word or a method,
/// and its answer is nobody's.
#[test]
fn a_request_that_was_under_way_is_not_taken_for_another() {
    let name = "a_request_that_was_under_way_is_not_taken_for_another";
    let Some(python) = support::any_python(name) else { return };
    let cases = [
        ("read", "and the rest of it\n"),
        ("readv", "ANOTHER / HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("read", "POSTAL CODE\r\n"),
    ];
    for (call, rest) in cases {
        let server = Reader::start(&python, call);
        let begun = "BEGUN ";
        let length = begun.len() + rest.len();
        let head = format!("POST /under/way HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{begun}");
        let mut raw = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
        raw.write_all(head.as_bytes()).expect("sent");
        // The rest is to be a piece of its own.
        wait_for("the server to read", || (unread(&raw) == Some(0)).then_some(()));
        let daemon = server.daemon();
        let mut client = Client::on(raw).expect("a connection");
        let answer = client.send("POST", "/under/way", rest.as_bytes()).expect("the answer");
        assert_eq!(answer.text(), format!("{length}\n"));
        let done: Vec<Exchange> =
            (0..5).map(|number| ask(&mut client, "GET", &format!("/get/{number}"), b"")).collect();
        daemon.recorded_exactly(&done);
    }
}

/// One thread serves it all. What it does for a client that came before the daemon and speaks no HTTP is not the work of
/// the request that waits meanwhile.
#[test]
fn work_for_an_older_client_is_not_the_open_requests() {
    let Some(python) = support::any_python("work_for_an_older_client_is_not_the_open_requests") else {
        return;
    };
    let port = free_port();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/mixed/server.py");
    let mut command = Command::new(&python.program);
    let server = Group::spawn(command.arg(program).arg(port.to_string()).stdin(Stdio::null()));
    let connect = || TcpStream::connect(("127.0.0.1", port)).ok();
    let mut older = wait_for("the server to listen", connect);
    // This one too: an accept within the request would give the server away.
    let mut client = connect().expect("a connection");
    let mut say = |line: &str| {
        older.write_all(line.as_bytes()).expect("sent");
        let mut echo = vec![0; line.len()];
        older.read_exact(&mut echo).expect("an echo");
        assert_eq!(echo, line.as_bytes());
    };
    say("hello\n");
    let daemon = Daemon::start(&["--pid", &server.pid().to_string(), "--freq", "499"]);
    client.write_all(b"GET /waits HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    wait_for("the request to be seen", || (daemon.status()["requests"]["open"] == 1).then_some(()));
    say("noise\n");
    say("answer\n");
    let mut answer = [0; 64];
    assert!(client.read(&mut answer).expect("an answer") > 0 && answer.starts_with(b"HTTP/1.1 200 OK"));
    let record = daemon.record_of("/waits");
    assert_eq!(record["attribution"], "none", "{record:#}");
    assert_eq!(record["samples"], 0, "{record:#}");
    let samples = &daemon.status()["samples"];
    assert!(samples["attributed"] == 0 && samples["emitted"] != 0, "{samples:#}");
}
