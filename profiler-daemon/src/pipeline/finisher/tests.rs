//! What reaches the store, and what is held until then.

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
    let done = Finished { key, pid, exchange, attributed: true, tail_samples: 0, lost: 0 };
    Message::Finished(Box::new(done))
}

fn sample(key: RequestKey, pid: u32, weight: u64) -> Message {
    Message::Sample(Box::new(RawSample { key, pid, weight, user: Vec::new(), kernel: Vec::new() }))
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

fn python(name: &str) -> Frame {
    Frame { name: name.into(), file: "/a.py".into(), line: 1, first_line: 1, kind: FrameKind::Python }
}
