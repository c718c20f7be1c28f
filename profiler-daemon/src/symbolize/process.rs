//! What is remembered of one process: its mappings, its code objects, its resolved frames.
//!
//! A process that ended can no longer be asked, so whatever it told us stays until the pipeline says it is over;
//! a forked child begins with a copy of what its parent told, since its memory is a copy of its parent's.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use profiler_common::RawFrame;
use rustc_hash::FxHashMap;

use super::generations::Generations;
use super::module::{Module, Modules};
use super::python::code::Code;
use super::reason::Reason;
use crate::process::identity::{self, ProcessKey};
use crate::process::maps::{Mapping, Maps};
use crate::process::memory::ProcessMemory;
use crate::process::python::{self, CodeLayout};
use crate::profile::Frame;

/// What became of a raw frame.
#[derive(Debug)]
pub(super) struct Resolved {
    /// Outermost first; empty for a frame that is dropped.
    pub(super) frames: Box<[Arc<Frame>]>,
    pub(super) kind: ResolvedKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResolvedKind {
    Named,
    /// The interpreter's loop, which Python frames stand for.
    InterpreterLoop,
    Unresolved(Reason),
    /// A guess that was wrong, and whatever was guessed from it.
    Cut(Reason),
}

/// Code objects kept per process: Django with its dependencies runs some 5,000.
const CODES_MAX: usize = 20_000;
/// Distinct (code, instruction) pairs kept per process; a busy service shows a few thousand.
const FRAMES_MAX: usize = 16_384;
/// What an entry of the frame memory costs, about: key, pointer, the boxed frames.
const FRAME_COST: usize = 160;
/// How often an unknown address may make us read the map again: a read costs 100 µs and more.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

/// The process's Python.
#[derive(Clone)]
struct Interpreter {
    layout: &'static CodeLayout,
    /// The part of its loop that has no symbol.
    cold: Option<Range<u64>>,
}

pub(super) struct Process {
    key: ProcessKey,
    pub(super) memory: ProcessMemory,
    maps: Rc<Maps>,
    scanned: Option<Instant>,
    /// By start of mapping.
    modules: FxHashMap<u64, Result<Rc<Module>, Reason>>,
    /// Looked for once; that there is none is kept until the map changes.
    interpreter: Option<Option<Interpreter>>,
    codes: Generations<u64, Rc<Code>>,
    frames: Generations<RawFrame, Rc<Resolved>>,
    code_bytes: usize,
    /// The sum at which it is taken anew.
    recount_at: usize,
    /// When it was used last, on the symbolizer's own count.
    pub(super) used: u64,
}

impl Process {
    pub(super) fn new(key: ProcessKey) -> Self {
        Self {
            key,
            memory: ProcessMemory::new(key.pid),
            maps: Rc::default(),
            scanned: None,
            modules: FxHashMap::default(),
            interpreter: None,
            codes: Generations::new(CODES_MAX),
            frames: Generations::new(FRAMES_MAX),
            code_bytes: 0,
            recount_at: 0,
            used: 0,
        }
    }

    /// Reads what does not depend on a stack.
    pub(super) fn ask(&mut self) {
        self.rescan();
        self.interpreter();
    }

    /// The child's beginning: all that is known of the parent holds for it too.
    pub(super) fn fork(&mut self, child: ProcessKey) -> Self {
        Self {
            key: child,
            memory: ProcessMemory::new(child.pid),
            maps: self.maps.clone(),
            scanned: self.scanned,
            modules: self.modules.clone(),
            interpreter: self.interpreter.clone(),
            codes: self.codes.fork(),
            frames: self.frames.fork(),
            code_bytes: self.code_bytes,
            recount_at: self.recount_at,
            used: self.used,
        }
    }

    pub(super) fn remembered(&self, raw: &RawFrame) -> Option<&Rc<Resolved>> {
        self.frames.get(raw)
    }

    pub(super) fn remember(&mut self, raw: RawFrame, resolved: Rc<Resolved>) {
        self.frames.insert(raw, resolved);
    }

    /// Bytes it occupies, about; what forked processes share is counted for each.
    pub(super) fn size(&self) -> usize {
        self.code_bytes + self.frames.len() * FRAME_COST
    }

    /// The mapping that holds an address, after another look if it is not known.
    pub(super) fn mapping(&mut self, address: u64) -> Option<Mapping> {
        if self.maps.lookup(address).is_none() {
            self.rescan();
        }
        self.maps.lookup(address).cloned()
    }

    fn rescan(&mut self) {
        let now = Instant::now();
        if self.scanned.is_some_and(|last| now.duration_since(last) < SCAN_INTERVAL) {
            return;
        }
        self.scanned = Some(now);
        if !self.is_current() {
            return;
        }
        // A process that is gone has no map: what is known of it stays.
        let Ok(maps) = Maps::read(self.key.pid) else { return };
        if maps.iter().next().is_none() || maps == *self.maps {
            return;
        }
        // Something was mapped, perhaps where something else was before.
        self.maps = Rc::new(maps);
        self.modules.clear();
        self.frames.clear();
        // Programs that embed an interpreter may load it late.
        if matches!(self.interpreter, Some(None)) {
            self.interpreter = None;
        }
    }

    /// Whether the pid still belongs to the process we mean.
    fn is_current(&self) -> bool {
        self.key.start_time == 0 || identity::key(self.key.pid).is_ok_and(|key| key == self.key)
    }

    pub(super) fn module(&mut self, modules: &mut Modules, mapping: &Mapping) -> Result<Rc<Module>, Reason> {
        if let Some(known) = self.modules.get(&mapping.start) {
            return known.clone();
        }
        let found = modules.get(self.key.pid, mapping);
        // A full table empties again; everything else stays as it is.
        if !matches!(found, Err(Reason::TooManyFiles)) {
            self.modules.insert(mapping.start, found.clone());
        }
        found
    }

    /// The code object at an address, as it was when the frame was seen.
    pub(super) fn code(&mut self, raw: &RawFrame) -> Result<Rc<Code>, Reason> {
        if let Some(known) = self.codes.get(&raw.address)
            && known.check == raw.check
        {
            return Ok(known.clone());
        }
        let layout = self.interpreter().ok_or(Reason::NoInterpreter)?.layout;
        if !self.is_current() {
            return Err(Reason::Gone);
        }
        let code = Rc::new(Code::read(&self.memory, layout, raw.address, raw.check)?);
        self.codes.insert(raw.address, code.clone());
        self.code_bytes += code.size();
        // What was forgotten is noticed when the count looks too high, at most once in a megabyte of insertions.
        if self.code_bytes > self.recount_at {
            self.code_bytes = self.codes.values().map(|code| code.size()).sum();
            self.recount_at = self.code_bytes + (self.code_bytes / 8).max(1 << 20);
        }
        Ok(code)
    }

    /// Whether an address without a symbol belongs to the interpreter's loop.
    pub(super) fn in_cold_loop(&mut self, address: u64) -> bool {
        let cold = self.interpreter().and_then(|interpreter| interpreter.cold.as_ref());
        cold.is_some_and(|cold| cold.contains(&address))
    }

    fn interpreter(&mut self) -> Option<&Interpreter> {
        if self.interpreter.is_none() {
            if self.scanned.is_none() {
                self.rescan();
            }
            let located = python::locate(self.key.pid, &self.maps).unwrap_or_else(|error| {
                tracing::debug!(pid = self.key.pid, %error, "no interpreter");
                None
            });
            self.interpreter = Some(located.and_then(|located| {
                let layout = &python::layout(located.version)?.code;
                Some(Interpreter { layout, cold: located.interpreter_cold })
            }));
        }
        self.interpreter.as_ref().and_then(Option::as_ref)
    }
}
