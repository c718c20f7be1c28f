//! Stacks in words: raw frames become [`Frame`]s.
//!
//! In: the addresses of one sample, kernel and user, and which process it was taken in. Out: the stack, root
//! first, as shared frames; and how many frames stayed without a name, by kind and reason. No frame disappears
//! uncounted: what cannot be named becomes a frame that says so.
//!
//! ```text
//! Symbolizer ── process.rs   per process: mappings, code objects, resolved frames
//!            ├─ python/      code object → name, file, line
//!            ├─ module.rs    mapping → file
//!            ├─ native.rs    file and address → name (blazesym)
//!            └─ intern.rs    one copy of each frame
//! ```
//!
//! A [`Symbolizer`] lives on one thread of its own: it is not `Send`. What it asks a target for may take as long as
//! `process::patience` allows.

mod generations;
mod intern;
mod module;
mod native;
mod process;
pub mod python;
mod reason;
mod text;

use std::rc::Rc;
use std::sync::Arc;

use profiler_common::{FRAME_NATIVE_CALLER, FRAME_NATIVE_LEAF, FRAME_PYTHON, RawFrame};
use rustc_hash::FxHashMap;

pub use reason::Reason;

use crate::process::elf::ElfFile;
use crate::process::identity::ProcessKey;
use crate::process::python::TAIL_CALL_PREFIX;
use crate::profile::{Frame, FrameKind};

use generations::Generations;
use intern::Interner;
use module::Modules;
use native::Native;
use process::{Process, Resolved, ResolvedKind};

/// Processes remembered; beyond, the one that was sampled longest ago is forgotten.
const PROCESSES_MAX: usize = 1024;
/// Memory for code objects and resolved frames of all processes together, bytes, about.
const BYTES_MAX: usize = 64 << 20;
/// Bytes that may be added between two looks at that sum: what it can be exceeded by.
const AUDIT_BYTES: usize = 1 << 20;
/// Kernel addresses remembered. A busy host shows some 3,000.
const KERNEL_MAX: usize = 32_768;

/// The interpreter's loop, under the names that compilers make of it (`.cold`, `.constprop.0`, …).
const LOOP_PREFIX: &str = "_PyEval_EvalFrameDefault";

/// How one stack went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Frames in the stack that only say what they are not.
    pub unresolved: u32,
    /// Raw frames that were dropped: wrong guesses of a return address.
    pub cut: u32,
}

/// Resolves stacks.
pub struct Symbolizer {
    processes: FxHashMap<ProcessKey, Process>,
    modules: Modules,
    native: Native,
    kernel: Generations<u64, Rc<Resolved>>,
    interner: Interner,
    counters: FxHashMap<(FrameKind, Reason), u64>,
    /// The current stack without what it shares with the one before, leaf first, and without the frames that are not
    /// shown; here to keep its allocation.
    scratch: Vec<Option<Rc<Resolved>>>,
    clock: u64,
    /// Bytes added since the last audit.
    added: usize,
}

impl Default for Symbolizer {
    fn default() -> Self {
        Self {
            processes: FxHashMap::default(),
            modules: Modules::default(),
            native: Native::new(),
            kernel: Generations::new(KERNEL_MAX),
            interner: Interner::default(),
            counters: FxHashMap::default(),
            scratch: Vec::new(),
            clock: 0,
            added: 0,
        }
    }
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
        let mut outcome = Outcome::default();
        let python = user.iter().any(|raw| raw.kind() == FRAME_PYTHON);
        self.clock += 1;
        // Taken out of the map, so that the caches shared by all processes can be borrowed beside it.
        let mut process = self.processes.remove(&key).unwrap_or_else(|| Process::new(key));
        process.used = self.clock;
        process.refresh();

        let shared = process.recent.shared(user);
        let mut cutting = false;
        for raw in &user[..user.len() - shared] {
            let caller = raw.kind() == FRAME_NATIVE_CALLER;
            if cutting && caller {
                outcome.cut += 1;
                continue;
            }
            let resolved = match process.remembered(raw) {
                Some(known) => known.clone(),
                None => self.resolve_user(&mut process, raw),
            };
            cutting = false;
            match resolved.kind {
                ResolvedKind::Named => {}
                ResolvedKind::InterpreterLoop if python => {
                    self.scratch.push(None);
                    continue;
                }
                ResolvedKind::InterpreterLoop => {}
                ResolvedKind::Unresolved(reason) => {
                    outcome.unresolved += 1;
                    *self.counters.entry((kind_of(raw), reason)).or_default() += 1;
                }
                ResolvedKind::Cut(reason) => {
                    outcome.cut += 1;
                    *self.counters.entry((FrameKind::Native, reason)).or_default() += 1;
                    cutting = true;
                    continue;
                }
            }
            self.scratch.push(Some(resolved));
        }
        process.recent.change(user, shared, &self.scratch, outcome == Outcome::default());
        self.scratch.clear();
        self.resolve_kernel(kernel, process.recent.end(), &mut outcome);
        self.put_back(key, process);
        (self.processes.get(&key).map_or(&[], |process| process.recent.stack()), outcome)
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
        self.counters.iter().map(|(&(kind, reason), &count)| (kind, reason, count))
    }

    /// Bytes held for processes, about.
    pub fn size(&self) -> usize {
        self.processes.values().map(Process::size).sum()
    }

    fn forget(&mut self, key: ProcessKey) {
        self.processes.remove(&key);
        self.sweep_modules();
    }

    fn sweep_modules(&mut self) {
        // Before their descriptors are closed and their numbers used for other files.
        for module in self.modules.sweep() {
            self.native.forget(module.id);
        }
    }

    fn put_back(&mut self, key: ProcessKey, mut process: Process) {
        if self.processes.len() >= PROCESSES_MAX && !self.processes.contains_key(&key) {
            self.forget_oldest();
        }
        self.added += process.added();
        process.bound();
        self.processes.insert(key, process);
        if self.added >= AUDIT_BYTES {
            self.added = 0;
            self.audit(key);
        }
    }

    /// Who takes most room has to make some: others did nothing to lose what they have. Not the one `at_hand`, whose
    /// stack is about to be read; it has a bound of its own.
    fn audit(&mut self, at_hand: ProcessKey) {
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

    /// The slow path: a frame of this process that was not seen before.
    #[cold]
    fn resolve_user(&mut self, process: &mut Process, raw: &RawFrame) -> Rc<Resolved> {
        let resolved = match raw.kind() {
            FRAME_PYTHON => self.resolve_python(process, raw),
            _ => self.resolve_native(process, raw),
        };
        // What failed for a reason that may pass is tried again at the next sight.
        let passing = matches!(
            resolved.kind,
            ResolvedKind::Unresolved(
                Reason::Unmapped
                    | Reason::TooManyFiles
                    | Reason::Fault
                    | Reason::Gone
                    | Reason::Reused
                    | Reason::Unanswered
            ) | ResolvedKind::Cut(Reason::Unmapped)
        );
        let resolved = Rc::new(resolved);
        if !passing {
            process.remember(*raw, resolved.clone());
        }
        resolved
    }

    fn resolve_python(&mut self, process: &mut Process, raw: &RawFrame) -> Resolved {
        match process.code(raw) {
            Ok(code) => {
                let frame = Frame {
                    name: code.name.clone(),
                    file: code.filename.clone(),
                    line: code.line(raw.lasti()),
                    first_line: code.first_line,
                    kind: FrameKind::Python,
                };
                Resolved { frames: [self.interner.frame(frame)].into(), kind: ResolvedKind::Named }
            }
            Err(reason) => {
                let name = format!("<python code {:#x}: {}>", raw.address, reason.name());
                self.unresolved(FrameKind::Python, &name, "", reason)
            }
        }
    }

    fn resolve_native(&mut self, process: &mut Process, raw: &RawFrame) -> Resolved {
        // A call may be the last instruction of its function, so what is looked up is the call itself.
        let caller = raw.kind() == FRAME_NATIVE_CALLER;
        let address = raw.address.wrapping_sub(caller.into());
        let Some(mapping) = process.mapping(address, caller).filter(|m| m.executable) else {
            return if caller {
                cut(Reason::Unmapped)
            } else {
                self.unresolved(FrameKind::Native, "[unmapped]", "", Reason::Unmapped)
            };
        };
        let module = match process.module(&mut self.modules, &mapping) {
            Err(Reason::TooManyFiles) => {
                self.sweep_modules();
                process.module(&mut self.modules, &mapping)
            }
            found => found,
        };
        let module = match module {
            Ok(module) => module,
            Err(reason) => {
                if caller && !process.called_from(raw.address) {
                    return cut(Reason::NoCallSite);
                }
                let name = mapping.file_name();
                let name = if name.is_empty() { "[anon]" } else { &name };
                let place = format!("{name}+{:#x}", address - mapping.start + mapping.offset);
                return self.unresolved(FrameKind::Native, &place, name, reason);
            }
        };
        let Some(bias) = module.elf.bias(&mapping) else {
            let place = format!("{}+{:#x}", module.name, address - mapping.start + mapping.offset);
            return self.unresolved(FrameKind::Native, &place, &module.name, Reason::Damaged);
        };
        let vaddr = address.wrapping_sub(bias);
        if caller && !call_site(&module.elf, vaddr.wrapping_add(1)) {
            return cut(Reason::NoCallSite);
        }
        match self.native.resolve(&module, vaddr, &mut self.interner) {
            Some(frames) => {
                let is_loop = frames
                    .iter()
                    .any(|f| f.name.starts_with(LOOP_PREFIX) || f.name.starts_with(TAIL_CALL_PREFIX));
                let kind = if is_loop { ResolvedKind::InterpreterLoop } else { ResolvedKind::Named };
                Resolved { frames, kind }
            }
            None if process.in_cold_loop(address) => {
                let name = format!("{LOOP_PREFIX}.cold");
                let frame = self.interner.bare(FrameKind::Native, &name, &module.name);
                Resolved { frames: [frame].into(), kind: ResolvedKind::InterpreterLoop }
            }
            None => {
                let place = format!("{}+{vaddr:#x}", module.name);
                self.unresolved(FrameKind::Native, &place, &module.name, Reason::NoSymbol)
            }
        }
    }

    fn resolve_kernel(&mut self, kernel: &[u64], out: &mut Vec<Arc<Frame>>, outcome: &mut Outcome) {
        for (n, &address) in kernel.iter().enumerate().rev() {
            // All but the innermost are return addresses.
            let address = if n == 0 { address } else { address.wrapping_sub(1) };
            let resolved = match self.kernel.get(&address) {
                Some(known) => known.clone(),
                None => {
                    let resolved = match self.native.resolve_kernel(address, &mut self.interner) {
                        Some(frames) => Resolved { frames, kind: ResolvedKind::Named },
                        // Without the address: profiles are shared, and it would give away where the kernel lies.
                        None => self.unresolved(FrameKind::Kernel, "[kernel]", "", Reason::NoKernelSymbol),
                    };
                    let resolved = Rc::new(resolved);
                    self.kernel.insert(address, resolved.clone());
                    resolved
                }
            };
            if let ResolvedKind::Unresolved(reason) = resolved.kind {
                outcome.unresolved += 1;
                *self.counters.entry((FrameKind::Kernel, reason)).or_default() += 1;
            }
            out.extend_from_slice(&resolved.frames);
        }
    }

    fn unresolved(&mut self, kind: FrameKind, name: &str, file: &str, reason: Reason) -> Resolved {
        let frame = self.interner.bare(kind, name, file);
        Resolved { frames: [frame].into(), kind: ResolvedKind::Unresolved(reason) }
    }
}

fn kind_of(raw: &RawFrame) -> FrameKind {
    match raw.kind() {
        FRAME_PYTHON => FrameKind::Python,
        FRAME_NATIVE_LEAF | FRAME_NATIVE_CALLER => FrameKind::Native,
        // Kinds of a later kernel side are looked up as native code, which at worst names nothing.
        _ => FrameKind::Native,
    }
}

fn cut(reason: Reason) -> Resolved {
    Resolved { frames: Box::default(), kind: ResolvedKind::Cut(reason) }
}

/// Whether a call precedes a return address, by the file. At the start of a segment there are fewer bytes to see.
fn call_site(elf: &ElfFile, vaddr: u64) -> bool {
    let mut bytes = [0; native::CALL_MAX];
    (2..=native::CALL_MAX).rev().any(|length| {
        let Some(start) = vaddr.checked_sub(length as u64) else { return false };
        let before = &mut bytes[..length];
        elf.read_vaddr(start, before).is_ok() && native::ends_in_call(before)
    })
}

#[cfg(test)]
mod tests;
