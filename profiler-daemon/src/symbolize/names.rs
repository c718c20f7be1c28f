//! One raw frame in words: addresses to names, with what all processes share for it.
//!
//! In: a raw frame and the process it was seen in, or a kernel address. Out: what became of it ([`Resolved`]). What
//! cannot be named gets a frame that says so and a reason, and is counted for each sample.

use std::rc::Rc;
use std::sync::Arc;

use profiler_common::{
    FRAME_LEFT_OUT, FRAME_NATIVE_CALLER, FRAME_NATIVE_LEAF, FRAME_NATIVE_RETURN, FRAME_PYTHON, RawFrame,
};
use rustc_hash::FxHashMap;

use super::generations::Generations;
use super::intern::Interner;
use super::module::{Module, Modules};
use super::native::{self, Native};
use super::process::Process;
use super::recent::Fault;
use super::{Outcome, Reason};
use crate::process::elf::ElfFile;
use crate::process::python::TAIL_CALL_PREFIX;
use crate::profile::{Frame, FrameKind};

/// Kernel addresses remembered. A busy host shows some 3,000.
const KERNEL_MAX: usize = 32_768;

/// Addresses of files remembered, whoever maps them: the workers of a service run the same few thousand functions, and each
/// would have them looked up by itself. About 160 bytes each.
const SHARED_MAX: usize = 32_768;

/// The interpreter's loop, under the names that compilers make of it (`.cold`, `.constprop.0`, …).
const LOOP_PREFIX: &str = "_PyEval_EvalFrameDefault";

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
    /// Code made at run time, named by its maker until other code takes its place.
    Generated,
    Unresolved(Reason),
    /// A guess that was wrong, and whatever was guessed from it.
    Cut(Reason),
}

/// See the module.
pub(super) struct Names {
    modules: Modules,
    native: Native,
    kernel: Generations<u64, Rc<Resolved>>,
    /// By the module's number, which no other has after it, and the address in its file; `None`: there is no symbol.
    shared: Generations<(u32, u64), Option<Rc<Resolved>>>,
    interner: Interner,
    counters: FxHashMap<(FrameKind, Reason), u64>,
    /// Wrong guesses, which are many.
    unmapped: Rc<Resolved>,
    no_call_site: Rc<Resolved>,
}

impl Default for Names {
    fn default() -> Self {
        let cut = |reason| Rc::new(Resolved { frames: Box::default(), kind: ResolvedKind::Cut(reason) });
        Self {
            modules: Modules::default(),
            native: Native::new(),
            kernel: Generations::new(KERNEL_MAX),
            shared: Generations::new(SHARED_MAX),
            interner: Interner::default(),
            counters: FxHashMap::default(),
            unmapped: cut(Reason::Unmapped),
            no_call_site: cut(Reason::NoCallSite),
        }
    }
}

impl Names {
    /// How often frames could not be resolved, by kind and reason, since the start.
    pub(super) fn counters(&self) -> impl Iterator<Item = (FrameKind, Reason, u64)> + '_ {
        self.counters.iter().map(|(&(kind, reason), &count)| (kind, reason, count))
    }

    pub(super) fn count(&mut self, fault: Fault, outcome: &mut Outcome) {
        let counted = match fault {
            Fault::Unresolved(kind, reason) => {
                outcome.unresolved += 1;
                (kind, reason)
            }
            Fault::Cut(reason) => {
                outcome.cut += 1;
                (FrameKind::Native, reason)
            }
            Fault::Followed => {
                outcome.cut += 1;
                return;
            }
        };
        *self.counters.entry(counted).or_default() += 1;
    }

    #[cfg(test)]
    pub(super) fn asked(&self) -> u64 {
        self.native.asked
    }

    /// Forgets the files that no process uses any more.
    pub(super) fn sweep(&mut self) {
        // Before their descriptors are closed and their numbers used for other files.
        for module in self.modules.sweep() {
            self.native.forget(module.id);
        }
    }

    /// The slow path: a frame of this process that was not seen before.
    #[cold]
    pub(super) fn user(&mut self, process: &mut Process, raw: &RawFrame) -> Rc<Resolved> {
        let resolved = match raw.kind() {
            FRAME_PYTHON => Rc::new(self.python(process, raw)),
            FRAME_LEFT_OUT => {
                Rc::new(self.unresolved(FrameKind::Native, "[native frames left out]", "", Reason::LeftOut))
            }
            _ => self.native_frame(process, raw),
        };
        let keep = match resolved.kind {
            ResolvedKind::Unresolved(reason) => !reason.passes(),
            // Any word of a stack may be taken for an address: they would take the room of the others.
            ResolvedKind::Cut(Reason::Unmapped) => false,
            _ => true,
        };
        if keep {
            process.remember(*raw, resolved.clone());
        }
        resolved
    }

    fn python(&mut self, process: &mut Process, raw: &RawFrame) -> Resolved {
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

    fn native_frame(&mut self, process: &mut Process, raw: &RawFrame) -> Rc<Resolved> {
        // A call may be the last instruction of its function, so what is looked up is the call itself.
        let guess = raw.kind() == FRAME_NATIVE_CALLER;
        let caller = guess || raw.kind() == FRAME_NATIVE_RETURN;
        let address = raw.address.wrapping_sub(caller.into());
        let Some(mapping) = process.mapping(address, guess).filter(|m| m.executable) else {
            return if guess {
                self.unmapped.clone()
            } else {
                Rc::new(self.unresolved(FrameKind::Native, "[unmapped]", "", Reason::Unmapped))
            };
        };
        let module = match process.module(&mut self.modules, &mapping) {
            Err(Reason::TooManyFiles) => {
                self.sweep();
                process.module(&mut self.modules, &mapping)
            }
            found => found,
        };
        let module = match module {
            Ok(module) => module,
            Err(reason) => {
                if guess && !process.called_from(raw.address) {
                    return self.no_call_site.clone();
                }
                if reason.may_be_generated()
                    && let Some((name, list)) = process.generated(address)
                {
                    let frame = self.interner.bare(FrameKind::Native, name, list);
                    return Rc::new(Resolved { frames: [frame].into(), kind: ResolvedKind::Generated });
                }
                let name = mapping.file_name();
                let name = if name.is_empty() { "[anon]" } else { &name };
                let place = format!("{name}+{:#x}", address - mapping.start + mapping.offset);
                return Rc::new(self.unresolved(FrameKind::Native, &place, name, reason));
            }
        };
        let Some(bias) = module.elf.bias(&mapping) else {
            let place = format!("{}+{:#x}", module.name, address - mapping.start + mapping.offset);
            return Rc::new(self.unresolved(FrameKind::Native, &place, &module.name, Reason::Damaged));
        };
        let vaddr = address.wrapping_sub(bias);
        if guess && !call_site(&module.elf, vaddr.wrapping_add(1)) {
            return self.no_call_site.clone();
        }
        if let Some(resolved) = self.symbol(&module, vaddr) {
            return resolved;
        }
        let resolved = if process.in_cold_loop(address) {
            let name = format!("{LOOP_PREFIX}.cold");
            let frame = self.interner.bare(FrameKind::Native, &name, &module.name);
            Resolved { frames: [frame].into(), kind: ResolvedKind::InterpreterLoop }
        } else {
            let place = format!("{}+{vaddr:#x}", module.name);
            self.unresolved(FrameKind::Native, &place, &module.name, Reason::NoSymbol)
        };
        Rc::new(resolved)
    }

    /// What the file's symbols say; `None`: nothing.
    fn symbol(&mut self, module: &Module, vaddr: u64) -> Option<Rc<Resolved>> {
        let key = (module.id, vaddr);
        if let Some(known) = self.shared.get(&key) {
            return known.clone();
        }
        let resolved = self.native.resolve(module, vaddr, &mut self.interner).map(|frames| {
            let of_loop = |name: &str| name.starts_with(LOOP_PREFIX) || name.starts_with(TAIL_CALL_PREFIX);
            let is_loop = frames.iter().any(|frame| of_loop(&frame.name));
            let kind = if is_loop { ResolvedKind::InterpreterLoop } else { ResolvedKind::Named };
            Rc::new(Resolved { frames, kind })
        });
        self.shared.insert(key, resolved.clone());
        resolved
    }

    pub(super) fn kernel(&mut self, kernel: &[u64], out: &mut Vec<Arc<Frame>>, outcome: &mut Outcome) {
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
                self.count(Fault::Unresolved(FrameKind::Kernel, reason), outcome);
            }
            out.extend_from_slice(&resolved.frames);
        }
    }

    fn unresolved(&mut self, kind: FrameKind, name: &str, file: &str, reason: Reason) -> Resolved {
        let frame = self.interner.bare(kind, name, file);
        Resolved { frames: [frame].into(), kind: ResolvedKind::Unresolved(reason) }
    }
}

pub(super) fn kind_of(raw: &RawFrame) -> FrameKind {
    match raw.kind() {
        FRAME_PYTHON => FrameKind::Python,
        FRAME_NATIVE_LEAF | FRAME_NATIVE_CALLER | FRAME_NATIVE_RETURN | FRAME_LEFT_OUT => FrameKind::Native,
        // Kinds of a later kernel side are looked up as native code, which at worst names nothing.
        _ => FrameKind::Native,
    }
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
