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

fn frame(n: u32) -> Arc<Frame> {
    let name = format!("f{n}").into();
    Arc::new(Frame { name, file: "".into(), line: 0, first_line: n, kind: FrameKind::Native })
}

#[test]
fn profiles_have_a_common_bound_and_samples_beyond_it_count() {
    let mut finisher = bare();
    let stacks: Vec<Vec<Arc<Frame>>> = (0..2000).map(|n| vec![frame(n); 100]).collect();
    let (mut key, mut given) = (0, 0);
    while finisher.samples_folded == 0 {
        for stack in stacks.iter().take(100) {
            finisher.grow(key, stack, 10);
            given += 1;
        }
        key += 1;
        assert!(finisher.nodes <= NODES_MAX + 100, "{} nodes", finisher.nodes);
    }
    let folded = finisher.samples_folded;
    let counted: usize = finisher.builders.values().map(Builder::nodes).sum();
    assert_eq!(finisher.nodes, counted);
    let mut samples = 0;
    let mut truncated = 0;
    for key in 0..key {
        let builder = finisher.take_builder(key).unwrap();
        let ns = builder.sampled_ns();
        let profile = builder.finish(1);
        assert_eq!(ns, profile.sampled_ns());
        samples += profile.samples();
        truncated += profile.truncated_samples();
    }
    assert_eq!((samples, truncated, finisher.nodes), (given, folded, 0));
    finisher.grow(7, &stacks[0], 10);
    assert_eq!(finisher.samples_folded, folded);
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
    let (pid, stack) = (4_194_301, vec![frame(1), frame(2)]);
    finisher.grow(1, &stack, 10);
    let held = finisher.nodes();
    finisher.message(finished(1, pid));
    assert_eq!((finisher.builders.len(), finisher.nodes()), (0, held));
    finisher.targets.reject(ProcessKey { pid, start_time: 1 });
    finisher.settle();
    assert_eq!(finisher.nodes(), 0);
    finisher.grow(2, &stack, 10);
    finisher.message(finished(2, 4_194_302));
    assert_ne!(finisher.nodes(), 0);
    finisher.undecided.give_up();
    assert_eq!(finisher.nodes(), 0);
}
