//! Several requests at a time on one connection.

use super::run::{GET, OK, Run};
use crate::correlate::http::note;
use crate::record::Outcome::{self, *};

#[test]
fn pipelined_in_one_read() {
    let mut run = Run::new();
    run.input("GET /1 HTTP/1.1\r\n\r\nHEAD /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\n\r\n");
    assert_eq!(run.connection.requests().map(|r| r.activation).collect::<Vec<_>>(), [1, 1, 1]);
    run.output(OK).output("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n").output(OK);
    run.gives(&["GET /1 200 complete 10..20", "HEAD /2 200 complete 10..30", "GET /3 200 complete 10..40"]);
}

#[test]
fn two_responses_in_one_write_of_which_one_is_invisible() {
    let mut run = Run::new();
    run.input("GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n")
        .output(format!("{OK}{OK}"))
        .input(GET)
        .output(OK);
    run.gives(&["GET /1 200 complete 10..20", "GET /2 - incomplete 10..20", "GET /a 200 complete 30..40"]);
    assert_eq!((run.done[1].response_bytes, run.done[1].note), (40, Some(note::RESPONSE_UNSEEN)));
}

#[test]
fn three_responses_in_one_write_leave_a_doubt_that_passes() {
    let mut run = Run::new();
    let three = "GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\n\r\n";
    run.input(three).output(format!("{OK}{OK}{OK}")).input(GET).output(OK).input(GET).output(OK);
    let outcomes: Vec<(Outcome, Option<u16>)> = run.done.iter().map(|x| (x.outcome, x.status)).collect();
    let unknown = (Incomplete, None);
    assert_eq!(outcomes, [(Complete, Some(200)), unknown, unknown, unknown, (Complete, Some(200))]);
}

#[test]
fn request_hidden_behind_a_body_is_counted() {
    let mut run = Run::new();
    run.input(format!("POST /1 HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody{GET}")).output(OK).output(OK);
    run.gives(&["POST /1 200 complete 10..20"]);
    assert_eq!(run.log[1..2], ["unseen"]);
    run.input(GET).output(OK);
    assert_eq!(run.lines()[1..], ["GET /a 200 complete 40..50"]);
    // Pipelined with another, whose response is then unknown.
    run.input(format!("POST /1 HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody{GET}"))
        .input(GET)
        .output(OK)
        .output(OK);
    assert_eq!(run.lines()[2..], ["POST /1 200 complete 60..80", "GET /a - incomplete 70..90"]);
}

#[test]
fn too_many_pipelined_requests() {
    let mut run = Run::new();
    for _ in 0..70 {
        run.input(GET);
    }
    assert_eq!(run.connection.requests().count(), 64);
    assert_eq!(run.done.len(), 6);
    assert!(run.done.iter().all(|x| x.outcome == Incomplete && x.note == Some(note::PIPELINE_LIMIT)));
    for _ in 0..70 {
        run.output(OK);
    }
    let complete: Vec<u64> = run.done.iter().filter(|x| x.outcome == Complete).map(|x| x.seq).collect();
    assert_eq!(complete, (0..63).collect::<Vec<_>>());
    run.input(GET).output(OK);
    assert_eq!(run.done.last().map(|x| (x.seq, x.outcome, x.status)), Some((70, Complete, Some(200))));
}
