//! The boundary probes: what a target transfers on its server-side connections.
//!
//! In: registers behind a system call inside libc. Out: the pieces of the transfer, see [`piece`](super::piece).
//! A process that is no target costs one map look-up, and a descriptor that is no tracked connection another.

use aya_ebpf::{bindings::pt_regs, programs::ProbeContext};
use aya_log_ebpf::debug;
use profiler_common::{
    Accept, Close, ConnId, Connection, DIR_IN, DIR_OUT, Kind, Stat, Target, connection_flags, connection_key,
    connection_state, flags, target_flags,
};
use profiler_ebpf::{head::begins_known_method, memory::Memory};

use super::{
    maps::{ACTIVE, CONNECTIONS, EVENTS, QUIET, TARGETS, TRANSFER_STEPS, count, settings},
    piece::{self, Flow},
    task::{Current, Ids, header, ids, now, read_user},
};

/// Flags of calls that take nothing out of the stream: `MSG_OOB`, `MSG_PEEK`, `MSG_ERRQUEUE`.
const NOT_STREAM: u64 = 0x1 | 0x2 | 0x2000;
const EINTR: i64 = 4;
const EAGAIN: i64 = 11;

/// Slots of `TRANSFER_STEPS`, by probe.
const STEP_RECV: u32 = 0;
const STEP_READ: u32 = 1;
const STEP_READV: u32 = 2;
const STEP_RECVMSG: u32 = 3;
const STEP_SEND: u32 = 4;
const STEP_WRITEV: u32 = 5;
const STEP_SENDMSG: u32 = 6;

/// Where the bytes of a transfer are.
#[derive(Clone, Copy)]
enum Buffer {
    Flat(u64),
    /// Address and length of an array of `struct iovec`.
    Vector(u64, u64),
    /// Not in user memory (`sendfile`).
    Nowhere,
}

struct Call {
    direction: u16,
    buffer: Buffer,
    /// What the call returned.
    result: i64,
    /// The connection may be created here, when its bytes say that it is one.
    discover: bool,
    step: u32,
}

#[inline(always)]
fn regs(ctx: &ProbeContext) -> &pt_regs {
    // SAFETY: the context of a uprobe is the interrupted registers.
    unsafe { &*ctx.regs }
}

#[inline(always)]
fn is_target(pid: u32) -> bool {
    // SAFETY: a lookup.
    match unsafe { TARGETS.get(pid) } {
        Some(target) => target.flags & target_flags::HTTP != 0,
        None => false,
    }
}

#[inline(always)]
pub fn recv(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    if r.r10 & NOT_STREAM != 0 || r.rdx == 0 {
        return 0;
    }
    let buffer = Buffer::Flat(r.rsi);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_IN, buffer, result: r.rax as i64, discover: true, step: STEP_RECV },
    )
}

#[inline(always)]
pub fn read(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    if r.rdx == 0 {
        return 0;
    }
    let buffer = Buffer::Flat(r.rsi);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_IN, buffer, result: r.rax as i64, discover: false, step: STEP_READ },
    )
}

#[inline(always)]
pub fn readv(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    let buffer = Buffer::Vector(r.rsi, r.rdx);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_IN, buffer, result: r.rax as i64, discover: false, step: STEP_READV },
    )
}

#[inline(always)]
pub fn recvmsg(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    if r.rdx & NOT_STREAM != 0 {
        return 0;
    }
    let buffer = message(r.rsi);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_IN, buffer, result: r.rax as i64, discover: true, step: STEP_RECVMSG },
    )
}

#[inline(always)]
pub fn send(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    let buffer = Buffer::Flat(r.rsi);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_OUT, buffer, result: r.rax as i64, discover: false, step: STEP_SEND },
    )
}

#[inline(always)]
pub fn writev(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    let buffer = Buffer::Vector(r.rsi, r.rdx);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_OUT, buffer, result: r.rax as i64, discover: false, step: STEP_WRITEV },
    )
}

#[inline(always)]
pub fn sendmsg(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    let buffer = message(r.rsi);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call { direction: DIR_OUT, buffer, result: r.rax as i64, discover: false, step: STEP_SENDMSG },
    )
}

#[inline(always)]
pub fn sendfile(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let r = regs(ctx);
    transfer(
        ctx,
        ids,
        r.rdi as u32,
        Call {
            direction: DIR_OUT,
            buffer: Buffer::Nowhere,
            result: r.rax as i64,
            discover: false,
            step: u32::MAX,
        },
    )
}

/// `struct msghdr` on x86-64 (glibc, bits/socket.h): `msg_iov` at 16, `msg_iovlen` at 24.
#[inline(always)]
fn message(address: u64) -> Buffer {
    match (Current.word(address + 16), Current.word(address + 24)) {
        (Ok(iov), Ok(len)) => Buffer::Vector(iov, len),
        _ => Buffer::Nowhere,
    }
}

/// One piece of one call's transfer; tail-calls the probe again while bytes are left.
#[inline(always)]
fn transfer(ctx: &ProbeContext, ids: Ids, fd: u32, call: Call) -> u32 {
    let key = connection_key(ids.pid, fd);
    let conn = match CONNECTIONS.get_ptr_mut(key) {
        Some(conn) => conn,
        None => {
            if !call.discover || call.result < 4 {
                return 0;
            }
            if serves(ids.tid) {
                return 0;
            }
            match discover(key, &call.buffer) {
                Some(conn) => conn,
                None => return 0,
            }
        }
    };
    // SAFETY: a live map value; entries are preallocated and never unmapped.
    let conn = unsafe { &mut *conn };
    if conn.flags & connection_flags::IGNORED != 0 {
        return 0;
    }
    let flow = Flow { ids, fd, key, direction: call.direction };
    if call.result <= 0 {
        return ended(&flow, conn, call.result);
    }
    let total = call.result as u64;
    let done = conn.offset;
    if done >= total {
        reset(conn);
        return 0;
    }
    let left_total = total - done;
    let (address, left, element_left) = match call.buffer {
        Buffer::Flat(address) => (address + done, left_total, left_total),
        Buffer::Vector(array, length) => {
            if u64::from(conn.element) >= length {
                (0, left_total, 0)
            } else {
                let at = array + u64::from(conn.element) * 16;
                match (Current.word(at), Current.word(at + 8)) {
                    (Ok(base), Ok(size)) => {
                        let rest = size.saturating_sub(conn.element_offset);
                        (base + conn.element_offset, if rest < left_total { rest } else { left_total }, rest)
                    }
                    _ => (0, left_total, 0),
                }
            }
        }
        Buffer::Nowhere => (0, left_total, 0),
    };
    if left > 0 {
        let covered = piece::emit(&flow, conn, address, left, left == left_total);
        conn.offset = done + covered;
        conn.element_offset += covered;
        if covered >= element_left {
            conn.element = conn.element.wrapping_add(1);
            conn.element_offset = 0;
        }
        if conn.offset >= total {
            reset(conn);
            return 0;
        }
    } else {
        // An empty element.
        conn.element = conn.element.wrapping_add(1);
        conn.element_offset = 0;
    }
    // SAFETY: the array holds uprobe programs.
    unsafe { TRANSFER_STEPS.tail_call(ctx, call.step) };
    // The chain is at its limit: the rest is one invisible piece.
    let rest = total.saturating_sub(conn.offset);
    count(Stat::PipelineOverflow);
    piece::emit_plain(&flow, conn, rest, flags::PIPELINE_OVERFLOW, 0);
    reset(conn);
    0
}

#[inline(always)]
fn reset(conn: &mut Connection) {
    conn.offset = 0;
    conn.element_offset = 0;
    conn.element = 0;
}

/// End of stream, or an error.
#[inline(always)]
fn ended(flow: &Flow, conn: &mut Connection, result: i64) -> u32 {
    if result == -EAGAIN || result == -EINTR || (result == 0 && flow.direction == DIR_OUT) {
        return 0;
    }
    if flow.direction == DIR_IN
        && conn.in_state != connection_state::BODY
        && conn.in_state != connection_state::HEAD
    {
        deactivate(flow.ids.tid, flow.key);
    }
    piece::emit_plain(flow, conn, 0, 0, (-result) as u32);
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
    // SAFETY: lookups; the values are only read.
    let Some(active) = (unsafe { ACTIVE.get(tid) }) else { return false };
    let (activation, key) = (active.activation, active.key);
    // SAFETY: as above.
    let Some(conn) = (unsafe { CONNECTIONS.get(key) }) else { return false };
    conn.activation == activation && conn.in_state != connection_state::RESPONDED
}

/// Starts to track a connection that nobody saw being accepted, if its bytes begin with a registered method.
#[inline(always)]
fn discover(key: u64, buffer: &Buffer) -> Option<*mut Connection> {
    let address = match *buffer {
        Buffer::Flat(address) => address,
        Buffer::Vector(array, _) => Current.word(array).ok()?,
        Buffer::Nowhere => return None,
    };
    let mut first = 0u32;
    // SAFETY: a local of four bytes.
    unsafe { read_user((&raw mut first).cast(), 4, address) }.ok()?;
    if !begins_known_method(first) {
        return None;
    }
    track(key, connection_flags::UNSEEN);
    CONNECTIONS.get_ptr_mut(key)
}

#[inline(always)]
fn track(key: u64, flags: u8) -> u64 {
    let generation = now();
    let conn = Connection { generation, flags, ..EMPTY };
    if CONNECTIONS.insert(key, conn, 0).is_err() {
        count(Stat::ConnectionsFull);
    }
    generation
}

const EMPTY: Connection = Connection {
    generation: 0,
    activation: 0,
    offset: 0,
    element_offset: 0,
    scan: 0,
    window_in: 0,
    window_out: 0,
    lost: 0,
    in_state: connection_state::EXPECT,
    out_state: connection_state::EXPECT,
    flags: 0,
    element: 0,
};

#[inline(always)]
pub fn accept(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    let set = settings();
    let result = regs(ctx).rax as i64;
    if result < 0 {
        return 0;
    }
    if !is_target(ids.pid) {
        if set.adopt_acceptors == 0 || ids.pid == set.own_pid || TARGETS.get_ptr(ids.pid).is_some() {
            return 0;
        }
        let target = Target {
            flags: target_flags::HTTP | target_flags::PROVISIONAL,
            tss_key: 0,
            tss_block: 0,
            reserved: 0,
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
    let fd = result as u32;
    let key = connection_key(ids.pid, fd);
    let generation = track(key, 0);
    let record = Accept {
        header: header(Kind::Accept, ids, generation),
        conn: ConnId { generation, pid: ids.pid, fd },
    };
    match EVENTS.reserve::<Accept>(0) {
        Some(mut slot) => {
            slot.write(record);
            slot.submit(QUIET);
        }
        None => lost(key),
    }
    0
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
    entry_value: 0,
};

#[inline(always)]
fn lost(key: u64) {
    count(Stat::BoundaryLostRing);
    if let Some(conn) = CONNECTIONS.get_ptr_mut(key) {
        // SAFETY: a live map value.
        unsafe { (*conn).lost += 1 };
    }
}

#[inline(always)]
pub fn close(ctx: &ProbeContext) -> u32 {
    let ids = ids();
    if !is_target(ids.pid) {
        return 0;
    }
    let fd = regs(ctx).rdi as u32;
    let key = connection_key(ids.pid, fd);
    let Some(conn) = CONNECTIONS.get_ptr_mut(key) else { return 0 };
    // SAFETY: a live map value.
    let (generation, missing, ignored) =
        unsafe { ((*conn).generation, (*conn).lost, (*conn).flags & connection_flags::IGNORED != 0) };
    let _ = CONNECTIONS.remove(key);
    deactivate(ids.tid, key);
    if ignored {
        return 0;
    }
    let mut head = header(Kind::Close, ids, now());
    head.lost = missing;
    match EVENTS.reserve::<Close>(0) {
        Some(mut slot) => {
            slot.write(Close { header: head, conn: ConnId { generation, pid: ids.pid, fd } });
            slot.submit(QUIET);
        }
        None => count(Stat::BoundaryLostRing),
    }
    0
}
