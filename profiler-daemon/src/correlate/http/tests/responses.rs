//! Where a response ends, and what ends a connection before it does.

use super::run::{GET, OK, Run, THREAD};
use crate::correlate::http::{Connection, Direction, Method, note};
use crate::record::Outcome::*;

#[test]
fn one_request_tells_everything() {
    let mut run = Run::new();
    run.input("GET /a?secret=1 HTTP/1.1\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n");
    assert_eq!(run.log, ["start 0 at 10 in 1"]);
    let current = run.connection.current().expect("open");
    assert_eq!((current.seq, current.start, current.tid, current.activation), (0, 10, THREAD, 1));
    assert_eq!(current.head.map(|head| &head.method), Some(&Method::Get));
    run.transfer(Direction::Out, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", 8).output("ok");
    assert!(!run.connection.is_open());
    assert_eq!(run.log.len(), 1);
    let [exchange] = &run.done[..] else { panic!("one exchange") };
    let head = exchange.head.as_ref().expect("seen");
    assert_eq!(head.trace_id.expect("valid").to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!((exchange.start, exchange.first_out, exchange.end), (10, Some(20), 30));
    assert_eq!((exchange.request_bytes, exchange.response_bytes), (98, 40));
    assert!(exchange.handoff && !exchange.streaming);
    assert_eq!((exchange.tid, exchange.outcome, exchange.note, exchange.lost), (THREAD, Complete, None, 0));
}

#[test]
fn interim_responses_do_not_end_a_request() {
    let mut run = Run::new();
    run.input("POST /up HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        .output("HTTP/1.1 100 Continue\r\n\r\n")
        .input("body")
        .output("HTTP/1.1 103 Early Hints\r\nLink: </s>\r\n\r\n")
        .output(OK);
    run.gives(&["POST /up 200 complete 10..50"]);
    assert_eq!(run.done[0].first_out, Some(50));
}

#[test]
fn refused_expectation_leaves_no_body_behind() {
    let mut run = Run::new();
    run.input("POST /up HTTP/1.1\r\nContent-Length: 400\r\nExpect: 100-continue\r\n\r\n")
        .output("HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
        .input(GET)
        .output(OK);
    run.gives(&["POST /up 417 complete 10..20", "GET /a 200 complete 30..40"]);
}

#[test]
fn responses_without_body() {
    let long = "Content-Length: 500\r\n\r\n";
    let mut run = Run::new();
    run.input("HEAD /h HTTP/1.1\r\n\r\n").output(format!("HTTP/1.1 200 OK\r\n{long}"));
    run.input(GET).output(format!("HTTP/1.1 304 Not Modified\r\n{long}"));
    run.input(GET).output("HTTP/1.1 204 No Content\r\n\r\n");
    run.gives(&["HEAD /h 200 complete 10..20", "GET /a 304 complete 30..40", "GET /a 204 complete 50..60"]);
}

#[test]
fn upgrade_ends_http() {
    let mut run = Run::new();
    run.input("GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
        .output("HTTP/1.1 101 Switching Protocols\r\n\r\n");
    run.input("GET /no HTTP/1.1\r\n\r\n").output(OK).close();
    run.gives(&["GET /ws 101 upgraded 10..20"]);
    assert!(run.connection.is_over());

    // What the other protocol says is nobody's answer, also in the same write.
    let mut run = Run::new();
    run.input("GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n");
    run.output(b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x81\x02hi").output(b"\x81\x02ho").close();
    run.gives(&["GET /ws 101 upgraded 10..20"]);
    assert_eq!(run.log, ["start 0 at 10 in 1"]);

    let mut run = Run::new();
    run.input("CONNECT db:5432 HTTP/1.1\r\n\r\n").output("HTTP/1.1 200 OK\r\n\r\n").input("\x16\x03").close();
    run.gives(&["CONNECT db:5432 200 upgraded 10..20"]);
    let mut run = Run::new();
    run.input("CONNECT db:5432 HTTP/1.1\r\n\r\n").output(OK.replace("200", "403")).input(GET).output(OK);
    run.gives(&["CONNECT db:5432 403 complete 10..20", "GET /a 200 complete 30..40"]);
}

/// Of a write of several buffers the kernel side takes the tail at its end only.
#[test]
fn a_head_and_its_only_chunk_in_two_buffers_of_one_write() {
    let mut run = Run::new();
    run.input(GET);
    run.time += 10;
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut pieces = run.kernel.transfer(Direction::Out, head.as_bytes(), run.time, THREAD);
    assert_eq!((pieces.len(), pieces[0].bytes.len()), (1, head.len()));
    pieces[0].tail.clear();
    pieces.extend(run.kernel.transfer(Direction::Out, b"0\r\n\r\n", run.time, THREAD));
    run.feed(pieces).close().gives(&["GET /a 200 complete 10..20"]);
}

/// By sendfile: nothing of a body is in memory.
#[test]
fn bodies_that_are_no_bytes_of_the_process() {
    let mut run = Run::new();
    let sent = |run: &mut Run, bytes: &[u8]| {
        run.time += 10;
        let mut pieces = run.kernel.transfer(Direction::Out, bytes, run.time, THREAD);
        pieces.iter_mut().for_each(|piece| piece.tail.clear());
        run.feed(pieces);
    };
    run.input(GET).output("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n");
    sent(&mut run, &[0; 60]);
    sent(&mut run, &[0; 40]);
    run.gives(&["GET /a 200 complete 10..40"]);
    run.input(GET).output("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").output("64\r\n");
    sent(&mut run, &[0; 100]);
    run.output("\r\n0\r\n\r\n").act(Connection::flush);
    assert_eq!(run.lines()[1..], ["GET /a 200 complete 50..90"]);
}

/// It was cut before its path was over, but says that no body follows the answer.
#[test]
fn a_long_head_request_has_no_body_in_its_answer() {
    let mut run = Run::new();
    run.input(format!("HEAD /{} HTTP/1.1\r\n\r\n", "x".repeat(5000)));
    run.output("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n").input(GET).output(OK);
    run.gives(&["? 200 complete 10..20", "GET /a 200 complete 30..40"]);
}

#[test]
fn an_interim_response_and_the_final_one_in_one_write() {
    let mut run = Run::new();
    run.input(GET).output(format!("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n{OK}"));
    run.gives(&["GET /a 200 complete 10..20"]);
    assert_eq!(run.done[0].first_out, Some(20));
}

#[test]
fn a_reset_within_chunks() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut run = Run::new();
    run.input(GET).output(format!("{head}5\r\nhel")).reset();
    run.gives(&["GET /a 200 aborted 10..20"]);
    assert_eq!(run.done[0].note, Some(note::RESPONSE_CUT));
    let mut run = Run::new();
    run.input(GET).output(format!("{head}0\r\n\r\n")).reset();
    run.gives(&["GET /a 200 complete 10..20"]);
}

#[test]
fn chunked_response_ends_at_its_last_chunk() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut run = Run::new();
    run.input(GET).output(head).output("2\r\nok\r\n").output("0\r\n\r\n");
    run.gives(&[]);
    run.act(Connection::flush).gives(&["GET /a 200 complete 10..40"]);
    // Data that looks like the end: it goes on.
    run.input(GET).output(format!("{head}7\r\n\r\n0\r\n\r\n")).output("\r\n0\r\n\r\n").idle();
    assert_eq!(run.lines()[1..], ["GET /a 200 complete 50..70"]);
    // Ends by the next request.
    run.input(GET).output(format!("{head}0\r\n\r\n")).input(GET).output(OK);
    assert_eq!(run.lines()[2..], ["GET /a 200 complete 80..90", "GET /a 200 complete 100..110"]);
}

#[test]
fn chunked_trailers() {
    let body = "2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n";
    let announced = "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\nTrailer: X-Sum\r\n\r\n";
    let mut run = Run::new();
    run.input(GET).output(format!("{announced}{body}")).close().gives(&["GET /a 200 complete 10..20"]);
    // Not announced: text chunks end so too.
    let silent = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut run = Run::new();
    run.input(GET).output(format!("{silent}{body}")).input(GET).output(format!("{silent}{body}")).close();
    run.gives(&["GET /a 200 complete 10..20", "GET /a 200 incomplete 30..40"]);
    assert_eq!(run.done[1].note, Some(note::RESPONSE_END));
}

#[test]
fn chunked_response_cut_off() {
    let mut run = Run::new();
    run.input(GET).output("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel").close();
    run.gives(&["GET /a 200 aborted 10..20"]);
    assert_eq!(run.done[0].note, Some(note::RESPONSE_CUT));
}

#[test]
fn body_until_close() {
    let head = "HTTP/1.0 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n";
    let start = || {
        let mut run = Run::new();
        run.input("GET /s HTTP/1.0\r\n\r\n")
            .output(head)
            .output("data: 1\n\n")
            .output("HTTP/1.1 200 OK\r\n\r\n");
        run.idle().gives(&[]);
        run
    };
    let mut run = start();
    run.close().gives(&["GET /s 200 complete 10..40"]);
    assert!(run.done[0].streaming);
    start().reset().gives(&["GET /s 200 aborted 10..40"]);
    start().exit().gives(&["GET /s 200 exit 10..40"]);
    start().stop().gives(&["GET /s 200 incomplete 10..40"]);
}

#[test]
fn connection_ends_early() {
    for (end, outcome) in [
        (Run::close as fn(&mut Run) -> &mut Run, "aborted"),
        (Run::reset, "aborted"),
        (Run::exit, "exit"),
        (Run::stop, "incomplete"),
    ] {
        let mut run = Run::new();
        end(run.input(GET)).gives(&[&format!("GET /a - {outcome} 10..20")]);
        let mut run = Run::new();
        end(run.input(GET).output(&OK[..OK.len() - 1])).gives(&[&format!("GET /a 200 {outcome} 10..20")]);
        let mut run = Run::new();
        end(run.input(GET).output("HTTP/1.1 100 Continue\r\n\r\n"))
            .gives(&[&format!("GET /a - {outcome} 10..30")]);
        let mut run = Run::new();
        end(run.input(GET).output(OK)).gives(&["GET /a 200 complete 10..20"]);
    }
    let mut run = Run::new();
    run.input("GET /slow HTTP/1.1\r\nHo").close().gives(&["GET /slow - aborted 10..20"]);
    assert_eq!(run.done[0].note, Some(note::HEAD_PARTIAL));
}

/// A server may answer what it takes for a request (HTTP/0.9) or is tired of waiting for (408).
#[test]
fn an_answer_to_half_a_head_does_not_complete_it() {
    let mut run = Run::new();
    run.input("GET /x").output(OK).close();
    assert_eq!((run.done[0].outcome, &run.done[0].head), (Incomplete, &None));
    assert_eq!((run.done[0].status, run.done[0].note), (Some(200), Some(note::HEAD_PARTIAL)));
    let mut run = Run::new();
    run.input("GET /slow HTTP/1.1\r\nHo").output(OK).close().gives(&["GET /slow 200 incomplete 10..20"]);
}
