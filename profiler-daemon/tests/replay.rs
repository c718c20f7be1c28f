//! A recorded conversation, run through the pipeline without a kernel: every request is what the client did.
//!
//! `tests/fixtures/conversation.rec` is what the kernel side reported of one run of `tests/apps/conversation/server.py`;
//! `conversation.json` beside it is what the server said of itself and the client's own account. The expectations below
//! are worked out by hand from these two sides of the conversation, never from what we made of it. On a kernel
//! (`REQPROF_E2E=1`) the conversation is held anew and must give the same; `cargo xtask fixture` does that and keeps the
//! new recording, which is due whenever the records' layout changes (`ABI_VERSION`).

#[path = "replay/conversation.rs"]
mod conversation;
mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use profiler_common::FRAME_PYTHON;
use profiler_daemon::correlate::RequestKey;
use profiler_daemon::decode::{Event, decode};
use profiler_daemon::pipeline::{Message, Reader, Stats};
use profiler_daemon::process::targets::Targets;
use profiler_daemon::record::{Attribution, Outcome, RequestRecord};
use profiler_daemon::replay::{Player, play};

use conversation::{
    BURN_A, BURN_B, CHUNKED, CUT, DELETE, FIRST, HEAD, KILL, MISSING, PLAIN, SECOND, Told, UPLOAD, WAIT,
};

/// A request of the conversation as it must be recorded.
struct Expected {
    method: &'static str,
    path: &'static str,
    status: Option<u16>,
    /// What the client sent.
    sent: usize,
    /// What the server wrote, by its source: see [`the_answers_are_as_long_as_counted`].
    answered: u64,
    outcome: Outcome,
    note: Option<&'static str>,
}

fn complete(method: &'static str, path: &'static str, status: u16, sent: &str, answered: u64) -> Expected {
    let (status, sent) = (Some(status), sent.len());
    Expected { method, path, status, sent, answered, outcome: Outcome::Complete, note: None }
}

/// In the order in which the client asked.
fn expected() -> Vec<Expected> {
    vec![
        complete("GET", "/plain", 200, PLAIN, 44),
        complete("GET", "/first", 200, FIRST, 44),
        complete("GET", "/second", 200, SECOND, 45),
        complete("GET", "/chunked", 200, CHUNKED, 81),
        complete("HEAD", "/plain", 200, HEAD, 38),
        complete("DELETE", "/item/7", 204, DELETE, 27),
        complete("POST", "/upload", 200, UPLOAD, 41),
        complete("GET", "/burn/a", 200, BURN_A, 40),
        complete("GET", "/burn/b", 200, BURN_B, 40),
        complete("GET", "/missing", 404, MISSING, 53),
        // The client reset the connection while the server worked: no byte of an answer was sent.
        Expected {
            method: "GET",
            path: "/wait",
            status: None,
            sent: WAIT.len(),
            answered: 0,
            outcome: Outcome::Aborted,
            note: Some("connection ended before a response"),
        },
        // The server closed 996 bytes early.
        Expected {
            method: "GET",
            path: "/cut",
            status: Some(200),
            sent: CUT.len(),
            answered: 45,
            outcome: Outcome::Aborted,
            note: Some("connection ended within the response"),
        },
        // The server was killed 995 bytes early.
        Expected {
            method: "GET",
            path: "/kill",
            status: Some(200),
            sent: KILL.len(),
            answered: 46,
            outcome: Outcome::Exit,
            note: Some("process exited"),
        },
    ]
}

/// Sent together, and answered together.
const PIPELINED: [&str; 2] = ["/first", "/second"];

/// The numbers of [`expected`], with what they count.
#[test]
fn the_answers_are_as_long_as_counted() {
    for (answer, length) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nplain\n", 44),
        ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nfirst\n", 44),
        ("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsecond\n", 45),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
             4\r\none\n\r\n4\r\ntwo\n\r\n6\r\nthree\n\r\n0\r\n\r\n",
            81,
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", 38),
        ("HTTP/1.1 204 No Content\r\n\r\n", 27),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n26\n", 41),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na\n", 40),
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nmissing\n", 53),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ncut\n", 45),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nlast\n", 46),
    ] {
        assert_eq!(answer.len(), length, "{answer}");
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conversation.rec")
}

/// The recording, or what to do about one that cannot be read.
fn open(path: &Path) -> Result<Player, String> {
    Player::open(path).map_err(|e| format!("{e}; `cargo xtask fixture`, as root, makes this recording anew"))
}

#[track_caller]
fn must_open(path: &Path) -> Player {
    open(path).unwrap_or_else(|reason| panic!("{reason}"))
}

#[test]
fn the_recorded_conversation_is_what_the_client_did() {
    requests_are_what_the_client_did(&fixture());
}

#[test]
fn every_recorded_sample_goes_to_the_request_whose_function_it_was_in() {
    samples_are_where_they_belong(&fixture());
}

#[test]
fn the_recording_is_small_and_holds_no_secret() {
    let bytes = std::fs::read(fixture()).expect("the recording");
    assert!(bytes.len() <= 100 << 10, "{} bytes", bytes.len());
    // The client sent it in a query, in a header and in a body.
    assert!([PLAIN, UPLOAD].iter().all(|request| request.contains(conversation::SECRET)));
    assert!(!bytes.windows(conversation::SECRET.len()).any(|w| w == conversation::SECRET.as_bytes()));
}

/// Whoever raises the version is told what to do.
#[test]
fn a_recording_of_another_layout_says_how_to_make_it_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let old = dir.path().join("old.rec");
    let mut bytes = std::fs::read(fixture()).expect("the recording");
    bytes[9] ^= 0x40;
    std::fs::write(&old, bytes).expect("a copy");
    let reason = open(&old).err().expect("a refusal");
    assert!(reason.contains("record anew") && reason.contains("cargo xtask fixture"), "{reason}");
}

/// The same on this kernel. With `REQPROF_FIXTURE=write` the new recording takes the committed one's place.
#[test]
fn a_conversation_of_now_gives_the_same() {
    const NAME: &str = "a_conversation_of_now_gives_the_same";
    let write = std::env::var("REQPROF_FIXTURE").is_ok_and(|value| value == "write");
    if !support::can_run(NAME) {
        return;
    }
    let interpreter = Path::new(conversation::PYTHON);
    assert!(!write || interpreter.exists(), "recording needs {}", interpreter.display());
    if !interpreter.exists() {
        support::skip::skip(NAME, format_args!("{} is not installed", interpreter.display()));
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("conversation.rec");
    conversation::hold(&path, expected().len());
    requests_are_what_the_client_did(&path);
    samples_are_where_they_belong(&path);
    if write {
        for extension in ["rec", "json"] {
            let bytes = std::fs::read(path.with_extension(extension)).expect("what was just written");
            std::fs::write(fixture().with_extension(extension), bytes).expect("a place for it");
        }
    }
}

/// Every request, in order: no more and no fewer.
fn requests_are_what_the_client_did(path: &Path) {
    let told = Told::read(path);
    let epoch = must_open(path).epoch;
    let records = Arc::new(Mutex::new(Vec::new()));
    let seen = records.clone();
    let counters = play(path, move |record: &RequestRecord| seen.lock().unwrap().push(record.clone()));
    let counters = counters.expect("a recording that can be played");
    let mut records = std::mem::take(&mut *records.lock().unwrap());
    // Two pipelined ones began with the same byte; the first is answered first.
    records.sort_by_key(|record| record.start);
    let expected = expected();
    let paths: Vec<_> = records.iter().map(|record| record.path.as_deref().unwrap_or_default()).collect();
    assert_eq!(paths, expected.iter().map(|e| e.path).collect::<Vec<_>>());
    for ((record, wanted), client) in records.iter().zip(&expected).zip(&told.requests) {
        let what = format!("{record:?}");
        assert_eq!(record.pid, told.pid, "{what}");
        assert_eq!(record.tid, told.pid, "one thread does it all: {what}");
        assert_eq!(record.method.as_deref(), Some(wanted.method), "{what}");
        assert_eq!(record.status, wanted.status, "{what}");
        assert_eq!(record.request_bytes, wanted.sent as u64, "{what}");
        assert_eq!(record.response_bytes, wanted.answered, "{what}");
        assert_eq!(record.outcome, wanted.outcome, "{what}");
        assert_eq!(record.note.as_deref(), wanted.note, "{what}");
        // Which of two that came together the server worked on, nobody can tell.
        let alone = !PIPELINED.contains(&wanted.path);
        let attribution = if alone { Attribution::Thread } else { Attribution::None };
        assert_eq!(record.attribution, attribution, "{what}");
        assert_eq!(record.lost_events, 0, "{what}");
        assert_eq!(record.ttfb_ns.is_some(), wanted.answered > 0, "{what}");
        assert!(record.ttfb_ns.unwrap_or_default() <= record.duration_ns, "{what}");
        // By the client's clock, which is the kernel's: nothing can be received before it is sent.
        assert!(record.start - epoch >= client.sent_at, "{what}");
    }
    // The client asked for one after the other, but for the pipelined pair.
    for (pair, client) in records.windows(2).zip(told.requests.windows(2)) {
        if client[0].sent_at == client[1].sent_at {
            let paths = [&pair[0].path, &pair[1].path].map(|path| path.as_deref().unwrap_or_default());
            assert_eq!(paths, PIPELINED);
            continue;
        }
        let end = pair[0].start + pair[0].duration_ns as i64;
        assert!(end <= pair[1].start, "{:?} had not ended when {:?} began", pair[0].path, pair[1].path);
    }
    assert_eq!(counters.requests_unseen, 0);
    assert_eq!(counters.requests_discarded, 0);
    assert_eq!(counters.refused, 0);
    assert_eq!(counters.requests_pipelined, 1, "/second, which came with /first");
    let given: u64 = records.iter().map(|record| record.samples).sum();
    assert_eq!(counters.samples_attributed, given);
}

/// Of each sample its stack says which of the two burning routes it was taken in, whatever we made of it.
fn samples_are_where_they_belong(path: &Path) {
    let told = Told::read(path);
    let route_of = |mut code: Box<dyn Iterator<Item = u64>>| {
        code.find_map(|address| {
            let name = told.code.iter().find(|(_, at)| **at == address)?.0.as_str();
            Some(if name.starts_with("burn_a") { "/burn/a" } else { "/burn/b" })
        })
    };
    let (out, messages) = crossbeam_channel::unbounded();
    let mut reader = Reader::new(out, None, Targets::default(), Stats::default());
    let mut player = must_open(path);
    let mut bytes = Vec::new();
    let mut taken: HashMap<&str, u64> = HashMap::new();
    while player.next_record(&mut bytes).expect("a whole recording").is_some() {
        if let Event::Sample(sample) = decode(&bytes).expect("a record") {
            let code: Vec<u64> =
                sample.user().filter(|f| f.kind() == FRAME_PYTHON).map(|f| f.address).collect();
            if let Some(route) = route_of(Box::new(code.into_iter())) {
                *taken.entry(route).or_default() += 1;
            }
        }
        reader.record(&bytes);
    }
    assert_eq!(reader.undecodable, 0);
    reader.end(0);
    let (mut given, mut paths) = (Vec::new(), HashMap::<RequestKey, String>::new());
    let mut revoked = Vec::new();
    for message in messages.try_iter().flatten() {
        match message {
            Message::Sample(sample) => {
                let code: Vec<u64> =
                    sample.user.iter().filter(|f| f.kind() == FRAME_PYTHON).map(|f| f.address).collect();
                given.push((sample.key, route_of(Box::new(code.into_iter()))));
            }
            Message::Revoke(key) => revoked.push(key),
            Message::Finished(finished) => {
                let head = finished.exchange.head.expect("a head");
                paths.insert(finished.key, head.path.to_string());
            }
            _ => {}
        }
    }
    for key in revoked {
        assert!(PIPELINED.contains(&paths[&key].as_str()), "the samples of {} were taken back", paths[&key]);
    }
    // The work takes a third of a second or so; a few samples must have hit it, or this shows nothing.
    for route in ["/burn/a", "/burn/b"] {
        let count = given.iter().filter(|(_, stack)| *stack == Some(route)).count() as u64;
        assert!(count >= 5, "{count} samples of {route}");
        assert_eq!(Some(&count), taken.get(route), "a sample of {route} was given to no request");
    }
    for (key, stack) in given {
        if let Some(route) = stack {
            assert_eq!(paths[&key], route, "a sample went to the wrong request");
        }
    }
}
