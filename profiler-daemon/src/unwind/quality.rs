//! How well native stacks come out, by process.
//!
//! In: samples, as the reader counts them. Out: for each process and for all how many walks ended where nothing called
//! any more, and why the others ended before. A process that has ended keeps its numbers until its pid means another, or its
//! room is needed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use profiler_common::unwind::end;
use profiler_common::{Sample, flags};
use rustc_hash::FxHashMap;
use serde_json::{Value, json};

/// Names of [`end`]'s values.
pub const REASONS: [&str; end::COUNT] = [
    "complete",
    "truncated",
    "no_rule",
    "no_table",
    "unmapped",
    "unsupported",
    "fault",
    "disorder",
    "no_registers",
];

/// Walks by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub ends: [u64; end::COUNT],
    /// Of those that are complete: with steps by frame pointer.
    pub guessed: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.ends.iter_mut().zip(other.ends).for_each(|(sum, n)| *sum += n);
        self.guessed += other.guessed;
    }

    pub fn total(&self) -> u64 {
        self.ends.iter().sum()
    }

    /// An object: `samples`, `complete`, of these `guessed`, and the others by reason.
    pub fn json(&self) -> Value {
        let incomplete: serde_json::Map<String, Value> = REASONS
            .iter()
            .zip(self.ends)
            .skip(1)
            .filter(|(_, n)| *n > 0)
            .map(|(reason, n)| ((*reason).to_owned(), n.into()))
            .collect();
        let complete = self.ends[usize::from(end::COMPLETE)];
        json!({"samples": self.total(), "complete": complete, "guessed": self.guessed, "incomplete": incomplete})
    }
}

/// What was counted since it was handed on last.
#[derive(Default)]
pub struct Counted {
    by_pid: FxHashMap<u32, Tally>,
    /// What happened to processes since, in its order, with what was counted of them until then.
    turns: Vec<(u32, Tally, Turn)>,
}

enum Turn {
    /// It is over, and can be asked about until its pid means another.
    Ended,
    /// Its pid means a new process, or it runs another program.
    Began,
}

impl Counted {
    pub fn count(&mut self, sample: &Sample) {
        let tally = self.by_pid.entry(sample.header.pid).or_default();
        // A value that is unknown can only be a mistake of ours.
        let end = usize::from(sample.end).min(end::COUNT - 1);
        tally.ends[end] += 1;
        let complete = sample.end == end::COMPLETE && sample.header.flags & flags::GUESSED != 0;
        tally.guessed += u64::from(complete);
    }

    /// The process is gone.
    pub fn ended(&mut self, pid: u32) {
        self.turn(pid, Turn::Ended);
    }

    /// A process was forked, or runs another program from now on.
    pub fn began(&mut self, pid: u32) {
        self.turn(pid, Turn::Began);
    }

    fn turn(&mut self, pid: u32, turn: Turn) {
        let tally = self.by_pid.remove(&pid).unwrap_or_default();
        self.turns.push((pid, tally, turn));
    }
}

/// The sums; cheap to clone.
#[derive(Clone, Default)]
pub struct Quality(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    all: Tally,
    processes: HashMap<u32, Known>,
}

#[derive(Default)]
struct Known {
    tally: Tally,
    /// Whatever else is counted for this pid is another's.
    ended: bool,
}

/// Processes remembered, as many as can be targets; beyond, those that have ended make room.
const PROCESSES_MAX: usize = 16_384;

impl Quality {
    /// Takes over what was counted. `alive` says which processes are worth remembering when there is no room.
    pub fn take(&self, counted: &mut Counted, alive: impl Fn(u32) -> bool) {
        if counted.by_pid.is_empty() && counted.turns.is_empty() {
            return;
        }
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (pid, tally, turn) in counted.turns.drain(..) {
            if tally.total() > 0 {
                state.add(pid, &tally, &alive);
            }
            match turn {
                Turn::Ended => {
                    if let Some(known) = state.processes.get_mut(&pid) {
                        known.ended = true;
                    }
                }
                Turn::Began => drop(state.processes.remove(&pid)),
            }
        }
        for (pid, tally) in counted.by_pid.drain() {
            state.add(pid, &tally, &alive);
        }
    }

    pub fn of(&self, pid: u32) -> Tally {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.processes.get(&pid).map_or_else(Tally::default, |known| known.tally)
    }

    pub fn all(&self) -> Tally {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).all
    }
}

impl State {
    fn add(&mut self, pid: u32, tally: &Tally, alive: impl Fn(u32) -> bool) {
        self.all.add(tally);
        if self.processes.len() >= PROCESSES_MAX && !self.processes.contains_key(&pid) {
            self.processes.retain(|pid, _| alive(*pid));
            if self.processes.len() >= PROCESSES_MAX {
                return;
            }
        }
        let known = self.processes.entry(pid).or_default();
        if std::mem::take(&mut known.ended) {
            known.tally = Tally::default();
        }
        known.tally.add(tally);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use profiler_common::Header;

    fn sample(pid: u32, end: u8, bits: u16) -> Sample {
        Sample { header: Header { pid, flags: bits, ..Header::default() }, end, ..Sample::default() }
    }

    #[test]
    fn walks_are_counted_by_process_and_reason() {
        let (quality, mut counted) = (Quality::default(), Counted::default());
        for (pid, end, bits) in [
            (1, end::COMPLETE, 0),
            (1, end::COMPLETE, flags::GUESSED),
            (1, end::FAULT, flags::GUESSED),
            (2, end::NO_RULE, 0),
            (2, 200, 0),
        ] {
            counted.count(&sample(pid, end, bits));
        }
        quality.take(&mut counted, |_| true);
        quality.take(&mut counted, |_| true);
        assert_eq!(
            quality.of(1).json(),
            json!({"samples": 3, "complete": 2, "guessed": 1, "incomplete": {"fault": 1}})
        );
        assert_eq!(
            quality.of(2).json(),
            json!({"samples": 2, "complete": 0, "guessed": 0, "incomplete": {"no_rule": 1, "no_registers": 1}})
        );
        assert_eq!(quality.all().total(), 5);
    }

    #[test]
    fn a_pid_that_is_used_again_begins_anew() {
        let (quality, mut counted) = (Quality::default(), Counted::default());
        let mut totals = Vec::new();
        let mut take = |counted: &mut Counted| {
            quality.take(counted, |_| true);
            totals.push((quality.of(1).total(), quality.all().total()));
        };
        counted.count(&sample(1, end::COMPLETE, 0));
        take(&mut counted);
        counted.count(&sample(1, end::FAULT, 0));
        counted.ended(1);
        // Until somebody else has it, it is what can be asked about.
        take(&mut counted);
        counted.count(&sample(1, end::COMPLETE, 0));
        take(&mut counted);
        // All at once: the end of one, and the beginning of the next.
        counted.count(&sample(1, end::COMPLETE, 0));
        counted.ended(1);
        counted.count(&sample(1, end::NO_RULE, 0));
        take(&mut counted);
        // Another program, of which there is no sample yet.
        counted.began(1);
        take(&mut counted);
        assert_eq!(totals, [(1, 1), (2, 2), (1, 3), (1, 5), (0, 5)]);
    }

    #[test]
    fn those_that_ended_make_room() {
        let (quality, mut counted) = (Quality::default(), Counted::default());
        for pid in 0..PROCESSES_MAX as u32 {
            counted.count(&sample(pid, 0, 0));
        }
        quality.take(&mut counted, |_| true);
        counted.count(&sample(u32::MAX, 0, 0));
        quality.take(&mut counted, |pid| pid == 7);
        assert_eq!((quality.of(7).total(), quality.of(8).total(), quality.of(u32::MAX).total()), (1, 0, 1));
    }
}
