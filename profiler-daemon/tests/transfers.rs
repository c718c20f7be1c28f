//! Transfers of unusual shape: both ways at once, in many elements, empty lines in front, and descriptors that are
//! closed without `close` and used again for something else.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::http::{Client, Exchange, unread};
use support::process::{Group, free_port};
use support::{Daemon, wait_for};
use tempfile::TempDir;

struct Server {
    port: u16,
    _group: Group,
    _dir: TempDir,
}

/// Each test in front of each source of boundaries, which is in every record.
macro_rules! each_source {
    ($($test:ident)*) => { $(
        mod $test {
            #[test]
            fn in_libc() {
                super::checks::$test(concat!(stringify!($test), "::in_libc"), "uprobe");
            }
            #[test]
            fn at_system_calls() {
                super::checks::$test(concat!(stringify!($test), "::at_system_calls"), "syscall");
            }
        }
    )* };
}
each_source! {
    both_ways_at_once_are_counted_exactly
    many_elements_are_covered
    empty_lines_in_front_belong_to_no_request
    a_file_behind_a_descriptor_closed_unseen_is_no_request
    other_text_is_no_request
}

/// A server and its daemon, unless such tests cannot run here.
fn start(name: &str, source: &str) -> Option<(Server, Daemon)> {
    let python = support::any_python(name)?;
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "GET /from-a-file HTTP/1.1\r\nHost: x\r\n\r\n").expect("written");
    let port = free_port();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/transfers/server.py");
    let mut command = Command::new(&python.program);
    command.arg(program).arg(port.to_string()).arg(file).stdin(Stdio::null()).stdout(Stdio::null());
    let group = Group::spawn(&mut command);
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--boundary", source]);
    Some((Server { port, _group: group, _dir: dir }, daemon))
}

#[track_caller]
fn get(client: &mut Client, target: &str) -> Exchange {
    client.request("GET", target, b"").unwrap_or_else(|e| panic!("{target}: {e}"))
}

/// These and nothing else, all seen by this source.
#[track_caller]
fn recorded(daemon: &Daemon, source: &str, exchanges: &[Exchange]) {
    daemon.recorded_exactly(exchanges);
    assert!(daemon.records("").iter().all(|record| record["boundary"] == source));
}

mod checks {
    use super::*;

    pub fn both_ways_at_once_are_counted_exactly(name: &str, source: &str) {
        let Some((server, daemon)) = start(name, source) else { return };
        let stream = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
        let mut other = stream.try_clone().expect("a handle");
        let body = 5 * 20_000;
        let head = format!("POST /duplex HTTP/1.1\r\nContent-Length: {body}\r\n\r\n");
        let sent = (head.len() + body) as u64;
        // The response is read while the body is sent.
        let sender = std::thread::spawn(move || {
            other.write_all(head.as_bytes()).expect("sent");
            (0..body / 1000).for_each(|_| other.write_all(&[b'Y'; 1000]).expect("sent"));
        });
        let mut client = Client::on(stream).expect("a connection");
        let mut duplex = client.send("POST", "/duplex", b"").expect("an answer");
        sender.join().expect("sent");
        duplex.sent = sent;
        let after = get(&mut client, "/after");
        recorded(&daemon, source, &[duplex, after]);
    }

    pub fn many_elements_are_covered(name: &str, source: &str) {
        let Some((server, daemon)) = start(name, source) else { return };
        let mut client = Client::new(server.port);
        let done = ["/vector", "/chunked", "/after"].map(|target| get(&mut client, target));
        assert_eq!((done[0].body.len(), done[1].body.len()), (460, 225));
        recorded(&daemon, source, &done);
    }

    pub fn empty_lines_in_front_belong_to_no_request(name: &str, source: &str) {
        let Some((server, daemon)) = start(name, source) else { return };
        let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut done = Vec::new();
        for (number, lines) in ["\r\n", "\r\n\r\n\r\n\r\n\r\n\r\n"].iter().enumerate() {
            // By themselves, and together with the request.
            for apart in [true, false] {
                let path = format!("/empty/{number}/{apart}");
                let mut raw = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
                let message = request(&path);
                if apart {
                    raw.write_all(lines.as_bytes()).expect("sent");
                    wait_for("the server to read", || (unread(&raw) == Some(0)).then_some(()));
                }
                let rest = if apart { message.clone() } else { format!("{lines}{message}") };
                let mut client = Client::on(raw).expect("a connection");
                let mut exchange = client.send("GET", &path, rest.as_bytes()).expect("an answer");
                exchange.sent = message.len() as u64;
                done.push(exchange);
            }
        }
        recorded(&daemon, source, &done);
    }

    pub fn a_file_behind_a_descriptor_closed_unseen_is_no_request(name: &str, source: &str) {
        let Some((server, daemon)) = start(name, source) else {
            return;
        };
        let mut done = Vec::new();
        for target in ["/fclose", "/dup2"] {
            // Accepted before, or it could get the descriptor that becomes free.
            let mut other = Client::new(server.port);
            done.push(get(&mut other, &format!("/before{target}")));
            done.push(get(&mut Client::new(server.port), target));
            // Answered when the file was read, so that what was seen of it would be there too.
            done.push(get(&mut other, &format!("/after{target}")));
        }
        recorded(&daemon, source, &done);
    }

    /// Text of another protocol that begins with a word in upper case.
    pub fn other_text_is_no_request(name: &str, source: &str) {
        let Some((server, daemon)) = start(name, source) else { return };
        let mut raw = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
        raw.write_all(b"USER anna\r\n").expect("sent");
        wait_for("the server to read", || (unread(&raw) == Some(0)).then_some(()));
        raw.write_all(b"PASS secret\r\n\r\n").expect("sent");
        // The server takes it for a request.
        let mut answer = [0; 256];
        assert!(raw.read(&mut answer).expect("an answer") > 0);
        drop(raw);
        recorded(&daemon, source, &[get(&mut Client::new(server.port), "/after")]);
    }
}
