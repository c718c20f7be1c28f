//! Which request an event loop works on: by CPython's contexts.
//!
//! In: what the loop's thread receives, copies of contexts, samples. Out: for each context the activation that it works
//! for.
//!
//! Whatever is to run later (a task, a callback, a function for another thread) gets a copy of the context that is current
//! when it is made, and runs in that copy. So a copy made for a request belongs to it, and so do all copies of the copy.
//! The first are made in the *turn* in which the loop hands received bytes on to its protocol: asyncio receives inside
//! the context of the connection's callback, uvloop before it enters one. The interpreter counts how often a thread has
//! entered or left a context. If that number is what it was when the bytes were received, or one more and the current
//! context was entered from the one of then, nothing else has run since.
//!
//! A context's address may be another's after its death, so deaths are seen too.

use profiler_common::{ContextKey, Stat, Target, connection_flags, context_use, target_flags};
use profiler_ebpf::{
    context::{self, Here},
    python,
};

use super::{
    connection::Shared,
    maps::{CONTEXT_PROCESSES, CONTEXTS, TARGETS, TURNS, count, settings},
    task::{Current, Ids, ids, opened, read_kernel, task},
};

/// Value of `TURNS`, keyed by tid: when and for which request the thread received last.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Turn {
    activation: u64,
    /// The connection's.
    key: u64,
    then: Here,
}

/// Whether contexts of this process are followed; bits of [`context_use`].
#[inline(always)]
fn followed(pid: u32) -> u32 {
    // SAFETY: a lookup; the value is copied at once.
    unsafe { CONTEXT_PROCESSES.get(pid) }.copied().unwrap_or(0)
}

#[inline(always)]
fn here(target: &Target) -> Option<Here> {
    let set = settings();
    if set.kernel.valid == 0 || target.flags & target_flags::PYTHON == 0 {
        return None;
    }
    let base = read_kernel::<u64>(task(), set.kernel.task_fsbase).ok()?;
    let state = python::thread_state(&Current, target, base).ok()?;
    if state == 0 {
        return None;
    }
    context::here(&Current, state, target.python.tstate_context).ok()
}

#[inline(always)]
fn key(pid: u32, address: u64) -> ContextKey {
    ContextKey { pid, reserved: 0, address }
}

/// Whether a request of this process that begins now, on a connection that an event loop waits for, is told by contexts.
#[inline(always)]
pub fn tells(pid: u32) -> bool {
    followed(pid) != 0
}

/// The current thread has received on a connection, which is of interest if an event loop waits for that (`watched` is
/// not 0). The result says nothing. Like [`super::connection::connection_begins`] it is a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn context_received(activation: u64, connection: u64, watched: u64) -> u64 {
    let ids = ids();
    let followed = followed(ids.pid);
    if followed == 0 {
        return 0;
    }
    if watched == 0 {
        end_turn(ids.tid);
        return 0;
    }
    turn(ids, activation, connection);
    if followed & context_use::USED == 0 {
        // Only where there is an entry: the daemon may have taken it away.
        let _ = CONTEXT_PROCESSES.insert(ids.pid, followed | context_use::USED, BPF_EXIST);
    }
    0
}

/// The current thread has received on a descriptor that is no connection which is followed. If an event loop waits for
/// it, what handles the bytes may run in a copy of some request's context: the one in which the connection to a database
/// was opened, which others use now. That is nobody's turn. Else a turn that lasted is over.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn context_elsewhere(fd: u64) -> u64 {
    let ids = ids();
    if followed(ids.pid) & context_use::USED == 0 {
        return 0;
    }
    if opened(fd as u32).is_none_or(|file| file.watched) {
        turn(ids, 0, 0);
    } else {
        end_turn(ids.tid);
    }
    0
}

/// A turn of this thread begins; `activation` 0: nobody's.
#[inline(always)]
fn turn(ids: Ids, activation: u64, key: u64) {
    // SAFETY: a lookup; used at once.
    let then = (unsafe { TARGETS.get(ids.pid) }).and_then(here);
    let Some(then) = then else {
        // What was received before is over all the same.
        return end_turn(ids.tid);
    };
    if TURNS.insert(ids.tid, Turn { activation, key, then }, 0).is_err() {
        count(Stat::ContextsFull);
    }
}

/// `BPF_EXIST` (include/uapi/linux/bpf.h).
const BPF_EXIST: u64 = 2;

/// Whom a thread works for.
struct Owner {
    activation: u64,
    /// The connection's key, if it has only just received that; else 0.
    received: u64,
}

/// A turn goes before what its context was copied from: the callback of a connection may be in a copy of an earlier
/// request's context, if it was paused and resumed there.
#[inline(always)]
fn owner_of(ids: Ids, followed: u32, here: Here) -> Option<Owner> {
    // SAFETY: a lookup; the value is copied at once.
    if let Some(Turn { activation, key, then }) = unsafe { TURNS.get(ids.tid) }.copied() {
        let reads_first = followed & context_use::READS_FIRST != 0;
        if context::in_turn(&Current, then, here, reads_first) {
            return if activation != 0 { Some(Owner { activation, received: key }) } else { None };
        }
    }
    // SAFETY: as above.
    let owner = unsafe { CONTEXTS.get(key(ids.pid, here.context)) }.copied()?;
    Some(Owner { activation: owner, received: 0 })
}

/// The thread waits for the next event, or does what is no loop's: its turn is over.
#[inline(always)]
pub fn end_turn(tid: u32) {
    if TURNS.get_ptr(tid).is_some() {
        let _ = TURNS.remove(tid);
    }
}

/// What is known of the thread that is sampled.
pub enum Sampled {
    /// Its process has no event loop whose contexts are followed.
    Unfollowed,
    /// It works in none that is a request's.
    Nobodys,
    /// It works for this activation.
    Owned(u64),
}

#[inline(always)]
pub fn sampled(ids: Ids, target: &Target) -> Sampled {
    if target.flags & target_flags::PYTHON == 0 {
        return Sampled::Unfollowed;
    }
    let followed = followed(ids.pid);
    if followed & context_use::USED == 0 {
        return Sampled::Unfollowed;
    }
    match here(target).and_then(|here| owner_of(ids, followed, here)) {
        Some(owner) => Sampled::Owned(owner.activation),
        None => Sampled::Nobodys,
    }
}

/// `PyContext_CopyCurrent` has returned this.
#[inline(always)]
pub fn copied(copy: u64) -> u32 {
    let ids = ids();
    let followed = followed(ids.pid);
    if copy == 0 || followed & context_use::USED == 0 {
        return 0;
    }
    // SAFETY: a lookup; used at once.
    let Some(target) = (unsafe { TARGETS.get(ids.pid) }) else { return 0 };
    let Some(owner) = here(target).and_then(|here| owner_of(ids, followed, here)) else {
        // What had this address before is gone, whether or not that was seen.
        return death(copy);
    };
    if CONTEXTS.insert(key(ids.pid, copy), owner.activation, 0).is_err() {
        count(Stat::ContextsFull);
        return 0;
    }
    if owner.received != 0
        && let Some(conn) = Shared::of(owner.received)
        && conn.activation() == owner.activation
    {
        conn.set_flags(conn.flags() | connection_flags::CONTEXTS);
    }
    0
}

/// A context dies when the probed function goes on.
#[inline(always)]
pub fn death(address: u64) -> u32 {
    let key = key(ids().pid, address);
    if CONTEXTS.get_ptr(key).is_some() {
        let _ = CONTEXTS.remove(key);
    }
    0
}
