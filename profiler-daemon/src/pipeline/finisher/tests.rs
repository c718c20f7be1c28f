//! What reaches the store, and what is held until then.

use profiler_common::{FRAME_NATIVE_LEAF, FRAME_PYTHON, RawFrame, flags};

use super::*;
use crate::correlate::http::Exchange;
use crate::process::identity::ProcessKey;
use crate::record::Outcome;
use crate::store::{Config, Deadline, Filter, Sort, Store};

fn finished(key: RequestKey, pid: u32) -> Message {
    let exchange = Exchange {
        seq: 0,
        start: 1_000,
        first_out: Some(2_000),
        end: 3_000,
        tid: pid,
        handoff: false,
        head: None,
        status: Some(200),
        request_bytes: 6,
        response_bytes: 40,
        outcome: Outcome::Incomplete,
        note: None,
        streaming: false,
        lost: 0,
    };
    let done = Finished::served(key, pid, exchange);
    Message::Finished(Box::new(done))
}

fn sample(key: RequestKey, pid: u32, weight: u64) -> Message {
    Message::Sample(Box::new(RawSample { key, pid, weight, flags: 0, user: Vec::new(), kernel: Vec::new() }))
}

fn with(settings: LiveSettings) -> Finisher {
    let naming = Naming { epoch: 1_767_225_600_000_000_000, salt: 0 };
    let metrics = Arc::new(Metrics::new().unwrap());
    Finisher::new(Targets::default(), naming, Live::new(settings), metrics, Stats::default())
}

fn bare() -> Finisher {
    with(LiveSettings::default())
}

fn finisher(settings: LiveSettings, store: &Store) -> Finisher {
    let mut finisher = with(settings);
    finisher.store = Some(store.sender());
    finisher
}

fn store(dir: &std::path::Path) -> Store {
    Store::open(&Config { max_age: Duration::MAX, ..Config::new(dir) }).unwrap()
}

#[test]
fn a_short_request_keeps_its_cpu_time_and_says_why_it_has_no_profile() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let settings = LiveSettings { min_duration: Duration::from_secs(1), ..LiveSettings::default() };
    let mut finisher = finisher(settings, &store);
    finisher.recorded = true;
    for message in [sample(1, 7, 100), sample(1, 7, 23), finished(1, 7), finished(2, 7)] {
        finisher.message(message);
    }
    store.flush();
    let page = store.reader().list(&Filter::default(), Sort::Oldest, 10, None).unwrap();
    let shown: Vec<_> = page.records.iter().map(|r| (r.samples, r.profile, r.note.as_deref())).collect();
    assert_eq!(shown, [(2, false, Some(TOO_SHORT)), (0, false, None)]);
    let routes = store.reader().routes(&Filter::default(), Deadline::after(Duration::from_secs(60))).unwrap();
    assert_eq!((routes[0].sampled_cpu_ns, routes[0].samples), (Some(123), 2));
}

/// How long somebody listens is no latency.
#[test]
fn a_stream_of_events_is_counted_and_in_no_histogram() {
    let mut finisher = bare();
    finisher.recorded = true;
    let Message::Finished(mut stream) = finished(2, 7) else { unreachable!() };
    stream.exchange.streaming = true;
    finisher.message(finished(1, 7));
    finisher.message(Message::Finished(stream));
    let text = finisher.metrics.encode(crate::serve::metrics::Encoding::Prometheus, None);
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).expect("a line");
        line.rsplit(' ').next().expect("a value").to_owned()
    };
    assert_eq!(value("http_server_request_duration_seconds_count"), "1");
    assert_eq!(value("reqprof_requests_total{outcome=\"incomplete\"}"), "2");
}

#[test]
fn a_request_waits_until_its_process_is_decided_upon() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut finisher = finisher(LiveSettings::default(), &store);
    finisher.message(finished(1, 4_194_301));
    finisher.settle();
    store.flush();
    let stored = || store.reader().list(&Filter::default(), Sort::Oldest, 10, None).unwrap().records.len();
    assert_eq!((stored(), finisher.finished, finisher.filtered), (0, 1, 0));
    finisher.targets.reject(ProcessKey { pid: 4_194_301, start_time: 1 });
    finisher.settle();
    store.flush();
    assert_eq!((stored(), finisher.finished, finisher.filtered), (0, 1, 1));
    assert!(finisher.undecided.is_empty());
    assert_eq!(finisher.undecided.dropped(), 0);
}

#[test]
fn a_step_of_the_clock_is_followed() {
    let mut finisher = bare();
    finisher.naming.epoch = 0;
    finisher.follow_clock();
    let apart = |a: i64, b: i64| (a - b).abs();
    // Readings of two clocks: what lies between them is scheduling.
    assert!(apart(finisher.naming.epoch, sys::epoch()) < 3_600_000_000_000);
    assert_ne!(finisher.naming.epoch, 0);
    (finisher.recorded, finisher.naming.epoch) = (true, 5);
    finisher.follow_clock();
    assert_eq!(finisher.naming.epoch, 5);
}

#[test]
fn what_waits_for_a_decision_keeps_its_share_of_the_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut finisher = finisher(LiveSettings::default(), &store);
    let (pid, stack) = (4_194_301, ["main", "work"].map(|name| Arc::new(python(name))));
    finisher.collecting.grow(1, &stack, 10, 0);
    finisher.message(finished(1, pid));
    assert!(finisher.collecting.take(1).is_none());
    assert_eq!(finisher.undecided.nodes(), 3, "the root and two functions");
    finisher.targets.reject(ProcessKey { pid, start_time: 1 });
    finisher.settle();
    assert_eq!(finisher.undecided.nodes(), 0);
    finisher.collecting.grow(2, &stack, 10, 0);
    finisher.message(finished(2, 4_194_302));
    assert_eq!(finisher.undecided.nodes(), 3);
    finisher.undecided.give_up();
    assert_eq!(finisher.undecided.nodes(), 0);
}

#[test]
fn a_stack_without_its_outermost_frames_says_so() {
    let mut finisher = bare();
    let me = std::process::id();
    // A function of this test, and a Python frame that nobody knows.
    let native = RawFrame::new(FRAME_NATIVE_LEAF, python as *const () as u64, 0, 0);
    let unknown = RawFrame::new(FRAME_PYTHON, 0x10, 0, 0);
    let mut take = |flags, user: &[RawFrame], native_frames| {
        finisher.native_frames = native_frames;
        let user = user.to_vec();
        let sample = RawSample { key: 1, pid: me, weight: 10, flags, user, kernel: Vec::new() };
        finisher.message(Message::Sample(Box::new(sample)));
        let profile = finisher.collecting.take(1).unwrap().finish(10);
        assert_eq!(profile.truncated_samples(), 0, "the tree has room");
        let mut path = Vec::new();
        let mut node = profile.root();
        while let Some(&child) = node.children().first() {
            path.push((child.name().to_owned(), child.function().kind));
            node = child;
        }
        path
    };
    let deep = "[stack deeper than 512 frames]".to_owned();
    let unread = "[Python frames unreadable]".to_owned();
    let whole = take(0, &[native, unknown], true);
    assert!(whole.len() == 2 && whole[1].0.ends_with("::python"), "{whole:?}");
    let with = |name: &String, kind, rest: &[(String, FrameKind)]| [&[(name.clone(), kind)], rest].concat();
    let cut = take(flags::TRUNCATED | flags::IN_KERNEL, &[native, unknown], true);
    assert_eq!(cut, with(&deep, FrameKind::Python, &whole));
    let cut = take(flags::TRUNCATED, &[native, unknown], false);
    assert_eq!(cut, with(&deep, FrameKind::Python, &whole[..1]));
    assert_eq!(take(flags::TRUNCATED, &[native], false), with(&deep, FrameKind::Native, &whole[1..]));
    assert_eq!(take(flags::PYTHON_FAULT, &[native], true), with(&unread, FrameKind::Python, &whole[1..]));
    let cut = take(flags::PYTHON_FAULT, &[native, unknown], true);
    assert_eq!(cut, with(&unread, FrameKind::Python, &whole));
    assert_eq!(take(flags::PYTHON_NO_STATE, &[native, unknown], true), whole);
    // The kernel side delivers fewer, but what the compiler inlined comes on top.
    let many = [vec![native], vec![unknown; MAX_DEPTH + 10]].concat();
    let cut = take(0, &many, true);
    assert_eq!((cut.len(), &cut[0].0), (MAX_DEPTH, &deep));
    assert_eq!(cut.last(), whole.last(), "the innermost is there");
    let cut = take(0, &many[..MAX_DEPTH], false);
    assert_eq!((cut.len(), &cut[0].0), (MAX_DEPTH - 1, &whole[0].0), "all of Python fits");
    finisher.publish();
    assert_eq!(finisher.stats.snapshot().stacks_cut, 1);
}

#[test]
fn a_child_is_known_by_its_parent_until_it_runs_something_else_or_ends() {
    let mut finisher = bare();
    let me = std::process::id();
    let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let leaf = |key, pid| {
        let user = vec![RawFrame::new(FRAME_NATIVE_LEAF, python as *const () as u64, 0, 0)];
        Message::Sample(Box::new(RawSample { key, pid, weight: 10, flags: 0, user, kernel: Vec::new() }))
    };
    finisher.message(leaf(1, me));
    for pid in [child.id(), gone.id()] {
        finisher.message(Message::Forked { parent: me, child: pid });
        assert!(finisher.keys.contains_key(&pid) && finisher.keys.contains_key(&me));
    }
    // What it did before it ended.
    finisher.message(leaf(2, gone.id()));
    let profile = finisher.collecting.take(2).unwrap().finish(10);
    assert!(profile.root().children()[0].name().ends_with("::python"));
    finisher.message(Message::Exec(child.id()));
    finisher.message(Message::Exited(gone.id()));
    assert_eq!(finisher.keys.keys().collect::<Vec<_>>(), [&me]);
    // Nothing is asked for processes that are not selected, or of a recording.
    finisher.targets.reject(identity::key(me).unwrap());
    finisher.message(Message::Forked { parent: me, child: child.id() });
    finisher.targets.ended(me);
    (finisher.targets, finisher.recorded) = (Targets::default(), true);
    finisher.message(Message::Forked { parent: me, child: child.id() });
    assert_eq!(finisher.keys.keys().collect::<Vec<_>>(), [&me]);
    drop(child.stdin.take());
    child.wait().unwrap();
}

fn python(name: &str) -> Frame {
    Frame { name: name.into(), file: "/a.py".into(), line: 1, first_line: 1, kind: FrameKind::Python }
}
