//! What one thread is working on.
//!
//! The rule that attribution stands on: a thread that serves one request at a time works for the request it began
//! last. A thread that begins a request while another of its own is open (an event loop) breaks the rule, and from
//! then on nothing is attributed to it, ever: no guess is better than a wrong one.

use super::engine::{Place, RequestKey};

/// A thread of a target that has begun at least one request.
#[derive(Debug, Default)]
pub struct Thread {
    pub pid: u32,
    /// The kernel side's mark of what it works on; 0 = nothing.
    pub activation: u64,
    /// The connection that mark came from.
    pub place: Option<Place>,
    /// Requests it began that are not finished.
    pub open: Vec<RequestKey>,
    /// It was seen with two requests at once.
    pub interleaves: bool,
    /// The request it finished last, while its tail may still go on.
    pub tail: Option<RequestKey>,
}

impl Thread {
    pub fn forget(&mut self, key: RequestKey) {
        self.open.retain(|open| *open != key);
    }
}
