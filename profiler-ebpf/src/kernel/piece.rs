//! One contiguous piece of a connection's stream: is there a head in it, where does it end, tell the daemon.
//!
//! In: an address in the process, a length, the connection's state. Out: one `Data` record; heads are captured up
//! to their empty line, bodies stay where they are.

use profiler_common::{
    Active, ConnId, Connection, DIR_IN, DIR_OUT, Data, HEAD_MAX, Kind, Stat, connection_flags,
    connection_state, flags,
};
use profiler_ebpf::head::{
    begins_known_method, empty_lines, first_mark, may_begin_request, may_begin_response,
};

use super::{
    maps::{ACTIVE, EVENTS, QUIET, count},
    task::{Ids, header, now, read_user},
};

/// Whose transfer it is.
pub struct Flow {
    pub ids: Ids,
    pub fd: u32,
    pub key: u64,
    pub direction: u16,
}

/// A record with room for captured bytes. The room comes in three sizes, because a reservation's size must be a
/// constant and most heads are short.
#[repr(C)]
struct Captured<const ROOM: usize> {
    data: Data,
    bytes: [u8; ROOM],
}

/// Bytes of another protocol that are captured: enough to tell TLS and HTTP/2 from the rest.
const FOREIGN_MAX: u64 = 24;
const SMALL: usize = 256;
const MEDIUM: usize = 1024;
const LARGE: usize = HEAD_MAX;

/// Reports the piece at `address`, and returns how many of its `left` bytes it covered: fewer than all when another
/// head follows. `last`: the transfer ends with this piece.
#[inline(always)]
pub fn emit(flow: &Flow, conn: &mut Connection, address: u64, left: u64, last: bool) -> u64 {
    let first = first_bytes(address, left);
    let mut bits = 0u16;
    let capture = if flow.direction == DIR_IN {
        if unproven(conn) && (left < 4 || !begins_known_method(first as u32)) {
            return left; // the rest of something whose beginning was not seen
        }
        begin_in(conn, first, left, &mut bits)
    } else {
        if conn.flags & connection_flags::HTTP == 0 {
            return left; // the server speaks first: not HTTP, and the client's first bytes will say so
        }
        // While a request's head is still arriving, what is sent answers an earlier one.
        if conn.in_state != connection_state::HEAD || conn.flags & connection_flags::HELD == 0 {
            conn.in_state = connection_state::RESPONDED;
        }
        if conn.out_state != connection_state::HEAD && may_begin_response(first, left) {
            conn.out_state = connection_state::HEAD;
            conn.window_out = 0;
        }
        conn.out_state == connection_state::HEAD
    };
    if address == 0 || !(capture || bits & flags::HEAD_FAULT != 0) {
        let tail = if flow.direction == DIR_OUT && address != 0 { address + left } else { 0 };
        emit_plain_tail(flow, conn, left, bits, 0, tail);
        return left;
    }
    if left <= SMALL as u64 {
        with_room::<SMALL>(flow, conn, address, left, first, bits, last)
    } else if left <= MEDIUM as u64 {
        with_room::<MEDIUM>(flow, conn, address, left, first, bits, last)
    } else {
        with_room::<LARGE>(flow, conn, address, left, first, bits, last)
    }
}

/// Whether the connection was open before it was looked at, and has carried nothing since that proves it to be HTTP.
#[inline(always)]
pub fn unproven(conn: &Connection) -> bool {
    conn.flags & (connection_flags::UNSEEN | connection_flags::HTTP) == connection_flags::UNSEEN
}

/// The first bytes, at most eight, in the low bytes.
#[inline(always)]
fn first_bytes(address: u64, left: u64) -> u64 {
    let mut first = 0u64;
    let size = if left >= 8 { 8 } else { left as u32 & 7 };
    if address == 0 || size == 0 {
        return 0;
    }
    // SAFETY: a local of eight bytes, and size is at most 8.
    let _ = unsafe { read_user((&raw mut first).cast(), size, address) };
    first
}

/// What incoming bytes mean for the connection; whether they are to be captured.
#[inline(always)]
fn begin_in(conn: &mut Connection, first: u64, left: u64, bits: &mut u16) -> bool {
    if conn.flags & connection_flags::UNSEEN != 0 {
        *bits |= flags::UNSEEN_ACCEPT;
    }
    if conn.in_state == connection_state::HEAD {
        return true;
    }
    if may_begin_request(first, left) {
        // After a body that was not followed this may be more of the body: then it is not held.
        if conn.in_state != connection_state::BODY || conn.offset > 0 {
            conn.flags |= connection_flags::HELD;
        } else {
            conn.flags &= !connection_flags::HELD;
        }
        if conn.in_state != connection_state::BODY {
            conn.activation = now();
            conn.flags |= connection_flags::HTTP;
            conn.out_state = connection_state::EXPECT;
            count(Stat::RequestsStarted);
            *bits |= flags::NEW_ACTIVATION;
        }
        conn.in_state = connection_state::HEAD;
        conn.window_in = 0;
        return true;
    }
    if conn.flags & connection_flags::HTTP == 0 {
        // TLS, or another protocol: said once, then left alone. Its first bytes tell which.
        conn.flags |= connection_flags::IGNORED;
        return true;
    }
    false
}

/// The thread begins to work on a new request, if this piece begins one.
///
/// From here on samples carry its mark, so its record must have its place in the ring and its time: the clock may
/// interrupt right behind, and a sample in front of the record, or older than it, belongs to nothing that is known.
#[inline(always)]
fn activate(flow: &Flow, conn: &Connection, bits: u16) {
    if bits & flags::NEW_ACTIVATION == 0 {
        return;
    }
    let active =
        Active { activation: conn.activation, key: flow.key, lost: 0, reserved: 0, entered: 0, waits: 0 };
    if ACTIVE.insert(flow.ids.tid, active, 0).is_err() {
        count(Stat::ActiveFull);
    }
}

#[inline(always)]
fn data(flow: &Flow, conn: &Connection, advance: u64, bits: u16, errno: u32) -> Data {
    let mut head = header(Kind::Data, flow.ids, now());
    head.flags = bits;
    head.lost = conn.lost;
    Data {
        header: head,
        conn: ConnId { generation: conn.generation, pid: flow.ids.pid, fd: flow.fd },
        activation: conn.activation,
        advance,
        direction: flow.direction,
        captured: 0,
        errno,
        tail: [0; 8],
        tail_len: 0,
        reserved: 0,
        entered: if flow.direction == DIR_OUT { conn.entered } else { 0 },
    }
}

/// A piece of which no byte is captured.
#[inline(always)]
pub fn emit_plain(flow: &Flow, conn: &mut Connection, advance: u64, bits: u16, errno: u32) {
    emit_plain_tail(flow, conn, advance, bits, errno, 0);
}

/// `tail_end`: the address behind an outgoing piece, 0 = its bytes are not in memory.
#[inline(always)]
fn emit_plain_tail(flow: &Flow, conn: &mut Connection, advance: u64, bits: u16, errno: u32, tail_end: u64) {
    match EVENTS.reserve::<Data>(0) {
        Some(mut slot) => {
            let record = slot.write(data(flow, conn, advance, bits, errno));
            if tail_end != 0 {
                read_tail(record, tail_end, advance);
            }
            slot.submit(QUIET);
            conn.lost = 0;
        }
        None => missed(conn, bits),
    }
}

/// A record did not fit. The next one of this connection says so; what it began is counted, because nothing that
/// follows tells of it.
#[inline(always)]
fn missed(conn: &mut Connection, bits: u16) {
    conn.lost += 1;
    count(Stat::BoundaryLostRing);
    if bits & flags::NEW_ACTIVATION != 0 {
        count(Stat::RequestsLostRing);
    }
}

#[inline(always)]
fn read_tail(record: &mut Data, end: u64, length: u64) {
    let size = if length >= 8 { 8 } else { length as u32 & 7 };
    if size == 0 {
        return;
    }
    // SAFETY: the field has eight bytes, and size is at most 8.
    if unsafe { read_user(record.tail.as_mut_ptr(), size, end - u64::from(size)) }.is_ok() {
        record.tail_len = size;
    }
}

/// Captures the head at `address` into a record with `ROOM` bytes.
#[inline(always)]
fn with_room<const ROOM: usize>(
    flow: &Flow,
    conn: &mut Connection,
    address: u64,
    left: u64,
    first: u64,
    bits: u16,
    last: bool,
) -> u64 {
    let incoming = flow.direction == DIR_IN;
    let Some(mut slot) = EVENTS.reserve::<Captured<ROOM>>(0) else {
        activate(flow, conn, bits);
        missed(conn, bits);
        // Without the bytes the end of the head is unknown: take the rest for a body, the daemon resynchronises.
        if incoming {
            conn.in_state = connection_state::BODY;
        } else {
            conn.out_state = connection_state::BODY;
        }
        return left;
    };
    let record = slot.as_mut_ptr();
    let mut covered = left;
    // SAFETY: the reservation is ours until it is submitted, and all writes stay inside it.
    unsafe {
        (&raw mut (*record).data).write(data(flow, conn, left, bits, 0));
        activate(flow, conn, bits);
        let bytes = (&raw mut (*record).bytes).cast::<u8>();
        let mut size = left;
        if conn.flags & connection_flags::IGNORED != 0 && size > FOREIGN_MAX {
            size = FOREIGN_MAX;
        }
        if size > ROOM as u64 {
            size = ROOM as u64;
        }
        if read_user(bytes, size as u32, address).is_err() {
            count(Stat::HeadReadFault);
            (*record).data.header.flags |= flags::HEAD_FAULT;
            slot.submit(QUIET);
            conn.lost = 0;
            if incoming {
                conn.in_state = connection_state::BODY;
            } else {
                conn.out_state = connection_state::BODY;
            }
            return left;
        }
        let window = if incoming { conn.window_in } else { conn.window_out };
        // The result goes through memory, so that the verifier need not follow each position on its own.
        (&raw mut conn.scan).write_volatile(0);
        let words = bytes.cast::<u64>();
        let mut before = u64::from(window) << 32;
        let mut i = 0usize;
        while i < ROOM / 8 {
            if (i * 8) as u64 >= size {
                break;
            }
            let w = words.add(i).read();
            let marks = empty_lines(before, w);
            if marks != 0 {
                (&raw mut conn.scan).write_volatile((i * 8) as u64 + first_mark(marks));
                break;
            }
            before = w;
            i += 1;
        }
        let end = (&raw const conn.scan).read_volatile();
        let mut captured = size;
        if end != 0 && end <= size {
            captured = end;
            (*record).data.header.flags |= flags::HEAD_END;
            if incoming {
                conn.in_state = connection_state::BODY;
            } else {
                conn.out_state = connection_state::BODY;
            }
            let rest = left - end;
            let next = first_bytes(address + end, rest);
            if rest > 0
                && if incoming { may_begin_request(next, rest) } else { may_begin_response(next, rest) }
            {
                covered = end;
            }
        } else if size < left {
            // Longer than we look: its end will not be seen.
            if incoming {
                conn.in_state = connection_state::BODY;
            } else {
                conn.out_state = connection_state::BODY;
            }
        } else {
            let window = slide(window, first, address, left);
            if incoming {
                conn.window_in = window;
            } else {
                conn.window_out = window;
            }
        }
        (*record).data.advance = covered;
        (*record).data.captured = captured as u16;
        if !incoming && last && covered == left {
            read_tail(&mut (*record).data, address + left, left);
        }
    }
    slot.submit(QUIET);
    conn.lost = 0;
    covered
}

/// The last four bytes of a head so far, after `left` more (which begin with `first`).
#[inline(always)]
fn slide(window: u32, first: u64, address: u64, left: u64) -> u32 {
    if left < 4 {
        let bits = 8 * (left as u32 & 3);
        return (window >> bits) | ((first as u32) << ((32 - bits) & 31));
    }
    first_bytes(address + left - 4, 4) as u32
}
