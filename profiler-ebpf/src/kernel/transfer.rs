//! A transfer, piece by piece: which bytes of the process it moved, through flat buffers and arrays of them.
//!
//! In: where its buffers are, and where the thread's transfer stands. Out: its pieces, see
//! [`piece`](super::piece). All calls share these programs, because they are large and the verifier takes its time with
//! each copy; they tail-call themselves while bytes are left.

use profiler_common::{DIR_IN, DIR_OUT, Stat, connection_flags, flags};
use profiler_ebpf::memory::Memory;

use super::{
    call::{Buffers, Stepping},
    connection::{Flow, Shared},
    maps::{TRANSFERS, count},
    piece::{self, Known},
    task::{Current, ids, read_user},
};

/// Elements put together by one program: with the 32 links of the chain more than a call may have (1,024).
const ELEMENTS: u32 = 33;

/// Slots of `TRANSFER_STEPS` and its kin.
const STEP_IN: u32 = 0;
const STEP_OUT: u32 = 1;

/// Value of `TRANSFERS`, keyed by tid: the transfer that the thread's programs are looking at.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Transfer {
    /// The connection's, when it began: its descriptor may be another one's before it ends.
    pub generation: u64,
    /// See [`profiler_common::Data::entered`].
    pub entered: u64,
    buffers: Buffers,
    /// Bytes that were transferred.
    total: u64,
    /// Bytes that earlier pieces covered, and of the current element.
    pub offset: u64,
    pub element_offset: u64,
    pub element: u64,
    /// Where the search for the end of a head left its result.
    pub scan: u64,
    /// Of elements put together: bytes, and the last eight of them.
    pub together: u64,
    pub tail: u64,
    pub fd: u32,
    /// 1: a head ended earlier in it, so what follows that looks like one is one.
    pub headed: u16,
    /// See [`Flow::source`].
    source: u16,
}

impl Transfer {
    #[inline(always)]
    pub fn new(conn: Shared, flow: &Flow, buffers: Buffers, entered: u64, total: u64) -> Self {
        Self {
            generation: conn.generation(),
            entered,
            buffers,
            total,
            offset: 0,
            element_offset: 0,
            element: 0,
            scan: 0,
            together: 0,
            tail: 0,
            fd: flow.fd,
            headed: 0,
            source: flow.source,
        }
    }
}

/// Begins to look at the `total` bytes that were transferred.
#[inline(always)]
pub fn start<S: Stepping>(
    ctx: &S,
    flow: &Flow,
    conn: Shared,
    buffers: Buffers,
    entered: u64,
    total: u64,
) -> u32 {
    let transfer = Transfer::new(conn, flow, buffers, entered, total);
    if TRANSFERS.insert(flow.ids.tid, transfer, 0).is_err() {
        count(Stat::PipelineOverflow);
        piece::emit_plain(flow, conn, entered, total, flags::PIPELINE_OVERFLOW, 0);
        return 0;
    }
    next(ctx, flow, conn, &transfer)
}

/// On to the next piece, if there is one.
#[inline(always)]
fn next<S: Stepping>(ctx: &S, flow: &Flow, conn: Shared, transfer: &Transfer) -> u32 {
    if transfer.offset >= transfer.total {
        return over(flow);
    }
    // SAFETY: the array holds programs for this context.
    unsafe { S::steps().tail_call(ctx, if flow.direction == DIR_IN { STEP_IN } else { STEP_OUT }) };
    // The chain is at its limit: the rest is one invisible piece.
    let rest = transfer.total.saturating_sub(transfer.offset);
    count(Stat::PipelineOverflow);
    piece::emit_plain(flow, conn, transfer.entered, rest, flags::PIPELINE_OVERFLOW, 0);
    over(flow)
}

#[inline(always)]
fn over(flow: &Flow) -> u32 {
    let _ = TRANSFERS.remove(flow.ids.tid);
    0
}

#[inline(always)]
pub fn step_in<S: Stepping>(ctx: &S) -> u32 {
    step(ctx, DIR_IN)
}

#[inline(always)]
pub fn step_out<S: Stepping>(ctx: &S) -> u32 {
    step(ctx, DIR_OUT)
}

/// One piece.
#[inline(always)]
fn step<S: Stepping>(ctx: &S, direction: u16) -> u32 {
    let ids = ids();
    let Some(entry) = TRANSFERS.get_ptr_mut(ids.tid) else { return 0 };
    // SAFETY: a live map value. Only programs of the current thread use and remove this entry, and they run one after
    // the other; it is not used behind `over`.
    let transfer = unsafe { &mut *entry };
    let flow = Flow::new(ids, transfer.fd, direction, transfer.source);
    let Some(conn) = Shared::of(flow.key) else { return over(&flow) };
    let total = transfer.total;
    let done = transfer.offset;
    // The last piece may have shown that the connection is not one to follow, or another thread have closed it. Nothing
    // can be left already, but the verifier does not know that.
    if done >= total || conn.generation() != transfer.generation || conn.is(connection_flags::IGNORED) {
        return over(&flow);
    }
    let left_total = total - done;
    let Buffers { address: at, elements, vector } = transfer.buffers;
    let (address, left, element_left) = if vector == 0 {
        (at + done, left_total, left_total)
    } else {
        if piece::may_go_together(&flow, conn) {
            put_together(&flow, transfer, at, elements, total);
            if transfer.together > 0 {
                piece::emit_together(&flow, conn, transfer);
                return next(ctx, &flow, conn, transfer);
            }
        }
        if transfer.element >= elements {
            (0, left_total, 0)
        } else {
            let at = at + transfer.element * 16;
            match (Current.word(at), Current.word(at + 8)) {
                (Ok(base), Ok(size)) => {
                    let rest = size.saturating_sub(transfer.element_offset);
                    let left = if rest < left_total { rest } else { left_total };
                    (base + transfer.element_offset, left, rest)
                }
                _ => (0, left_total, 0),
            }
        }
    };
    if left > 0 {
        let known = Known { entered: transfer.entered, headed: transfer.headed != 0 };
        let covered = piece::emit(&flow, conn, known, address, left, left == left_total);
        // What captures a head has used the entry too.
        // SAFETY: as above.
        let transfer = unsafe { &mut *entry };
        transfer.offset = done + covered;
        transfer.element_offset += covered;
        if covered >= element_left {
            transfer.element += 1;
            transfer.element_offset = 0;
        }
    } else {
        // An empty element.
        transfer.element += 1;
        transfer.element_offset = 0;
    }
    // SAFETY: as above.
    next(ctx, &flow, conn, unsafe { &*entry })
}

/// Goes through elements that begin no head. All state is in memory, so that the verifier sees each turn begin alike.
#[inline(always)]
fn put_together(flow: &Flow, transfer: &mut Transfer, array: u64, length: u64, total: u64) {
    transfer.together = 0;
    transfer.tail = 0;
    for _ in 0..ELEMENTS {
        let element = transfer.element;
        if element >= length || transfer.offset >= total {
            break;
        }
        let mut iovec = [0u64; 2];
        // SAFETY: a local of sixteen bytes.
        if unsafe { read_user((&raw mut iovec).cast(), 16, array + element * 16) }.is_err() {
            break;
        }
        let rest = iovec[1].saturating_sub(transfer.element_offset);
        let left_total = total - transfer.offset;
        let left = if rest < left_total { rest } else { left_total };
        let address = iovec[0] + transfer.element_offset;
        if left > 0 {
            if piece::begins_head(flow, address, left) {
                break;
            }
            transfer.tail = piece::slide_tail(transfer.tail, address, left);
        }
        transfer.together += left;
        transfer.offset += left;
        transfer.element = element + 1;
        transfer.element_offset = 0;
    }
}
