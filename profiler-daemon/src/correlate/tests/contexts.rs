//! Requests of event loops: contexts tell what is done for each, whatever their threads do besides.

use super::stage::{CHUNKED, OK, Stage};

/// One thread serves three at a time, and another helps.
#[test]
fn interleaved_requests_have_their_own() {
    let mut stage = Stage::new();
    let fds = [5, 6, 7];
    for fd in fds {
        stage.accept(1, fd).looped(1, 10, fd, &format!("/{fd}"));
    }
    let marks = fds.map(|fd| stage.mark_of(1, fd));
    for round in 1..4 {
        for mark in marks {
            stage.in_context(1, 10, mark, round).in_context(1, 11, mark, 1);
        }
    }
    // Samples outside of any context are the loop's own, though the thread has a mark of the last one.
    stage.samples(1, 10, 4);
    stage.output(1, 10, 6, OK).in_context(1, 11, marks[1], 2);
    stage.output(1, 10, 5, OK).output(1, 12, 7, OK).in_context(1, 10, marks[2], 1).wait(500_000_000);
    stage.gives(&["/5 Complete 9 after 0", "/6 Complete 9 after 2", "/7 Complete 9 after 1"]);
    let counters = stage.counters();
    assert_eq!((counters.samples_attributed, counters.samples_after_response), (27, 3));
    assert_eq!((counters.samples_unknown, counters.samples_interleaved), (4, 0));
    assert!(stage.finished.iter().all(|done| done.by_context));
}

/// A thousand at a time, in turns of another order each.
#[test]
fn a_thousand_interleaved_requests_have_their_own() {
    const ALL: u32 = 1_000;
    let mut stage = Stage::new();
    for fd in 0..ALL {
        stage.accept(1, fd).looped(1, 10, fd, &format!("/{fd}"));
    }
    for turn in 1..=3 {
        for n in 0..ALL {
            // 7, 11 and 13 have no factor with 1,000 in common: each is met once a turn.
            let fd = n * [7, 11, 13][turn - 1] % ALL;
            let mark = stage.mark_of(1, fd);
            stage.in_context(1, 10, mark, u64::from(fd % 3));
        }
    }
    for n in 0..ALL {
        stage.output(1, 10, n * 17 % ALL, OK);
    }
    stage.wait(1_000_000_000);
    assert_eq!(stage.finished.len(), ALL as usize);
    for done in &stage.finished {
        let path = &done.exchange.head.as_ref().expect("seen").path;
        let fd: u64 = path[1..].parse().expect("a number");
        let samples = stage.samples.get(&done.key).map_or(0, Vec::len) as u64;
        assert_eq!((done.attributed, samples), (true, 3 * (fd % 3)), "{path}");
    }
}

/// A background task goes on under the mark of a request that is long over, while others are open on its connection.
#[test]
fn what_outlives_its_request_is_nobody_elses() {
    let mut stage = Stage::new();
    stage.accept(1, 5).looped(1, 10, 5, "/a");
    let first = stage.mark_of(1, 5);
    stage.in_context(1, 10, first, 2).output(1, 10, 5, OK).wait(1_000_000_000);
    stage.looped(1, 10, 5, "/b");
    let second = stage.mark_of(1, 5);
    stage.in_context(1, 10, first, 5).in_context(1, 10, second, 3).output(1, 10, 5, OK).wait(1_000_000_000);
    stage.gives(&["/a Complete 2 after 0", "/b Complete 3 after 0"]);
    assert_eq!(stage.counters().samples_after_response, 5);
}

/// What makes a thread's samples nobody's says nothing where contexts tell.
#[test]
fn threads_may_do_as_they_like() {
    let mut stage = Stage::new();
    stage.accept(1, 5).looped(1, 10, 5, "/a");
    let mark = stage.mark_of(1, 5);
    stage.in_context(1, 10, mark, 1);
    // It accepts, serves another, and a third one writes the response.
    stage.accept_by(1, 10, 6).looped(1, 10, 6, "/b").output(1, 10, 6, OK);
    stage.in_context(1, 11, mark, 1).output(1, 13, 5, CHUNKED).in_context(1, 10, mark, 1);
    stage.output(1, 10, 5, "0\r\n\r\n").wait(1_000_000_000);
    stage.gives(&["/a Complete 3 after 0", "/b Complete 0 after 0"]);
}

/// One head may be answered before the next is worked on, or not: nobody can tell.
#[test]
fn pipelined_requests_have_none() {
    let mut stage = Stage::new();
    stage.accept(1, 5).looped(1, 10, 5, "/a").pipelined(1, 10, 5, "/b");
    let mark = stage.mark_of(1, 5);
    stage.in_context(1, 10, mark, 4).output(1, 10, 5, OK).in_context(1, 10, mark, 4).output(1, 10, 5, OK);
    stage.wait(1_000_000_000).gives(&["/a Complete none", "/b Complete none"]);
    assert_eq!(stage.counters().samples_attributed, 0);
}

/// Both kinds in one process: a thread pool behind one port, a loop behind another.
#[test]
fn threads_and_loops_do_not_mix() {
    let mut stage = Stage::new();
    stage.accept_by(1, 1, 5).accept_by(1, 1, 6).looped(1, 10, 5, "/loop").request(1, 20, 6, "/thread");
    let mark = stage.mark_of(1, 5);
    stage.in_context(1, 20, mark, 1).samples(1, 20, 2).in_context(1, 10, mark, 3);
    stage.output(1, 20, 6, OK).output(1, 10, 5, OK).wait(1_000_000_000);
    stage.gives(&["/loop Complete 4 after 0", "/thread Complete 2 after 0"]);
}

/// The client hangs up: what was done until then was done for it.
#[test]
fn an_unanswered_request_keeps_its_own() {
    let mut stage = Stage::new();
    stage.accept(1, 5).looped(1, 10, 5, "/a");
    let mark = stage.mark_of(1, 5);
    stage.in_context(1, 10, mark, 3).close(1, 10, 5).in_context(1, 10, mark, 2).wait(1_000_000_000);
    stage.gives(&["/a Aborted 3 after 2"]);
}

/// The same pid and mark in another process, and connections that go without a word.
#[test]
fn marks_are_a_process_s_own_and_end_with_it() {
    let mut stage = Stage::new();
    stage.accept(1, 5).looped(1, 10, 5, "/a");
    let mark = stage.mark_of(1, 5);
    stage.in_context(2, 30, mark, 2).in_context(1, 10, mark, 1);
    stage.exit(1, 10, 0).in_context(1, 10, mark, 2).wait(1_000_000_000);
    stage.gives(&["/a Exit none"]);
    assert!(stage.engine.marked.is_empty(), "{:?}", stage.engine.marked);
}

/// One task serves all of a connection's requests: what it does between the first byte and the last is in no context that
/// was made for them.
#[test]
fn without_a_context_of_its_own_a_request_has_no_samples() {
    let mut stage = Stage::new();
    stage.accept(1, 5).looped_by_one_task(1, 10, 5, "/a");
    let mark = stage.mark_of(1, 5);
    stage.in_context(1, 10, mark, 2).output(1, 10, 5, OK).in_context(1, 10, mark, 1).wait(1_000_000_000);
    stage.looped(1, 10, 5, "/b").output(1, 10, 5, OK).wait(1_000_000_000);
    stage.gives(&["/a Complete none", "/b Complete 0 after 0"]);
    assert_eq!(stage.counters().samples_revoked, 2);
}
