//! Processes, threads, connections and recordings that end, and numbers that are used again.

use super::*;

#[test]
fn a_process_ends_within_a_request() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(2, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2).request(2, 20, 5, "/b").samples(2, 20, 1);
    stage.exit(1, 10, 0);
    stage.output(2, 20, 5, OK).close(2, 20, 5);
    stage.gives(&["/a Exit 2 after 0", "/b Complete 1 after 0"]);
    assert!(stage.processes.contains(&ProcessEvent::Exited { pid: 1 }));
    assert_eq!(stage.left, [(1, 5)], "what the kernel side still has of it");
    assert_eq!(stage.engine.open_connections(), 0);
}

/// The end of a process was lost, and its pid and thread ids are given to another.
#[test]
fn a_pid_is_used_again() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2);
    stage.fork(9, 1);
    stage.samples(1, 10, 1);
    stage.accept(1, 6);
    stage.request(1, 10, 6, "/b").samples(1, 10, 3).output(1, 10, 6, OK).close(1, 10, 6);
    stage.gives(&["/a Exit none", "/b Complete 3 after 0"]);
    assert_eq!(stage.left, [(1, 5)]);
}

/// The end of a process was lost, and its pid is another one's before the daemon finds out.
#[test]
fn a_process_that_is_found_gone_takes_nothing_of_its_successor_along() {
    let mut stage = Stage::new();
    stage.accept(1, 5).request(1, 10, 5, "/old").samples(1, 10, 2);
    let born = stage.time + 1;
    stage.accept(1, 6).request(1, 12, 6, "/new").samples(1, 12, 1);
    stage.gone(1, born);
    stage.gives(&["/old Exit none"]);
    stage.samples(1, 12, 2).output(1, 12, 6, OK).close(1, 12, 6);
    stage.gives(&["/old Exit none", "/new Complete 3 after 0"]);
    assert_eq!(stage.left, [(1, 5)]);
    stage.accept(1, 7).request(1, 12, 7, "/last").gone(1, u64::MAX);
    assert_eq!(stage.engine.open_connections(), 0);
}

#[test]
fn a_thread_id_is_used_again_by_another_process() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(2, 7);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2);
    stage.request(2, 10, 7, "/b").samples(2, 10, 3).output(2, 10, 7, OK).close(2, 10, 7);
    stage.exit(1, 11, 0);
    stage.gives(&["/a Exit none", "/b Complete 3 after 0"]);
}

#[test]
fn a_thread_ends() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2).output(1, 10, 5, OK).exit(1, 10, 3);
    stage.gives(&["/a Complete 2 after 0"]);
    // Its id, taken by a new thread of the same process, carries no mark.
    stage.samples_as(1, 10, 77, 1);
    stage.request(1, 10, 6, "/b").samples(1, 10, 1).output(1, 10, 6, OK).close(1, 10, 6);
    stage.gives(&["/a Complete 2 after 0", "/b Complete 1 after 0"]);
    assert_eq!(stage.counters().samples_unknown, 1);
}

#[test]
fn a_new_program_ends_the_old_ones_requests() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1).exec(1, 10);
    stage.samples(1, 10, 1);
    stage.gives(&["/a Exit 1 after 0"]);
    assert_eq!(stage.processes.last(), Some(&ProcessEvent::Exec { pid: 1 }));
    assert_eq!(stage.left, [(1, 5)]);
    assert_eq!(stage.counters().samples_unknown, 1);
}

#[test]
fn time_ends_what_was_silent() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1).output(1, 10, 5, CHUNKED).output(1, 10, 5, "0\r\n\r\n");
    stage.request(1, 11, 6, "/b").output(1, 11, 6, OK);
    stage.gives(&[]);
    stage.wait(600_000_000);
    stage.gives(&["/a Complete 1 after 0", "/b Complete 0 after 0"]);
}

#[test]
fn the_end_of_a_recording_ends_what_looks_over() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").output(1, 10, 5, CHUNKED).output(1, 10, 5, "0\r\n\r\n");
    stage.request(1, 11, 6, "/b").samples(1, 11, 1);
    stage.finish();
    stage.gives(&["/a Complete 0 after 0", "/b Incomplete 1 after 0"]);
}

/// What is open when profiling stops has a record that says so, and its samples: nothing vanishes.
#[test]
fn the_end_of_profiling_ends_what_is_open() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6).accept(1, 7).accept(1, 8);
    stage.request(1, 10, 5, "/waits").samples(1, 10, 2);
    stage.request(1, 11, 6, "/answers").output(1, 11, 6, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n");
    stage.request(1, 12, 7, "/first").pipelined(1, 12, 7, "/second");
    stage.input(1, 13, 8, "GET /partial HTTP/1.1\r\n", flags::NEW_ACTIVATION);
    stage.wait(1_000_000_000).finish();
    stage.gives(&[
        "/waits Incomplete 2 after 0",
        "/answers Incomplete 0 after 0",
        "/first Incomplete none",
        "/second Incomplete none",
        "/partial Incomplete 0 after 0",
    ]);
    assert!(stage.finished.iter().all(|done| done.exchange.note == Some(note::STOPPED)));
    // Whoever waited had waited until then; of an answer the last byte seen is what is known.
    let end = stage.time;
    let until_then = |done: &&Finished| done.exchange.end == end;
    assert_eq!(stage.finished.iter().filter(until_then).count(), 4);
    assert_eq!(stage.engine.open_requests(), 0);
}

/// The end of a request was lost, nothing that follows tells, and the thread went on.
#[test]
fn the_end_of_profiling_trusts_nothing_open_after_a_loss() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1).lose(1, 5).samples(1, 10, 2).finish();
    stage.gives(&["/a Incomplete none"]);
    assert_eq!(stage.counters().samples_revoked, 3);
}

/// A close that reached nobody. One that is still open, one that is not silent and one that is missing only once stay.
#[test]
fn an_audit_closes_what_is_gone() {
    let mut stage = Stage::new();
    for fd in 5..=8 {
        stage.accept(1, fd);
    }
    stage.request(1, 10, 5, "/gone").samples(1, 10, 1).request(1, 11, 6, "/open").samples(1, 11, 1);
    stage.request(1, 12, 7, "/late");
    stage.wait(6_000_000_000);
    stage.request(1, 13, 8, "/busy");
    stage.audit(&[6, 7]).gives(&[]);
    assert_eq!(stage.engine.open_connections(), 4);
    stage.audit(&[6]).gives(&["/gone Incomplete none"]);
    assert_eq!(stage.note("/gone"), Some(note::LOST));
    assert_eq!(stage.left, [(1, 5)], "the kernel side forgets it too");
    assert_eq!(stage.engine.open_connections(), 3);
    // It was there again in between: what was seen first was a mistake.
    stage.audit(&[6, 7]).audit(&[6]).gives(&["/gone Incomplete none"]);
    stage.output(1, 11, 6, OK).close(1, 11, 6).output(1, 12, 7, OK).close(1, 12, 7);
    stage.output(1, 13, 8, OK).close(1, 13, 8);
    stage.gives(&[
        "/gone Incomplete none",
        "/open Complete 1 after 0",
        "/late Complete 0 after 0",
        "/busy Complete 0 after 0",
    ]);
}

/// An idle connection costs memory until it is found out, and nothing else.
#[test]
fn an_audit_closes_an_idle_connection() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").output(1, 10, 5, OK).wait(6_000_000_000);
    stage.audit(&[]).audit(&[]).gives(&["/a Complete 0 after 0"]);
    assert_eq!((stage.engine.open_connections(), stage.left.as_slice()), (0, &[(1, 5)][..]));
    stage.accept(1, 5).request(1, 10, 5, "/b").output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Complete 0 after 0", "/b Complete 0 after 0"]);
}

/// Threads whose end was not seen make room when they have been idle for long, and not before; whoever finds no room has
/// a record without samples, and is counted.
#[test]
fn threads_that_are_gone_make_room() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    let first = 100;
    for tid in first..first + THREADS_MAX as u32 - 1 {
        stage.request(1, tid, 5, "/fill").output(1, tid, 5, OK);
    }
    stage.request(1, 10, 6, "/long").samples(1, 10, 1);
    assert_eq!(stage.counters().refused, 0);
    stage.request(1, 11, 5, "/refused").samples(1, 11, 2).output(1, 11, 5, OK);
    assert_eq!(stage.counters().refused, 1);
    assert_eq!(stage.counters().samples_unknown, 2);
    stage.wait(61_000_000_000);
    stage.request(1, 11, 5, "/room").samples(1, 11, 3).output(1, 11, 5, OK).wait(1_000_000_000);
    // The one that is at work for all that time kept its place.
    stage.samples(1, 10, 1).output(1, 10, 6, OK).close(1, 10, 6);
    assert_eq!(stage.counters().refused, 1);
    stage.finished.retain(|done| done.exchange.head.as_ref().is_some_and(|head| &*head.path != "/fill"));
    stage.gives(&["/refused Complete none", "/room Complete 3 after 0", "/long Complete 2 after 0"]);
}

/// A call that would wait, or was interrupted, is made again.
#[test]
fn calls_that_are_made_again_change_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5).request(1, 10, 5, "/a").samples(1, 10, 1);
    stage.output(1, 10, 5, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no");
    stage.fails(1, 10, 5, libc::EAGAIN).fails(1, 10, 5, libc::EINTR).samples(1, 10, 2);
    stage.output(1, 10, 5, "k").close(1, 10, 5);
    stage.gives(&["/a Complete 3 after 0"]);
}

/// A parent accepts, its child serves: the child's part of the connection was not seen to begin.
#[test]
fn a_connection_that_a_child_takes_over() {
    let mut stage = Stage::new();
    stage.accept(1, 5).fork(1, 2).close(1, 1, 5).known(2, 5);
    stage.input(2, 20, 5, &GET.replace("PATH", "/a"), flags::NEW_ACTIVATION | flags::UNSEEN_ACCEPT);
    stage.samples(2, 20, 2).output(2, 20, 5, OK).close(2, 20, 5);
    stage.gives(&["/a Complete 2 after 0"]);
}
