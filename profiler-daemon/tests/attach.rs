//! What was going on before the daemon came: connections that are open and requests that are under way.
//!
//! The server reads with `read` or `readv`, where a descriptor says nothing about being a connection.

mod support;

use std::io::Write;
use std::net::TcpStream;

use support::http::{Client, Exchange, unread};
use support::reader::Reader;
use support::wait_for;

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
