//! The correlator on events made by hand; `tests/random.rs` has the random ones.

mod contexts;
mod ends;
mod random;
mod reject;
mod stage;

use profiler_common::flags;

use super::engine::{CONNECTIONS_MAX, THREADS_MAX};
use super::http::note;
use super::{Finished, ProcessEvent};
use crate::record::Outcome;
use stage::{CHUNKED, GET, OK, Stage};

#[test]
fn one_thread_on_one_connection() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    for path in ["/a", "/b"] {
        stage.request(1, 10, 5, path);
        stage.samples(1, 10, 3).output(1, 10, 5, OK).samples(1, 10, 2);
    }
    stage.close(1, 10, 5);
    stage.gives(&["/a Complete 3 after 2", "/b Complete 3 after 2"]);
    assert_eq!(stage.counters().samples_attributed, 6);
    assert_eq!(stage.counters().samples_after_response, 4);
}

/// The client has the last byte when the write is entered, not when the server comes back from it; samples in between
/// are the request's all the same.
#[test]
fn a_write_that_did_not_wait_ends_when_it_was_entered() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/one").samples(1, 10, 2);
    let entered = stage.time;
    stage.samples(1, 10, 3).output_entered(1, 10, 5, OK, entered).samples(1, 10, 1);
    stage.request(1, 10, 5, "/two");
    let start = stage.time;
    let first = start + 7;
    stage.wait(1_000).output_entered(1, 10, 5, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", first);
    let second = stage.time + 5;
    stage.wait(1_000).output_entered(1, 10, 5, "abc", second).close(1, 10, 5);
    stage.gives(&["/one Complete 5 after 1", "/two Complete 0 after 0"]);
    assert_eq!(stage.times("/one"), (Some(2_000), 2_000));
    assert_eq!(stage.times("/two"), (Some(7), second - start));
}

#[test]
fn a_write_that_waited_ends_when_it_returned() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 3).output(1, 10, 5, OK);
    assert_eq!(stage.counters().samples_attributed, 3);
    stage.close(1, 10, 5);
    assert_eq!(stage.times("/a"), (Some(4_000), 4_000));
}

/// Times from the kernel that cannot be, and threads that write across each other: nothing ends before it began.
#[test]
fn no_time_runs_backwards() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    let before = stage.time - 500;
    stage.request(1, 10, 5, "/a").output_entered(1, 10, 5, OK, before);
    stage.request(1, 10, 5, "/b");
    let entered = stage.time + 10;
    stage.output(1, 11, 5, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n");
    stage.output_entered(1, 10, 5, "abc", entered);
    stage.request(1, 10, 5, "/c");
    let after = stage.time + 1_000_000;
    stage.output_entered(1, 10, 5, OK, after).close(1, 10, 5);
    assert_eq!(stage.times("/a"), (Some(0), 0));
    assert_eq!(stage.times("/b"), (Some(1_000), 1_000));
    assert_eq!(stage.times("/c"), (Some(1_000), 1_000));
}

/// A thread keeps its mark until it begins something else, however long that takes and whoever has the connection by
/// then: what it does meanwhile is known to belong to no request.
#[test]
fn a_thread_that_rests_works_for_nothing_that_is_unknown() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2).output(1, 10, 5, OK).samples(1, 10, 1);
    stage.wait(300_000_000).samples(1, 10, 4);
    stage.request(1, 11, 5, "/b").samples(1, 10, 8).output(1, 11, 5, OK);
    stage.close(1, 11, 5).samples(1, 10, 16);
    stage.gives(&["/a Complete 2 after 1", "/b Complete 0 after 0"]);
    assert_eq!(stage.counters().samples_after_response, 1 + 4 + 8 + 16);
    assert_eq!(stage.counters().samples_unknown, 0);
    // A mark of which nothing is known is another matter.
    stage.samples_as(1, 10, 77, 1);
    assert_eq!(stage.counters().samples_unknown, 1);
}

#[test]
fn a_sample_on_the_threshold_of_a_request_belongs_to_what_was_before() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").output(1, 10, 5, OK);
    stage.request_interrupted(1, 10, 6, "/b").samples(1, 10, 2).output(1, 10, 6, OK);
    stage.close(1, 10, 6);
    stage.gives(&["/a Complete 0 after 0", "/b Complete 2 after 0"]);
    let counters = stage.counters();
    assert_eq!((counters.samples_after_response, counters.samples_unknown), (1, 0));
    // What it did before is not done: nobody can say.
    stage.request(1, 11, 5, "/c").request_interrupted(1, 11, 6, "/d");
    assert_eq!(stage.counters().samples_unknown, 1);
}

#[test]
fn two_threads_at_once() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").request(1, 11, 6, "/b");
    stage.samples(1, 10, 1).samples(1, 11, 2).samples(1, 10, 1);
    stage.output(1, 11, 6, OK).output(1, 10, 5, OK);
    stage.close(1, 10, 5).close(1, 11, 6);
    stage.gives(&["/a Complete 2 after 0", "/b Complete 2 after 0"]);
}

#[test]
fn a_thread_that_interleaves_gets_nothing_any_more() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2);
    stage.request(1, 10, 6, "/b").samples(1, 10, 2);
    stage.output(1, 10, 5, OK).output(1, 10, 6, OK);
    stage.request(1, 10, 5, "/c").samples(1, 10, 3).output(1, 10, 5, OK);
    stage.gives(&["/a Complete none", "/b Complete none", "/c Complete none"]);
    let counters = stage.counters();
    assert_eq!((counters.samples_revoked, counters.samples_interleaved), (2, 5));
    assert_eq!(counters.samples_attributed, 0);
}

/// The end of a request was lost: its thread looks as if it interleaved, until the next record on that connection
/// says that one is missing.
#[test]
fn a_lost_response_does_not_make_an_event_loop() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2);
    stage.lose(1, 5);
    stage.request(1, 10, 6, "/b").samples(1, 10, 1).output(1, 10, 6, OK);
    stage.close(1, 11, 5);
    stage.request(1, 10, 6, "/c").samples(1, 10, 3).output(1, 10, 6, OK).close(1, 10, 6);
    stage.gives(&["/a Incomplete none", "/b Complete none", "/c Complete 3 after 0"]);
}

/// The beginning of a request was lost, and its thread answers it while it has another one open.
#[test]
fn an_answer_elsewhere_takes_the_samples_back() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.lose(1, 5);
    stage.request(1, 10, 6, "/b").samples(1, 10, 4);
    stage.output(1, 10, 5, OK);
    stage.output(1, 10, 6, OK).close(1, 10, 6);
    stage.gives(&["/b Complete none"]);
    assert_eq!(stage.counters().samples_revoked, 4);
}

/// Which of them the thread works on is its own business, until the first answer at least.
#[test]
fn pipelined_requests_get_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").pipelined(1, 10, 5, "/b");
    stage.samples(1, 10, 5).output(1, 10, 5, OK).output(1, 10, 5, OK);
    stage.request(1, 10, 5, "/c").samples(1, 10, 2).output(1, 10, 5, OK).samples(1, 10, 3).close(1, 10, 5);
    stage.gives(&["/a Complete none", "/b Complete none", "/c Complete 2 after 3"]);
}

/// Both answers are in one write, and behind the first one's body the second is invisible.
#[test]
fn a_pipelined_response_that_is_not_seen_gets_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1).pipelined(1, 10, 5, "/b").samples(1, 10, 5);
    stage.output(1, 10, 5, &format!("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc{OK}"));
    stage.samples(1, 10, 2).wait(6_000_000_000);
    stage.gives(&["/a Complete none", "/b Incomplete none"]);
}

/// A request that nobody can see follows a body in the same transfer.
#[test]
fn a_hidden_pipelined_request_takes_trust_away() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.input(1, 10, 5, "POST /known HTTP/1.1\r\nContent-Length: 5\r\n\r\n", flags::NEW_ACTIVATION);
    stage.hidden(1, 10, 5, "helloGET /b HTTP/1.1\r\n\r\n").samples(1, 10, 4).output(1, 10, 5, OK);
    // Behind a body whose end cannot be seen it shows by its answer, in the same write or a later one.
    let chunked = "POST /chunked HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    stage.input(1, 11, 6, chunked, flags::NEW_ACTIVATION);
    stage.hidden(1, 11, 6, "0\r\n\r\nGET /b HTTP/1.1\r\n\r\n").samples(1, 11, 4);
    stage.output(1, 11, 6, OK).output(1, 11, 6, OK);
    stage.close(1, 10, 5).close(1, 11, 6);
    stage.gives(&["/known Complete none", "/chunked Complete none"]);
}

/// The response between two pipelined requests is lost: what looks like the first one's samples may be the second's.
#[test]
fn pipelined_requests_with_a_gap_get_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").pipelined(1, 10, 5, "/b");
    stage.samples(1, 10, 1).lose(1, 5).samples(1, 10, 2).output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Incomplete none", "/b Incomplete none"]);
}

#[test]
fn a_handed_over_request_gets_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 2).output(1, 11, 5, OK).close(1, 11, 5);
    stage.gives(&["/a Complete none"]);
    assert_eq!(stage.counters().samples_revoked, 2);
}

/// The one that received it went on with something else, and whoever closes did the work.
#[test]
fn a_request_that_another_thread_closes_unanswered_gets_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6).accept(1, 7);
    stage.request(1, 10, 5, "/other").samples(1, 10, 2).close(1, 11, 5);
    stage.request(1, 10, 6, "/reset").samples(1, 10, 2).fails(1, 11, 6, libc::ECONNRESET);
    stage.request(1, 10, 7, "/own").samples(1, 10, 2).close(1, 10, 7);
    stage.accept(1, 8).request(1, 10, 8, "/nobody").samples(1, 10, 2).accept(1, 8);
    stage.gives(&[
        "/other Aborted none",
        "/reset Aborted none",
        "/own Aborted 2 after 0",
        "/nobody Incomplete none",
    ]);
}

/// The one that reads a body on with another mark is not the one that began: the first one's mark stays its own.
#[test]
fn a_body_read_by_another_thread_hands_over() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(1, 6);
    stage.input(1, 10, 5, "POST /a HTTP/1.1\r\nContent-Length: 5\r\n\r\n", flags::NEW_ACTIVATION);
    stage.output(1, 10, 5, "HTTP/1.1 100 Continue\r\n\r\n");
    stage.input(1, 11, 5, "GET /", flags::NEW_ACTIVATION);
    stage.samples(1, 10, 1);
    stage.output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Complete none"]);
}

#[test]
fn a_descriptor_is_used_again_and_its_close_was_lost() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1).output(1, 10, 5, OK).samples(1, 10, 1);
    stage.accept(1, 5);
    // The first thread's mark still names the descriptor.
    stage.request(1, 11, 5, "/b").samples(1, 10, 1).samples(1, 11, 2);
    stage.output(1, 11, 5, OK).close(1, 11, 5).wait(600_000_000);
    stage.gives(&["/a Complete 1 after 2", "/b Complete 2 after 0"]);
}

#[test]
fn late_records_of_a_descriptors_former_use_change_nothing() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    let former = stage.connection(1, 5);
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1);
    stage.close_as(10, former);
    stage.output_as(11, former, "the end of what was said there");
    stage.samples(1, 10, 1).output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Complete 2 after 0"]);
}

#[test]
fn losses_are_told() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage
        .request(1, 10, 5, "/a")
        .samples(1, 10, 1)
        .lost_samples(1, 10, 4)
        .output(1, 10, 5, OK)
        .close(1, 10, 5);
    stage.accept(1, 6);
    stage.request(1, 10, 6, "/b").lose(1, 6).close(1, 10, 6);
    stage.gives(&["/a Complete 2 after 0", "/b Incomplete none"]);
    assert_eq!(stage.lost("/a"), 4);
    assert_eq!(stage.lost("/b"), 1);
    assert_eq!(stage.note("/b"), Some(note::LOST));
}

#[test]
fn samples_with_a_mark_that_is_not_known() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.samples_as(1, 10, 1, 2);
    stage.request(1, 10, 5, "/a").samples_as(1, 10, 1, 3).samples(1, 10, 1);
    // Of another process, with the same mark.
    let mark = stage.mark(10);
    stage.samples_as(2, 10, mark, 1);
    stage.output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Complete 1 after 0"]);
    assert_eq!(stage.counters().samples_unknown, 6);
}

/// After what looks like the last chunk nothing is the request's own, though its end is proven later only.
#[test]
fn a_chunked_response_ends_with_its_last_chunk() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").samples(1, 10, 1).output(1, 10, 5, CHUNKED).samples(1, 10, 1);
    stage
        .output(1, 10, 5, "5\r\nhello\r\n")
        .samples(1, 10, 1)
        .output(1, 10, 5, "0\r\n\r\n")
        .samples(1, 10, 4);
    stage.request(1, 10, 5, "/b").samples(1, 10, 1).output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Complete 3 after 4", "/b Complete 1 after 0"]);
}

/// As many connections as the kernel side follows are remembered; one more is counted, and one that closes makes room.
#[test]
fn connections_beyond_what_is_remembered_are_counted() {
    let mut stage = Stage::new();
    for fd in 0..CONNECTIONS_MAX as u32 {
        stage.accept(1, fd);
    }
    assert_eq!((stage.counters().refused, stage.engine.open_connections()), (0, CONNECTIONS_MAX));
    stage.accept(2, 5);
    assert_eq!((stage.counters().refused, stage.engine.open_connections()), (1, CONNECTIONS_MAX));
    stage.close(1, 10, 7).accept(2, 6).request(2, 20, 6, "/a").output(2, 20, 6, OK).close(2, 20, 6);
    assert_eq!(stage.counters().refused, 1);
    stage.gives(&["/a Complete 0 after 0"]);
}

/// A write that fails because of what is to be written does not end the connection; one on a broken one does.
#[test]
fn only_some_errors_end_a_connection() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").fails(1, 10, 5, libc::EINVAL).output(1, 10, 5, OK);
    stage.request(1, 10, 5, "/b").fails(1, 10, 5, libc::EPIPE).close(1, 10, 5);
    stage.gives(&["/a Complete 0 after 0", "/b Aborted 0 after 0"]);
}

/// What was announced and turns out to be another protocol: its samples are counted once.
#[test]
fn what_is_no_request_gives_its_samples_back() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.input(1, 10, 5, "PING", flags::NEW_ACTIVATION).samples(1, 10, 2);
    stage.input(1, 10, 5, " this is no request\r\n", 0).samples(1, 10, 1);
    stage.gives(&[]);
    let counters = stage.counters();
    assert_eq!((counters.samples_attributed, counters.samples_revoked, counters.samples_unknown), (0, 2, 1));
}

/// An event loop with one HTTP request in flight: what else it does shows as an accept, or as a transfer.
#[test]
fn an_accept_within_a_request_takes_trust_away() {
    let mut stage = Stage::new();
    stage.accept(1, 5).request(1, 10, 5, "/loop").samples(1, 10, 1);
    stage.accept_by(1, 10, 6).samples(1, 10, 5);
    stage.output(1, 10, 5, OK);
    stage.request(1, 10, 5, "/next").samples(1, 10, 1).output(1, 10, 5, OK);
    stage.gives(&["/loop Complete none", "/next Complete none"]);
    assert_eq!(stage.counters().samples_interleaved, 6, "{:?}", stage.counters());
}

#[test]
fn a_transfer_elsewhere_within_a_request_takes_trust_away() {
    let upgrade = |stage: &mut Stage| {
        stage.request(1, 10, 5, "/socket").output(1, 10, 5, "HTTP/1.1 101 Switching Protocols\r\n\r\n");
    };
    let binary = |stage: &mut Stage| {
        stage.input(1, 10, 5, "\x16\x03\x01", 0);
    };
    let unknown = |stage: &mut Stage| {
        stage.hidden(1, 11, 5, "nothing to be seen");
    };
    type Kind<'a> = (&'a dyn Fn(&mut Stage), &'a [&'a str]);
    let kinds: [Kind<'_>; 3] = [
        (&upgrade, &["/a Complete none", "/socket Upgraded 0 after 0"]),
        (&binary, &["/a Complete none"]),
        (&unknown, &["/a Complete none"]),
    ];
    for (kind, gives) in kinds {
        for out in [false, true] {
            let mut stage = Stage::new();
            stage.accept(1, 5).accept(1, 6);
            kind(&mut stage);
            stage.request(1, 10, 6, "/a").samples(1, 10, 2);
            if out {
                stage.output(1, 10, 5, "frame")
            } else {
                stage.hidden(1, 10, 5, "frame")
            };
            stage.samples(1, 10, 1).output(1, 10, 6, OK).close(1, 10, 6).close(1, 10, 5);
            stage.gives(gives);
        }
    }
}

#[test]
fn a_thread_that_accepts_reads_writes_and_closes_does_one_thing_at_a_time() {
    let mut stage = Stage::new();
    for (path, chunked) in [("/a", false), ("/b", true), ("/c", false)] {
        stage.accept_by(1, 10, 5).request(1, 10, 5, path).samples(1, 10, 2);
        if chunked {
            // Its end is proven by nothing yet, and the connection stays open.
            stage.output(1, 10, 5, CHUNKED).output(1, 10, 5, "0\r\n\r\n").accept_by(1, 10, 6);
        } else {
            stage.output(1, 10, 5, OK);
        }
        stage.close(1, 10, 5);
    }
    stage.gives(&["/a Complete 2 after 0", "/b Complete 2 after 0", "/c Complete 2 after 0"]);
}

/// The end of the request was lost, so that its thread only looks as if it accepted meanwhile.
#[test]
fn an_accept_after_a_lost_response_does_not_make_an_event_loop() {
    let mut stage = Stage::new();
    stage.accept_by(1, 10, 5).request(1, 10, 5, "/a").samples(1, 10, 2).lose(1, 5);
    stage.accept_by(1, 10, 6).close(1, 10, 5);
    stage.request(1, 10, 6, "/b").samples(1, 10, 2).output(1, 10, 6, OK).close(1, 10, 6);
    stage.gives(&["/a Incomplete none", "/b Complete 2 after 0"]);
}

/// More pieces in a write than the kernel side looks at: the rest is invisible, not lost.
#[test]
fn an_invisible_rest_is_no_loss() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n";
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/whole").samples(1, 10, 1).output(1, 10, 5, head).blind(1, 10, 5, true, 100);
    stage.request(1, 10, 5, "/part").samples(1, 10, 1).output(1, 10, 5, head).blind(1, 10, 5, true, 60);
    stage.output(1, 10, 5, "0123456789012345678901234567890123456789").samples(1, 10, 1);
    stage.request(1, 10, 5, "/next").output(1, 10, 5, CHUNKED).blind(1, 10, 5, true, 100);
    stage.request(1, 10, 5, "/last").output(1, 10, 5, CHUNKED).blind(1, 10, 5, true, 100).close(1, 10, 5);
    stage.gives(&[
        "/whole Complete 1 after 0",
        "/part Complete 1 after 1",
        "/next Complete 0 after 0",
        "/last Incomplete none",
    ]);
    assert_eq!(stage.note("/last"), Some(note::RESPONSE_END));
    assert!(stage.finished.iter().all(|done| done.lost == 0));
}

/// How many responses an invisible rest holds is unknown where several are due.
#[test]
fn an_invisible_rest_may_hold_other_responses() {
    let mut stage = Stage::new();
    stage.accept(1, 5);
    stage.request(1, 10, 5, "/a").pipelined(1, 10, 5, "/b").pipelined(1, 10, 5, "/c");
    stage.output(1, 10, 5, CHUNKED).blind(1, 10, 5, true, 100).output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Incomplete none", "/b Incomplete none", "/c Incomplete none"]);
    assert!(stage.finished.iter().all(|done| done.exchange.note == Some(note::PIPELINE_UNSEEN)));
    assert!(stage.finished.iter().all(|done| done.lost == 0));
}

/// Whatever the kernel side takes for a beginning ends in one of the counters; the stage checks the sum.
#[test]
fn every_beginning_is_accounted_for() {
    let mut stage = Stage::new();
    // Bytes that cannot be read; what reads like a request on a connection that is upgraded, or speaks otherwise.
    stage.accept(1, 5).unreadable(1, 10, 5, 200);
    stage.accept(1, 6).request(1, 11, 6, "/socket");
    stage.output(1, 11, 6, "HTTP/1.1 101 Switching Protocols\r\n\r\n");
    stage.input(1, 11, 6, "PING", flags::NEW_ACTIVATION);
    stage.accept(1, 7).input(1, 12, 7, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", flags::NEW_ACTIVATION);
    // Of a connection that was open before, only a whole line is believed.
    stage.known(1, 8).input(1, 13, 8, "POST", flags::NEW_ACTIVATION | flags::UNSEEN_ACCEPT);
    stage.input(1, 13, 8, " is what this text is about\r\n", 0);
    stage.known(1, 9).input(1, 14, 9, "GET", flags::NEW_ACTIVATION | flags::UNSEEN_ACCEPT);
    stage.input(1, 14, 9, " /split HTTP/1.1\r\n\r\n", 0).output(1, 14, 9, OK);
    stage.close(1, 11, 6).close(1, 14, 9);
    stage.gives(&["/socket Upgraded 0 after 0", "/split Complete 0 after 0"]);
    let counters = stage.counters();
    assert_eq!((counters.requests_discarded, counters.requests_pipelined), (5, 1));
}

#[test]
fn a_connection_that_was_open_before() {
    let mut stage = Stage::new();
    stage.known(1, 5);
    stage.input(1, 10, 5, &GET.replace("PATH", "/a"), flags::NEW_ACTIVATION | flags::UNSEEN_ACCEPT);
    stage.samples(1, 10, 2).output(1, 10, 5, OK).close(1, 10, 5);
    stage.gives(&["/a Complete 2 after 0"]);
    assert!(stage.finished.iter().all(|f| f.exchange.outcome == Outcome::Complete));
}
