//! One contiguous piece of a connection's stream: is there a head in it, where does it end, tell the daemon.
//!
//! In: an address in the process, a length, the connection's state. Out: one `Data` record; heads are captured
//! ([`capture`]), bodies stay where they are.

use profiler_common::{
    Active, Close, ConnId, DIR_IN, DIR_OUT, Data, Kind, Stat, TOLD_BY_CONTEXT, connection_flags,
    connection_state, flags,
};
use profiler_ebpf::head::{
    Where, begins_known_method, empty_line, may_be_request_line, may_begin_request, may_begin_response,
};

use super::{
    boundary::interleaved,
    capture::{self, How},
    connection::{Flow, REPLACED, Shared, connection_begins},
    context,
    maps::{ACTIVE, CONNECTIONS, EVENTS, QUIET, count},
    task::{header, now, read_at_most, unique},
    tls,
    transfer::Transfer,
};

/// What a piece needs to know of its transfer.
#[derive(Clone, Copy)]
pub struct Known {
    /// See [`profiler_common::Data::entered`].
    pub entered: u64,
    /// A head ended earlier in it.
    pub headed: bool,
}

/// Reports the piece at `address`, and returns how many of its `left` bytes it covered: fewer than all when another
/// head follows, or an empty line in front of one. `last`: the transfer ends with this piece.
#[inline(always)]
pub fn emit(flow: &Flow, conn: Shared, known: Known, address: u64, left: u64, last: bool) -> u64 {
    let mut words = [0u64; 3];
    read_first(&mut words, address, left);
    let first = words[0];
    let mut bits = 0u16;
    let capture = if flow.direction == DIR_IN {
        let line =
            left >= 4 && begins_known_method(first as u32) && may_be_request_line(&words, left, Where::Body);
        if conn.unproven() && !line {
            // The rest of something whose beginning was not seen, or no HTTP at all.
            interleaved(flow);
            return left;
        }
        let capture = match begin_in(flow, conn, known, &words, left, &mut bits) {
            Begin::Capture => true,
            Begin::Pass => false,
            Begin::EmptyLine => {
                emit_plain(flow, conn, known.entered, 2, bits, 0);
                return 2;
            }
            Begin::Other => {
                closed_unseen(flow, conn);
                return left;
            }
        };
        // Where a request begins, its record comes first.
        if bits & flags::NEW_ACTIVATION == 0 {
            context::context_received(conn.activation(), flow.key, watched(conn));
        }
        capture
    } else {
        if !answers(conn) {
            interleaved(flow);
            return left;
        }
        if conn.out_state() != connection_state::HEAD && may_begin_response(first, left) {
            conn.set_out_state(connection_state::HEAD);
            conn.set_window_out(0);
            conn.set_head_out(0);
        }
        conn.out_state() == connection_state::HEAD
    };
    if address == 0 || !capture {
        let end = if flow.direction == DIR_OUT && address != 0 { address + left } else { 0 };
        emit_plain_tail(flow, conn, known.entered, left, bits, 0, Tail::Before(end));
        return left;
    }
    capture::take(address, left, How { bits, direction: flow.direction, source: flow.source, last })
}

/// What is sent means for the connection that a response has begun. False where it is nobody's answer: when the server
/// speaks first it is not HTTP, and the client's first bytes will say so.
#[inline(always)]
fn answers(conn: Shared) -> bool {
    if !conn.is(connection_flags::HTTP) {
        return false;
    }
    // While a request's head is still arriving, what is sent answers an earlier one.
    if conn.in_state() != connection_state::HEAD || !conn.is(connection_flags::HELD) {
        conn.set_in_state(connection_state::RESPONDED);
    }
    true
}

/// Whether elements of the transfer may be reported as one: not while one may be (part of) a head.
#[inline(always)]
pub fn may_go_together(flow: &Flow, conn: Shared) -> bool {
    let state = if flow.direction == DIR_IN { conn.in_state() } else { conn.out_state() };
    conn.is(connection_flags::HTTP) && state != connection_state::HEAD
}

/// Whether an element may begin a head; [`emit`] decides.
#[inline(always)]
pub fn begins_head(flow: &Flow, address: u64, left: u64) -> bool {
    let first = first_bytes(address, left);
    if flow.direction == DIR_IN {
        may_begin_request(first, left) || empty_line(first, left)
    } else {
        may_begin_response(first, left)
    }
}

/// The last eight bytes, when `left` more follow at `address`; the latest is the highest.
#[inline(always)]
pub fn slide_tail(tail: u64, address: u64, left: u64) -> u64 {
    if left >= 8 {
        return first_bytes(address + left - 8, 8);
    }
    let bits = 8 * (left as u32 & 7);
    (tail >> bits) | (first_bytes(address, left) << ((64 - bits) & 63))
}

/// Reports elements that were put together.
#[inline(always)]
pub fn emit_together(flow: &Flow, conn: Shared, transfer: &Transfer) {
    let (length, tail) = (transfer.together, transfer.tail);
    if flow.direction == DIR_IN {
        emit_plain(flow, conn, transfer.entered, length, 0, 0);
    } else if answers(conn) {
        emit_plain_tail(flow, conn, transfer.entered, length, 0, 0, Tail::Known(tail));
    } else {
        interleaved(flow);
    }
}

/// The first bytes, at most eight, in the low bytes.
#[inline(always)]
pub fn first_bytes(address: u64, left: u64) -> u64 {
    let mut first = 0u64;
    if address == 0 || left == 0 {
        return 0;
    }
    // SAFETY: a local of eight bytes.
    let _ = unsafe { read_at_most::<8>((&raw mut first).cast(), left.min(8), address) };
    first
}

/// The first bytes, at most 24; 0 behind them.
#[inline(always)]
fn read_first(words: &mut [u64; 3], address: u64, left: u64) {
    if address == 0 || left == 0 {
        return;
    }
    // SAFETY: a local of 24 bytes.
    let _ = unsafe { read_at_most::<24>((&raw mut *words).cast(), left.min(24), address) };
}

/// What is to be done with incoming bytes.
enum Begin {
    /// They are (part of) a head, or tell what the connection is instead.
    Capture,
    /// They are a body.
    Pass,
    /// An empty line stands in front, which belongs to no request (RFC 9112, 2.2).
    EmptyLine,
    /// They came from something else than the connection.
    Other,
}

/// What incoming bytes mean for the connection.
#[inline(always)]
fn begin_in(flow: &Flow, conn: Shared, known: Known, words: &[u64; 3], left: u64, bits: &mut u16) -> Begin {
    let first = words[0];
    if conn.is(connection_flags::UNSEEN) {
        *bits |= flags::UNSEEN_ACCEPT;
    }
    let state = conn.in_state();
    if state == connection_state::HEAD {
        return Begin::Capture;
    }
    let proven = conn.is(connection_flags::HTTP);
    let in_body = state == connection_state::BODY;
    if may_begin_request_behind(first, left) || (empty_line(first, left) && !in_body) {
        return Begin::EmptyLine;
    }
    let begins = if in_body {
        may_be_request_line(words, left, Where::Body)
    } else if !proven {
        may_be_request_line(words, left, Where::Start)
    } else {
        may_begin_request(first, left)
    };
    if !begins {
        if proven {
            return Begin::Pass;
        }
        // TLS, or another protocol: said once, then left alone. Its first bytes tell which.
        let wrapped = flow.source != tls::MARK && tls::begins(first, left);
        let tls = if wrapped { connection_flags::TLS } else { 0 };
        conn.set_flags(conn.flags() | connection_flags::IGNORED | tls);
        return Begin::Capture;
    }
    let told = connection_begins(flow.key);
    if told == REPLACED {
        return Begin::Other;
    }
    // After a body that was not followed this may be more of the body: then it is not held.
    let mut now_flags = if !in_body || known.headed {
        conn.flags() | connection_flags::HELD
    } else {
        conn.flags() & !connection_flags::HELD
    };
    if !in_body {
        conn.set_activation(unique());
        now_flags = (now_flags | connection_flags::HTTP) & !connection_flags::CONTEXTS;
        conn.set_out_state(connection_state::EXPECT);
        count(Stat::RequestsStarted);
        *bits |= flags::NEW_ACTIVATION;
        *bits |= told as u16 & flags::BY_CONTEXT;
    }
    conn.set_flags(now_flags);
    conn.set_in_state(connection_state::HEAD);
    conn.set_window_in(0);
    conn.set_head_in(0);
    Begin::Capture
}

/// The connection's descriptor has become another file's, and no `close` was seen. After this its entry is gone.
#[inline(always)]
fn closed_unseen(flow: &Flow, conn: Shared) {
    closed(flow, conn);
}

/// The connection is over: its entry goes, and the daemon is told.
#[inline(always)]
pub fn closed(flow: &Flow, conn: Shared) {
    let (silent, generation, missing, bits) =
        (conn.unproven(), conn.generation(), conn.lost(), contexts(conn));
    let _ = CONNECTIONS.remove(flow.key);
    if !silent {
        emit_close(flow, generation, missing, bits);
    }
}

/// Tells that a connection is over.
#[inline(always)]
fn emit_close(flow: &Flow, generation: u64, missing: u32, bits: u16) {
    let mut head = header(Kind::Close, flow.ids, now());
    (head.lost, head.flags) = (missing, bits);
    match EVENTS.reserve::<Close>(0) {
        Some(mut slot) => {
            slot.write(Close { header: head, conn: ConnId { generation, pid: flow.ids.pid, fd: flow.fd } });
            slot.submit(QUIET);
        }
        None => count(Stat::BoundaryLostRing),
    }
}

/// The thread begins to work on a new request, if this piece begins one.
///
/// From here on samples carry its mark, so its record must have its place in the ring and its time: the clock may
/// interrupt right behind, and a sample in front of the record, or older than it, belongs to nothing that is known.
#[inline(always)]
pub fn activate(flow: &Flow, conn: Shared, bits: u16) {
    if bits & flags::NEW_ACTIVATION == 0 {
        return;
    }
    let activation = conn.activation();
    // Where contexts tell who works for it, what its thread does besides says nothing.
    const { assert!(flags::BY_CONTEXT as u32 / BY_CONTEXT_UNIT == TOLD_BY_CONTEXT) };
    let told = u32::from(bits & flags::BY_CONTEXT) / BY_CONTEXT_UNIT;
    let active = Active { activation, key: flow.key, lost: 0, told, entered: 0, waits: 0 };
    if ACTIVE.insert(flow.ids.tid, active, 0).is_err() {
        count(Stat::ActiveFull);
    }
    context::context_received(activation, flow.key, u64::from(told));
}

/// These make of one flag another without a branch.
const BY_CONTEXT_UNIT: u32 = 1 << 11;
const CONTEXTS_UNIT: u16 = 1 << 6;

/// [`flags::BY_CONTEXT`] if a context was made for the connection's latest request.
#[inline(always)]
fn contexts(conn: Shared) -> u16 {
    const { assert!(connection_flags::CONTEXTS as u16 * CONTEXTS_UNIT == flags::BY_CONTEXT) };
    u16::from(conn.flags() & connection_flags::CONTEXTS) * CONTEXTS_UNIT
}

/// Not 0 if an event loop may wait for the connection.
#[inline(always)]
fn watched(conn: Shared) -> u64 {
    u64::from(conn.flags() & connection_flags::WATCHED)
}

/// Takes the number of samples lost within the thread's present activation, if that is `activation`. Only where a record
/// has its place in the ring, which tells it.
#[inline(always)]
fn samples_lost(flow: &Flow, activation: u64) -> u32 {
    let Some(active) = ACTIVE.get_ptr_mut(flow.ids.tid) else { return 0 };
    // SAFETY: a live map value, the current thread's. The sampler may interrupt between load and store, and what it
    // counts there is told by none; that is one instruction.
    unsafe {
        if (*active).activation != activation {
            return 0;
        }
        let lost = (&raw const (*active).lost).read_volatile();
        if lost != 0 {
            (&raw mut (*active).lost).write_volatile(0);
        }
        lost
    }
}

#[inline(always)]
pub fn data(flow: &Flow, conn: Shared, entered: u64, advance: u64, bits: u16, errno: u32, lost: u32) -> Data {
    let mut head = header(Kind::Data, flow.ids, now());
    head.flags = bits | flow.source | contexts(conn);
    head.lost = lost;
    let activation = conn.activation();
    Data {
        header: head,
        conn: ConnId { generation: conn.generation(), pid: flow.ids.pid, fd: flow.fd },
        activation,
        advance,
        direction: flow.direction,
        captured: 0,
        errno,
        tail: [0; 8],
        tail_len: 0,
        samples_lost: samples_lost(flow, activation),
        entered,
    }
}

/// The last bytes of an outgoing piece.
enum Tail {
    /// In front of this address; 0 = they are not in memory.
    Before(u64),
    /// These, the latest in the highest byte.
    Known(u64),
}

/// A piece of which no byte is captured.
#[inline(always)]
pub fn emit_plain(flow: &Flow, conn: Shared, entered: u64, advance: u64, bits: u16, errno: u32) {
    emit_plain_tail(flow, conn, entered, advance, bits, errno, Tail::Before(0));
}

#[inline(always)]
fn emit_plain_tail(flow: &Flow, conn: Shared, entered: u64, advance: u64, bits: u16, errno: u32, tail: Tail) {
    let lost = conn.lost();
    match EVENTS.reserve::<Data>(0) {
        Some(mut slot) => {
            let record = slot.write(data(flow, conn, entered, advance, bits, errno, lost));
            match tail {
                Tail::Before(0) => {}
                Tail::Before(end) => read_tail(record, end, advance),
                Tail::Known(tail) => {
                    let size = if advance < 8 { advance as u32 & 7 } else { 8 };
                    // The bytes in front of a short one are none.
                    record.tail = (tail >> ((64 - 8 * size) & 63)).to_le_bytes();
                    record.tail_len = size;
                }
            }
            slot.submit(QUIET);
            conn.told(lost);
        }
        None => missed(conn, bits),
    }
}

/// A record did not fit. The next one of this connection says so; what it began is counted, because nothing that
/// follows tells of it.
#[inline(always)]
pub fn missed(conn: Shared, bits: u16) {
    conn.lose();
    count(Stat::BoundaryLostRing);
    if bits & flags::NEW_ACTIVATION != 0 {
        count(Stat::RequestsLostRing);
    }
}

#[inline(always)]
pub fn read_tail(record: &mut Data, end: u64, length: u64) {
    let size = length.min(8);
    if size == 0 {
        return;
    }
    // SAFETY: the field has eight bytes.
    if unsafe { read_at_most::<8>(record.tail.as_mut_ptr(), size, end - size) }.is_ok() {
        record.tail_len = size as u32;
    }
}

/// Whether an empty line stands in front of what may be a request.
#[inline(always)]
pub fn may_begin_request_behind(first: u64, left: u64) -> bool {
    empty_line(first, left) && left > 2 && may_begin_request(first >> 16, left - 2)
}
