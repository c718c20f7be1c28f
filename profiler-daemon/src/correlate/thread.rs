//! What one thread is working on.
//!
//! The rule that attribution stands on: a thread that serves one request at a time works for the request it began
//! last. While two of its own are open, or it accepts or transfers elsewhere within one, nothing is attributed to any
//! of them: no guess is better than a wrong one. When the older one then goes on, the thread is an event loop, and
//! nothing is attributed to it any more, ever. When it does not, its end was lost, and the rule holds again as soon as
//! that is clear.

use rustc_hash::FxHashSet;

use super::output::{Place, RequestKey};

/// A thread of a target that has begun at least one request.
#[derive(Debug, Default)]
pub struct Thread {
    pub pid: u32,
    /// The kernel side's mark of what it works on; 0 = nothing.
    pub activation: u64,
    /// The mark before that one.
    pub before: u64,
    /// The connection that mark came from.
    pub place: Option<Place>,
    /// Requests it began that are not finished.
    pub open: FxHashSet<RequestKey>,
    /// Of these, the ones during which it was not seen doing anything elsewhere: one connection's, nearly always one.
    /// What it does next is compared with these only, so that thousands of requests of an event loop cost nothing.
    pub alone: Vec<RequestKey>,
    /// When it began the last one, ns.
    pub began: u64,
    /// It was seen going on with one request after it had begun another.
    pub interleaves: bool,
    /// The request it finished last, while its tail may still go on.
    pub tail: Option<RequestKey>,
}

impl Thread {
    /// Begins a request at `time` under this mark; pipelined ones share it.
    pub fn begin(&mut self, activation: u64, place: Place, key: RequestKey, time: u64) {
        if self.activation != activation {
            self.before = self.activation;
        }
        (self.activation, self.place, self.began) = (activation, Some(place), time);
        self.open.insert(key);
        if !self.interleaves {
            self.alone.push(key);
        }
    }

    /// Whether a mark seen at `time` is of what it did before it began its one open request, and is done. The clock may
    /// interrupt the kernel side when the request's record has its place in the ring and the thread not yet its mark.
    pub fn had_done(&self, activation: u64, time: u64) -> bool {
        activation == self.before && time < self.began && self.open.len() == 1
    }

    pub fn forget(&mut self, key: RequestKey) {
        self.open.remove(&key);
        self.alone.retain(|open| *open != key);
    }
}
