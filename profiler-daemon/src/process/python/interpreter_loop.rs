//! Where the interpreter's loop lies: program counters there stand for Python frames.
//!
//! In: the file that has it. Out: its code, as virtual addresses. It need not be in one piece: compilers move what they
//! think is rarely run elsewhere ([`cold_part`]), at times nearly all of it, and builds with tail calls (3.14,
//! `--with-tail-call-interp`) have a function for each instruction.

use std::ops::Range;

use super::cold::cold_part;
use crate::process::elf::{ElfError, ElfFile, Symbol};

/// The loop's code is 34 to 85 KiB in every build seen.
const LOOP_MAX: u64 = 1 << 20;
/// What is smaller than this in sum only leads to the instructions.
const LOOP_MIN: u64 = 8 << 10;

/// Functions of single instructions.
pub(crate) const TAIL_CALL_PREFIX: &str = "_TAIL_CALL_";

/// The loop's code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterpreterLoop {
    /// What its symbol covers.
    pub hot: Range<u64>,
    /// The part that lies elsewhere.
    pub cold: Option<Range<u64>>,
    /// Whether that is where Python code is run. If not, its functions have no symbols, and Python frames cannot be put
    /// between the native ones.
    pub found: bool,
}

impl InterpreterLoop {
    pub(super) fn find(elf: &ElfFile, symbol: Symbol) -> Result<Self, ElfError> {
        let hot = symbol.value..symbol.value.saturating_add(symbol.size);
        let mut code = vec![0; symbol.size.min(LOOP_MAX) as usize];
        elf.read_vaddr(symbol.value, &mut code)?;
        let mut cold = cold_part(elf, symbol.value, &code);
        let size = |cold: &Option<Range<u64>>| {
            symbol.size.saturating_add(cold.as_ref().map_or(0, |part| part.end - part.start))
        };
        if size(&cold) < LOOP_MIN {
            // They are compiled one behind the other.
            let span = elf.symbol_span(TAIL_CALL_PREFIX)?.filter(|span| span.end - span.start <= LOOP_MAX);
            cold = span.or(cold);
        }
        let found = size(&cold) >= LOOP_MIN;
        Ok(Self { hot, cold, found })
    }

    /// The same in a process.
    pub(super) fn moved(&self, bias: u64) -> Self {
        let by = |range: &Range<u64>| range.start.wrapping_add(bias)..range.end.wrapping_add(bias);
        Self { hot: by(&self.hot), cold: self.cold.as_ref().map(by), found: self.found }
    }

    /// Whether an address belongs to the part without a symbol.
    pub fn is_cold(&self, address: u64) -> bool {
        self.cold.as_ref().is_some_and(|cold| cold.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;
    use std::fs::File;
    use std::process::Command;

    /// As a build with tail calls is laid out: the loop's symbol covers next to nothing.
    const TAIL_CALLS: &str = r#"
        __attribute__((used)) static void _TAIL_CALL_A(void) { __asm__(".skip 6000, 0x90"); }
        __attribute__((used)) static void _TAIL_CALL_B(void) { __asm__(".skip 6000, 0x90"); }
        void _PyEval_EvalFrameDefault(void) { }
    "#;

    fn find(program: &std::path::Path) -> InterpreterLoop {
        let elf = ElfFile::parse(File::open(program).unwrap()).unwrap();
        let symbols = elf.symbols(&["_PyEval_EvalFrameDefault"]).unwrap();
        InterpreterLoop::find(&elf, symbols["_PyEval_EvalFrameDefault"]).unwrap()
    }

    #[test]
    fn builds_with_tail_calls_are_recognised() {
        let folder = tempfile::tempdir().unwrap();
        let (source, program) = (folder.path().join("loop.c"), folder.path().join("loop.so"));
        std::fs::write(&source, TAIL_CALLS).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&program).arg(&source);
        if compiler.status().is_err() {
            return skip("builds_with_tail_calls_are_recognised", "no C compiler");
        }
        let code = find(&program);
        let cold = code.cold.clone().unwrap();
        assert!(code.found && code.hot.end - code.hot.start < 100);
        assert!((12_000..12_200).contains(&(cold.end - cold.start)), "{code:x?}");
        assert!(code.is_cold(cold.start + 9000) && !code.is_cold(code.hot.start));
        let moved = code.moved(0x1000);
        assert_eq!(moved.hot.start, code.hot.start + 0x1000);
        assert_eq!(moved.cold.unwrap().end, cold.end + 0x1000);

        // Without symbols, at least that it is one.
        assert!(Command::new("strip").arg(&program).status().is_ok_and(|status| status.success()));
        let stripped = find(&program);
        assert_eq!((stripped.cold, stripped.found), (None, false));
    }
}
