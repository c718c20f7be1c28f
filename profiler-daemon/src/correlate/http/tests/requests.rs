//! Where a request begins and what of it is its body; what is none; what was missed.

use super::run::{GET, OK, Run, THREAD};
use crate::correlate::http::{Connection, Direction, Protocol, note};

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
        run.input(format!("\r\n{line}\r\n\r\n")).output(OK);
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
        // Requests of a kind, which the kernel side does not follow.
        (b"get /x HTTP/1.1\r\n\r\n", Protocol::NotHttp),
        (b"G3T /x HTTP/1.1\r\n\r\n", Protocol::NotHttp),
        (b"DELETE x HTTP/1.1\r\n\r\n", Protocol::NotHttp),
        (b"\nGET /x HTTP/1.1\r\n\r\n", Protocol::NotHttp),
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

/// RFC 9112, 2.2: a server ignores at least one empty line before a request line. Some clients send one after a body.
#[test]
fn an_empty_line_before_a_request_does_not_hide_it() {
    let get = format!("\r\n{GET}");
    let mut run = Run::new();
    run.input(&get).output(OK).input(&get).output(OK);
    run.gives(&["GET /a 200 complete 10..20", "GET /a 200 complete 30..40"]);
    assert_eq!(run.done[0].request_bytes, GET.len() as u64);

    // Behind a body whose end cannot be seen.
    let mut run = Run::new();
    run.input("POST /p HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").input("1\r\nx\r\n0\r\n\r\n");
    run.output(OK).input(&get).output(OK);
    run.gives(&["POST /p 200 complete 10..30", "GET /a 200 complete 40..50"]);

    // On a connection that was open before, and after a loss.
    let mut run = Run { connection: Connection::joined(), ..Run::new() };
    run.input(&get).output(OK).gives(&["GET /a 200 complete 10..20"]);
    let mut run = Run::new();
    run.input(GET).output(OK).lose(Direction::Out, "x");
    let before = run.done.len();
    run.input(&get).output(OK);
    assert!(run.done.len() > before, "{:?}", run.lines());
    // The empty line in a transfer of its own, and one that is cut.
    let mut run = Run::new();
    run.input("\r\n").input(GET).output(OK).input("\r").input("\n").input(GET).output(OK);
    assert_eq!(run.done.len(), 2, "{:?}", run.lines());
}
