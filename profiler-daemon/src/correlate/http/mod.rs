//! HTTP/1.x on one server-side connection: from pieces of its two byte streams to exchanges.
//!
//! In: [`Piece`]s, in order, as the kernel side captured them; bodies and most of what is not a head stay invisible.
//! Out: [`Event`]s, of which [`Event::Finished`] carries a whole [`Exchange`]. No I/O and no clock: time is inside
//! the pieces, so a recorded capture gives the same exchanges again. What the bytes do not prove is reported as
//! [`Outcome::Incomplete`] with a note, or as [`Event::Unseen`]; it is never guessed.

mod connection;
mod head;
mod inbound;
mod outbound;
mod partial;
mod tail;
mod trace;

#[cfg(test)]
mod conversation;
#[cfg(test)]
mod kernel;
#[cfg(test)]
mod tests;

pub use connection::{Connection, Current};
pub use head::{Method, RequestHead};
pub use trace::TraceId;

use crate::record::Outcome;

/// Most bytes of a tail: `\r\n0\r\n\r\n` is 7 long.
pub const TAIL_MAX: usize = 8;

/// Direction of a piece, seen from the profiled process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Received: requests.
    In,
    /// Sent: responses.
    Out,
}

/// A run of bytes of one direction of a connection's stream.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// When the call that transferred it returned, ns.
    pub time: u64,
    /// When the bytes changed hands, as near as is known, ns: `time`, or earlier where a writer did not wait in the
    /// call but came back late from it.
    pub handed: u64,
    pub tid: u32,
    /// The kernel side's mark for the work that began here; 0 = none.
    pub activation: u64,
    /// The kernel side took this piece for the beginning of new work; `activation` is new.
    pub begins: bool,
    pub direction: Direction,
    /// Bytes of the stream this piece covers.
    pub advance: u64,
    /// The first bytes of the piece; what follows them, up to `advance`, is invisible.
    pub captured: &'a [u8],
    /// The last bytes of an outgoing piece; `tail_len` of them are valid.
    pub tail: [u8; TAIL_MAX],
    /// `min(advance, 8)`, or less (0) where the bytes could not be read.
    pub tail_len: u8,
    /// Records of this connection that were lost before this one.
    pub lost: u32,
    /// The rest of a transfer in more pieces than the kernel side looks at: nothing of it is visible, and heads may
    /// be anywhere in it.
    pub blind: bool,
}

/// What a connection turned out to speak, if not HTTP/1.x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    NotHttp,
    /// The preface of HTTP/2 with prior knowledge.
    Http2,
    Tls,
}

impl Protocol {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotHttp => "not HTTP",
            Self::Http2 => "HTTP/2",
            Self::Tls => "TLS",
        }
    }
}

/// What a piece changed. `seq` counts the requests of one connection from 0.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// The first byte of a request arrived. Pipelined requests share the activation of the first of them.
    Started {
        seq: u64,
        time: u64,
        tid: u32,
        activation: u64,
    },
    /// What `Started` announced is no request after all (a PROXY line, another protocol).
    Discarded {
        seq: u64,
    },
    /// Another activation belongs to this request: its body or head was read on.
    Activation {
        seq: u64,
        activation: u64,
    },
    Finished(Exchange),
    /// At least one request arrived whose head is invisible (it followed a body in the same transfer). It gets no
    /// exchange, only this.
    Unseen,
    /// Bytes were sent that answer no request that was seen, and none is known to have been missed.
    Unowned,
    /// The connection does not speak HTTP/1.x; no more events follow. At most once.
    Verdict(Protocol),
}

/// A finished request with its response.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    pub seq: u64,
    /// When the first byte of the request was received, ns.
    pub start: u64,
    /// When the first byte of the final response was handed over (not of a 1xx), ns.
    pub first_out: Option<u64>,
    /// When the last byte of the response was handed over; without a response, when the connection, the process
    /// or the profiling ended. Equal to `start` where an incomplete request's end is unknown.
    pub end: u64,
    /// The thread that received the first byte.
    pub tid: u32,
    /// Another thread wrote (part of) the response.
    pub handoff: bool,
    /// `None` when not even the request line was seen.
    pub head: Option<RequestHead>,
    pub status: Option<u16>,
    /// Bytes received until the response was finished, head and body.
    pub request_bytes: u64,
    /// Bytes written, interim (1xx) responses included.
    pub response_bytes: u64,
    pub outcome: Outcome,
    /// Why `outcome` is not `Complete`, or another remark.
    pub note: Option<&'static str>,
    /// Server-sent events: the duration says nothing about speed.
    pub streaming: bool,
    /// Records of this connection lost while this request was open, or just before it.
    pub lost: u32,
}

/// Where events go.
pub type Sink<'s> = &'s mut dyn FnMut(Event);

/// The texts of [`Exchange::note`].
pub mod note {
    pub const LOST: &str = "records of the connection were lost";
    pub const MALFORMED: &str = "malformed request";
    pub const HEAD_CUT: &str = "request head longer than captured";
    pub const HEAD_PARTIAL: &str = "request head not complete";
    pub const RESPONSE_UNSEEN: &str = "response head not seen";
    pub const RESPONSE_FRAMING: &str = "length of the response unreadable";
    pub const RESPONSE_END: &str = "end of the chunked response not seen";
    pub const NO_RESPONSE: &str = "connection ended before a response";
    pub const RESPONSE_CUT: &str = "connection ended within the response";
    pub const PROCESS_EXIT: &str = "process exited";
    pub const STOPPED: &str = "profiling stopped before its end";
    pub const PIPELINE_UNSEEN: &str = "pipelined with a request or response that was not seen";
    pub const PIPELINE_LIMIT: &str = "too many pipelined requests";
    pub const UPGRADED: &str = "pipelined before the connection was upgraded";
}
