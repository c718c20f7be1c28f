//! What the stages count, where the HTTP side can see it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::correlate;
use crate::profile::FrameKind;

/// Totals since the start.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub correlate: correlate::Counters,
    pub open_requests: u64,
    pub open_connections: u64,
    /// Records that did not add up.
    pub undecodable: u64,
    /// Process events that the manager had no room for; it then looks for itself.
    pub manager_untold: u64,
    /// Frames that could not be resolved, by kind and reason.
    pub unresolved: Vec<(FrameKind, &'static str, u64)>,
    /// Finished requests.
    pub finished: u64,
    /// Finished, but not of a selected process or route.
    pub filtered: u64,
    /// Finished, but whether the process is selected was never known.
    pub undecided: u64,
    /// Samples of requests beyond those a profile is collected for at a time.
    pub samples_without_room: u64,
    /// Samples counted without their stacks, because the profiles being collected were too large together.
    pub samples_folded: u64,
    /// Stacks deeper than a tree, shown without their outermost frames.
    pub stacks_cut: u64,
    /// Requests not written to a file because the writer was behind.
    pub files_dropped: u64,
    /// Requests not written to a file because writing failed.
    pub files_failed: u64,
    pub symbol_bytes: u64,
}

/// Shared by the stages; each changes its own fields, a few times a second.
#[derive(Clone, Default)]
pub struct Stats(Arc<Mutex<Snapshot>>);

impl Stats {
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
    pub fn snapshot(&self) -> Snapshot {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
