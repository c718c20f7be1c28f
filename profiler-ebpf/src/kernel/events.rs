//! Event loops: which connections are waited for by epoll, and threads that go to wait within a request.
//!
//! A thread that waits for whatever event comes next while the request it began is open works on whatever that is: other
//! requests, timers, background tasks. But an event loop inside a request (a view that runs one to its end, a client
//! library) is part of the request. What tells them apart is whether the request's own connection is waited for.

use profiler_common::{connection_flags, connection_key};

use super::{
    boundary::{interleaved_with, made},
    call::Source,
    connection::Shared,
    maps::ACTIVE,
    task::ids,
};

/// Operations of `epoll_ctl` (include/uapi/linux/eventpoll.h).
const ADD: u64 = 1;
const DEL: u64 = 2;

/// `epoll_ctl(epfd, operation, fd, event)` has returned.
#[inline(always)]
pub fn control<S: Source>(ctx: &S) -> u32 {
    let Some((ids, call)) = made(ctx) else { return 0 };
    if call.result != 0 {
        return 0;
    }
    let Some(conn) = Shared::of(connection_key(ids.pid, call.rdx as u32)) else { return 0 };
    match call.rsi {
        ADD => conn.set_flags(conn.flags() | connection_flags::WATCHED),
        DEL => conn.set_flags(conn.flags() & !connection_flags::WATCHED),
        _ => {}
    }
    0
}

/// A thread is about to wait. `epoll_wait` and its kin are called in every turn of every event loop, so whoever is in no
/// request costs one look-up.
#[inline(always)]
pub fn wait() -> u32 {
    let ids = ids();
    let Some(active) = ACTIVE.get_ptr_mut(ids.tid) else { return 0 };
    // SAFETY: a live map value, and the entry of the current thread; the sampler uses other fields.
    let active = unsafe { &mut *active };
    let Some(conn) = Shared::of(active.key) else { return 0 };
    if conn.activation() == active.activation && conn.is(connection_flags::WATCHED) {
        interleaved_with(ids, active);
    }
    0
}
