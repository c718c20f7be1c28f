//! The conversation that is recorded: the client's side of it, and a real daemon that listens in.
//!
//! Out: the recording, and beside it as JSON what cannot be known from the sources: the server's pid, where its code
//! objects are, and when the client sent what.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::support::http::monotonic_ns;
use super::support::process::{Group, PATIENCE};
use super::support::{Daemon, wait_for};

/// An interpreter whose frames are known.
pub const PYTHON: &str = "/usr/bin/python3.11";

/// In the requests where secrets are, and nowhere in a recording.
pub const SECRET: &str = "verysecret";

pub const PLAIN: &str =
    "GET /plain?token=verysecret HTTP/1.1\r\nHost: x\r\nCookie: session=verysecret\r\n\r\n";
pub const FIRST: &str = "GET /first HTTP/1.1\r\nHost: x\r\n\r\n";
pub const SECOND: &str = "GET /second HTTP/1.1\r\nHost: x\r\n\r\n";
pub const CHUNKED: &str = "GET /chunked HTTP/1.1\r\nHost: x\r\n\r\n";
pub const HEAD: &str = "HEAD /plain HTTP/1.1\r\nHost: x\r\n\r\n";
pub const DELETE: &str = "DELETE /item/7 HTTP/1.1\r\nHost: x\r\n\r\n";
/// Its body has 26 bytes.
pub const UPLOAD: &str =
    "POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\nverysecret and 11 more....";
pub const BURN_A: &str = "GET /burn/a HTTP/1.1\r\nHost: x\r\n\r\n";
pub const BURN_B: &str = "GET /burn/b HTTP/1.1\r\nHost: x\r\n\r\n";
pub const MISSING: &str = "GET /missing HTTP/1.1\r\nHost: x\r\n\r\n";
pub const WAIT: &str = "GET /wait HTTP/1.1\r\nHost: x\r\n\r\n";
pub const CUT: &str = "GET /cut HTTP/1.1\r\nHost: x\r\n\r\n";
pub const KILL: &str = "GET /kill HTTP/1.1\r\nHost: x\r\n\r\n";

/// What those who took part say.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    pub pid: u32,
    /// Addresses of code objects, by the function's name.
    pub code: BTreeMap<String, u64>,
    /// In order.
    pub requests: Vec<Asked>,
}

/// A request, by the client's account.
#[derive(Debug, Serialize, Deserialize)]
pub struct Asked {
    pub line: String,
    /// CLOCK_MONOTONIC, ns: before its first byte was sent.
    pub sent_at: i64,
}

impl Told {
    /// What is beside a recording.
    #[track_caller]
    pub fn read(recording: &Path) -> Self {
        let text =
            std::fs::read(recording.with_extension("json")).expect("what the client and the server said");
        serde_json::from_slice(&text).expect("JSON")
    }
}

/// What the server says first.
#[derive(Deserialize)]
struct Server {
    port: u16,
    pid: u32,
    code: BTreeMap<String, u64>,
}

/// Holds the conversation and records it. `requests`: as many are waited for.
pub fn hold(recording: &Path, requests: usize) {
    let dir = tempfile::tempdir().expect("a directory");
    let says = dir.path().join("says");
    let mut command = Command::new(PYTHON);
    command
        .args(["-I", "-B"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/conversation/server.py"))
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&says).expect("a file"));
    let mut group = Group::spawn(&mut command);
    let said = |what: &str| {
        let text = std::fs::read_to_string(&says).unwrap_or_default();
        text.split_inclusive('\n').find(|line| line.contains(what) && line.ends_with('\n')).map(str::to_owned)
    };
    let server = wait_for("the server to listen", || said("port"));
    let server: Server = serde_json::from_str(&server).expect("JSON");
    let pid = server.pid.to_string();
    let events = recording.to_str().expect("a plain path");
    let daemon = Daemon::start(&["--pid", &pid, "--events", events]);

    let mut client = Client { port: server.port, asked: Vec::new() };
    client.talk();
    client.abandon(|| wait_for("the server to wait", || said("waiting")));
    client.answered_by(CUT, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ncut\n");
    client.answered_by(KILL, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nlast\n");
    group.wait();

    wait_for("every request to be over", || {
        let finished = daemon.status()["requests"]["finished"].as_u64();
        finished.filter(|finished| *finished >= requests as u64)
    });
    assert!(daemon.end(libc::SIGTERM).success());
    let told = Told { pid: server.pid, code: server.code, requests: client.asked };
    let text = serde_json::to_string_pretty(&told).expect("JSON") + "\n";
    std::fs::write(recording.with_extension("json"), text).expect("a place for it");
}

/// Sends exactly what it is told and keeps book.
struct Client {
    port: u16,
    asked: Vec<Asked>,
}

impl Client {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the server");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream
    }

    /// Writes requests down, and sends them in these pieces.
    fn send(&mut self, stream: &mut TcpStream, requests: &[&str], pieces: &[&str]) {
        // An empty line before a request is no part of it.
        assert_eq!(requests.concat(), pieces.concat().trim_start_matches("\r\n"));
        let sent_at = monotonic_ns() as i64;
        for request in requests {
            let line = request.lines().next().unwrap_or_default().replace(SECRET, "…");
            self.asked.push(Asked { line, sent_at });
        }
        for piece in pieces {
            stream.write_all(piece.as_bytes()).expect("the server reads");
        }
    }

    /// One connection, kept alive over everything that goes well.
    fn talk(&mut self) {
        let mut stream = self.connect();
        let (upload_head, upload_body) = UPLOAD.split_at(UPLOAD.len() - 26);
        let turns: [(&[&str], &[&str], &str); 9] = [
            (&[PLAIN], &[PLAIN], "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nplain\n"),
            (
                &[FIRST, SECOND],
                &[&[FIRST, SECOND].concat()],
                "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nfirst\n\
                 HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsecond\n",
            ),
            (
                &[CHUNKED],
                &[CHUNKED],
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                 4\r\none\n\r\n4\r\ntwo\n\r\n6\r\nthree\n\r\n0\r\n\r\n",
            ),
            (&[HEAD], &[HEAD], "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n"),
            (&[DELETE], &[DELETE], "HTTP/1.1 204 No Content\r\n\r\n"),
            (&[UPLOAD], &[upload_head, upload_body], "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n26\n"),
            (&[BURN_A], &[BURN_A], "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na\n"),
            (&[BURN_B], &[BURN_B], "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nb\n"),
            (
                &[MISSING],
                &[&["\r\n", MISSING].concat()],
                "HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nmissing\n",
            ),
        ];
        for (requests, pieces, answer) in turns {
            self.send(&mut stream, requests, pieces);
            let mut got = vec![0; answer.len()];
            stream.read_exact(&mut got).expect("an answer");
            assert_eq!(String::from_utf8_lossy(&got), answer);
        }
        // Nothing came that is not counted.
        stream.shutdown(Shutdown::Write).expect("a socket");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the end");
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }

    /// Asks, and is gone as soon as the server is at work.
    fn abandon<T>(&mut self, at_work: impl FnOnce() -> T) {
        let mut stream = self.connect();
        self.send(&mut stream, &[WAIT], &[WAIT]);
        at_work();
        let now = libc::linger { l_onoff: 1, l_linger: 0 };
        let (value, size) = (&raw const now, size_of::<libc::linger>() as libc::socklen_t);
        // SAFETY: the descriptor is open, and value points to a live structure of that size.
        let failed = unsafe {
            libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value.cast(), size)
        };
        assert_eq!(failed, 0, "{}", io::Error::last_os_error());
        // With that, closing is a reset.
        drop(stream);
    }

    /// A connection of its own that the server ends; it begins with an empty line.
    fn answered_by(&mut self, request: &str, answer: &str) {
        let mut stream = self.connect();
        self.send(&mut stream, &[request], &[&["\r\n", request].concat()]);
        let mut got = vec![0; answer.len()];
        stream.read_exact(&mut got).expect("an answer");
        assert_eq!(String::from_utf8_lossy(&got), answer);
        // The end of the stream or a reset, as it happens.
        let _ = stream.read_to_end(&mut got);
        assert_eq!(got.len(), answer.len());
    }
}
