//! The request side: finds where requests begin in the received bytes, and what of them is head and body.

use memchr::memchr;

use super::connection::{Connection, Doubt, OPEN_MAX, Open};
use super::head::{self, BadLine, Framing, Method};
use super::outbound::Output;
use super::partial::Progress;
use super::tail::Ending;
use super::{Event, Piece, Protocol, Sink, note};
use crate::record::Outcome;

/// The PROXY protocol's first version: a line of at most 107 bytes before the first request.
const PROXY_LINES: [&[u8]; 2] = [b"PROXY TCP", b"PROXY UNKNOWN"];

/// What the next received byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The first byte of a request.
    Expect,
    /// Within the newest request's head.
    Head,
    /// Within the newest request's body; `untouched` until its first byte.
    Body { left: u64, untouched: bool },
    /// Within the newest request's body, whose end cannot be seen: chunked, or its head was longer than captured.
    Opaque,
    /// Anything: something was missed. Only a whole request line is taken for one.
    Resync,
    /// Anything: records were lost, so even what reads like a request line may be the rest of one. It must be what
    /// the kernel side took for a beginning.
    Lost,
    /// As `Opaque` or `Resync`, after bytes that may become a request line.
    Maybe { since: Origin, owned: bool },
    /// Nothing of ours: another protocol, or over.
    Foreign,
}

/// Where a request began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    time: u64,
    tid: u32,
    activation: u64,
}

impl Connection {
    pub(super) fn receive(&mut self, piece: &Piece<'_>, sink: Sink<'_>) {
        let origin = Origin { time: piece.time, tid: piece.tid, activation: piece.activation };
        let mut seen = piece.captured;
        let hidden = piece.advance.saturating_sub(seen.len() as u64);
        // Every turn consumes visible bytes or returns, except `Body`, which ends in `Expect`.
        loop {
            match self.input {
                Input::Foreign => return,
                Input::Expect => {
                    seen = without_empty_lines(seen);
                    if seen.is_empty() {
                        // So are invisible ones.
                        if hidden > 2 || (piece.blind && hidden > 0) {
                            self.unseen(sink);
                        }
                        return;
                    }
                    seen = self.begin(origin, seen, hidden, sink);
                }
                Input::Head => {
                    if seen.is_empty() {
                        if hidden == 0 {
                            return;
                        }
                        self.cut_newest();
                        continue;
                    }
                    self.belongs(origin, sink);
                    seen = self.read_on(seen, hidden, sink);
                }
                Input::Body { left, .. } => {
                    let taken = left.min(seen.len() as u64 + hidden);
                    if taken == 0 {
                        return;
                    }
                    self.belongs(origin, sink);
                    if let Some(newest) = self.newest() {
                        newest.request_bytes += taken;
                    }
                    if taken < left {
                        self.input = Input::Body { left: left - taken, untouched: false };
                        return;
                    }
                    self.input = Input::Expect;
                    let shown = taken.min(seen.len() as u64);
                    seen = &seen[shown as usize..];
                    let beyond = hidden - (taken - shown);
                    if seen.is_empty() {
                        if beyond > 2 || (piece.blind && beyond > 0) {
                            self.unseen(sink);
                        }
                        return;
                    }
                }
                Input::Opaque | Input::Resync | Input::Lost => {
                    let owned = self.input == Input::Opaque;
                    let may_begin = if owned { self.may_begin_in_body() } else { true };
                    let may_begin = may_begin && (self.input != Input::Lost || piece.begins);
                    let request = without_empty_lines(seen);
                    if may_begin && head::may_become_request(first_line(request)) {
                        if memchr(b'\n', request).is_some() {
                            if head::request_line_fits(request) {
                                self.input = Input::Expect;
                                continue;
                            }
                        } else if hidden == 0 {
                            self.request.push(request);
                            self.input = Input::Maybe { since: origin, owned };
                            return;
                        }
                    }
                    return self.swallow(origin, seen.len() as u64 + hidden, sink);
                }
                // The kernel side saw something else begin: a response was written in between.
                Input::Maybe { since, .. } if since.activation != origin.activation => self.forget_maybe(),
                Input::Maybe { since, .. } => {
                    let known = self.request.bytes().len();
                    let progress = self.request.push(seen);
                    let bytes = self.request.bytes();
                    if memchr(b'\n', bytes).is_some() && head::request_line_fits(bytes) {
                        self.request.truncate(known);
                        self.announce(since, known as u64, sink);
                        self.input = Input::Head;
                        continue;
                    }
                    let line = first_line(bytes);
                    let open = line.len() == bytes.len() && head::may_become_request(line);
                    if !open || hidden > 0 || progress == Progress::Full {
                        self.request.truncate(known);
                        self.forget_maybe();
                        self.swallow(origin, seen.len() as u64 + hidden, sink);
                    }
                    return;
                }
            }
        }
    }

    /// The first bytes of a request. Returns what is left of them.
    fn begin<'a>(&mut self, origin: Origin, seen: &'a [u8], hidden: u64, sink: Sink<'_>) -> &'a [u8] {
        if !self.proven {
            if let [0x16, 0x03, ..] = seen {
                self.verdict(Protocol::Tls, sink);
                return &[];
            }
            if !self.begun {
                // A request that it does not take for one: nothing more will be told of the connection.
                self.verdict(Protocol::NotHttp, sink);
                return &[];
            }
            if let Some(end) = proxy_line(seen) {
                return &seen[end..];
            }
        }
        let end = head::end(seen, 0);
        if end.is_none() && memchr(b'\n', seen).is_none() && !head::may_become_request(seen) {
            self.bad_line(BadLine::Malformed, Some((origin, seen.len() as u64 + hidden)), sink);
            return &[];
        }
        if let Some(end) = end {
            match head::parse_request(&seen[..end], true) {
                Ok(head) => {
                    self.announce(origin, end as u64, sink);
                    self.headed(head);
                    return &seen[end..];
                }
                Err(bad) => {
                    self.bad_line(bad, Some((origin, seen.len() as u64 + hidden)), sink);
                    return &[];
                }
            }
        }
        if let Some(Err(bad)) = memchr(b'\n', seen).map(|_| head::parse_request(seen, false)) {
            self.bad_line(bad, Some((origin, seen.len() as u64 + hidden)), sink);
            return &[];
        }
        self.announce(origin, 0, sink);
        self.input = Input::Head;
        self.read_on(seen, hidden, sink)
    }

    /// More bytes of the newest request's head. Returns what is left of them.
    fn read_on<'a>(&mut self, seen: &'a [u8], hidden: u64, sink: Sink<'_>) -> &'a [u8] {
        let known = self.request.bytes().len();
        let had_line = memchr(b'\n', self.request.bytes()).is_some();
        let progress = self.request.push(seen);
        if !had_line {
            if !self.proven
                && let Some(end) = proxy_line(self.request.bytes())
            {
                self.request.take();
                self.withdraw(sink);
                self.input = Input::Expect;
                return &seen[end - known..];
            }
            let bytes = self.request.bytes();
            let bad = match memchr(b'\n', bytes) {
                Some(_) => head::parse_request(bytes, false).err(),
                None => (!head::may_become_request(bytes)).then_some(BadLine::Malformed),
            };
            if let Some(bad) = bad {
                if let Some(newest) = self.newest() {
                    newest.request_bytes += seen.len() as u64 + hidden;
                }
                self.bad_line(bad, None, sink);
                return &[];
            }
        }
        let taken = if let Progress::Whole(taken) = progress { taken } else { seen.len() };
        if let Some(newest) = self.newest() {
            newest.request_bytes += taken as u64;
        }
        match progress {
            Progress::Whole(_) => {
                let bytes = self.request.take();
                if let Ok(head) = head::parse_request(&bytes, true) {
                    self.headed(head);
                }
                &seen[taken..]
            }
            Progress::Open if hidden == 0 => &[],
            Progress::Open | Progress::Full => {
                self.cut_newest();
                &[]
            }
        }
    }

    /// A request began. Whatever can only have ended before it, did.
    fn announce(&mut self, origin: Origin, bytes: u64, sink: Sink<'_>) {
        self.make_way(origin.activation, sink);
        let doubt = self.doubt;
        let Origin { time, tid, activation } = origin;
        let seq = self.next_seq;
        self.next_seq += 1;
        self.open.push_back(Open {
            seq,
            start: time,
            tid,
            activation,
            head: None,
            method: None,
            request_bytes: bytes,
            response_bytes: 0,
            first_out: None,
            last_out: time,
            status: None,
            handoff: false,
            streaming: false,
            lost: 0,
            gap: false,
            taint: doubt.map(|doubt| doubt.note),
            remark: None,
            unpaired: doubt.is_some(),
        });
        sink(Event::Started { seq, time, tid, activation });
    }

    fn make_way(&mut self, activation: u64, sink: Sink<'_>) {
        if self.open.len() == 1 && self.open[0].first_out.is_some() {
            match self.output {
                _ if self.provisionally_over() => self.finish(Outcome::Complete, None, sink),
                // Text chunks end in empty lines too; one who pipelines may ask on in the middle of them.
                Output::Chunked { ending: Ending::EmptyLine, .. } if !self.pipelined => {
                    self.finish(Outcome::Complete, None, sink);
                }
                Output::Chunked { ending: Ending::Unknown, .. } => self.finish(Outcome::Complete, None, sink),
                Output::Unreadable => self.finish(Outcome::Incomplete, Some(note::RESPONSE_FRAMING), sink),
                _ => {}
            }
        }
        if !self.pipelined {
            // One who waits for each response has got this one, in records that were lost.
            while self.open.front().is_some_and(|open| open.gap) {
                self.finish(Outcome::Incomplete, Some(note::LOST), sink);
            }
        } else if self.open.back().is_some_and(|back| back.activation != activation) {
            // Something was written since the last request, and of those whose responses cannot be told apart no
            // more will be known. The doubt stays: one of their responses may still come.
            let doubt = self.doubt;
            while self.open.front().is_some_and(|open| open.unpaired) {
                self.finish(Outcome::Incomplete, None, sink);
            }
            self.doubt = doubt;
        }
        if !self.open.is_empty() {
            self.pipelined = true;
        } else if self.doubt.is_some_and(|doubt| doubt.settled) {
            self.doubt = None;
        }
        if self.open.len() == OPEN_MAX
            && let Some(mut last) = self.open.pop_back()
        {
            let start = last.start;
            last.taint = Some(note::PIPELINE_LIMIT);
            last.unpaired = true;
            self.doubt = Some(Doubt { note: note::PIPELINE_LIMIT, settled: false });
            sink(Event::Finished(last.exchange(start, Outcome::Incomplete, None)));
        }
    }

    /// The newest request's head is whole.
    fn headed(&mut self, head: head::RequestHead) {
        self.proven = true;
        self.input = match head.framing {
            // A tunnel's bytes may follow; if it is refused, the next request.
            _ if head.method == Method::Connect => Input::Opaque,
            Framing::Unsaid | Framing::Length(0) => Input::Expect,
            Framing::Length(left) => Input::Body { left, untouched: true },
            Framing::Chunked | Framing::Coded | Framing::Unreadable => Input::Opaque,
        };
        if let Some(newest) = self.newest() {
            newest.head = Some(head);
        }
    }

    /// The rest of the newest request's head is invisible, or too long.
    fn cut_newest(&mut self) {
        self.input = Input::Opaque;
        let Some(mut newest) = self.open.pop_back() else { return };
        self.cut_head(&mut newest, note::HEAD_CUT);
        self.proven |= newest.head.is_some();
        self.open.push_back(newest);
    }

    /// No request line. `begun` is where it began and its size, unless it was announced already.
    fn bad_line(&mut self, bad: BadLine, begun: Option<(Origin, u64)>, sink: Sink<'_>) {
        if !self.proven {
            if begun.is_none() {
                self.withdraw(sink);
            }
            let protocol = if bad == BadLine::Http2 { Protocol::Http2 } else { Protocol::NotHttp };
            return self.verdict(protocol, sink);
        }
        // On a connection that spoke HTTP it is a broken request, which the server will answer.
        if let Some((origin, bytes)) = begun {
            self.announce(origin, bytes, sink);
        }
        self.request.take();
        if let Some(newest) = self.newest() {
            newest.taint.get_or_insert(note::MALFORMED);
        }
        self.input = Input::Resync;
    }

    /// The newest request was none.
    fn withdraw(&mut self, sink: Sink<'_>) {
        if let Some(open) = self.open.pop_back() {
            sink(Event::Discarded { seq: open.seq });
        }
    }

    /// Bytes where a request should begin, none of them visible.
    fn unseen(&mut self, sink: Sink<'_>) {
        self.input = Input::Resync;
        if self.proven {
            self.doubt = Some(Doubt { note: note::PIPELINE_UNSEEN, settled: false });
            sink(Event::Unseen);
        }
    }

    /// Body bytes of the newest request, as far as can be told.
    fn swallow(&mut self, origin: Origin, bytes: u64, sink: Sink<'_>) {
        if self.input == Input::Opaque && bytes > 0 {
            self.belongs(origin, sink);
            if let Some(newest) = self.newest() {
                newest.request_bytes += bytes;
            }
        }
    }

    /// Bytes of the newest request were received under this activation.
    fn belongs(&mut self, origin: Origin, sink: Sink<'_>) {
        if let Some(newest) = self.newest()
            && origin.activation != 0
            && newest.activation != origin.activation
        {
            newest.activation = origin.activation;
            sink(Event::Activation { seq: newest.seq, activation: origin.activation });
        }
    }

    /// Whether a request may begin within bytes that cannot be told from a body: not while the body's request is
    /// (visibly) unanswered, since bodies quote requests.
    fn may_begin_in_body(&self) -> bool {
        if self.open.is_empty() {
            return true;
        }
        let answered = self.open.len() == 1 && self.open[0].first_out.is_some();
        let endless = match self.output {
            Output::Unreadable => true,
            Output::Chunked { ending, .. } => ending != Ending::Open,
            _ => false,
        };
        answered && endless
    }

    /// Whatever looked like the beginning of a request, was not.
    pub(super) fn forget_maybe(&mut self) {
        if let Input::Maybe { owned, .. } = self.input {
            let known = self.request.take().len() as u64;
            self.input = if owned { Input::Opaque } else { Input::Resync };
            if owned && let Some(newest) = self.newest() {
                newest.request_bytes += known;
            }
        }
    }
}

/// Empty lines before a request are no part of it (RFC 9112, 2.2); some clients send one after a body.
fn without_empty_lines(bytes: &[u8]) -> &[u8] {
    let lead = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    &bytes[lead..]
}

fn first_line(bytes: &[u8]) -> &[u8] {
    memchr(b'\n', bytes).map_or(bytes, |at| &bytes[..at])
}

/// The index after a PROXY line at the start of `bytes`.
fn proxy_line(bytes: &[u8]) -> Option<usize> {
    PROXY_LINES.iter().any(|start| bytes.starts_with(start)).then(|| memchr(b'\n', bytes))?.map(|at| at + 1)
}
