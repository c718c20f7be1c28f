//! Processes that are to be looked at again.
//!
//! In: programs that just started, and what a look at them found. Out: who is due. A process cannot be judged at its
//! `exec`: libraries are mapped, the interpreter started and sockets opened some time later.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::identity::ProcessKey;

/// When a new program is looked at, after its start.
const LOOKS: [Duration; 5] = [
    Duration::from_millis(0),
    Duration::from_millis(60),
    Duration::from_millis(250),
    Duration::from_millis(1000),
    Duration::from_millis(3000),
];
/// Processes waiting for another look; a fork storm is caught up with by the next scan.
const PENDING_MAX: usize = 4096;

/// See the module.
#[derive(Default)]
pub struct Pending {
    waiting: HashMap<u32, Waiting>,
    /// The same by time: asked for at every message.
    due: BTreeSet<(Instant, u32)>,
}

struct Waiting {
    key: ProcessKey,
    started: Instant,
    look: usize,
}

impl Waiting {
    fn due(&self) -> Instant {
        self.started + LOOKS[self.look]
    }
}

impl Pending {
    /// All looks, from now on.
    pub fn begin(&mut self, key: ProcessKey, now: Instant) {
        self.remove(key.pid);
        if self.waiting.len() < PENDING_MAX {
            let waiting = Waiting { key, started: now, look: 0 };
            self.due.insert((waiting.due(), key.pid));
            self.waiting.insert(key.pid, waiting);
        }
    }

    pub fn remove(&mut self, pid: u32) {
        if let Some(waiting) = self.waiting.remove(&pid) {
            self.due.remove(&(waiting.due(), pid));
        }
    }

    pub fn contains(&self, pid: u32) -> bool {
        self.waiting.contains_key(&pid)
    }

    /// Which process it was when it began to wait.
    pub fn key(&self, pid: u32) -> Option<ProcessKey> {
        self.waiting.get(&pid).map(|waiting| waiting.key)
    }

    /// When the next look is due.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Who is due, longest first.
    pub fn due(&self, now: Instant) -> Vec<u32> {
        self.due.iter().take_while(|(at, _)| *at <= now).map(|(_, pid)| *pid).collect()
    }

    /// A look is over. `settled`: there is no point in another. Returns whether it was the last.
    pub fn looked(&mut self, pid: u32, settled: bool) -> bool {
        let Some(waiting) = self.waiting.get_mut(&pid) else { return false };
        self.due.remove(&(waiting.due(), pid));
        waiting.look += 1;
        if settled || waiting.look >= LOOKS.len() {
            self.waiting.remove(&pid);
            return true;
        }
        self.due.insert((waiting.due(), pid));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(pid: u32) -> ProcessKey {
        ProcessKey { pid, start_time: 1 }
    }

    fn after(began: Instant, ms: u64) -> Instant {
        began + Duration::from_millis(ms)
    }

    #[test]
    fn a_new_program_is_looked_at_five_times_within_three_seconds() {
        let began = Instant::now();
        let mut pending = Pending::default();
        pending.begin(key(7), began);
        for (look, ms) in [0, 60, 250, 1000, 3000].into_iter().enumerate() {
            assert_eq!(pending.next(), Some(after(began, ms)));
            if ms > 0 {
                assert_eq!(pending.due(after(began, ms - 1)), [0; 0]);
            }
            assert_eq!(pending.due(after(began, ms)), [7]);
            assert_eq!(pending.looked(7, false), look == 4);
        }
        assert_eq!((pending.next(), pending.key(7)), (None, None));
        assert!(!pending.looked(7, true), "it does not wait any more");
    }

    #[test]
    fn who_is_settled_or_gone_is_due_no_more() {
        let began = Instant::now();
        let mut pending = Pending::default();
        for pid in [7, 8, 9] {
            pending.begin(key(pid), began);
        }
        assert!(pending.looked(8, true));
        assert!(!pending.looked(9, false));
        pending.remove(7);
        assert_eq!((pending.next(), pending.due(after(began, 60))), (Some(after(began, 60)), vec![9]));
        // Another program in the same process.
        pending.begin(key(9), after(began, 10));
        assert_eq!(pending.due(after(began, 10)), [9]);
        pending.remove(9);
        assert_eq!((pending.next(), pending.contains(9)), (None, false));
    }

    #[test]
    fn their_number_is_bounded() {
        let began = Instant::now();
        let mut pending = Pending::default();
        for pid in 0..=PENDING_MAX as u32 {
            pending.begin(key(pid), began);
        }
        assert!(pending.contains(0) && !pending.contains(PENDING_MAX as u32));
        assert_eq!(pending.due(began).len(), PENDING_MAX);
        pending.begin(key(0), after(began, 1));
        assert_eq!(pending.due(after(began, 1)).len(), PENDING_MAX);
    }
}
