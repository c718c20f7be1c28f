//! Names of native and kernel code.
//!
//! In: a module and an address in it, or a kernel address. Out: its frames, outermost first: more than one where
//! the compiler inlined. blazesym does the reading of symbol tables and debug information; this bounds what it
//! keeps, and survives if it fails on a forged file.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use blazesym::MaybeDefault;
use blazesym::symbolize::source::{Elf, Kernel, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer, evict};
use iced_x86::{Decoder, DecoderOptions, FlowControl};

use super::intern::Interner;
use super::module::Module;
use crate::profile::{Frame, FrameKind};

/// Files whose symbols blazesym keeps at once, and the sum of their sizes: parsed debug information takes up to a
/// few times its size in the file.
const LOADED_MAX: usize = 64;
const LOADED_BYTES_MAX: u64 = 512 << 20;

/// The source of native names.
pub(super) struct Native {
    blazesym: Symbolizer,
    /// Least recently added first.
    loaded: VecDeque<(u32, PathBuf, u64)>,
    /// Addresses of files that were looked up.
    #[cfg(test)]
    pub(super) asked: u64,
}

impl Native {
    pub(super) fn new() -> Self {
        Self {
            blazesym: build(),
            loaded: VecDeque::new(),
            #[cfg(test)]
            asked: 0,
        }
    }

    /// The frames at a virtual address of a module; `None`: there is no symbol.
    pub(super) fn resolve(
        &mut self,
        module: &Module,
        vaddr: u64,
        interner: &mut Interner,
    ) -> Option<Box<[Arc<Frame>]>> {
        #[cfg(test)]
        {
            self.asked += 1;
        }
        self.load(module);
        let mut elf = Elf::new(&module.path);
        elf.debug_syms = module.debug;
        let source = Source::Elf(elf);
        let blazesym = &self.blazesym;
        // A forged file may trip an assertion in a parser. That must cost one frame, not the daemon.
        let found = catch_unwind(AssertUnwindSafe(|| {
            match blazesym.symbolize_single(&source, Input::VirtOffset(vaddr)) {
                Ok(Symbolized::Sym(sym)) => Some(frames(&sym, FrameKind::Native, &module.name, interner)),
                Ok(Symbolized::Unknown(_)) => None,
                Err(error) => {
                    tracing::debug!(module = module.name, %error, "cannot symbolize");
                    None
                }
            }
        }));
        found.unwrap_or_else(|_| {
            tracing::warn!(module = module.name, "its symbols made the parser fail");
            *self = Self::new();
            None
        })
    }

    /// The frames at a kernel address; `None`: hidden or unknown.
    pub(super) fn resolve_kernel(
        &mut self,
        address: u64,
        interner: &mut Interner,
    ) -> Option<Box<[Arc<Frame>]>> {
        // `kallsyms` knows the running kernel, its modules and BPF programs; looking for a matching vmlinux with
        // debug information would cost hundreds of megabytes for line numbers that few need.
        let kernel = Kernel { vmlinux: MaybeDefault::None, debug_syms: false, ..Kernel::default() };
        match self.blazesym.symbolize_single(&Source::Kernel(kernel), Input::AbsAddr(address)) {
            Ok(Symbolized::Sym(sym)) => {
                let module =
                    sym.module.as_ref().map_or("[kernel]".into(), |m| m.to_string_lossy().into_owned());
                Some(frames(&sym, FrameKind::Kernel, &module, interner))
            }
            Ok(Symbolized::Unknown(_)) => None,
            Err(error) => {
                tracing::debug!(%error, "cannot symbolize a kernel address");
                None
            }
        }
    }

    /// Drops what is kept for a module.
    pub(super) fn forget(&mut self, id: u32) {
        let Some(n) = self.loaded.iter().position(|entry| entry.0 == id) else { return };
        if let Some((_, path, _)) = self.loaded.remove(n) {
            self.evict(path);
        }
    }

    fn load(&mut self, module: &Module) {
        if self.loaded.iter().any(|entry| entry.0 == module.id) {
            return;
        }
        let size = module.elf.id().size;
        while !self.loaded.is_empty()
            && (self.loaded.len() >= LOADED_MAX
                || self.loaded.iter().map(|entry| entry.2).sum::<u64>().saturating_add(size)
                    > LOADED_BYTES_MAX)
        {
            if let Some((_, path, _)) = self.loaded.pop_front() {
                self.evict(path);
            }
        }
        self.loaded.push_back((module.id, module.path.clone(), size));
    }

    fn evict(&mut self, path: PathBuf) {
        if let Err(error) = self.blazesym.evict(&evict::Evict::Elf(evict::Elf::new(path))) {
            tracing::debug!(%error, "cannot evict");
        }
    }
}

fn build() -> Symbolizer {
    // Descriptors are reused for other files: `forget` goes first, and reloading catches what slips through.
    Symbolizer::builder().enable_auto_reload(true).enable_code_info(true).enable_inlined_fns(true).build()
}

fn frames(sym: &Sym<'_>, kind: FrameKind, module: &str, interner: &mut Interner) -> Box<[Arc<Frame>]> {
    let outer = (&*sym.name, sym.code_info.as_deref());
    let inlined = sym.inlined.iter().map(|f| (&*f.name, f.code_info.as_ref()));
    std::iter::once(outer)
        .chain(inlined)
        .map(|(name, code)| frame(name, code, kind, module, interner))
        .collect()
}

fn frame(
    name: &str,
    code: Option<&CodeInfo<'_>>,
    kind: FrameKind,
    module: &str,
    interner: &mut Interner,
) -> Arc<Frame> {
    // Compilers write paths such as `/build/./Python/ceval.c`; components leave the dots out.
    let path = code.map(|c| c.to_path().components().collect::<PathBuf>());
    let file = interner.name(&path.as_ref().map_or(module.into(), |path| path.to_string_lossy()));
    let line = code.and_then(|c| c.line).unwrap_or(0);
    // glibc's names for its own calls of what it exports.
    let name = interner.name(name.strip_prefix("__GI_").unwrap_or(name));
    interner.frame(Frame { name, file, line, first_line: 0, kind })
}

/// Longest call instruction that compilers make: a prefix, an opcode, an addressing byte or two, four of
/// displacement.
pub(super) const CALL_MAX: usize = 8;

/// Whether the bytes before a return address end in a call instruction.
pub(super) fn ends_in_call(before: &[u8]) -> bool {
    // `call rel32` is nearly all of them.
    if before.len() >= 5 && before[before.len() - 5] == 0xe8 {
        return true;
    }
    (2..=CALL_MAX.min(before.len())).any(|length| {
        let code = &before[before.len() - length..];
        let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
        let calls = matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
        instruction.len() == length && calls && !instruction.is_invalid()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_sites_by_their_bytes() {
        let calls: [&[u8]; 8] = [
            &[0xe8, 1, 2, 3, 4],                   // call rel32
            &[0xff, 0xd0],                         // call *%rax
            &[0x41, 0xff, 0xd4],                   // call *%r12
            &[0xff, 0x50, 0x18],                   // call *0x18(%rax)
            &[0xff, 0x15, 1, 2, 3, 4],             // call *x(%rip)
            &[0xff, 0x14, 0xc2],                   // call *(%rdx,%rax,8)
            &[0x41, 0xff, 0x94, 0xc4, 1, 2, 3, 4], // call *x(%r12,%rax,8)
            &[0x3e, 0xff, 0xd0],                   // notrack call *%rax
        ];
        for call in calls {
            let mut before = vec![0x90; CALL_MAX - call.len()];
            before.extend(call);
            assert!(ends_in_call(&before), "{call:x?}");
            assert!(ends_in_call(call), "{call:x?}");
        }
        let others: [&[u8]; 6] = [
            &[],
            &[0xff],
            &[0x90; 8],
            &[0x48, 0x89, 0xc3, 0x48, 0x83, 0xc4, 0x18, 0xc3],
            &[0x90, 0x90, 0x90, 0xff, 0xe0],       // jmp *%rax
            &[0x90, 0x90, 0x90, 0xe9, 1, 2, 3, 4], // jmp rel32
        ];
        for other in others {
            assert!(!ends_in_call(other), "{other:x?}");
        }
    }
}
