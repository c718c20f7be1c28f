//! A client that does not take its response: the request lasts until it does.

mod support;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use support::http::{Client, monotonic_ns};
use support::reader::Reader;
use support::wait_for;

/// Much longer than anything else in this request takes.
const REST: Duration = Duration::from_millis(500);

/// Whether a thread of the process waits inside `write`: the file begins with the number of the system call, unless the
/// thread runs.
fn waits_in_write(pid: u32) -> bool {
    let inside =
        |path| fs::read_to_string(path).is_ok_and(|text| text.starts_with(&format!("{} ", libc::SYS_write)));
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the server");
    threads.flatten().any(|thread| inside(thread.path().join("syscall")))
}

#[test]
fn a_write_that_waits_for_the_client_belongs_to_the_request() {
    let name = "a_write_that_waits_for_the_client_belongs_to_the_request";
    let Some(python) = support::any_python(name) else { return };
    let server = Reader::start(&python, "read");
    let daemon = server.daemon();
    let mut raw = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
    raw.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    wait_for("the server to wait for us", || waits_in_write(server.pid()).then_some(()));
    let waiting = monotonic_ns();
    std::thread::sleep(REST);
    let reading = monotonic_ns();
    let answer = Client::on(raw).and_then(|mut client| client.send("GET", "/large", b"")).expect("an answer");
    assert_eq!(answer.body.len(), 4 << 20);
    let record = daemon.record_of("/large");
    let duration = record["duration_ns"].as_u64().expect("a number");
    assert!(duration >= reading - waiting, "{record:#}");
    assert_eq!(record["response_bytes"], answer.received, "{record:#}");
}
