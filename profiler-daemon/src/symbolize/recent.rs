//! The stack that was resolved last: most of the next one is the same, from its outermost frame on.
//!
//! In: what became of the frames that the new stack does not share with it. Out: the new stack, root first. A frame
//! that may have a name at the next sight is not remembered, nor what it calls; wrong guesses and frames without a
//! name are, together with what has to be counted for them in each sample.

use std::rc::Rc;
use std::sync::Arc;

use profiler_common::{FRAME_PYTHON, RawFrame};

use super::Reason;
use super::names::Resolved;
use crate::profile::{Frame, FrameKind};

/// Why a raw frame is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Unresolved(FrameKind, Reason),
    /// A wrong guess of a return address.
    Cut(Reason),
    /// Guessed from a wrong guess.
    Followed,
}

/// What became of a raw frame in the stack it is in.
pub(super) struct Step {
    pub(super) shown: Option<Rc<Resolved>>,
    pub(super) fault: Option<Fault>,
}

impl Step {
    /// Whether it is the same at the next sight, as long as the process's map is. (A guess is never a reason to read
    /// the map again, so one that led nowhere still does.)
    fn holds(&self) -> bool {
        !matches!(self.fault, Some(Fault::Unresolved(_, reason)) if reason.passes())
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Recent {
    /// Root first.
    raw: Vec<RawFrame>,
    /// Of each of these: how long `stack` is up to it.
    depth: Vec<u32>,
    /// Those of `raw` that have one, by their place there.
    faults: Vec<(usize, Fault)>,
    /// Root first; behind what `raw` stands for come the other frames, and the kernel's.
    stack: Vec<Arc<Frame>>,
}

impl Recent {
    /// How many of the outermost frames of `user` (leaf first) are those of this stack, from a Python frame on: what a
    /// native one means depends on the frames below it.
    pub(super) fn shared(&self, user: &[RawFrame]) -> usize {
        let same = self.raw.iter().zip(user.iter().rev()).take_while(|(a, b)| a == b).count();
        let python = self.raw[..same].iter().rposition(|raw| raw.kind() == FRAME_PYTHON);
        python.map_or(0, |at| at + 1)
    }

    /// Makes it the stack of `user`: the `shared` outermost frames stay, `inner` became of the others (leaf first).
    pub(super) fn change(&mut self, user: &[RawFrame], shared: usize, inner: &[Step]) {
        let keep = shared.checked_sub(1).and_then(|last| self.depth.get(last)).copied().unwrap_or(0);
        self.stack.truncate(keep as usize);
        self.raw.truncate(shared);
        self.depth.truncate(shared);
        self.faults.truncate(self.faults.partition_point(|(at, _)| *at < shared));
        let mut holds = true;
        for (raw, step) in user.iter().rev().skip(shared).zip(inner.iter().rev()) {
            if let Some(resolved) = &step.shown {
                self.stack.extend_from_slice(&resolved.frames);
            }
            holds = holds && step.holds();
            if holds {
                self.faults.extend(step.fault.map(|fault| (self.raw.len(), fault)));
                self.raw.push(*raw);
                self.depth.push(self.stack.len() as u32);
            }
        }
    }

    /// What is to be counted for the `shared` outermost frames.
    pub(super) fn faults(&self, shared: usize) -> impl Iterator<Item = Fault> + '_ {
        self.faults.iter().take_while(move |(at, _)| *at < shared).map(|(_, fault)| *fault)
    }

    pub(super) fn stack(&self) -> &[Arc<Frame>] {
        &self.stack
    }

    /// For the kernel's frames, which come last.
    pub(super) fn end(&mut self) -> &mut Vec<Arc<Frame>> {
        &mut self.stack
    }

    /// What is known of these frames holds no longer. The stack stays until the next.
    pub(super) fn clear(&mut self) {
        self.raw.clear();
        self.depth.clear();
        self.faults.clear();
    }

    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.raw.len()
    }
}
