//! Requests of event loops: contexts tell what is done for each, by the kernel side's marks.
//!
//! In: samples and records with [`flags::BY_CONTEXT`]. What the loop's thread does besides is of no matter here; see
//! [`super::attribution`] for all others.

use profiler_common::ConnId;

use super::engine::{Engine, Request};
use super::output::{Output, RequestKey, Sink};
use crate::decode::SampleEvent;

/// Marks of one request: pieces of its body that read like a request line while it is answered already get one each.
const MARKS_MAX: usize = 64;

impl Engine {
    /// The context that the thread worked in was made for one request, whichever thread that is.
    pub(super) fn sample_of_context(&mut self, event: &SampleEvent<'_>, sink: Sink<'_>) {
        let header = &event.sample.header;
        let Some(&key) = self.marked.get(&(header.pid, event.sample.activation)) else {
            // Of one that is over: a background task may outlive it.
            self.counters.samples_after_response += 1;
            return;
        };
        if let Some(trailing) = self.trailing.get_mut(&key) {
            trailing.finished.tail_samples += 1;
            self.counters.samples_after_response += 1;
            return;
        }
        let over = |request: &Request| {
            let conn = self.connections.get(&request.place.0).and_then(|fds| fds.get(&request.place.1));
            conn.is_some_and(|conn| {
                let current = conn.machine.current().map(|current| current.seq);
                conn.requests.iter().any(|(seq, of)| *of == key && Some(*seq) == current)
                    && conn.machine.looks_over()
            })
        };
        let over = self.open.get(&key).is_some_and(over);
        match self.open.get_mut(&key) {
            Some(request) if header.time >= request.start => {
                if !request.attributed {
                    self.counters.samples_interleaved += 1;
                } else if over {
                    request.tail += 1;
                    self.counters.samples_after_response += 1;
                } else {
                    request.samples += 1;
                    self.counters.samples_attributed += 1;
                    sink(Output::Sample { key, event });
                }
            }
            _ => self.counters.samples_unknown += 1,
        }
    }

    /// Something works for this request in a context of its own.
    pub(super) fn has_contexts(&mut self, conn: ConnId, activation: u64) {
        if let Some(key) = self.marked.get(&(conn.pid, activation))
            && let Some(request) = self.open.get_mut(key)
        {
            request.has_contexts = true;
        }
    }

    /// The same, said when its connection closes.
    pub(super) fn has_contexts_at_its_end(&mut self, closed: ConnId) {
        let known = self.conn((closed.pid, closed.fd)).filter(|conn| conn.generation == closed.generation);
        for (_, key) in known.map(|conn| conn.requests.clone()).unwrap_or_default() {
            self.open.entry(key).and_modify(|request| request.has_contexts = true);
        }
    }

    /// Another mark is this request's: its body was read on.
    pub(super) fn mark(&mut self, key: RequestKey, pid: u32, activation: u64, sink: Sink<'_>) {
        let Some(request) = self.open.get_mut(&key) else { return };
        if request.marks.len() >= MARKS_MAX {
            return self.revoke(key, sink);
        }
        request.marks.push(activation);
        self.marked.insert((pid, activation), key);
    }

    /// Samples with these marks are no open request's any more.
    pub(super) fn unmark(&mut self, pid: u32, marks: &[u64]) {
        for mark in marks {
            self.marked.remove(&(pid, *mark));
        }
    }
}
