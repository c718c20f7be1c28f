//! Random conversations against the whole state machine: written to bytes by a writer that shares nothing with the
//! parser, split at random, seen through the kernel side's capture rule, and compared with the writer's account.

use proptest::prelude::*;

use super::kernel::{Captured, Kernel};
use super::{Connection, Direction, Event, Exchange};
use crate::record::Outcome;

#[derive(Clone, Debug)]
enum Body {
    None,
    Length(Vec<u8>),
    Chunked { chunks: Vec<Vec<u8>>, trailer: bool },
    UntilClose(Vec<u8>),
}

#[derive(Clone, Debug)]
struct Talk {
    method: &'static str,
    path: String,
    /// What surrounds the path in the request line.
    form: usize,
    query: bool,
    bare_lf: bool,
    request: Body,
    /// Where the response comes: before so many bytes of the request's body; otherwise after it.
    early: Option<usize>,
    interim: Vec<u16>,
    status: u16,
    response: Body,
    handoff: bool,
}

/// A conversation and how it is cut.
#[derive(Clone, Debug)]
struct Script {
    /// Requests in one batch are pipelined.
    batches: Vec<Vec<Talk>>,
    sizes: Vec<usize>,
    /// Responses without a body share a write.
    merges: bool,
    /// Bytes of the last response that are written, if not all.
    cut: Option<usize>,
}

/// A body, with what a careless parser would take for something else.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        4 => proptest::collection::vec(any::<u8>(), 0..60),
        1 => Just(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n".to_vec()),
        1 => Just(b"GET /body HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        1 => Just(b"POST".to_vec()),
        1 => Just(b"line\r\n\r\n".to_vec()),
        1 => proptest::collection::vec(b'A'..=b'Z', 1..9000),
    ];
    proptest::collection::vec(part, 1..4)
        .prop_map(|parts| parts.concat())
        .prop_filter("empty", |b| !b.is_empty())
}

/// Chunks for a connection with pipelining: there, a chunk that ends like a message before one that begins like
/// another cannot be told from two responses.
fn plain() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(b'a'..=b'z', 1..5000)
}

fn chunked(chunk: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Body> {
    (proptest::collection::vec(chunk, 0..4), any::<bool>())
        .prop_map(|(chunks, trailer)| Body::Chunked { chunks, trailer })
}

fn request_body(last: bool) -> BoxedStrategy<Body> {
    let simple = prop_oneof![4 => Just(Body::None), 2 => content().prop_map(Body::Length)];
    // What follows a chunked request before its response is not to be told from its body.
    if last { prop_oneof![5 => simple, 1 => chunked(content())].boxed() } else { simple.boxed() }
}

fn response_body(alone: bool) -> BoxedStrategy<Body> {
    let simple = prop_oneof![1 => Just(Body::None), 4 => content().prop_map(Body::Length)];
    if alone {
        prop_oneof![3 => simple, 2 => chunked(content())].boxed()
    } else {
        prop_oneof![3 => simple, 2 => chunked(plain())].boxed()
    }
}

fn talk(alone: bool, last: bool) -> impl Strategy<Value = Talk> {
    let method = prop::sample::select(vec![
        "GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "M-SEARCH", "X",
    ]);
    let line = (method, "/[a-z0-9%._/-]{0,30}", 0..3usize, any::<bool>(), any::<bool>());
    let early = proptest::option::weighted(0.2, 0..200usize);
    let interim = proptest::collection::vec(prop::sample::select(vec![100u16, 102, 103]), 0..2);
    let status = prop::sample::select(vec![200u16, 200, 200, 201, 204, 304, 404, 500]);
    let answer = (request_body(last), early, interim, status, response_body(alone), any::<bool>());
    (line, answer).prop_map(
        move |(
            (method, path, form, query, bare_lf),
            (request, early, interim, status, response, handoff),
        )| {
            let early = early.filter(|_| alone && matches!(request, Body::Length(_)));
            let response = match (status, response) {
                (204 | 304, Body::Chunked { .. }) => Body::None,
                (_, body) => body,
            };
            Talk { method, path, form, query, bare_lf, request, early, interim, status, response, handoff }
        },
    )
}

fn batch() -> impl Strategy<Value = Vec<Talk>> {
    prop_oneof![
        3 => talk(true, true).prop_map(|talk| vec![talk]),
        1 => (proptest::collection::vec(talk(false, false), 1..5), talk(false, true))
            .prop_map(|(mut talks, last)| { talks.push(last); talks }),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    let sizes = proptest::collection::vec(prop_oneof![1..2usize, 1..8usize, 8..60usize, 60..9000usize], 1..8);
    let last = (talk(true, true), content(), 0..3usize);
    (proptest::collection::vec(batch(), 0..5), last, sizes, any::<bool>(), 0..10_000usize).prop_map(
        |(mut batches, (mut last, body, end), sizes, merges, cut)| {
            let mut written = None;
            if end > 0 {
                (last.status, last.early, last.interim) = (200, None, Vec::new());
                if last.method == "HEAD" {
                    last.method = "GET";
                }
                last.response = if end == 1 { Body::UntilClose(body) } else { Body::Length(body) };
                written = (end == 2).then_some(cut);
            }
            batches.push(vec![last]);
            Script { batches, sizes, merges, cut: written }
        },
    )
}

impl Body {
    fn header(&self, lf: &str) -> String {
        match self {
            Body::None => format!("Content-Length: 0{lf}"),
            Body::Length(bytes) => format!("Content-Length: {}{lf}", bytes.len()),
            Body::Chunked { trailer: true, .. } => {
                format!("Transfer-Encoding: chunked{lf}Trailer: X-Sum{lf}")
            }
            Body::Chunked { .. } => format!("Transfer-Encoding: chunked{lf}"),
            Body::UntilClose(_) => String::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Body::None => Vec::new(),
            Body::Length(bytes) | Body::UntilClose(bytes) => bytes.clone(),
            Body::Chunked { chunks, trailer } => {
                let mut out = Vec::new();
                for chunk in chunks {
                    out.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
                    out.extend(chunk);
                    out.extend(b"\r\n");
                }
                out.extend(if *trailer { &b"0\r\nX-Sum: 1\r\n\r\n"[..] } else { &b"0\r\n\r\n"[..] });
                out
            }
        }
    }
}

impl Talk {
    fn bodiless(&self) -> bool {
        self.method == "HEAD" || matches!(self.status, 204 | 304)
    }

    fn request_head(&self) -> Vec<u8> {
        let lf = if self.bare_lf { "\n" } else { "\r\n" };
        let query = if self.query { "?secret=HTTP/1.1" } else { "" };
        let target = match (self.form, self.method) {
            (1, _) => format!("http://example.org:80{}{query}", self.path),
            (2, "OPTIONS") => "*".to_owned(),
            _ => format!("{}{query}", self.path),
        };
        let body = if matches!(self.request, Body::None) { String::new() } else { self.request.header(lf) };
        format!("{} {target} HTTP/1.1{lf}Host: example.org{lf}{body}Accept: */*{lf}{lf}", self.method)
            .into_bytes()
    }

    fn expected_path(&self) -> &str {
        if self.form == 2 && self.method == "OPTIONS" { "*" } else { &self.path }
    }

    fn response_head(&self) -> Vec<u8> {
        let lf = if self.bare_lf { "\n" } else { "\r\n" };
        format!("HTTP/1.1 {} Some Reason{lf}{}Server: s{lf}{lf}", self.status, self.response.header(lf))
            .into_bytes()
    }
}

/// What went over the wire, in transfers.
struct Wire {
    sizes: Vec<usize>,
    turn: usize,
    transfers: Vec<(Direction, Vec<u8>, u32)>,
}

/// A place in the stream of one direction.
type Offset = usize;

impl Wire {
    fn offset(&self, direction: Direction) -> Offset {
        self.transfers.iter().filter(|t| t.0 == direction).map(|t| t.1.len()).sum()
    }

    /// Writes `bytes` in transfers of their own, and returns where they begin.
    fn write(&mut self, direction: Direction, bytes: &[u8], tid: u32) -> Offset {
        let begin = self.offset(direction);
        let mut rest = bytes;
        while !rest.is_empty() {
            let size = self.sizes[self.turn % self.sizes.len()].min(rest.len());
            self.turn += 1;
            self.transfers.push((direction, rest[..size].to_vec(), tid));
            rest = &rest[size..];
        }
        begin
    }

    /// The time of the transfer that holds this byte.
    fn time(&self, direction: Direction, at: Offset) -> u64 {
        let mut end = 0;
        let index = self.transfers.iter().position(|t| {
            end += if t.0 == direction { t.1.len() } else { 0 };
            t.0 == direction && at < end
        });
        time_of(index.expect("a byte that was written"))
    }
}

fn time_of(transfer: usize) -> u64 {
    1000 + transfer as u64
}

/// What an exchange must be, as far as the script knows.
#[derive(Clone, Debug, PartialEq)]
struct Account {
    start: u64,
    first_out: Option<u64>,
    end: u64,
    method: String,
    path: String,
    status: Option<u16>,
    request_bytes: u64,
    response_bytes: u64,
    outcome: Outcome,
    handoff: bool,
}

impl From<&Exchange> for Account {
    fn from(exchange: &Exchange) -> Self {
        let head = exchange.head.as_ref();
        Account {
            start: exchange.start,
            first_out: exchange.first_out,
            end: exchange.end,
            method: head.map_or(String::new(), |head| head.method.as_str().to_owned()),
            path: head.map_or(String::new(), |head| head.path.to_string()),
            status: exchange.status,
            request_bytes: exchange.request_bytes,
            response_bytes: exchange.response_bytes,
            outcome: exchange.outcome,
            handoff: exchange.handoff,
        }
    }
}

/// Places of one exchange.
struct Marks {
    request: Offset,
    request_bytes: usize,
    interim_bytes: usize,
    response: Offset,
    response_bytes: usize,
}

const READER: u32 = 7;
const WRITER: u32 = 8;

/// Performs the script: the transfers, the pieces seen, the time of the close, and the account of every exchange.
fn perform(script: &Script) -> (Vec<Captured>, u64, Vec<Account>) {
    let mut wire = Wire { sizes: script.sizes.clone(), turn: 0, transfers: Vec::new() };
    let mut marks: Vec<Marks> = Vec::new();
    let last = script.batches.len() - 1;
    for (number, batch) in script.batches.iter().enumerate() {
        let first = marks.len();
        // A head that follows a body in one transfer is invisible, so each body ends a transfer.
        let mut pending = Vec::new();
        let mut late = Vec::new();
        for talk in batch {
            let (head, body) = (talk.request_head(), talk.request.bytes());
            let sent = talk.early.map_or(body.len(), |early| early.min(body.len()));
            let request = wire.offset(Direction::In) + pending.len();
            pending.extend(&head);
            pending.extend(&body[..sent]);
            late = body[sent..].to_vec();
            if !body.is_empty() {
                wire.write(Direction::In, &pending, READER);
                pending.clear();
            }
            // Body bytes after a finished response are nobody's; while a chunked one may go on, they still count.
            let open_ended = matches!(talk.response, Body::Chunked { .. }) && !talk.bodiless();
            let counted = if open_ended { body.len() } else { sent };
            let request_bytes = head.len() + counted;
            marks.push(Marks { request, request_bytes, interim_bytes: 0, response: 0, response_bytes: 0 });
        }
        wire.write(Direction::In, &pending, READER);
        let mut pending = Vec::new();
        for (talk, marks) in batch.iter().zip(&mut marks[first..]) {
            let tid = if talk.handoff { WRITER } else { READER };
            for status in &talk.interim {
                let bytes = format!("HTTP/1.1 {status} Soon\r\nLink: </x>\r\n\r\n").into_bytes();
                marks.interim_bytes += bytes.len();
                wire.write(Direction::Out, &bytes, tid);
            }
            let mut bytes = talk.response_head();
            if !talk.bodiless() {
                bytes.extend(talk.response.bytes());
            }
            if let Some(cut) = script.cut.filter(|_| number == last) {
                bytes.truncate(cut % bytes.len());
            }
            marks.response_bytes = bytes.len();
            // The kernel side looks for a second response behind a head.
            let merges =
                script.merges && talk.bodiless() && batch.iter().all(|t| t.interim.is_empty() && !t.handoff);
            if merges {
                marks.response = wire.offset(Direction::Out) + pending.len();
                pending.extend(bytes);
            } else {
                let before = pending.len();
                pending.extend(bytes);
                marks.response = wire.write(Direction::Out, &pending, tid) + before;
                pending.clear();
            }
        }
        wire.write(Direction::Out, &pending, READER);
        wire.write(Direction::In, &late, READER);
    }
    let close = time_of(wire.transfers.len());
    let talks: Vec<&Talk> = script.batches.iter().flatten().collect();
    let accounts = talks.iter().zip(&marks).enumerate().map(|(index, (talk, marks))| {
        let cut = script.cut.is_some() && index == talks.len() - 1;
        let begun = marks.response_bytes > 0;
        let head_written = marks.response_bytes >= talk.response_head().len();
        Account {
            start: wire.time(Direction::In, marks.request),
            first_out: begun.then(|| wire.time(Direction::Out, marks.response)),
            end: if begun {
                wire.time(Direction::Out, marks.response + marks.response_bytes - 1)
            } else {
                close
            },
            method: talk.method.to_owned(),
            path: talk.expected_path().to_owned(),
            status: (!cut || head_written).then_some(talk.status),
            request_bytes: marks.request_bytes as u64,
            response_bytes: (marks.interim_bytes + marks.response_bytes) as u64,
            outcome: if cut { Outcome::Aborted } else { Outcome::Complete },
            handoff: talk.handoff && marks.interim_bytes + marks.response_bytes > 0,
        }
    });
    let accounts = accounts.collect();
    let mut kernel = Kernel::default();
    let transfers = wire.transfers.iter().enumerate();
    let pieces =
        transfers.flat_map(|(i, (dir, bytes, tid))| kernel.transfer(*dir, bytes, time_of(i), *tid)).collect();
    (pieces, close, accounts)
}

fn exchanges(pieces: &[Captured], close: u64) -> Vec<Exchange> {
    let mut done = Vec::new();
    let mut sink = |event: Event| {
        if let Event::Finished(exchange) = event {
            done.push(exchange);
        }
    };
    let mut connection = Connection::accepted();
    for piece in pieces {
        connection.piece(&piece.piece(), &mut sink);
    }
    connection.close(close, &mut sink);
    done
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, max_shrink_iters: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_exchange_is_found_exactly(script in script()) {
        let (pieces, close, accounts) = perform(&script);
        let done = exchanges(&pieces, close);
        let found: Vec<Account> = done.iter().map(Account::from).collect();
        prop_assert_eq!(found, accounts);
        prop_assert!(done.iter().enumerate().all(|(i, exchange)| exchange.seq == i as u64 && exchange.lost == 0));
    }

    /// With records lost, what is still called complete is true in all that is said of it.
    #[test]
    fn complete_is_true_after_a_loss(
        mut script in script(),
        losses in proptest::collection::vec(0..1000usize, 1..6),
    ) {
        for batch in &mut script.batches {
            // Without pipelining and early responses, which make some losses invisible.
            batch.truncate(1);
            batch[0].early = None;
        }
        let (mut pieces, close, accounts) = perform(&script);
        for loss in losses {
            if pieces.len() > 1 {
                let at = loss % (pieces.len() - 1);
                let gone = pieces.remove(at);
                pieces[at].lost += gone.lost + 1;
            }
        }
        for exchange in exchanges(&pieces, close) {
            let mut found = Account::from(&exchange);
            if exchange.outcome != Outcome::Complete {
                continue;
            }
            let account = accounts.iter().find(|account| account.start == found.start);
            prop_assert!(account.is_some(), "no request began at {}", found.start);
            let account = account.cloned().expect("checked");
            if exchange.lost > 0 {
                // Gaps are admitted for what is counted.
                (found.request_bytes, found.response_bytes) = (account.request_bytes, account.response_bytes);
                found.handoff = account.handoff;
            }
            prop_assert_eq!(found, account);
        }
    }
}
