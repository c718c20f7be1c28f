//! Which request a sample belongs to, and when nobody can say.
//!
//! The only place that gives a sample to a request, and the only one that takes trust away. Where a thread may have
//! worked on something else, nothing is given; see [`super::thread`] for the rule.

use profiler_common::Data;

use super::engine::Engine;
use super::output::{Output, Place, RequestKey, Sink};
use crate::decode::SampleEvent;

impl Engine {
    pub(super) fn sample(&mut self, event: &SampleEvent<'_>, sink: Sink<'_>) {
        let sample = &event.sample;
        let lost = u64::from(sample.header.lost);
        self.counters.samples += 1;
        let Some(thread) = self.threads.get(&sample.header.tid) else {
            self.counters.samples_unknown += 1;
            return;
        };
        if thread.interleaves {
            self.counters.samples_interleaved += 1;
            return;
        }
        if thread.activation != sample.activation || thread.pid != sample.header.pid {
            match thread.had_done(sample.activation, sample.header.time) {
                true => self.counters.samples_after_response += 1,
                false => self.counters.samples_unknown += 1,
            }
            return;
        }
        let (place, tail) = (thread.place, thread.tail);
        // What its mark stands for is over, though nobody waits for its tail any more.
        let done = thread.open.is_empty();
        let current = place.and_then(|place| {
            let conn = self.connections.get(&place.0)?.get(&place.1)?;
            let seq = conn.machine.current()?.seq;
            let key = conn.requests.iter().find(|(s, _)| *s == seq).map(|(_, key)| *key)?;
            Some((key, conn.machine.looks_over()))
        });
        let request = current.and_then(|(key, over)| Some((key, over, self.open.get_mut(&key)?)));
        match request {
            Some((key, over, request))
                if request.tid == sample.header.tid && sample.header.time >= request.start =>
            {
                request.lost += lost;
                if !request.attributed {
                    self.counters.samples_interleaved += 1;
                    return;
                }
                if over {
                    request.tail += 1;
                    self.counters.samples_after_response += 1;
                    return;
                }
                request.samples += 1;
                self.counters.samples_attributed += 1;
                sink(Output::Sample { key, event });
            }
            _ => match tail.and_then(|key| self.trailing.get_mut(&key)) {
                Some(finished) => {
                    finished.tail_samples += 1;
                    finished.lost += lost;
                    self.counters.samples_after_response += 1;
                }
                None if done => self.counters.samples_after_response += 1,
                None => self.counters.samples_unknown += 1,
            },
        }
    }

    /// Samples of a request that no sample's record tells of.
    pub(super) fn samples_lost(&mut self, place: Place, tid: u32, data: &Data) {
        let marked = self.threads.get(&tid).is_some_and(|thread| thread.activation == data.activation);
        let key = self.connections.get(&place.0).and_then(|fds| fds.get(&place.1)).and_then(|conn| {
            let seq = conn.machine.current()?.seq;
            conn.requests.iter().find(|(s, _)| *s == seq).map(|(_, key)| *key)
        });
        if marked && let Some(request) = key.and_then(|key| self.open.get_mut(&key)) {
            request.lost += u64::from(data.samples_lost);
        }
    }

    /// The thread has dealt with another client meanwhile, of which nothing else tells.
    pub(super) fn interleaved(&mut self, tid: u32, activation: u64, sink: Sink<'_>) {
        let Some(thread) = self.threads.get(&tid).filter(|thread| thread.activation == activation) else {
            return;
        };
        for key in thread.open.clone() {
            self.overlap(key, sink);
        }
    }

    /// A thread writes on a connection. One that serves one request at a time has none open elsewhere.
    pub(super) fn writes(&mut self, place: Place, tid: u32, lost: u32, sink: Sink<'_>) {
        let Some(thread) = self.threads.get(&tid).filter(|thread| !thread.open.is_empty()) else { return };
        let of = |key: &RequestKey| self.open.get(key).map(|request| request.place);
        if thread.open.iter().any(|key| of(key) == Some(place)) {
            return; // its own answer; the overlap, if any, was noticed when the later one began
        }
        let others = thread.open.clone();
        // What was upgraded, or never was HTTP, may be written to by whoever serves a request.
        let Some(conn) = self.connections.get(&place.0).and_then(|fds| fds.get(&place.1)) else { return };
        if conn.machine.is_over() {
            return;
        }
        for key in others {
            self.overlap(key, sink);
        }
        if lost == 0
            && self.connections[&place.0][&place.1].machine.is_open()
            && let Some(thread) = self.threads.get_mut(&tid)
        {
            thread.interleaves = true;
        }
    }

    /// Whether this thread has a request open on another connection: then no sample of the requests involved can be
    /// trusted. That it is an event loop is only known when that request goes on: its end may have been lost.
    pub(super) fn interleaves(&mut self, place: Place, tid: u32, sink: Sink<'_>) -> bool {
        let others = self.open_elsewhere(place, tid);
        for key in &others {
            // A chunked response whose end was seen is only waiting for proof.
            if let Some(other) = self.open.get(key).map(|request| request.place) {
                self.drive(other, 0, sink, |machine, events| machine.flush(events));
            }
        }
        let others = self.open_elsewhere(place, tid);
        for key in &others {
            self.overlap(*key, sink);
        }
        !others.is_empty() || self.threads.get(&tid).is_some_and(|thread| thread.interleaves)
    }

    pub(super) fn open_elsewhere(&self, place: Place, tid: u32) -> Vec<RequestKey> {
        let Some(thread) = self.threads.get(&tid) else { return Vec::new() };
        let elsewhere = |key: &&RequestKey| self.open.get(key).is_some_and(|request| request.place != place);
        thread.open.iter().filter(elsewhere).copied().collect()
    }

    pub(super) fn overlap(&mut self, key: RequestKey, sink: Sink<'_>) {
        self.revoke(key, sink);
        if let Some(request) = self.open.get_mut(&key) {
            request.overlapped = true;
        }
    }

    pub(super) fn revoke(&mut self, key: RequestKey, sink: Sink<'_>) {
        if let Some(request) = self.open.get_mut(&key)
            && request.attributed
        {
            request.attributed = false;
            self.counters.samples_attributed -= request.samples;
            self.counters.samples_revoked += request.samples;
            request.samples = 0;
            sink(Output::Revoke { key });
        }
    }
}
