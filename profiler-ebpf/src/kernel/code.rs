//! What is known of code objects, and for how long.
//!
//! In: the entry of CPython's `code_dealloc`, in processes that the daemon has put a probe into. Out: another epoch of
//! the process, which makes void what walks remember of its code objects. A process without an entry in `CODE_LIVES`
//! has no probe, and nothing is remembered of it.

use profiler_ebpf::python::Codes;

use super::{
    maps::{CODE_LIVES, KNOWN_CODE},
    task::{ids, unique},
};

/// A code object of this process dies when the probed function goes on.
#[inline(always)]
pub fn death() -> u32 {
    let Some(lives) = CODE_LIVES.get_ptr_mut(ids().pid) else { return 0 };
    // SAFETY: a live map value. Threads with a GIL each may write at once, or one late: whoever comes last leaves a number
    // that nobody has seen before, and a death that is not counted does no harm.
    unsafe {
        (*lives).epoch = unique();
        (*lives).deaths += 1;
    }
    0
}

/// The epoch of a process now, 0 where nothing may be remembered.
#[inline(always)]
pub fn epoch(pid: u32) -> u64 {
    // SAFETY: a lookup; the value is copied at once.
    unsafe { CODE_LIVES.get(pid) }.map_or(0, |lives| lives.epoch)
}

/// What this CPU remembers of code objects, for a process in this epoch.
#[inline(always)]
pub fn remembered(epoch: u64) -> Option<Codes<'static>> {
    if epoch == 0 {
        return None;
    }
    // SAFETY: a live map value of this CPU, and as large; the sampler does not interrupt itself.
    KNOWN_CODE.get_ptr_mut(0).map(|places| Codes { places: unsafe { &*places.cast_const().cast() }, epoch })
}
