//! Which request a sample belongs to, and when nobody can say.
//!
//! The only place that gives a sample to a request, and the only one that takes trust away. Where a thread may have
//! worked on something else, nothing is given; see [`super::thread`] for the rule.

use profiler_common::{Data, flags};

use super::engine::Engine;
use super::output::{Output, Place, RequestKey, Sink};
use crate::decode::SampleEvent;

impl Engine {
    pub(super) fn sample(&mut self, event: &SampleEvent<'_>, sink: Sink<'_>) {
        let sample = &event.sample;
        let lost = u64::from(sample.header.lost);
        self.counters.samples += 1;
        if sample.header.flags & flags::BY_CONTEXT != 0 {
            return self.sample_of_context(event, sink);
        }
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
                Some(trailing) => {
                    trailing.finished.tail_samples += 1;
                    trailing.finished.lost += lost;
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
    pub(super) fn interleaved(&mut self, pid: u32, tid: u32, activation: u64, sink: Sink<'_>) {
        if self.threads.get(&tid).is_some_and(|thread| thread.activation == activation) {
            self.turns_to(None, pid, tid, sink);
        }
    }

    /// A thread does something on a connection, whatever that one speaks, or accepts one (`place` is none). What it
    /// has open elsewhere cannot be told from this any more. That it is an event loop is only known when the request
    /// goes on: its end may have been lost.
    pub(super) fn turns_to(&mut self, place: Option<Place>, pid: u32, tid: u32, sink: Sink<'_>) {
        for key in self.alone_elsewhere(place, pid, tid) {
            // A chunked response whose end was seen is only waiting for proof.
            if let Some(other) = self.open.get(&key).map(|request| request.place) {
                self.drive(other, 0, sink, |machine, events| machine.flush(events));
            }
        }
        for key in self.alone_elsewhere(place, pid, tid) {
            self.overlap(key, sink);
        }
    }

    fn alone_elsewhere(&self, place: Option<Place>, pid: u32, tid: u32) -> Vec<RequestKey> {
        let Some(thread) = self.threads.get(&tid).filter(|thread| thread.pid == pid) else {
            return Vec::new();
        };
        let elsewhere =
            |key: &&RequestKey| self.open.get(key).is_some_and(|request| Some(request.place) != place);
        thread.alone.iter().filter(elsewhere).copied().collect()
    }

    /// A thread that answers a request it did not begin, while one that it began is open, does several at a time.
    pub(super) fn answers(&mut self, place: Place, tid: u32, lost: u32) {
        let Some(thread) = self.threads.get_mut(&tid).filter(|thread| !thread.open.is_empty()) else {
            return;
        };
        let Some(conn) = self.connections.get(&place.0).and_then(|fds| fds.get(&place.1)) else { return };
        let own = conn.requests.iter().any(|(_, key)| thread.open.contains(key));
        thread.interleaves |= !own && lost == 0 && conn.machine.is_open();
    }

    /// Which of the requests that are open on a connection is being worked on is unknown.
    pub(super) fn revoke_all(&mut self, place: Place, sink: Sink<'_>) {
        let Some(conn) = self.conn(place) else { return };
        let keys: Vec<RequestKey> = conn.requests.iter().map(|(_, key)| *key).collect();
        for key in keys {
            self.revoke(key, sink);
        }
    }

    /// Something was sent that answers no request that was seen: one came together with the last one, and some of its
    /// samples may be that one's.
    pub(super) fn unowned(&mut self, place: Place, sink: Sink<'_>) {
        let Some(key) = self.conn(place).and_then(|conn| conn.last) else { return };
        if let Some(trailing) = self.trailing.get_mut(&key)
            && trailing.finished.attributed
        {
            trailing.finished.attributed = false;
            self.counters.samples_attributed -= trailing.samples;
            self.counters.samples_revoked += trailing.samples;
            sink(Output::Revoke { key });
        }
    }

    pub(super) fn overlap(&mut self, key: RequestKey, sink: Sink<'_>) {
        self.revoke(key, sink);
        let Some(request) = self.open.get_mut(&key) else { return };
        request.overlapped = true;
        if let Some(thread) = self.threads.get_mut(&request.tid) {
            thread.alone.retain(|alone| *alone != key);
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
