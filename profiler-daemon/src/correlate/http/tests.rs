//! The corner cases, one by one, through the kernel side's capture rule or as bare pieces.

use proptest::prelude::*;

use super::kernel::{Captured, Kernel};
use super::partial::PARTIAL_MAX;
use super::{Connection, Direction, Event, Exchange, Method, Protocol, note};
use crate::record::Outcome::{self, *};

const THREAD: u32 = 7;

/// One connection and what came out of it. The clock advances by 10 with every transfer, from 10.
struct Run {
    connection: Connection,
    kernel: Kernel,
    time: u64,
    done: Vec<Exchange>,
    /// Everything but `Finished`, in short.
    log: Vec<String>,
}

impl Run {
    fn new() -> Self {
        Self::on(Connection::accepted())
    }

    fn on(connection: Connection) -> Self {
        Self { connection, kernel: Kernel::default(), time: 0, done: Vec::new(), log: Vec::new() }
    }

    fn act(&mut self, act: impl FnOnce(&mut Connection, &mut dyn FnMut(Event))) -> &mut Self {
        let (done, log) = (&mut self.done, &mut self.log);
        act(&mut self.connection, &mut |event| match event {
            Event::Started { seq, time, activation, .. } => {
                log.push(format!("start {seq} at {time} in {activation}"))
            }
            Event::Discarded { seq } => log.push(format!("discard {seq}")),
            Event::Activation { seq, activation } => log.push(format!("activation {seq} {activation}")),
            Event::Unseen => log.push("unseen".into()),
            Event::Unowned => log.push("unowned".into()),
            Event::Verdict(protocol) => log.push(format!("{protocol:?}")),
            Event::Finished(exchange) => done.push(exchange),
        });
        self
    }

    fn feed(&mut self, pieces: Vec<Captured>) -> &mut Self {
        for piece in pieces {
            self.act(|connection, sink| connection.piece(&piece.piece(), sink));
        }
        self
    }

    fn transfer(&mut self, direction: Direction, bytes: &[u8], tid: u32) -> &mut Self {
        self.time += 10;
        let pieces = self.kernel.transfer(direction, bytes, self.time, tid);
        self.feed(pieces)
    }

    fn input(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.transfer(Direction::In, bytes.as_ref(), THREAD)
    }

    fn output(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.transfer(Direction::Out, bytes.as_ref(), THREAD)
    }

    /// As `input` or `output`, of which the record is lost; the next one says so.
    fn lose(&mut self, direction: Direction, bytes: &str) -> &mut Self {
        self.time += 10;
        let lost = self.kernel.transfer(direction, bytes.as_bytes(), self.time, THREAD).len();
        self.time += 10;
        let next = match direction {
            Direction::In => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            Direction::Out => "GET /next HTTP/1.1\r\n\r\n",
        };
        let other = if direction == Direction::In { Direction::Out } else { Direction::In };
        let mut pieces = self.kernel.transfer(other, next.as_bytes(), self.time, THREAD);
        pieces[0].lost = lost as u32;
        self.feed(pieces)
    }

    fn close(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.close(time, sink))
    }

    fn reset(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.reset(time, sink))
    }

    fn exit(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.exit(time, sink))
    }

    fn idle(&mut self) -> &mut Self {
        self.act(Connection::idle)
    }

    /// `METHOD path status outcome start..end` of what is finished.
    fn lines(&self) -> Vec<String> {
        let line = |x: &Exchange| {
            let head =
                x.head.as_ref().map_or("?".to_owned(), |h| format!("{} {}", h.method.as_str(), h.path));
            let status = x.status.map_or("-".to_owned(), |s| s.to_string());
            format!("{head} {status} {} {}..{}", x.outcome.name(), x.start, x.end)
        };
        self.done.iter().map(line).collect()
    }

    #[track_caller]
    fn gives(&self, lines: &[&str]) {
        assert_eq!(self.lines(), lines);
    }
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

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

    let mut run = Run::new();
    run.input("CONNECT db:5432 HTTP/1.1\r\n\r\n").output("HTTP/1.1 200 OK\r\n\r\n").input("\x16\x03").close();
    run.gives(&["CONNECT db:5432 200 upgraded 10..20"]);
    let mut run = Run::new();
    run.input("CONNECT db:5432 HTTP/1.1\r\n\r\n").output(OK.replace("200", "403")).input(GET).output(OK);
    run.gives(&["CONNECT db:5432 403 complete 10..20", "GET /a 200 complete 30..40"]);
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
}

#[test]
fn connection_ends_early() {
    for (end, outcome) in
        [(Run::close as fn(&mut Run) -> &mut Run, "aborted"), (Run::reset, "aborted"), (Run::exit, "exit")]
    {
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

#[test]
fn bodies_do_not_mislead() {
    let mut run = Run::new();
    run.input(format!("POST /1 HTTP/1.1\r\nContent-Length: {}\r\n\r\n", GET.len())).input(GET);
    run.output(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", OK.len())).output(OK);
    run.gives(&["POST /1 200 complete 10..40"]);
    // Chunked: not before it is answered.
    run.input("POST /2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        .input(GET)
        .output(OK)
        .input(GET)
        .output(OK);
    assert_eq!(run.lines()[1..], ["POST /2 200 complete 50..70", "GET /a 200 complete 80..90"]);
}

#[test]
fn response_before_the_body_is_read() {
    let mut run = Run::new();
    run.input("POST /up HTTP/1.1\r\nContent-Length: 8\r\n\r\nbo")
        .output(OK)
        .input("dyBODY")
        .input(GET)
        .output(OK);
    run.gives(&["POST /up 200 complete 10..20", "GET /a 200 complete 40..50"]);
}

#[test]
fn a_new_activation_belongs_to_the_open_request() {
    let mut run = Run::new();
    run.input("POST /up HTTP/1.1\r\nContent-Length: 8\r\n\r\n")
        .output("HTTP/1.1 200 OK\r\n")
        .input("POST")
        .input("POST");
    assert_eq!(run.log, ["start 0 at 10 in 1", "activation 0 2"]);
}

#[test]
fn targets_and_methods() {
    for (line, method, path) in [
        ("OPTIONS * HTTP/1.1", "OPTIONS", "*"),
        ("GET http://h:8/p/q?x#y HTTP/1.1", "GET", "/p/q"),
        ("GET http://h HTTP/1.1", "GET", "/"),
        ("GET HTTPS://h?x HTTP/1.1", "GET", "/"),
        ("GET /p?u=http://h/x HTTP/1.1", "GET", "/p"),
        ("GET /a#frag HTTP/1.0", "GET", "/a"),
        ("GET /%7euser HTTP/1.1", "GET", "/%7euser"),
        ("GET /a\u{7f}\u{1}b HTTP/1.1", "GET", "/a\u{fffd}\u{fffd}b"),
        ("GET /é HTTP/1.1", "GET", "/é"),
        ("X / HTTP/1.1", "X", "/"),
        ("BREW-IT /pot HTTP/1.1", "BREW-IT", "/pot"),
    ] {
        let mut run = Run::new();
        run.input(format!("{line}\r\n\r\n")).output(OK);
        run.gives(&[&format!("{method} {path} 200 complete 10..20")]);
        assert_eq!(run.done[0].request_bytes, line.len() as u64 + 4, "{line}");
    }
    let mut run = Run::new();
    run.input(b"GET /\xff\xfe HTTP/1.1\n\n").output(OK).gives(&["GET /\u{fffd}\u{fffd} 200 complete 10..20"]);
    for (unit, kept) in [("a", 1023), ("é", 511), ("€", 341)] {
        let mut run = Run::new();
        run.input(format!("GET /{} HTTP/1.1\r\n\r\n", unit.repeat(1100))).output(OK);
        let path = &run.done[0].head.as_ref().expect("seen").path;
        assert_eq!(**path, format!("/{}", unit.repeat(kept)));
    }
}

/// Where they are visible; whether the kernel side takes what follows for a beginning is its own business.
#[test]
fn empty_lines_before_a_request_are_skipped() {
    let mut run = Run::new();
    let first = run.kernel.transfer(Direction::In, GET.as_bytes(), 10, THREAD).remove(0);
    let bytes = [b"\r\n\n", GET.as_bytes()].concat();
    run.feed(vec![Captured { advance: bytes.len() as u64, bytes, ..first }]).output(OK);
    run.gives(&["GET /a 200 complete 10..10"]);
    assert_eq!(run.done[0].request_bytes, GET.len() as u64);
}

#[test]
fn what_is_not_http() {
    for (bytes, protocol) in [
        (&b"\x16\x03\x01\x02\x00\x01"[..], Protocol::Tls),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Protocol::Http2),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Protocol::NotHttp),
        (b"GET /old\r\n", Protocol::NotHttp),
        (b"GET / HTTP/3.0\r\n\r\n", Protocol::NotHttp),
        (b"AMQP\x00\x00\x09\x01", Protocol::NotHttp),
        (b"*1\r\n$4\r\nPING\r\n", Protocol::NotHttp),
    ] {
        let mut run = Run::new();
        run.input(bytes).input(GET).output(OK).close();
        assert_eq!((run.log, run.done), (vec![format!("{protocol:?}")], vec![]), "{bytes:?}");
    }
    // Byte by byte, what had been announced is withdrawn.
    let mut run = Run::new();
    for byte in "PRI * HTTP/2.0\r\n".bytes() {
        run.input([byte]);
    }
    assert_eq!(run.log, ["start 0 at 10 in 1", "discard 0", "Http2"]);
}

#[test]
fn malformed_after_a_good_request() {
    let mut run = Run::new();
    run.input(GET).output(OK).input("GET /\r\n\r\n").output(OK.replace("200", "400")).close();
    run.gives(&["GET /a 200 complete 10..20", "? 400 incomplete 30..40"]);
    assert_eq!(run.done[1].note, Some(note::MALFORMED));
}

#[test]
fn proxy_line_is_skipped() {
    let line = "PROXY TCP4 192.0.2.1 192.0.2.2 40000 80\r\n";
    let mut run = Run::new();
    run.input(format!("{line}{GET}")).output(OK).gives(&["GET /a 200 complete 10..20"]);
    assert_eq!(run.done[0].request_bytes, GET.len() as u64);
    let mut run = Run::new();
    run.input(&line[..9]).input(&line[9..]).input(GET).output(OK).gives(&["GET /a 200 complete 30..40"]);
    let mut run = Run::new();
    run.input("PROXY /x HTTP/1.1\r\n\r\n").output(OK).gives(&["PROXY /x 200 complete 10..20"]);
}

#[test]
fn unreadable_lengths() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n";
    let mut run = Run::new();
    run.input(GET).output(head).output("ok").input(GET).output(head).output("ok").idle();
    run.gives(&["GET /a 200 incomplete 10..30", "GET /a 200 incomplete 40..60"]);
    assert_eq!(run.done[0].note, Some(note::RESPONSE_FRAMING));
    // A list of equal numbers is one number.
    run.input(GET).output("HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok");
    assert_eq!(run.lines()[2..], ["GET /a 200 complete 70..80"]);
}

#[test]
fn long_heads() {
    let cookie = "c".repeat(5000);
    let mut run = Run::new();
    run.input(format!("GET /long HTTP/1.1\r\nCookie: {cookie}\r\n\r\n")).output(OK).input(GET).output(OK);
    run.gives(&["GET /long 200 complete 10..20", "GET /a 200 complete 30..40"]);
    assert_eq!((run.done[0].note, run.done[0].request_bytes), (Some(note::HEAD_CUT), 5032));
    // In small reads, all of it is visible.
    let mut run = Run::new();
    for part in format!("GET /long HTTP/1.1\r\nCookie: {cookie}\r\n\r\n").as_bytes().chunks(1000) {
        run.input(part);
    }
    run.output(OK).gives(&["GET /long 200 complete 10..70"]);
    assert_eq!(run.done[0].note, None);
    // A query of 5,000 bytes is not part of the path.
    let mut run = Run::new();
    run.input(format!("GET /q?{cookie} HTTP/1.1\r\n\r\n")).output(OK).gives(&["GET /q 200 complete 10..20"]);
    assert_eq!(run.done[0].head.as_ref().and_then(|head| head.minor), None);
}

#[test]
fn losses() {
    // The rest of a response, then the next request.
    let mut run = Run::new();
    run.input(GET).output(&OK[..39]).lose(Direction::Out, "o").output(OK);
    run.gives(&["GET /a 200 incomplete 10..20", "GET /next 200 complete 40..50"]);
    assert_eq!((run.done[0].note, run.done[0].lost), (Some(note::LOST), 1));
    // A whole request: its response is nobody's.
    let mut run = Run::new();
    run.input(GET).output(OK).lose(Direction::In, GET).input(GET).output(OK);
    run.gives(&["GET /a 200 complete 10..20", "GET /a 200 complete 50..60"]);
    // Part of the request's body: whether the response is its own is unknown.
    let mut run = Run::new();
    run.input("POST /up HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
        .lose(Direction::In, "ok")
        .input(GET)
        .output(OK);
    run.gives(&["POST /up - incomplete 10..30", "GET /a 200 complete 40..50"]);
}

#[test]
fn joined_connection_waits_for_a_request() {
    let mut run = Run::on(Connection::joined());
    // The record of its first request was lost.
    run.kernel.transfer(Direction::In, GET.as_bytes(), 0, THREAD);
    run.input("rest of a body")
        .output("rest of a response")
        .input("HELLO WORLD\r\n")
        .input(GET)
        .output(OK)
        .close();
    run.gives(&["GET /a 200 complete 40..50"]);
}

#[test]
fn idle_leaves_a_long_poll_alone() {
    let mut run = Run::new();
    run.input(GET).idle().gives(&[]);
    assert!(run.connection.is_open());
    assert_eq!(run.connection.last_activity(), 10);
}

/// Pieces that push the machine from state to state, and many that do not fit.
fn piece() -> impl Strategy<Value = Captured> {
    let text = prop::sample::select(vec![
        GET,
        OK,
        "G",
        "H",
        "HTTP/1.",
        "\r\n",
        "\r\n\r\n",
        "0\r\n\r\n",
        "GET\r\n",
        "PROXY TCP4 x\r\n",
        "PRI * HTTP/2.0\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
        "HTTP/1.1 200 OK\r\n\r\n",
        "Host: x\r\n",
    ]);
    let bytes = prop_oneof![
        5 => text.prop_map(|text| text.as_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..80),
        1 => (1..5000usize).prop_map(|len| vec![b'A'; len]),
    ];
    // One call transfers at most 2 GiB.
    let beyond = prop_oneof![4 => Just(0u64), 2 => 0..100u64, 1 => 0..1u64 << 31];
    let rest = (0..4u64, any::<bool>(), prop::bool::weighted(0.6), prop::bool::weighted(0.05), 0..=8usize);
    (bytes, beyond, rest).prop_map(|(bytes, beyond, (activation, begins, inward, lost, tail))| Captured {
        time: 0,
        tid: activation as u32,
        activation,
        begins,
        direction: if inward { Direction::In } else { Direction::Out },
        advance: bytes.len() as u64 + beyond,
        tail: bytes[bytes.len().saturating_sub(tail)..].to_vec(),
        bytes,
        lost: u32::from(lost),
        blind: lost,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nonsense_is_survived_within_bounds(pieces in proptest::collection::vec(piece(), 0..150), accepted: bool, end in 0..3usize) {
        let mut run = Run::on(if accepted { Connection::accepted() } else { Connection::joined() });
        for (time, mut piece) in pieces.into_iter().enumerate() {
            piece.time = time as u64;
            run.feed(vec![piece]);
            if time % 50 == 49 {
                run.idle();
            }
            prop_assert!(run.connection.requests().count() <= 64);
            prop_assert!(run.connection.buffered() <= 2 * 2 * PARTIAL_MAX, "twice for the growth of a vector");
        }
        run.time = 1000;
        let ends: [fn(&mut Run) -> &mut Run; 3] = [Run::close, Run::reset, Run::exit];
        ends[end](&mut run);
        prop_assert!(!run.connection.is_open());
        // Every request that started ended exactly once.
        let of = |word: &str| -> Vec<u64> {
            let lines = run.log.iter().filter_map(|line| line.strip_prefix(word)?.split(' ').next()?.parse().ok());
            lines.collect()
        };
        let mut ended: Vec<u64> = run.done.iter().map(|x| x.seq).chain(of("discard ")).collect();
        ended.sort_unstable();
        prop_assert_eq!(of("start "), ended);
        prop_assert!(run.done.iter().all(|x| x.start <= x.end && x.first_out.is_none_or(|t| x.start <= t && t <= x.end)));
        prop_assert!(run.done.iter().all(|x| x.outcome == Complete || x.note.is_some() || x.outcome == Upgraded));
    }
}
