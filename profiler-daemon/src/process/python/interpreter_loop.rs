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
