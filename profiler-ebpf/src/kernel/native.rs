//! Native frames: the tables in their maps, and the function that walks one frame further.
//!
//! In: the walker in the sampler's scratch. Out: the same, at the caller. It is a function of its own, and one that the
//! verifier checks by itself (a global one), so that its many branches are not checked anew for each frame of a walk.

use aya_ebpf::bindings::pt_regs;
use profiler_common::unwind::{Block, Mapping, Rule, Space, end};
use profiler_ebpf::{
    native::{Found, Tables, Walker},
    places::Places,
};

use super::{
    maps::{FOUND_RULES, MAPPINGS, UNWIND_RULES, WALK, block},
    task::Current,
};

struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn mapping(&self, number: u32) -> Option<&Mapping> {
        MAPPINGS.get(number)
    }

    #[inline(always)]
    fn block(&self, number: u32) -> Option<&Block> {
        block(number)
    }

    #[inline(always)]
    fn rule(&self, number: u16) -> Option<&Rule> {
        UNWIND_RULES.get(number.into())
    }

    #[inline(always)]
    fn found(&self) -> Option<&Places<Found>> {
        // SAFETY: a live map value of this CPU, and as large; the sampler does not interrupt itself.
        FOUND_RULES.get_ptr_mut(0).map(|places| unsafe { &*places.cast_const().cast() })
    }
}

/// What [`native_caller`] says when there is a caller.
pub const FOUND: u64 = u64::MAX;

/// Moves the walker to the caller; otherwise says why not, one of [`end`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn native_caller() -> u64 {
    let Some(walk) = WALK.get_ptr_mut(0) else { return end::NO_REGISTERS.into() };
    // SAFETY: this CPU's scratch, and the sampler does not interrupt itself; its caller holds no reference to the part.
    let walker = unsafe { &mut (*walk).native };
    match walker.step(&Current, &Maps) {
        Ok(()) => FOUND,
        Err(reason) => reason.into(),
    }
}

/// Begins at an interrupted thread's registers.
#[inline(always)]
pub fn begin(walker: &mut Walker, regs: &pt_regs, space: Space) {
    walker.begin(
        regs.rip,
        [
            regs.rax, regs.rdx, regs.rcx, regs.rbx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        space,
    );
}
