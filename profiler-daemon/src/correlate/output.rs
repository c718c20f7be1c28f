//! What the correlator says: samples that are a request's, requests that ended, processes that came and went.

use profiler_common::ConnId;

use super::http::{Exchange, Protocol};
use crate::decode::SampleEvent;
use crate::record::Boundary;

/// Number of a request within this run.
pub type RequestKey = u64;

/// A connection: process and descriptor.
pub type Place = (u32, u32);

/// What the correlator found out.
#[derive(Debug)]
pub enum Output<'a> {
    /// A sample belongs to this request.
    Sample {
        key: RequestKey,
        event: &'a SampleEvent<'a>,
    },
    /// All samples of this request were attributed on a wrong assumption: forget them.
    Revoke {
        key: RequestKey,
    },
    /// A request ended; its samples are all there.
    Finished(Box<Finished>),
    /// What was announced is no request: forget its samples.
    Discard {
        key: RequestKey,
    },
    Process(ProcessEvent),
    /// This connection is gone without a close, with its process, its program or by itself: the kernel side may know it
    /// still.
    Left(ConnId),
    /// A connection of this process speaks something else, as was seen at this time, ns.
    Protocol {
        pid: u32,
        protocol: Protocol,
        time: u64,
    },
}

/// Processes that come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It accepted a connection; sent once per connection of a process that may be new to us.
    Accepted {
        pid: u32,
    },
    Forked {
        parent: u32,
        child: u32,
    },
    Exec {
        pid: u32,
    },
    /// The whole process is gone.
    Exited {
        pid: u32,
    },
    /// A thread ended, and whether it was the last cannot be told.
    MayHaveExited {
        pid: u32,
    },
}

/// A finished request.
#[derive(Debug)]
pub struct Finished {
    pub key: RequestKey,
    pub pid: u32,
    /// Where it was seen.
    pub boundary: Boundary,
    pub exchange: Exchange,
    /// Samples can be trusted: one thread did it all, and it does one thing at a time; or they were taken in contexts that
    /// were made for it.
    pub attributed: bool,
    pub by_context: bool,
    pub tail_samples: u64,
    /// Lost samples and boundary records.
    pub lost: u64,
}

#[cfg(test)]
impl Finished {
    /// One that a thread served and that nothing was lost of.
    pub(crate) fn served(key: RequestKey, pid: u32, exchange: Exchange) -> Self {
        let boundary = Boundary::Uprobe;
        Self { key, pid, boundary, exchange, attributed: true, by_context: false, tail_samples: 0, lost: 0 }
    }
}

/// What the correlator could not place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub samples: u64,
    pub samples_attributed: u64,
    /// Taken after the last response byte.
    pub samples_after_response: u64,
    /// The thread interleaves requests.
    pub samples_interleaved: u64,
    /// The activation names no request that is known.
    pub samples_unknown: u64,
    /// Attributed first, then taken back.
    pub samples_revoked: u64,
    /// Pipelined requests whose head was invisible.
    pub requests_unseen: u64,
    /// Requests that share the kernel side's mark with the one before them, so that it counted them as one.
    pub requests_pipelined: u64,
    /// What was announced as a request and is none.
    pub requests_discarded: u64,
    /// Connections or threads beyond what is remembered.
    pub refused: u64,
}

/// Where outputs go.
pub(super) type Sink<'s> = &'s mut dyn FnMut(Output<'_>);
