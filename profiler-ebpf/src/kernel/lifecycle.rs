//! Processes: fork, exec, exit.
//!
//! In: raw tracepoints (their arguments are task pointers, so tracefs is not needed). Out: `TARGETS` kept true at
//! once, a record for the daemon. A forked child is a target before it runs its first instruction.
//!
//! These are rare, so here (and at adoption) is what aya-log says when it is switched on: `AYA_LOG_LEVEL` is 0
//! otherwise, a constant to the verifier, which drops the code. The sampler and the transfers never log.

use aya_ebpf::{EbpfContext, programs::RawTracePointContext};
use aya_log_ebpf::debug;
use profiler_common::{Exit, Fork, Header, Kind, LIVE_UNKNOWN, Stat, target_flags};

use super::{
    maps::{
        ACTIVE, CODE_LIVES, CONTEXT_PROCESSES, EVENTS, QUIET, SPACES, TARGETS, TLS_THREADS, TURNS, count,
        settings,
    },
    task::{header, ids, now, read_kernel, task},
};

#[inline(always)]
fn emit<T: 'static>(record: T) {
    match EVENTS.reserve::<T>(0) {
        Some(mut slot) => {
            slot.write(record);
            slot.submit(QUIET);
        }
        None => count(Stat::ProcessLostRing),
    }
}

/// `sched_process_fork(parent, child)`; runs in the parent.
#[inline(always)]
pub fn fork(ctx: &RawTracePointContext) -> i32 {
    let set = settings();
    let ids = ids();
    // SAFETY: a lookup; the value is copied at once.
    let Some(target) = (unsafe { TARGETS.get(ids.pid) }).copied() else { return 0 };
    // The child of a rejected process is looked at when it accepts a connection itself.
    if set.kernel.valid == 0 || target.flags & target_flags::HTTP == 0 {
        return 0;
    }
    // SAFETY: the context of this tracepoint holds two pointers.
    let child = unsafe { *ctx.as_ptr().cast::<u64>().add(1) };
    let Ok(pid) = read_kernel::<u32>(child, set.kernel.task_tgid) else { return 0 };
    if pid == ids.pid {
        return 0; // a thread
    }
    if TARGETS.insert(pid, target, 0).is_err() {
        count(Stat::TargetsFull);
    }
    // What it maps is what its parent maps. Without room it is looked at as a new process is.
    // SAFETY: a lookup; the value is copied at once.
    if let Some(space) = (unsafe { SPACES.get(ids.pid) }).copied() {
        let _ = SPACES.insert(pid, space, 0);
    }
    debug!(ctx, "process {} forked {}", ids.pid, pid);
    emit(Fork { header: header(Kind::Fork, ids, now()), child: pid, reserved: 0 });
    0
}

/// `sched_process_exec`; runs in the process with its new image.
#[inline(always)]
pub fn exec(ctx: &RawTracePointContext) -> i32 {
    let ids = ids();
    if let Some(target) = TARGETS.get_ptr_mut(ids.pid) {
        // What was known of the interpreter is gone with the old image.
        // SAFETY: the pointer is to a live map value.
        unsafe { (*target).flags &= !target_flags::PYTHON };
        let _ = SPACES.remove(ids.pid);
        let _ = CODE_LIVES.remove(ids.pid);
        let _ = CONTEXT_PROCESSES.remove(ids.pid);
    }
    // The thread that called exec takes over the id of the process's first thread.
    // SAFETY: the arguments of this tracepoint are a task, a thread id and a pointer.
    let former = unsafe { *ctx.as_ptr().cast::<u64>().add(1) } as u32;
    for tid in [former, ids.tid] {
        let _ = ACTIVE.remove(tid);
        let _ = TURNS.remove(tid);
        let _ = TLS_THREADS.remove(tid);
    }
    debug!(ctx, "process {} runs a new program", ids.pid);
    emit::<Header>(header(Kind::Exec, ids, now()));
    0
}

/// `sched_process_exit`; runs in the thread that ends.
#[inline(always)]
pub fn exit(ctx: &RawTracePointContext) -> i32 {
    let set = settings();
    let ids = ids();
    // Before anything else: of threads that end together the first may take their process out of the targets, and
    // a mark that stays would be the next thread's with this id.
    let _ = ACTIVE.remove(ids.tid);
    let _ = TURNS.remove(ids.tid);
    let _ = TLS_THREADS.remove(ids.tid);
    if TARGETS.get_ptr(ids.pid).is_none() {
        return 0;
    }
    let live = if set.kernel.valid == 0 {
        LIVE_UNKNOWN
    } else {
        read_kernel::<u64>(task(), set.kernel.task_signal)
            .and_then(|signal| read_kernel::<u32>(signal, set.kernel.signal_live))
            .unwrap_or(LIVE_UNKNOWN)
    };
    if live == 0 {
        let _ = TARGETS.remove(ids.pid);
        let _ = SPACES.remove(ids.pid);
        let _ = CODE_LIVES.remove(ids.pid);
        let _ = CONTEXT_PROCESSES.remove(ids.pid);
    }
    debug!(ctx, "thread {} of process {} ended, {} left", ids.tid, ids.pid, live);
    emit(Exit { header: header(Kind::Exit, ids, now()), live, reserved: 0 });
    0
}
