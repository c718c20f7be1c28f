//! The other part of the interpreter's loop.
//!
//! Compilers move what they think is rarely run out of a function, to another place. In Debian 12's stripped
//! `python3.11` 7.5 KiB of the loop lie 800 KiB before the rest, without a symbol. In: the loop's code. Out: the
//! range of that part, found by where the loop's conditional jumps lead and by what the unwind tables say is one
//! piece of code there.

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, FlowControl};

use crate::process::elf::ElfFile;

/// Jumps that leave the function. Debian 12's has 262.
const JUMPS_MAX: usize = 4096;
/// So many must lead into one piece: conditional jumps to other functions (tail calls) are single ones, and lead
/// to their first instruction.
const JUMPS_MIN: usize = 3;

/// The cold part of a function at `start`, as virtual addresses.
pub(super) fn cold_part(elf: &ElfFile, start: u64, code: &[u8]) -> Option<Range<u64>> {
    let mut pieces: HashMap<(u64, u64), usize> = HashMap::new();
    for target in jumps_out(start, code) {
        let Some(piece) = elf.unwind_range(target) else { continue };
        *pieces.entry((piece.start, piece.end)).or_default() += 1;
    }
    let (&(start, end), &jumps) = pieces.iter().max_by_key(|(piece, jumps)| (**jumps, **piece))?;
    (jumps >= JUMPS_MIN).then_some(start..end)
}

fn jumps_out(start: u64, code: &[u8]) -> Vec<u64> {
    let own = start..start.saturating_add(code.len() as u64);
    let mut targets: Vec<u64> = Decoder::with_ip(64, code, start, DecoderOptions::NONE)
        .iter()
        .filter(|i| i.flow_control() == FlowControl::ConditionalBranch)
        .map(|i| i.near_branch_target())
        .filter(|target| !own.contains(target))
        .take(JUMPS_MAX)
        .collect();
    targets.sort_unstable();
    targets.dedup();
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_conditional_jumps_out_of_the_function_count() {
        let code = [
            0x74, 0x02, // je inside
            0x0f, 0x84, 0x00, 0x10, 0x00, 0x00, // je 0x1008 bytes on
            0x0f, 0x85, 0x00, 0x20, 0x00, 0x00, // jne
            0x0f, 0x85, 0xfa, 0x1f, 0x00, 0x00, // jne, to the same place
            0xe9, 0x00, 0x30, 0x00, 0x00, // jmp
        ];
        assert_eq!(jumps_out(0x10000, &code), [0x11008, 0x1200e]);
    }
}
