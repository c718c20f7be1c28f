//! Finished requests of processes of which it is not known yet whether they are selected.
//!
//! The kernel side follows a process from its first `accept` on, and the manager looks at it a moment later. What ends
//! in between waits here: shown too early it would be a request of somebody else's service, without a name.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::correlate::Finished;
use crate::profile::Builder;

/// Requests that wait. The manager decides within milliseconds; a host full of servers that are not selected makes a
/// few hundred.
const HELD_MAX: usize = 1_024;
/// How long one waits. Twice the time between the manager's scans: by then the process has been looked at, or it was
/// gone before anyone could.
const PATIENCE: Duration = Duration::from_secs(10);

/// A finished request and its samples.
pub(super) type Held = (Finished, Option<Builder>);

/// See the module.
#[derive(Default)]
pub(super) struct Undecided {
    held: VecDeque<(Instant, Held)>,
    nodes: usize,
    dropped: u64,
}

impl Undecided {
    /// Keeps a request, if there is room.
    pub(super) fn hold(&mut self, request: Held, now: Instant) {
        if self.held.len() < HELD_MAX {
            self.nodes += nodes(&request);
            self.held.push_back((now, request));
        } else {
            self.dropped += 1;
        }
    }

    /// Of all profiles that wait: they take room as those being collected do.
    pub(super) fn nodes(&self) -> usize {
        self.nodes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes out those whose process is decided upon, oldest first, and gives up those that waited for too long.
    pub(super) fn take(&mut self, decided: impl Fn(u32) -> bool, now: Instant) -> Vec<Held> {
        let mut taken = Vec::new();
        for (since, request) in std::mem::take(&mut self.held) {
            if decided(request.0.pid) {
                self.nodes -= nodes(&request);
                taken.push(request);
            } else if now.saturating_duration_since(since) < PATIENCE {
                self.held.push_back((since, request));
            } else {
                self.nodes -= nodes(&request);
                self.dropped += 1;
            }
        }
        taken
    }

    /// The end: nobody will decide any more.
    pub(super) fn give_up(&mut self) {
        self.dropped += self.held.len() as u64;
        self.held.clear();
        self.nodes = 0;
    }

    /// Requests of which it was never known, since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }
}

fn nodes((_, builder): &Held) -> usize {
    builder.as_ref().map_or(0, Builder::nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlate::http::Exchange;
    use crate::record::Outcome;

    fn request(key: u64, pid: u32) -> Held {
        let exchange = Exchange {
            seq: 0,
            start: 0,
            first_out: None,
            end: 0,
            tid: pid,
            handoff: false,
            head: None,
            status: None,
            request_bytes: 0,
            response_bytes: 0,
            outcome: Outcome::Aborted,
            note: None,
            streaming: false,
            lost: 0,
        };
        (Finished::served(key, pid, exchange), None)
    }

    fn keys(held: Vec<Held>) -> Vec<u64> {
        held.into_iter().map(|(finished, _)| finished.key).collect()
    }

    #[test]
    fn requests_wait_for_their_own_process_only() {
        let (mut undecided, now) = (Undecided::default(), Instant::now());
        for (key, pid) in [(1, 10), (2, 20), (3, 10)] {
            undecided.hold(request(key, pid), now);
        }
        assert_eq!(keys(undecided.take(|pid| pid == 10, now)), [1, 3]);
        assert_eq!(keys(undecided.take(|_| false, now + PATIENCE - Duration::from_nanos(1))), [0; 0]);
        assert_eq!((undecided.is_empty(), undecided.dropped()), (false, 0));
        assert_eq!(keys(undecided.take(|_| false, now + PATIENCE)), [0; 0]);
        assert_eq!((undecided.is_empty(), undecided.dropped()), (true, 1));
    }

    #[test]
    fn what_does_not_fit_or_stays_is_counted() {
        let (mut undecided, now) = (Undecided::default(), Instant::now());
        for key in 0..HELD_MAX as u64 + 5 {
            undecided.hold(request(key, 10), now);
        }
        assert_eq!(undecided.dropped(), 5);
        assert_eq!(keys(undecided.take(|_| true, now)).len(), HELD_MAX);
        undecided.hold(request(1, 10), now);
        undecided.give_up();
        assert_eq!((undecided.is_empty(), undecided.dropped()), (true, 6));
    }
}
