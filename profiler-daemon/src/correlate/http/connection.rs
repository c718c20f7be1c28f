//! One connection: its open requests, in the order their responses must come, and how they end.
//!
//! [`inbound`](super::inbound) appends requests, [`outbound`](super::outbound) ends the first of them. Both rest on
//! what is here: the queue, the finishing of its first entry, and [`Doubt`], the state after something was missed,
//! in which it is unknown which response belongs to which request.

use std::collections::VecDeque;

use super::head::Method;
use super::inbound::Input;
use super::outbound::Output;
use super::partial::Partial;
use super::tail::{Ending, Tail};
use super::{Direction, Event, Exchange, Piece, Protocol, RequestHead, Sink, head, note};
use crate::record::Outcome;

/// Most requests of one connection that wait for their response. Browsers pipeline none, load generators 16 or so.
pub const OPEN_MAX: usize = 64;

/// The state machine of one connection. It holds no memory besides open requests and an unfinished head: at most
/// 64 requests with paths of 1 KiB and two partial heads of 16 KiB.
#[derive(Debug)]
pub struct Connection {
    pub(super) open: VecDeque<Open>,
    pub(super) next_seq: u64,
    pub(super) input: Input,
    pub(super) request: Partial,
    pub(super) output: Output,
    pub(super) response: Partial,
    pub(super) tail: Tail,
    pub(super) doubt: Option<Doubt>,
    /// A request head was read, so this is HTTP.
    pub(super) proven: bool,
    /// The kernel side saw something begin, or records of that may be lost. What does not begin it leaves alone for good.
    pub(super) begun: bool,
    /// The client once sent a request before the previous response was over.
    pub(super) pipelined: bool,
    last_activity: u64,
}

/// A request whose response is not over.
#[derive(Debug)]
pub struct Open {
    pub seq: u64,
    pub start: u64,
    pub tid: u32,
    /// The latest of its activations.
    pub activation: u64,
    pub head: Option<RequestHead>,
    /// Of a head that was cut within its path, which says how the response ends.
    pub method: Option<Method>,
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// First and last byte of the final response.
    pub first_out: Option<u64>,
    pub last_out: u64,
    pub status: Option<u16>,
    pub handoff: bool,
    pub streaming: bool,
    pub lost: u32,
    /// Records were lost while it was open.
    pub gap: bool,
    /// Why it cannot be complete, however it ends.
    pub taint: Option<&'static str>,
    pub remark: Option<&'static str>,
    /// Which response is its own is unknown, so nothing is said about the response.
    pub unpaired: bool,
}

/// It is unknown which response belongs to which request.
#[derive(Clone, Copy, Debug)]
pub struct Doubt {
    pub note: &'static str,
    /// The next request that finds no other open is paired with the next response.
    pub settled: bool,
}

/// The request being answered, for the attribution of samples.
#[derive(Clone, Copy, Debug)]
pub struct Current<'a> {
    pub seq: u64,
    pub start: u64,
    pub tid: u32,
    pub activation: u64,
    pub head: Option<&'a RequestHead>,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Close,
    Reset,
    Exit,
    /// It does not: profiling ends.
    Stop,
}

impl Connection {
    /// A connection that was seen being accepted: its first byte is the first byte of a request.
    pub fn accepted() -> Self {
        Self::new(Input::Expect)
    }

    /// A connection that was open before we looked: waits for something that is surely a request.
    pub fn joined() -> Self {
        Self::new(Input::Resync)
    }

    fn new(input: Input) -> Self {
        Self {
            open: VecDeque::new(),
            next_seq: 0,
            input,
            request: Partial::default(),
            output: Output::Idle,
            response: Partial::default(),
            tail: Tail::default(),
            doubt: None,
            proven: false,
            begun: false,
            pipelined: false,
            last_activity: 0,
        }
    }

    /// Takes the next piece.
    pub fn piece(&mut self, piece: &Piece<'_>, sink: Sink<'_>) {
        self.last_activity = piece.time;
        if self.input == Input::Foreign {
            return;
        }
        self.begun |= piece.begins || piece.lost > 0;
        if piece.lost > 0 {
            self.lose(piece.lost);
        }
        match piece.direction {
            Direction::In => self.receive(piece, sink),
            Direction::Out => self.send(piece, sink),
        }
    }

    /// The descriptor was closed.
    pub fn close(&mut self, time: u64, sink: Sink<'_>) {
        self.end(Last::Close, time, sink);
    }

    /// The peer reset the connection (a call failed with `ECONNRESET` or `EPIPE`).
    pub fn reset(&mut self, time: u64, sink: Sink<'_>) {
        self.end(Last::Reset, time, sink);
    }

    /// The process is gone.
    pub fn exit(&mut self, time: u64, sink: Sink<'_>) {
        self.end(Last::Exit, time, sink);
    }

    /// Profiling ends here; the connection may go on.
    pub fn stop(&mut self, time: u64, sink: Sink<'_>) {
        self.end(Last::Stop, time, sink);
    }

    /// Finishes a chunked response that looks over. For a caller who does not want to wait for the next request.
    pub fn flush(&mut self, sink: Sink<'_>) {
        while self.provisionally_over() {
            self.finish(Outcome::Complete, None, sink);
        }
    }

    /// The connection was silent for as long as the caller wants to wait: finishes every request of which no end
    /// can be seen. One whose response has not begun stays open, since it may be a long poll, and so does one whose
    /// response is readable and not over.
    pub fn idle(&mut self, sink: Sink<'_>) {
        while let Some(first) = self.open.front().filter(|first| first.first_out.is_some()) {
            if self.provisionally_over() {
                self.finish(Outcome::Complete, None, sink);
            } else if first.taint.is_some() {
                self.finish(Outcome::Incomplete, None, sink);
            } else {
                match self.output {
                    Output::Unreadable => {
                        self.finish(Outcome::Incomplete, Some(note::RESPONSE_FRAMING), sink)
                    }
                    Output::Chunked { ending: Ending::Unknown, .. } => {
                        self.finish(Outcome::Incomplete, Some(note::RESPONSE_END), sink);
                    }
                    _ => return,
                }
            }
        }
    }

    /// Whether a request waits for (the rest of) its response.
    pub fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Whether the response being written looks over, though only the next event can prove it.
    pub fn looks_over(&self) -> bool {
        self.provisionally_over()
    }

    /// The request being answered; with pipelining the first of those open.
    pub fn current(&self) -> Option<Current<'_>> {
        self.requests().next()
    }

    /// All open requests, in order.
    pub fn requests(&self) -> impl Iterator<Item = Current<'_>> {
        self.open.iter().map(|open| Current {
            seq: open.seq,
            start: open.start,
            tid: open.tid,
            activation: open.activation,
            head: open.head.as_ref(),
        })
    }

    /// Whether no more events can come: another protocol, upgraded, or ended.
    pub fn is_over(&self) -> bool {
        self.input == Input::Foreign
    }

    /// Time of the last piece, for the caller's idle timeout.
    pub fn last_activity(&self) -> u64 {
        self.last_activity
    }

    /// Bytes of memory held for partial heads.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> usize {
        self.request.capacity() + self.response.capacity()
    }

    pub(super) fn verdict(&mut self, protocol: Protocol, sink: Sink<'_>) {
        self.input = Input::Foreign;
        self.request.take();
        sink(Event::Verdict(protocol));
    }

    /// The newest request, if it is open: the one to which bytes of an unfinished head or body belong.
    pub(super) fn newest(&mut self) -> Option<&mut Open> {
        let seq = self.next_seq.checked_sub(1)?;
        self.open.back_mut().filter(|open| open.seq == seq)
    }

    /// Whether the first open request is a chunked response that looks over. An empty line alone is believed where
    /// trailers were announced.
    pub(super) fn provisionally_over(&self) -> bool {
        matches!(
            self.output,
            Output::Chunked { ending: Ending::LastChunk, .. }
                | Output::Chunked { ending: Ending::EmptyLine, trailers: true }
        )
    }

    /// Finishes the first open request. Its end is its last response byte.
    pub(super) fn finish(&mut self, outcome: Outcome, why: Option<&'static str>, sink: Sink<'_>) {
        let end = self.open.front().map_or(0, |open| open.last_out);
        self.finish_at(end, outcome, why, sink);
    }

    fn finish_at(&mut self, end: u64, outcome: Outcome, why: Option<&'static str>, sink: Sink<'_>) {
        let Some(mut done) = self.open.pop_front() else { return };
        self.output = Output::Idle;
        self.response.take();
        let (mut outcome, mut why) = (outcome, why);
        if done.seq + 1 == self.next_seq {
            // Answered before it was asked to the end: what was asked is not known.
            if self.input == Input::Head && outcome == Outcome::Complete {
                (outcome, why) = (Outcome::Incomplete, Some(note::HEAD_PARTIAL));
            }
            self.leave(&mut done);
        }
        // A response of whatever request was seen to its end, and none is open: the next pair matches.
        if done.unpaired
            && self.open.is_empty()
            && let Some(doubt) = &mut self.doubt
        {
            doubt.settled = true;
        }
        sink(Event::Finished(done.exchange(end, outcome, why)));
    }

    /// The newest request is over, perhaps before it was read to its end.
    fn leave(&mut self, done: &mut Open) {
        match self.input {
            Input::Head => {
                self.cut_head(done, note::HEAD_PARTIAL);
                self.input = Input::Opaque;
            }
            // Refused before its body was sent, a client may well not send it (RFC 9110, 10.1.1).
            Input::Body { untouched: true, .. } if done.head.as_ref().is_some_and(|h| h.expects_continue) => {
                self.input = Input::Opaque;
            }
            _ => {}
        }
    }

    /// Keeps what a partial head tells, mostly its request line.
    pub(super) fn cut_head(&mut self, open: &mut Open, remark: &'static str) {
        let bytes = self.request.take();
        open.head = head::parse_request(&bytes, false).ok();
        open.method = head::method_of(&bytes);
        open.remark = Some(remark);
    }

    /// Records were lost: nothing that was open can be trusted, except a response of known length, which proves
    /// itself by reaching it exactly, and one that had looked over.
    fn lose(&mut self, lost: u32) {
        let sole = self.open.len() == 1;
        // Three records can hold the rest of this response, another request and the head of its response, after
        // which the body of that would pass for the rest of this.
        let few = self.open.front().is_some_and(|first| first.lost.saturating_add(lost) < 3);
        let measured = few && matches!(self.output, Output::Length { .. });
        let provable = sole && !self.pipelined && (measured || self.provisionally_over());
        let in_body = !matches!(self.output, Output::Idle | Output::Head);
        for (index, open) in self.open.iter_mut().enumerate() {
            open.lost = open.lost.saturating_add(lost);
            open.gap = true;
            if !provable {
                open.taint.get_or_insert(note::LOST);
                open.unpaired |= !(index == 0 && in_body);
            }
        }
        if !provable {
            self.tail.clear();
            self.response.take();
            self.output = match self.output {
                Output::Idle => Output::Idle,
                Output::Chunked { trailers, .. } => Output::Chunked { ending: Ending::Unknown, trailers },
                Output::UntilClose => Output::UntilClose,
                Output::Head | Output::Length { .. } | Output::Unreadable => Output::Unreadable,
            };
        }
        if self.input == Input::Head
            && let Some(mut newest) = self.open.pop_back()
        {
            self.cut_head(&mut newest, note::HEAD_PARTIAL);
            self.open.push_back(newest);
        }
        self.request.take();
        self.input = Input::Lost;
        // Of a client that pipelines, responses to lost requests may still come.
        self.doubt = Some(Doubt { note: note::LOST, settled: !self.pipelined });
    }

    fn end(&mut self, last: Last, time: u64, sink: Sink<'_>) {
        let cut = match last {
            Last::Close | Last::Reset => (Outcome::Aborted, Some(note::RESPONSE_CUT)),
            Last::Exit => (Outcome::Exit, Some(note::PROCESS_EXIT)),
            Last::Stop => (Outcome::Incomplete, Some(note::STOPPED)),
        };
        let by_peer = matches!(last, Last::Close | Last::Reset);
        while let Some(first) = self.open.front() {
            let (end, (outcome, why)) = match self.output {
                _ if first.first_out.is_none() && !by_peer => (time, cut),
                _ if first.first_out.is_none() => {
                    let partial = self.input == Input::Head && self.open.len() == 1;
                    let why = if partial { note::HEAD_PARTIAL } else { note::NO_RESPONSE };
                    (time, (Outcome::Aborted, Some(why)))
                }
                _ if self.provisionally_over() => (first.last_out, (Outcome::Complete, None)),
                Output::UntilClose if last == Last::Close => (first.last_out, (Outcome::Complete, None)),
                Output::Chunked { ending: Ending::EmptyLine | Ending::Unknown, .. } if by_peer => {
                    (first.last_out, (Outcome::Incomplete, Some(note::RESPONSE_END)))
                }
                Output::Unreadable if by_peer => {
                    (first.last_out, (Outcome::Incomplete, Some(note::RESPONSE_FRAMING)))
                }
                _ => (first.last_out, cut),
            };
            self.finish_at(end, outcome, why, sink);
        }
        self.request.take();
        self.input = Input::Foreign;
    }
}

impl Open {
    /// Bytes of its response were written. Those of two threads may be handed over in another order than their calls
    /// return.
    pub(super) fn wrote(&mut self, piece: &Piece<'_>) {
        self.last_out = self.last_out.max(piece.handed);
        self.handoff |= piece.tid != self.tid;
    }

    pub(super) fn exchange(self, end: u64, outcome: Outcome, why: Option<&'static str>) -> Exchange {
        // What looks cut may have ended in a record that was lost.
        let taint = self.taint.or_else(|| (self.gap && outcome != Outcome::Complete).then_some(note::LOST));
        let seen = !self.unpaired;
        Exchange {
            seq: self.seq,
            start: self.start,
            first_out: self.first_out.filter(|_| seen),
            end,
            tid: self.tid,
            handoff: self.handoff && seen,
            head: self.head,
            status: self.status.filter(|_| seen),
            request_bytes: self.request_bytes,
            response_bytes: if seen { self.response_bytes } else { 0 },
            outcome: if taint.is_some() { Outcome::Incomplete } else { outcome },
            note: taint.or(why).or(self.remark),
            streaming: self.streaming && seen,
            lost: self.lost,
        }
    }
}
