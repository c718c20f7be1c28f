//! The boundary programs: what a target transfers on its server-side connections.
//!
//! In: system calls, by a [`Source`]. Out: the pieces of their transfers, see [`piece`](super::piece). A process that is
//! no target costs one map look-up, and a descriptor that is no tracked connection another.

use aya_log_ebpf::debug;
use profiler_common::{
    Accept, Active, ConnId, Connection, DIR_IN, DIR_OUT, Header, Interleaved, Kind, Stat, Target,
    connection_flags, connection_key, connection_state, target_flags,
};
use profiler_ebpf::head::begins_known_method;

use super::{
    call::{Buffers, Call, Shape, Source},
    connection::{Flow, Shared},
    context::{context_elsewhere, end_turn},
    maps::{ACTIVE, CONNECTIONS, EVENTS, QUIET, TARGETS, count, settings},
    piece::{self, Known},
    task::{Ids, header, ids, now, opened, read_kernel, read_user, task},
    tls, transfer,
};

/// Flags of calls that take nothing out of the stream: `MSG_OOB`, `MSG_PEEK`, `MSG_ERRQUEUE`.
const NOT_STREAM: u64 = 0x1 | 0x2 | 0x2000;
const EINTR: i64 = 4;
const EAGAIN: i64 = 11;
/// `ERESTARTSYS` to `ERESTART_RESTARTBLOCK` (include/linux/errno.h): the call was interrupted, and is made again or
/// fails with `EINTR`. Only seen inside the kernel.
const RESTART: core::ops::RangeInclusive<i64> = 512..=516;

#[inline(always)]
fn is_target<S: Source>(pid: u32) -> bool {
    // SAFETY: a lookup.
    match unsafe { TARGETS.get(pid) } {
        Some(target) => target.flags & (target_flags::HTTP | target_flags::SYSCALLS) == S::FOLLOWS,
        None => false,
    }
}

/// The call that a target has made.
#[inline(always)]
pub fn made<S: Source>(ctx: &S) -> Option<(Ids, Call)> {
    let ids = ids();
    if is_target::<S>(ids.pid) { Some((ids, ctx.call()?)) } else { None }
}

#[inline(always)]
pub fn recv<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    if call.r10 & NOT_STREAM != 0 || call.rdx == 0 {
        return 0;
    }
    transferred(ctx, ids, call, DIR_IN, Shape::Flat, true)
}

#[inline(always)]
pub fn read<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    if call.rdx == 0 {
        return 0;
    }
    transferred(ctx, ids, call, DIR_IN, Shape::Flat, false)
}

#[inline(always)]
pub fn readv<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    transferred(ctx, ids, call, DIR_IN, Shape::Vector, false)
}

#[inline(always)]
pub fn recvmsg<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    if call.rdx & NOT_STREAM != 0 {
        return 0;
    }
    transferred(ctx, ids, call, DIR_IN, Shape::Message, true)
}

#[inline(always)]
pub fn send<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    transferred(ctx, ids, call, DIR_OUT, Shape::Flat, false)
}

#[inline(always)]
pub fn writev<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    transferred(ctx, ids, call, DIR_OUT, Shape::Vector, false)
}

#[inline(always)]
pub fn sendmsg<S: Source>(ctx: &S, ids: Ids, call: &Call) -> u32 {
    transferred(ctx, ids, call, DIR_OUT, Shape::Message, false)
}

#[inline(always)]
pub fn sendfile<S: Source>(_ctx: &S, ids: Ids, call: &Call) -> u32 {
    let flow = Flow::new(ids, call.fd(), DIR_OUT, S::MARK);
    let Some(conn) = followed(&flow, call, None) else { return 0 };
    if call.result <= 0 {
        return ended(&flow, conn, call.result);
    }
    // Nothing of it is looked at, and glibc's wrapper has no cheap site before its system call.
    let known = Known { entered: 0, headed: false };
    piece::emit(&flow, conn, known, 0, call.result as u64, true);
    0
}

/// The connection of a call, if it is one to follow. `discover`: it may be created here, when the bytes in buffers of
/// this shape say that it is one.
#[inline(always)]
fn followed(flow: &Flow, call: &Call, discover: Option<Shape>) -> Option<Shared> {
    let known = Shared::of(flow.key);
    if flow.direction == DIR_IN && call.result > 0 {
        tls::received(flow, known);
    }
    let conn = match known {
        Some(conn) => conn,
        None => match discover {
            Some(shape) if call.result >= 4 => self::discover(flow, &call.buffers(shape))?,
            _ => return None,
        },
    };
    if conn.is(connection_flags::TLS) {
        if flow.direction == DIR_OUT {
            tls::sent(flow, entered(flow));
        } else if call.result == 0
            && conn.in_state() != connection_state::BODY
            && conn.in_state() != connection_state::HEAD
        {
            deactivate(flow.ids.tid, flow.key);
        }
    }
    if conn.is(connection_flags::IGNORED | connection_flags::TLS) {
        interleaved(flow);
        return None;
    }
    Some(conn)
}

/// The thread has dealt with a client of which no other record tells. If it is within a request of another one, it does
/// several things at a time, and its samples are nobody's.
#[inline(always)]
pub fn interleaved(flow: &Flow) {
    let Some(active) = ACTIVE.get_ptr_mut(flow.ids.tid) else { return };
    // SAFETY: a live map value, and the entry of the current thread; the sampler uses other fields.
    let active = unsafe { &mut *active };
    if active.key != flow.key {
        interleaved_with(flow.ids, active);
    }
}

/// Tells it, once per activation.
#[inline(always)]
pub fn interleaved_with(ids: Ids, active: &mut Active) {
    if active.told != 0 {
        return;
    }
    match EVENTS.reserve::<Interleaved>(0) {
        Some(mut slot) => {
            let header = header(Kind::Interleaved, ids, now());
            slot.write(Interleaved { header, activation: active.activation });
            slot.submit(QUIET);
            active.told = 1;
        }
        // The next record of its own connection will say that one is missing.
        None => lost(active.key),
    }
}

/// A transfer: what is cheap is decided here, its bytes are looked at by [`transfer`].
#[inline(always)]
fn transferred<S: Source>(
    ctx: &S,
    ids: Ids,
    call: &Call,
    direction: u16,
    shape: Shape,
    discover: bool,
) -> u32 {
    let flow = Flow::new(ids, call.fd(), direction, S::MARK);
    let Some(conn) = followed(&flow, call, discover.then_some(shape)) else {
        if direction == DIR_IN && call.result > 0 {
            context_elsewhere(u64::from(flow.fd));
        }
        return 0;
    };
    let entered = if direction == DIR_OUT { entered(&flow) } else { 0 };
    if call.result <= 0 {
        return ended(&flow, conn, call.result);
    }
    transfer::start(ctx, &flow, conn, call.buffers(shape), entered, call.result as u64)
}

/// A call that writes is about to be made. When it returns is not when the bytes went out: the client that they wake
/// may take the CPU first. So the time is taken here too, and [`entered`] finds out whether it tells more.
///
/// Every write on the host comes by, so whoever serves no request on this descriptor costs one look-up.
#[inline(always)]
pub fn enter<S: Source>(ctx: &S) -> u32 {
    let ids = ids();
    let Some(active) = ACTIVE.get_ptr_mut(ids.tid) else { return 0 };
    // SAFETY: a live map value, and the entry of the current thread.
    let active = unsafe { &mut *active };
    let Some(call) = ctx.call() else { return 0 };
    if active.key != connection_key(ids.pid, call.fd()) {
        return 0;
    }
    match waits() {
        Some(waits) => (active.entered, active.waits) = (now(), waits),
        None => active.entered = 0,
    }
    0
}

/// When the call that now returns was entered, if the thread has not waited since: then what it wrote fitted, and was
/// handed over at once. 0 when it waited, for the client to take bytes perhaps, and when the entry was not seen.
///
/// The entry of an earlier call cannot be taken for this one's: each call takes its own away here, and one that never
/// returned (a signal handler jumped out of it) is overwritten at the next entry.
#[inline(always)]
fn entered(flow: &Flow) -> u64 {
    let Some(active) = ACTIVE.get_ptr_mut(flow.ids.tid) else { return 0 };
    // SAFETY: a live map value, and the entry of the current thread.
    let active = unsafe { &mut *active };
    if active.key != flow.key || active.entered == 0 {
        return 0;
    }
    let entered = active.entered;
    active.entered = 0;
    if waits() == Some(active.waits) { entered } else { 0 }
}

/// How often the current thread gave its CPU up to wait.
#[inline(always)]
fn waits() -> Option<u64> {
    let kernel = settings().kernel;
    if kernel.valid == 0 {
        return None;
    }
    read_kernel(task(), kernel.task_nvcsw).ok()
}

/// End of stream, or an error.
#[inline(always)]
fn ended(flow: &Flow, conn: Shared, result: i64) -> u32 {
    let again = result == -EAGAIN || result == -EINTR || RESTART.contains(&-result);
    if again || (result == 0 && flow.direction == DIR_OUT) {
        return 0;
    }
    if conn.unproven() {
        return 0; // the daemon has not heard of it
    }
    if flow.direction == DIR_IN
        && conn.in_state() != connection_state::BODY
        && conn.in_state() != connection_state::HEAD
    {
        deactivate(flow.ids.tid, flow.key);
    }
    piece::emit_plain(flow, conn, 0, 0, 0, (-result) as u32);
    0
}

/// The thread no longer works for this connection.
#[inline(always)]
fn deactivate(tid: u32, key: u64) {
    // SAFETY: a lookup; only the key is read.
    let mine = unsafe { ACTIVE.get(tid) }.is_some_and(|active| active.key == key);
    if mine {
        let _ = ACTIVE.remove(tid);
    }
}

/// Whether the thread is within a request that it has not begun to answer. What it receives elsewhere is then an
/// answer to itself, however much it looks like a request.
#[inline(always)]
fn serves(tid: u32) -> bool {
    // SAFETY: a lookup; the value is only read.
    let Some(active) = (unsafe { ACTIVE.get(tid) }) else { return false };
    let (activation, key) = (active.activation, active.key);
    let Some(conn) = Shared::of(key) else { return false };
    conn.activation() == activation && conn.in_state() != connection_state::RESPONDED
}

/// Starts to track a connection that nobody saw being accepted, if its bytes begin with a registered method. Nearly all
/// that is asked about are a database's answers, which those four bytes already tell.
#[inline(always)]
fn discover(flow: &Flow, buffers: &Buffers) -> Option<Shared> {
    let address = buffers.first()?;
    let mut first = 0u32;
    // SAFETY: a local of four bytes.
    unsafe { read_user((&raw mut first).cast(), 4, address) }.ok()?;
    if !begins_known_method(first) || serves(flow.ids.tid) {
        return None;
    }
    track(flow.key, Connection { flags: connection_flags::UNSEEN, ..Connection::default() });
    Shared::of(flow.key)
}

#[inline(always)]
fn track(key: u64, conn: Connection) -> u64 {
    let generation = now();
    let conn = Connection { generation, ..conn };
    if CONNECTIONS.insert(key, conn, 0).is_err() {
        count(Stat::ConnectionsFull);
    }
    generation
}

/// In a library's function: whoever accepts a connection there becomes a target, where all are wanted.
#[inline(always)]
pub fn accept<S: Source>(ctx: &S) -> u32 {
    let ids = ids();
    let set = settings();
    let Some(call) = ctx.call() else { return 0 };
    if call.result < 0 {
        return 0;
    }
    if !is_target::<S>(ids.pid) {
        if set.adopt_acceptors == 0 || ids.pid == set.own_pid || TARGETS.get_ptr(ids.pid).is_some() {
            return 0;
        }
        let target = Target {
            flags: target_flags::HTTP | target_flags::PROVISIONAL,
            tss_key: 0,
            tss_block: 0,
            reserved: 0,
            current: 0,
            loop_start: 0,
            loop_end: 0,
            cold_start: 0,
            cold_end: 0,
            python: NO_PYTHON,
        };
        if TARGETS.insert(ids.pid, target, 0).is_err() {
            count(Stat::TargetsFull);
            return 0;
        }
        count(Stat::Adopted);
        debug!(ctx, "process {} accepted a connection and is a target now", ids.pid);
    }
    accepted(ctx, ids, &call)
}

/// A target has accepted a connection.
#[inline(always)]
pub fn accepted<S: Source>(_ctx: &S, ids: Ids, call: &Call) -> u32 {
    if call.result < 0 {
        return 0;
    }
    let fd = call.result as u32;
    let flow = Flow::new(ids, fd, DIR_IN, S::MARK);
    // The record of the new connection says so too, but if it is lost, no request within which it was accepted knows.
    interleaved(&flow);
    end_turn(ids.tid);
    let file = opened(fd);
    if file.as_ref().is_some_and(|file| !file.socket) {
        return 0; // a call with other numbers (32-bit) than it is taken for
    }
    let (inode, number) = file.map_or((0, 0), |file| (file.inode, file.number));
    begin(&flow, Connection { inode, number, ..Connection::default() }, true);
    0
}

/// A connection begins, which the daemon is `told` of. Returns its generation.
#[inline(always)]
pub fn begin(flow: &Flow, conn: Connection, told: bool) -> u64 {
    let generation = track(flow.key, conn);
    if !told {
        return generation;
    }
    let record = Accept {
        header: Header { flags: flow.source, ..header(Kind::Accept, flow.ids, generation) },
        conn: ConnId { generation, pid: flow.ids.pid, fd: flow.fd },
    };
    match EVENTS.reserve::<Accept>(0) {
        Some(mut slot) => {
            slot.write(record);
            slot.submit(QUIET);
        }
        None => lost(flow.key),
    }
    generation
}

const NO_PYTHON: profiler_common::PythonOffsets = profiler_common::PythonOffsets {
    tstate_cframe: 0,
    current_frame: 0,
    frame_code: 0,
    frame_previous: 0,
    frame_instr: 0,
    frame_entry: 0,
    code_argcount: 0,
    code_kwonly: 0,
    code_flags: 0,
    code_firstline: 0,
    code_bytecode: 0,
    entry_mode: 0,
    lasti_unit: 0,
    tstate_context: 0,
    reserved: [0; 3],
};

#[inline(always)]
fn lost(key: u64) {
    count(Stat::BoundaryLostRing);
    if let Some(conn) = Shared::of(key) {
        conn.lose();
    }
}

#[inline(always)]
pub fn close<S: Source>(ctx: &S) -> u32 {
    let Some((ids, call)) = made(ctx) else { return 0 };
    let flow = Flow::new(ids, call.fd(), DIR_IN, S::MARK);
    let Some(conn) = Shared::of(flow.key) else { return 0 };
    deactivate(ids.tid, flow.key);
    piece::closed(&flow, conn);
    0
}
