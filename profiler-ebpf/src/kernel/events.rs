//! Event loops: threads that go to wait within a request.
//!
//! A thread that waits for whatever event comes next while the request it began is open works on whatever that is: other
//! requests, timers, background tasks. But an event loop inside a request (a view that runs one to its end, a client
//! library) is part of the request. What tells them apart is the request's own connection: a loop's
//! is waited for too, or at least does not block. (A thread's may not block either, where it has a timeout. Then a loop
//! inside a request costs that request its samples, which is better than another's.)

use profiler_common::connection_flags;

use super::{boundary::interleaved_with, connection::Shared, context, maps::ACTIVE, task::ids, tls};

/// A thread is about to wait. `epoll_wait` and its kin are called in every turn of every event loop, so whoever is in no
/// request costs three look-ups.
#[inline(always)]
pub fn wait() -> u32 {
    let ids = ids();
    context::end_turn(ids.tid);
    tls::waits(ids.tid);
    let Some(active) = ACTIVE.get_ptr_mut(ids.tid) else { return 0 };
    // SAFETY: a live map value, and the entry of the current thread; the sampler uses other fields.
    let active = unsafe { &mut *active };
    let Some(conn) = Shared::of(active.key) else { return 0 };
    let looped = connection_flags::WATCHED | connection_flags::NONBLOCKING;
    if conn.activation() == active.activation && conn.is(looped) {
        interleaved_with(ids, active);
    }
    0
}
