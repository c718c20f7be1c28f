//! A head, or a part of one: its bytes into a record, up to the empty line that ends it.
//!
//! In: where a piece of the current thread's transfer lies, and what [`piece`](super::piece) has decided about it. Out: one
//! `Data` record with bytes, and the connection's state behind it.

use profiler_common::{DIR_IN, Data, HEAD_MAX, Stat, connection_flags, connection_state, flags};
use profiler_ebpf::head::{empty_lines, first_mark, may_begin_request, may_begin_response};

use super::{
    connection::{Flow, Shared},
    maps::{EVENTS, QUIET, TRANSFERS, count},
    piece::{activate, data, first_bytes, may_begin_request_behind, missed, read_tail},
    task::{ids, read_at_most},
};

/// A record with room for captured bytes. The room comes in three sizes, because a reservation's size must be a
/// constant and most heads are short.
#[repr(C)]
struct Captured<const ROOM: usize> {
    data: Data,
    bytes: [u8; ROOM],
}

/// Bytes of another protocol that are captured: enough to tell TLS and HTTP/2 from the rest.
const FOREIGN_MAX: u64 = 24;
/// Bytes captured of one head. Servers refuse heads of more than 8 to 64 KiB; what goes on is none, but another
/// protocol's text that began like one.
const HEAD_TOTAL_MAX: u32 = 64 << 10;
const SMALL: usize = 256;
const MEDIUM: usize = 1024;
const LARGE: usize = HEAD_MAX;

/// What is captured, besides its place.
pub struct How {
    /// Of the record's flags.
    pub bits: u16,
    pub direction: u16,
    /// See [`Flow::source`].
    pub source: u16,
    /// The transfer ends with it.
    pub last: bool,
}

impl How {
    #[inline(always)]
    fn pack(self) -> u64 {
        let Self { bits, direction, source, last } = self;
        u64::from(bits) | u64::from(direction) << 16 | u64::from(source) << 32 | u64::from(last) << 48
    }

    #[inline(always)]
    fn unpack(packed: u64) -> Self {
        Self {
            bits: packed as u16,
            direction: (packed >> 16) as u16,
            source: (packed >> 32) as u16,
            last: packed >> 48 != 0,
        }
    }
}

/// Captures the head at `address`, of the current thread's transfer. How many of its `left` bytes that covers, as
/// [`super::piece::emit`].
#[inline(always)]
pub fn take(address: u64, left: u64, how: How) -> u64 {
    let how = how.pack();
    if left <= SMALL as u64 {
        capture_small(address, left, how)
    } else if left <= MEDIUM as u64 {
        capture_medium(address, left, how)
    } else {
        capture_large(address, left, how)
    }
}

// Functions of their own, which the verifier checks by themselves: they are the largest part of what looks at a transfer,
// and would be checked anew for each way that leads to them.

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn capture_small(address: u64, left: u64, how: u64) -> u64 {
    capture::<SMALL>(address, left, how)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn capture_medium(address: u64, left: u64, how: u64) -> u64 {
    capture::<MEDIUM>(address, left, how)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn capture_large(address: u64, left: u64, how: u64) -> u64 {
    capture::<LARGE>(address, left, how)
}

/// The same into a record with `ROOM` bytes.
#[inline(always)]
fn capture<const ROOM: usize>(address: u64, left: u64, how: u64) -> u64 {
    let How { bits, direction, source, last } = How::unpack(how);
    let ids = ids();
    let Some(transfer) = TRANSFERS.get_ptr_mut(ids.tid) else { return left };
    // SAFETY: a live map value, which only programs of the current thread use; the caller does not hold on to it.
    let transfer = unsafe { &mut *transfer };
    let flow = &Flow::new(ids, transfer.fd, direction, source);
    let Some(conn) = Shared::of(flow.key) else { return left };
    let first = first_bytes(address, left);
    let incoming = flow.direction == DIR_IN;
    let lost = conn.lost();
    let Some(mut slot) = EVENTS.reserve::<Captured<ROOM>>(0) else {
        activate(flow, conn, bits);
        missed(conn, bits);
        // Without the bytes the end of the head is unknown: take the rest for a body, the daemon resynchronises.
        head_over(conn, incoming);
        return left;
    };
    let record = slot.as_mut_ptr();
    let mut covered = left;
    // SAFETY: the reservation is ours until it is submitted, and all writes stay inside it.
    unsafe {
        (&raw mut (*record).data).write(data(flow, conn, transfer.entered, left, bits, 0, lost));
        activate(flow, conn, bits);
        let bytes = (&raw mut (*record).bytes).cast::<u8>();
        let mut size = left;
        if conn.is(connection_flags::IGNORED) && size > FOREIGN_MAX {
            size = FOREIGN_MAX;
        }
        if size > ROOM as u64 {
            size = ROOM as u64;
        }
        if read_at_most::<ROOM>(bytes, size, address).is_err() {
            count(Stat::HeadReadFault);
            (*record).data.header.flags |= flags::HEAD_FAULT;
            slot.submit(QUIET);
            conn.told(lost);
            head_over(conn, incoming);
            return left;
        }
        let window = if incoming { conn.window_in() } else { conn.window_out() };
        // The result goes through memory, so that the verifier need not follow each position on its own.
        (&raw mut transfer.scan).write_volatile(0);
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
                (&raw mut transfer.scan).write_volatile((i * 8) as u64 + first_mark(marks));
                break;
            }
            before = w;
            i += 1;
        }
        let end = (&raw const transfer.scan).read_volatile();
        let mut captured = size;
        if end != 0 && end <= size {
            captured = end;
            (*record).data.header.flags |= flags::HEAD_END;
            transfer.headed = 1;
            head_over(conn, incoming);
            let rest = left - end;
            let next = first_bytes(address + end, rest);
            if rest > 0
                && if incoming {
                    may_begin_request(next, rest) || may_begin_request_behind(next, rest)
                } else {
                    may_begin_response(next, rest)
                }
            {
                covered = end;
            }
        } else if size < left || captured_more(conn, incoming, size as u32) > HEAD_TOTAL_MAX {
            // Longer than we look: its end will not be seen.
            head_over(conn, incoming);
        } else {
            let window = slide(window, first, address, left);
            if incoming {
                conn.set_window_in(window);
            } else {
                conn.set_window_out(window);
            }
        }
        (*record).data.advance = covered;
        (*record).data.captured = captured as u16;
        if !incoming && last && covered == left {
            read_tail(&mut (*record).data, address + left, left);
        }
    }
    slot.submit(QUIET);
    conn.told(lost);
    covered
}

#[inline(always)]
fn head_over(conn: Shared, incoming: bool) {
    if incoming {
        conn.set_in_state(connection_state::BODY);
    } else {
        conn.set_out_state(connection_state::BODY);
    }
}

/// How much of the head in progress was captured, with `size` more bytes.
#[inline(always)]
fn captured_more(conn: Shared, incoming: bool, size: u32) -> u32 {
    if incoming {
        let total = conn.head_in().wrapping_add(size);
        conn.set_head_in(total);
        total
    } else {
        let total = conn.head_out().wrapping_add(size);
        conn.set_head_out(total);
        total
    }
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
