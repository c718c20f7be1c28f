//! The response side: finds where responses begin and end in the sent bytes.

use super::connection::{Connection, Doubt};
use super::head::{self, Framing, Method};
use super::inbound::Input;
use super::partial::Progress;
use super::tail::Ending;
use super::{Event, Piece, Sink, TAIL_MAX, note};
use crate::record::Outcome;

/// What the next sent byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The first byte of a response, interim or final.
    Idle,
    /// Within a response's head.
    Head,
    /// Within a body of known length.
    Length { left: u64 },
    /// Within a chunked body, which may be over; see [`Ending`].
    Chunked { ending: Ending, trailers: bool },
    /// Within a body that ends with the connection.
    UntilClose,
    /// Within a response of unknown length.
    Unreadable,
}

impl Connection {
    pub(super) fn send(&mut self, piece: &Piece<'_>, sink: Sink<'_>) {
        self.forget_maybe();
        // The tail is that of the whole write, of which a head may be one element.
        let tail = if piece.captured.len() as u64 == piece.advance {
            &piece.captured[piece.captured.len().saturating_sub(TAIL_MAX)..]
        } else {
            &piece.tail[..usize::from(piece.tail_len).min(piece.tail.len())]
        };
        self.tail.push(tail, piece.advance);
        let mut seen = piece.captured;
        let mut hidden = piece.advance.saturating_sub(seen.len() as u64);
        // Every turn consumes bytes, ends a request, or both.
        while hidden > 0 || !seen.is_empty() {
            let others = self.open.len().saturating_sub(1);
            let over = self.provisionally_over();
            let Some(first) = self.open.front_mut() else {
                // A response to what was not seen: from here on the next request meets its own.
                match &mut self.doubt {
                    Some(doubt) => doubt.settled = true,
                    // What another protocol says answers no request.
                    None if self.proven && self.input != Input::Foreign => sink(Event::Unowned),
                    None => {}
                }
                return;
            };
            let rest = seen.len() as u64 + hidden;
            // Of a small write the first letters must do, where the response before looks over.
            let next_begins = others > 0
                && !seen.is_empty()
                && head::may_become_response(seen)
                && (seen.len() >= 7 || over);
            match self.output {
                Output::Idle => {
                    first.wrote(piece);
                    first.first_out = Some(first.last_out);
                    if seen.is_empty() {
                        self.response_unseen(others);
                        continue;
                    }
                    self.output = Output::Head;
                }
                Output::Head => {
                    first.wrote(piece);
                    if let Some(end) = self.response.bytes().is_empty().then(|| head::end(seen, 0)).flatten()
                    {
                        first.response_bytes += end as u64;
                        let (bytes, after) = seen.split_at(end);
                        seen = after;
                        self.answered(bytes, true, sink);
                        continue;
                    }
                    let progress = self.response.push(seen);
                    let taken = if let Progress::Whole(taken) = progress { taken } else { seen.len() };
                    first.response_bytes += taken as u64;
                    seen = &seen[taken..];
                    let whole = matches!(progress, Progress::Whole(_));
                    let foreign = !head::may_become_response(self.response.bytes());
                    if whole || foreign || hidden > 0 || progress == Progress::Full {
                        let bytes = self.response.take();
                        self.answered(&bytes, whole, sink);
                    }
                }
                Output::Length { left } => {
                    // What is visible may be the head of another response, to a request that was lost.
                    if first.gap && !seen.is_empty() {
                        first.taint.get_or_insert(note::LOST);
                    }
                    let taken = left.min(rest);
                    first.response_bytes += taken;
                    first.wrote(piece);
                    let shown = taken.min(seen.len() as u64);
                    seen = &seen[shown as usize..];
                    hidden -= taken - shown;
                    if taken < left {
                        self.output = Output::Length { left: left - taken };
                        return;
                    }
                    if first.gap && taken < rest {
                        first.taint.get_or_insert(note::LOST);
                    }
                    self.finish(Outcome::Complete, None, sink);
                }
                Output::Chunked { ending, .. } if next_begins && ending != Ending::Open => {
                    self.finish(Outcome::Complete, None, sink);
                }
                Output::Unreadable if next_begins => {
                    self.finish(Outcome::Incomplete, Some(note::RESPONSE_FRAMING), sink);
                }
                Output::Chunked { .. } | Output::UntilClose | Output::Unreadable => {
                    first.response_bytes += rest;
                    first.wrote(piece);
                    if let Output::Chunked { trailers, .. } = self.output {
                        if first.gap {
                            first.taint.get_or_insert(note::LOST);
                        }
                        self.output = Output::Chunked { ending: self.tail.ending(), trailers };
                    }
                    if piece.blind && others > 0 {
                        // Whether this one ends in there, and how many others do, is unknown.
                        self.unpair();
                    }
                    return;
                }
            }
        }
    }

    /// A response's head, or what is visible of it.
    fn answered(&mut self, bytes: &[u8], whole: bool, sink: Sink<'_>) {
        let Some(first) = self.open.front_mut() else { return };
        let interim = |status| (100..200).contains(&status) && status != 101;
        let parsed = head::parse_response(bytes, whole).filter(|head| whole || !interim(head.status));
        let Some(response) = parsed else {
            first.taint.get_or_insert(note::RESPONSE_UNSEEN);
            self.output = Output::Unreadable;
            return;
        };
        let status = response.status;
        if interim(status) {
            first.first_out = None;
            first.last_out = first.start;
            self.output = Output::Idle;
            return;
        }
        first.status = Some(status);
        first.streaming = response.event_stream;
        let method = first.head.as_ref().map(|head| &head.method).or(first.method.as_ref());
        let tunnel = method == Some(&Method::Connect) && (200..300).contains(&status);
        if status == 101 || tunnel {
            self.finish(Outcome::Upgraded, None, sink);
            while self.is_open() {
                self.finish(Outcome::Incomplete, Some(note::UPGRADED), sink);
            }
            self.input = Input::Foreign;
            return;
        }
        // RFC 9112, 6.3
        let bodiless = method == Some(&Method::Head) || matches!(status, 204 | 304);
        self.output = match response.framing {
            _ if bodiless => return self.finish(Outcome::Complete, None, sink),
            Framing::Length(0) => return self.finish(Outcome::Complete, None, sink),
            Framing::Length(left) => Output::Length { left },
            Framing::Chunked => Output::Chunked { ending: Ending::Open, trailers: response.trailers },
            Framing::Unsaid | Framing::Coded => Output::UntilClose,
            Framing::Unreadable => Output::Unreadable,
        };
    }

    /// A response begins in bytes that are invisible: another's end was in the same write. With one request
    /// waiting it is that one's; with several, nobody knows how many responses these bytes hold.
    fn response_unseen(&mut self, others: usize) {
        self.output = Output::Unreadable;
        if others > 0 {
            self.unpair();
        } else if let Some(first) = self.open.front_mut() {
            first.taint.get_or_insert(note::RESPONSE_UNSEEN);
        }
    }

    /// Which of the responses to come belongs to which of the open requests is unknown.
    fn unpair(&mut self) {
        for open in &mut self.open {
            open.taint.get_or_insert(note::PIPELINE_UNSEEN);
            open.unpaired = true;
        }
        self.doubt = Some(Doubt { note: note::PIPELINE_UNSEEN, settled: false });
    }
}
