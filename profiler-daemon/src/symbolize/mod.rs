//! Stacks in words: raw frames become [`Frame`]s.
//!
//! In: the addresses of one sample, kernel and user, and which process it was taken in. Out: the stack, root
//! first, as shared frames; and how many frames stayed without a name, by kind and reason. No frame disappears
//! uncounted: what cannot be named becomes a frame that says so.
//!
//! ```text
//! Symbolizer ── process.rs   per process: mappings, code objects, resolved frames
//!            ├─ recent.rs    the stack before, which is mostly the next one too
//!            └─ names.rs     one raw frame → what became of it
//!               ├─ python/      code object → name, file, line
//!               ├─ module.rs    mapping → file
//!               ├─ perfmap.rs   code made at run time → name, from its maker's list
//!               ├─ native.rs    file and address → name (blazesym)
//!               └─ intern.rs    one copy of each frame
//! ```
//!
//! A [`Symbolizer`] lives on one thread of its own: it is not `Send`. What it asks a target for may take as long as
//! `process::patience` allows.

mod generations;
mod intern;
mod module;
mod names;
mod native;
mod perfmap;
mod process;
pub mod python;
mod reason;
mod recent;
mod text;

use std::sync::Arc;

use profiler_common::{FRAME_NATIVE_CALLER, FRAME_NATIVE_RETURN, FRAME_PYTHON, RawFrame};
use rustc_hash::FxHashMap;

pub use reason::Reason;

use crate::process::identity::ProcessKey;
use crate::profile::{Frame, FrameKind};

use names::{Names, ResolvedKind, kind_of};
use process::Process;
use recent::{Fault, Step};

/// Processes remembered; beyond, the one that was sampled longest ago is forgotten.
const PROCESSES_MAX: usize = 1024;
/// Memory for code objects and resolved frames of all processes together, bytes, about.
const BYTES_MAX: usize = 64 << 20;
/// Bytes that may be added between two looks at that sum: what it can be exceeded by.
const AUDIT_BYTES: usize = 1 << 20;
/// How one stack went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Frames in the stack that only say what they are not.
    pub unresolved: u32,
    /// Raw frames that were dropped: wrong guesses of a return address.
    pub cut: u32,
}

/// Resolves stacks.
#[derive(Default)]
pub struct Symbolizer {
    processes: FxHashMap<ProcessKey, Process>,
    names: Names,
    /// What became of the frames of the current stack that it does not share with the one before, leaf first; here to
    /// keep its allocation.
    steps: Vec<Step>,
    clock: u64,
    /// Bytes added since the last audit.
    added: usize,
}

impl Symbolizer {
    /// Resolves one sample: `kernel` and `user` are leaf first, as the record has them. The stack is root first, with
    /// kernel frames at the leaf.
    pub fn resolve(
        &mut self,
        key: ProcessKey,
        kernel: &[u64],
        user: &[RawFrame],
    ) -> (&[Arc<Frame>], Outcome) {
        self.audit(key);
        self.make_room(key);
        self.clock += 1;
        let Self { processes, names, steps, clock, added } = self;
        let process = processes.entry(key).or_insert_with(|| Process::new(key));
        process.used = *clock;
        process.refresh();

        let mut shared = process.recent.shared(user);
        walk(names, process, user, shared, steps);
        if process.forget_changed() {
            // An unknown address made it read the map: what was resolved before may be of what was there before.
            shared = 0;
            walk(names, process, user, shared, steps);
        }
        process.recent.change(user, shared, steps);
        let mut outcome = Outcome::default();
        for fault in process.recent.faults(shared).chain(steps.iter().filter_map(|step| step.fault)) {
            names.count(fault, &mut outcome);
        }
        steps.clear();
        names.kernel(kernel, process.recent.end(), &mut outcome);
        *added += process.added();
        process.bound();
        (process.recent.stack(), outcome)
    }

    /// A target forked. To be called before the child's first sample: the child may be gone before it can be asked,
    /// but what the parent told holds for it. A parent that was never sampled, as the master of a prefork server, is
    /// asked now for what its children share: its mappings and its interpreter.
    pub fn forked(&mut self, parent: ProcessKey, child: ProcessKey) {
        let mut process = self.processes.remove(&parent).unwrap_or_else(|| {
            let mut process = Process::new(parent);
            process.ask();
            process
        });
        self.clock += 1;
        process.used = self.clock;
        let copy = process.fork(child);
        self.put_back(parent, process);
        self.put_back(child, copy);
    }

    /// A process will be sampled: what is shared by all its frames is asked for now, while it certainly lives.
    pub fn target(&mut self, key: ProcessKey) {
        if !self.processes.contains_key(&key) {
            let mut process = Process::new(key);
            process.ask();
            self.clock += 1;
            process.used = self.clock;
            self.put_back(key, process);
        }
    }

    /// A process runs another program now.
    pub fn exec(&mut self, key: ProcessKey) {
        self.forget(key);
    }

    /// A process ended and no sample of it is to come.
    pub fn exited(&mut self, key: ProcessKey) {
        self.forget(key);
    }

    /// How often frames could not be resolved, by kind and reason, since the start.
    pub fn counters(&self) -> impl Iterator<Item = (FrameKind, Reason, u64)> + '_ {
        self.names.counters()
    }

    /// Bytes held for processes, about.
    pub fn size(&self) -> usize {
        self.processes.values().map(Process::size).sum()
    }

    fn forget(&mut self, key: ProcessKey) {
        self.processes.remove(&key);
        self.names.sweep();
    }

    fn put_back(&mut self, key: ProcessKey, mut process: Process) {
        self.make_room(key);
        self.added += process.added();
        process.bound();
        self.processes.insert(key, process);
        self.audit(key);
    }

    fn make_room(&mut self, key: ProcessKey) {
        if self.processes.len() >= PROCESSES_MAX && !self.processes.contains_key(&key) {
            self.forget_oldest();
        }
    }

    /// Who takes most room has to make some: others did nothing to lose what they have. Not the one `at_hand`; it has a
    /// bound of its own.
    fn audit(&mut self, at_hand: ProcessKey) {
        if self.added < AUDIT_BYTES {
            return;
        }
        self.added = 0;
        let mut sizes: Vec<(usize, ProcessKey)> =
            self.processes.iter().map(|(key, process)| (process.size(), *key)).collect();
        sizes.sort_unstable();
        let mut total: usize = sizes.iter().map(|(size, _)| size).sum();
        while total > BYTES_MAX {
            let Some((size, key)) = sizes.pop() else { break };
            if key == at_hand {
                continue;
            }
            total -= size;
            self.forget(key);
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(key) = self.processes.iter().min_by_key(|(_, p)| p.used).map(|(&key, _)| key) {
            self.forget(key);
        }
    }
}

/// Resolves all but the `shared` outermost frames, leaf first.
fn walk(names: &mut Names, process: &mut Process, user: &[RawFrame], shared: usize, steps: &mut Vec<Step>) {
    steps.clear();
    let python = user.iter().any(|raw| raw.kind() == FRAME_PYTHON);
    let mut cutting = false;
    for raw in &user[..user.len() - shared] {
        // What follows from a wrong guess is wrong too, whatever found it.
        if cutting && matches!(raw.kind(), FRAME_NATIVE_CALLER | FRAME_NATIVE_RETURN) {
            steps.push(Step { shown: None, fault: Some(Fault::Followed) });
            continue;
        }
        let resolved = match process.remembered(raw) {
            Some(known) => known.clone(),
            None => names.user(process, raw),
        };
        cutting = matches!(resolved.kind, ResolvedKind::Cut(_));
        let fault = match resolved.kind {
            ResolvedKind::Named | ResolvedKind::InterpreterLoop | ResolvedKind::Generated => None,
            ResolvedKind::Unresolved(reason) => Some(Fault::Unresolved(kind_of(raw), reason)),
            ResolvedKind::Cut(reason) => Some(Fault::Cut(reason)),
        };
        // Python frames stand for the loop.
        let hidden = python && resolved.kind == ResolvedKind::InterpreterLoop;
        steps.push(Step { shown: (!hidden).then_some(resolved), fault });
    }
}

#[cfg(test)]
mod tests;
