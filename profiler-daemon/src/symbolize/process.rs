//! What is remembered of one process: its mappings, its code objects, its resolved frames.
//!
//! A process that ended can no longer be asked, so whatever it told us stays until the pipeline says it is over;
//! a forked child begins with a copy of what its parent told, since its memory is a copy of its parent's.

use std::hash::Hasher;
use std::rc::Rc;
use std::time::{Duration, Instant};

use profiler_common::{FRAME_PYTHON, RawFrame};
use rustc_hash::{FxHashMap, FxHasher};

use super::generations::Generations;
use super::module::{Module, Modules};
use super::names::{Resolved, ResolvedKind};
use super::native::{CALL_MAX, ends_in_call};
use super::perfmap::{self, PerfMap};
use super::python::code::Code;
use super::reason::Reason;
use super::recent::Recent;
use crate::bpf::sys;
use crate::process::identity::{self, ProcessKey};
use crate::process::maps::{Mapping, Maps};
use crate::process::memory::{Memory, ProcessMemory};
use crate::process::patience::{FILES, MEMORY, PATIENCE};
use crate::process::python::{self, InterpreterLoop, Layout, PythonError};

/// Code objects kept per process: Django with its dependencies runs some 5,000.
const CODES_MAX: usize = 20_000;
/// Distinct (code, instruction) pairs kept per process; a busy service shows a few thousand.
const FRAMES_MAX: usize = 16_384;
/// What an entry of the frame memory costs, about: key, pointer, the boxed frames.
const FRAME_COST: usize = 160;
/// Memory for the code objects and frames of one process, bytes, about: four times what a large Django site takes, and
/// an eighth of what there is for all.
pub(super) const BYTES_MAX: usize = 8 << 20;
/// How often an unknown address may make us read the map again: a read costs 100 µs and more.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);
/// A library that takes another's place gets its names as long as the map is believed. Longer where reading it takes
/// long: it may cost a thousandth of a CPU per process.
const BELIEVED: Duration = Duration::from_secs(1);
const BELIEVED_MAX: Duration = Duration::from_secs(30);
const READING_SHARE: u32 = 1000;
/// How often new names of code made at run time are looked for. Longer where there are many, as a process could pretend:
/// it may cost a hundredth of a CPU per process.
const GENERATED: Duration = Duration::from_secs(1);
const GENERATED_MAX: Duration = Duration::from_secs(30);
const GENERATED_SHARE: u32 = 100;

/// Names of code made at run time.
#[derive(Clone, Default)]
struct Generated {
    names: Rc<PerfMap>,
    /// When they are looked for again.
    due: Option<Instant>,
}

/// The process's Python.
#[derive(Clone)]
struct Interpreter {
    layout: Layout,
    /// Where the type of code objects lies.
    code_type: Option<u64>,
    /// Where its loop is: if something else is mapped there, it is another program's.
    code: InterpreterLoop,
}

pub(super) struct Process {
    key: ProcessKey,
    memory: ProcessMemory,
    maps: Rc<Maps>,
    scanned: Option<Instant>,
    /// Of the map's text as it was read last.
    fingerprint: u64,
    /// How long the map is believed.
    believed: Duration,
    /// By start of mapping.
    modules: FxHashMap<u64, Result<Rc<Module>, Reason>>,
    /// Looked for once; that there is none is kept until the map changes.
    interpreter: Option<Option<Interpreter>>,
    /// From the first sight of such code on.
    generated: Option<Generated>,
    codes: Generations<u64, Rc<Code>>,
    frames: Generations<RawFrame, Rc<Resolved>>,
    code_bytes: usize,
    /// The sum at which it is taken anew.
    recount_at: usize,
    /// Bytes added since [`Self::added`] was asked.
    added: usize,
    /// Something else is mapped somewhere than when `recent` was resolved.
    changed: bool,
    /// When it was used last, on the symbolizer's own count.
    pub(super) used: u64,
    pub(super) recent: Recent,
}

impl Process {
    pub(super) fn new(key: ProcessKey) -> Self {
        Self {
            key,
            memory: ProcessMemory::new(key.pid),
            maps: Rc::default(),
            scanned: None,
            fingerprint: 0,
            believed: BELIEVED,
            modules: FxHashMap::default(),
            interpreter: None,
            generated: None,
            codes: Generations::new(CODES_MAX),
            frames: Generations::new(FRAMES_MAX),
            code_bytes: 0,
            recount_at: 0,
            added: 0,
            changed: false,
            used: 0,
            recent: Recent::default(),
        }
    }

    /// Reads what does not depend on a stack.
    pub(super) fn ask(&mut self) {
        self.rescan();
        // Asked again when it is needed.
        let _ = self.interpreter();
    }

    /// The child's beginning: all that is known of the parent holds for it too.
    pub(super) fn fork(&mut self, child: ProcessKey) -> Self {
        Self {
            key: child,
            memory: ProcessMemory::new(child.pid),
            maps: self.maps.clone(),
            fingerprint: self.fingerprint,
            believed: self.believed,
            scanned: self.scanned,
            modules: self.modules.clone(),
            interpreter: self.interpreter.clone(),
            generated: self
                .generated
                .as_ref()
                .map(|of| Generated { names: Rc::new(of.names.fork()), due: None }),
            codes: self.codes.fork(),
            frames: self.frames.fork(),
            code_bytes: self.code_bytes,
            recount_at: self.recount_at,
            added: 0,
            changed: false,
            used: self.used,
            recent: Recent::default(),
        }
    }

    pub(super) fn remembered(&self, raw: &RawFrame) -> Option<&Rc<Resolved>> {
        self.frames.get(raw)
    }

    pub(super) fn remember(&mut self, raw: RawFrame, resolved: Rc<Resolved>) {
        self.frames.insert(raw, resolved);
        self.added += FRAME_COST;
    }

    /// Bytes added since the last call.
    pub(super) fn added(&mut self) -> usize {
        std::mem::take(&mut self.added)
    }

    /// Begins anew where one process would take the room of the others.
    pub(super) fn bound(&mut self) {
        if self.size() > BYTES_MAX {
            self.codes.clear();
            self.frames.clear();
            self.recent.clear();
            if let Some(generated) = &mut self.generated {
                generated.names = Rc::default();
            }
            (self.code_bytes, self.recount_at) = (0, 0);
        }
    }

    /// Reads the map again if it was not for a while. Called before each stack.
    pub(super) fn refresh(&mut self) {
        if self.scanned.is_some_and(|last| last.elapsed() >= self.believed) {
            self.read_map();
        }
        if self.generated.is_some() {
            // Names come late, and code is replaced by other code.
            self.look_for_names();
        }
        self.forget_changed();
    }

    /// The name of code that is in no file, and the name of the list it is from.
    pub(super) fn generated(&mut self, address: u64) -> Option<(&str, &str)> {
        if self.generated.is_none() {
            self.generated = Some(Generated::default());
        }
        self.look_for_names();
        self.generated.as_ref()?.names.lookup(address)
    }

    fn look_for_names(&mut self) {
        let began = Instant::now();
        let due = |of: &Generated| of.due.is_none_or(|due| began >= due);
        if !self.generated.as_ref().is_some_and(due) {
            return;
        }
        let current = self.is_current();
        let Some(generated) = &mut self.generated else { return };
        generated.due = Some(began + GENERATED);
        if !current {
            return;
        }
        let (pid, last, age) = (self.key.pid, generated.names.position(), age(self.key));
        let look = PATIENCE.ask(pid, FILES, move || perfmap::look(pid, last, age));
        let Ok(Some(look)) = look else { return };
        let before = generated.names.size();
        let changed = Rc::make_mut(&mut generated.names).add(look);
        self.added += generated.names.size().saturating_sub(before);
        generated.due = Some(began + (began.elapsed() * GENERATED_SHARE).clamp(GENERATED, GENERATED_MAX));
        if changed {
            self.changed = true;
            self.frames.retain(|_, resolved| match resolved.kind {
                ResolvedKind::Generated => false,
                ResolvedKind::Unresolved(reason) => !reason.may_be_generated(),
                _ => true,
            });
        }
    }

    /// Forgets the last stack if the map is another than when it was resolved. Whether it was.
    pub(super) fn forget_changed(&mut self) -> bool {
        let changed = std::mem::take(&mut self.changed);
        if changed {
            self.recent.clear();
        }
        changed
    }

    /// As if it had last looked at the map so long ago.
    #[cfg(test)]
    pub(super) fn looked(&mut self, ago: Duration) {
        self.scanned = Instant::now().checked_sub(ago);
    }

    /// Bytes it occupies, about; what forked processes share is counted for each.
    pub(super) fn size(&self) -> usize {
        let generated = self.generated.as_ref().map_or(0, |generated| generated.names.size());
        self.code_bytes + self.frames.len() * FRAME_COST + generated
    }

    /// The mapping that holds an address, after another look if it is not known. A guess is usually wrong, so for one
    /// the map is not read before its time.
    pub(super) fn mapping(&mut self, address: u64, guess: bool) -> Option<Mapping> {
        if self.maps.lookup(address).is_none() && (!guess || self.scanned.is_none()) {
            self.rescan();
        }
        self.maps.lookup(address).cloned()
    }

    fn rescan(&mut self) {
        if self.scanned.is_none_or(|last| last.elapsed() >= SCAN_INTERVAL) {
            self.read_map();
        }
    }

    fn read_map(&mut self) {
        let began = Instant::now();
        self.scanned = Some(began);
        if !self.is_current() {
            return;
        }
        let pid = self.key.pid;
        let text = PATIENCE.ask(pid, MEMORY, move || Maps::text(pid));
        self.believed = (began.elapsed() * READING_SHARE).clamp(BELIEVED, BELIEVED_MAX);
        // A process that is gone has no map: what is known of it stays.
        let Ok(Ok(text)) = text else { return };
        let mut hasher = FxHasher::default();
        hasher.write(&text);
        if text.is_empty() || hasher.finish() == self.fingerprint {
            return;
        }
        self.fingerprint = hasher.finish();
        let maps = Maps::parse(&text);
        let changed = self.maps.changed(&maps);
        self.maps = Rc::new(maps);
        // Modules are known by where they begin, also to what is not code.
        self.modules.clear();
        if changed.is_empty() {
            return;
        }
        self.changed = true;
        let within = |address: u64| changed.iter().any(|range| range.contains(&address));
        let replaced = match &self.interpreter {
            None => false,
            Some(None) => {
                // Programs that embed an interpreter may load it late.
                self.interpreter = None;
                false
            }
            // Another program, of which no record told.
            Some(Some(interpreter)) => within(interpreter.code.hot.start),
        };
        if replaced {
            self.interpreter = None;
            self.codes.clear();
            (self.code_bytes, self.recount_at) = (0, 0);
        }
        // What is mapped there now is not what it was when these got their names.
        let nameless = ResolvedKind::Unresolved(Reason::NoInterpreter);
        self.frames.retain(|raw, resolved| match raw.kind() {
            FRAME_PYTHON => !replaced && resolved.kind != nameless,
            _ => !within(raw.address),
        });
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
        // A full table empties again, and who did not answer may yet; everything else stays as it is.
        if !matches!(found, Err(Reason::TooManyFiles | Reason::Unanswered)) {
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
        let &Interpreter { layout, code_type, .. } = self.interpreter()?.ok_or(Reason::NoInterpreter)?;
        if !self.is_current() {
            return Err(Reason::Gone);
        }
        let (memory, address, check) = (self.memory, raw.address, raw.check);
        let read = move || Code::read(&memory, &layout, code_type, address, check);
        let code = Rc::new(PATIENCE.ask(self.key.pid, MEMORY, read)??);
        self.codes.insert(raw.address, code.clone());
        self.code_bytes += code.size();
        self.added += code.size();
        // What was forgotten is noticed when the count looks too high, at most once in a megabyte of insertions.
        if self.code_bytes > self.recount_at {
            self.code_bytes = self.codes.values().map(|code| code.size()).sum();
            self.recount_at = self.code_bytes + (self.code_bytes / 8).max(1 << 20);
        }
        Ok(code)
    }

    /// Whether a call precedes a return address, by the memory, for code without a file. What cannot be read is given
    /// the benefit of the doubt.
    pub(super) fn called_from(&self, address: u64) -> bool {
        let memory = self.memory;
        let read = move || {
            let mut bytes = [0; CALL_MAX];
            let start = address.wrapping_sub(CALL_MAX as u64);
            memory.read(start, &mut bytes).is_err() || ends_in_call(&bytes)
        };
        PATIENCE.ask(self.key.pid, MEMORY, read).unwrap_or(true)
    }

    /// Whether an address without a symbol belongs to the interpreter's loop.
    pub(super) fn in_cold_loop(&mut self, address: u64) -> bool {
        self.interpreter().ok().flatten().is_some_and(|interpreter| interpreter.code.is_cold(address))
    }

    fn interpreter(&mut self) -> Result<Option<&Interpreter>, Reason> {
        if self.interpreter.is_none() {
            if self.scanned.is_none() {
                self.rescan();
            }
            let (pid, maps, memory) = (self.key.pid, Maps::clone(&self.maps), self.memory);
            let look = move || {
                let Some(located) = python::locate(pid, &maps)? else { return Ok(None) };
                let layout = located.layout(&memory)?;
                let (code_type, code) = (located.code_type, located.interpreter_loop);
                Ok::<_, PythonError>(Some(Interpreter { layout, code_type, code }))
            };
            self.interpreter = Some(match PATIENCE.ask(pid, FILES, look) {
                Ok(Ok(found)) => found,
                Ok(Err(error)) => {
                    tracing::debug!(pid, %error, "no interpreter");
                    None
                }
                Err(unanswered) => return Err(unanswered.into()),
            });
        }
        Ok(self.interpreter.as_ref().and_then(Option::as_ref))
    }
}

/// How long a process runs, if that is known.
fn age(key: ProcessKey) -> Option<Duration> {
    let started = (key.start_time != 0).then(|| identity::earliest(key))?;
    Some(Duration::from_nanos(sys::monotonic_ns().saturating_sub(started)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbolize::recent::Step;

    #[test]
    fn one_process_has_a_bound_of_its_own() {
        let mut process = Process::new(ProcessKey { pid: 1, start_time: 1 });
        let resolved = Rc::new(Resolved { frames: Box::default(), kind: ResolvedKind::Named });
        let raw = RawFrame::new(FRAME_PYTHON, 1, 0, 0);
        process.remember(raw, resolved.clone());
        process.recent.change(&[raw], 0, &[Step { shown: Some(resolved), fault: None }]);
        assert_eq!(process.added(), FRAME_COST);
        assert_eq!(process.added(), 0);
        process.bound();
        assert_eq!((process.size(), process.recent.remembered()), (FRAME_COST, 1));
        process.code_bytes = BYTES_MAX;
        process.bound();
        assert_eq!((process.size(), process.recent.remembered()), (0, 0));
    }
}
