//! The clear text of TLS connections: what OpenSSL takes from its callers and hands to them.
//!
//! In: calls of `SSL_read`, `SSL_write` and their kin, and on which descriptors their threads receive. Out: transfers on
//! those descriptors' connections, see [`transfer`](super::transfer).
//!
//! A session (an `SSL`) does not say what it works on; applications with an event loop even move its bytes themselves. So it
//! is told by what happens: a thread that receives within a call of a session, receives for that session. And one that
//! receives outside of any (a loop, which waits for what comes) hands the bytes on before it receives elsewhere or waits
//! again. Only connections that came in count, so what a process fetches by TLS itself stays unseen.

use aya_ebpf::programs::ProbeContext;
use profiler_common::{Connection, DIR_IN, DIR_OUT, Stat, connection_flags, connection_key, flags};
use profiler_ebpf::{head::may_begin_response, memory::Memory};

use super::{
    boundary,
    call::{Buffers, Stepping},
    connection::{Flow, Shared},
    maps::{TLS_SESSIONS, TLS_THREADS, count},
    piece::first_bytes,
    task::{Current, ids},
    transfer,
};

/// Key of `TLS_SESSIONS`: an `SSL` of a process.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SessionKey {
    pid: u32,
    reserved: u32,
    ssl: u64,
}

/// What a session works on. The generation tells whether the descriptor still is that connection.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Session {
    generation: u64,
    fd: u32,
    /// [`BY_HANDSHAKE`], [`BY_READ`], or [`BEGUN`].
    state: u32,
}

/// A call of its handshake told.
const BY_HANDSHAKE: u32 = 0;
/// Its clear text is followed.
const BEGUN: u32 = 1;
/// A call that reads told, or what was received within a call.
const BY_READ: u32 = 2;

/// Value of `TLS_THREADS`, keyed by tid.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Thread {
    /// The session whose call the thread is in, 0 = it is in none.
    ssl: u64,
    /// The call's buffer.
    buffer: u64,
    /// Where it says how many bytes it moved, 0 = by its result.
    moved: u64,
    /// When the last call that sent within it was entered, see [`profiler_common::Data::entered`].
    entered: u64,
    /// The connection on which the thread received last, if `heard` is [`HERE`].
    generation: u64,
    fd: u32,
    /// [`DIR_IN`], [`DIR_OUT`], or [`HANDSHAKE`].
    direction: u16,
    /// 1: it received within the call.
    within: u8,
    /// What it has received on since it waited: [`NOTHING`], [`HERE`], [`ELSEWHERE`].
    heard: u8,
}

const NOTHING: u8 = 0;
/// On a connection that may carry TLS.
const HERE: u8 = 1;
/// On something else, such as a connection that the process made itself.
const ELSEWHERE: u8 = 2;

/// A call that moves no data of its caller's.
pub const HANDSHAKE: u16 = 2;

/// How a call says how many bytes it moved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// By its result (`SSL_read`).
    Result,
    /// Where its fourth argument points, if its result is positive (`SSL_read_ex`).
    There,
}

/// The thread's entry. A live map value, which only programs of the current thread use. One that it does not have is made
/// if it is `wanted`.
#[inline(always)]
fn entry(tid: u32, wanted: bool) -> Option<*mut Thread> {
    if let Some(thread) = TLS_THREADS.get_ptr_mut(tid) {
        return Some(thread);
    }
    if !wanted {
        return None;
    }
    tls_thread_begins(tid.into());
    TLS_THREADS.get_ptr_mut(tid)
}

/// Makes the thread's entry. The result says nothing. Like [`super::connection::connection_begins`] it is a function of its
/// own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tls_thread_begins(tid: u64) -> u64 {
    if TLS_THREADS.insert(tid as u32, Thread::default(), 0).is_err() {
        count(Stat::TlsFull);
    }
    0
}

/// A call of a session begins.
#[inline(always)]
pub fn enter(ctx: &ProbeContext, direction: u16, says: Says) -> u32 {
    let (Some(ssl), Some(buffer)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1)) else { return 0 };
    let moved = if says == Says::There { ctx.arg::<u64>(3).unwrap_or(0) } else { 0 };
    let Some(thread) = entry(ids().tid, true) else { return 0 };
    // SAFETY: see `entry`.
    let thread = unsafe { &mut *thread };
    (thread.ssl, thread.buffer, thread.moved) = (ssl, buffer, moved);
    (thread.direction, thread.within, thread.entered) = (direction, 0, 0);
    0
}

/// A call of a session returns.
#[inline(always)]
pub fn returned<S: Stepping>(ctx: &S, result: u32) -> u32 {
    let ids = ids();
    let Some(entry) = TLS_THREADS.get_ptr_mut(ids.tid) else { return 0 };
    // SAFETY: see `entry`.
    let entry = unsafe { &mut *entry };
    let thread = *entry;
    entry.ssl = 0;
    if thread.within != 0 {
        // It was for this call.
        (entry.within, entry.heard) = (0, NOTHING);
    }
    if thread.ssl == 0 {
        return 0;
    }
    let key = SessionKey { pid: ids.pid, reserved: 0, ssl: thread.ssl };
    let session = works_on(key, &thread);
    let bytes = moved(&thread, result);
    if thread.direction == HANDSHAKE || bytes == 0 {
        return 0;
    }
    if thread.direction == DIR_OUT && session.state != BEGUN {
        // Whoever answers has read a request.
        if may_begin_response(first_bytes(thread.buffer, bytes), bytes) {
            count(Stat::TlsUnseen);
        }
        return 0;
    }
    if session.generation == 0 {
        return 0;
    }
    let session = if session.state == BEGUN {
        session
    } else {
        let Some(session) = begin(session) else { return 0 };
        if TLS_SESSIONS.insert(key, session, 0).is_err() {
            count(Stat::TlsFull);
            return 0;
        }
        if entry.heard == HERE && entry.fd == session.fd {
            entry.generation = session.generation;
        }
        session
    };
    let flow = Flow::new(ids, session.fd, thread.direction, MARK);
    let Some(conn) = Shared::of(flow.key) else { return 0 };
    if conn.is(connection_flags::IGNORED) {
        return 0;
    }
    let buffers = Buffers { address: thread.buffer, elements: 0, vector: 0 };
    let entered = if thread.direction == DIR_OUT { thread.entered } else { 0 };
    transfer::start(ctx, &flow, conn, buffers, entered, bytes)
}

/// How many bytes a call has moved.
#[inline(always)]
fn moved(thread: &Thread, result: u32) -> u64 {
    let bytes = if thread.moved == 0 {
        result as i32
    } else if result as i32 > 0 {
        Current.word(thread.moved).unwrap_or(0) as i32
    } else {
        0
    };
    if bytes > 0 { bytes as u64 } else { 0 }
}

/// What the session works on whose call returns.
///
/// What was received within the call tells for certain. What the thread received before may have been for another session,
/// whose turn comes later (uvloop reads on in a later callback once the handshake is over; a client's session begins in the
/// middle of a request). But each call of a handshake follows upon what it is to read, at least the last one, so the last
/// one tells: that it is this connection, or none that came in. Where reads make the handshake (Node), or it was over before
/// anybody looked, a read tells as long as nothing else does, and only of a connection with which nobody has begun.
///
/// The result has generation 0 where nothing is known: an `Option` would be made of words that were never written, which the
/// verifier refuses.
#[inline(always)]
fn works_on(key: SessionKey, thread: &Thread) -> Session {
    let mut known = UNKNOWN;
    // SAFETY: a lookup; the value is copied at once.
    if let Some(session) = unsafe { TLS_SESSIONS.get(key) } {
        let copy = *session;
        if is_still(key.pid, copy.fd, copy.generation) {
            known = copy;
        }
    }
    let certain = thread.within != 0;
    let shakes = thread.direction == HANDSHAKE && known.state != BEGUN;
    let reads = thread.direction == DIR_IN && known.state == BY_READ;
    if thread.heard == ELSEWHERE {
        if known.generation != 0 && known.state != BEGUN && (certain || shakes || reads) {
            let _ = TLS_SESSIONS.remove(key);
            return UNKNOWN;
        }
        return known;
    }
    if thread.heard != HERE || known.generation == thread.generation {
        return known;
    }
    let Some(conn) = Shared::of(connection_key(key.pid, thread.fd)) else { return known };
    if conn.generation() != thread.generation {
        return known;
    }
    // Nobody has begun with its clear text.
    let fresh = conn.is(connection_flags::IGNORED) && conn.is(connection_flags::TLS);
    let first = thread.direction == DIR_IN && known.generation == 0 && (fresh || conn.unproven());
    if !(certain || first || (shakes && fresh)) {
        return known;
    }
    let state = if shakes { BY_HANDSHAKE } else { BY_READ };
    let session = Session { generation: thread.generation, fd: thread.fd, state };
    if TLS_SESSIONS.insert(key, session, 0).is_err() {
        count(Stat::TlsFull);
        return UNKNOWN;
    }
    session
}

const UNKNOWN: Session = Session { generation: 0, fd: 0, state: BY_READ };

/// A session ends; another one may have its address next.
#[inline(always)]
pub fn ended(ssl: u64) -> u32 {
    let key = SessionKey { pid: ids().pid, reserved: 0, ssl };
    let _ = TLS_SESSIONS.remove(key);
    0
}

#[inline(always)]
fn is_still(pid: u32, fd: u32, generation: u64) -> bool {
    Shared::of(connection_key(pid, fd)).is_some_and(|conn| conn.generation() == generation)
}

/// What was on the wire of a session's connection was its handshake; its clear text begins now.
#[inline(always)]
fn begin(session: Session) -> Option<Session> {
    let flow = Flow::new(ids(), session.fd, DIR_IN, MARK);
    let below = Shared::of(flow.key)?;
    if below.generation() != session.generation || !carries_tls(below) {
        return None;
    }
    let unseen = below.flags() & connection_flags::UNSEEN;
    let conn = Connection {
        inode: below.inode(),
        number: below.number(),
        flags: connection_flags::TLS | unseen,
        ..Connection::default()
    };
    let generation = boundary::begin(&flow, conn, unseen == 0);
    Some(Session { generation, state: BEGUN, ..session })
}

/// Whether what its descriptor transfers is TLS, or the middle of something whose beginning was not seen.
#[inline(always)]
fn carries_tls(conn: Shared) -> bool {
    conn.is(connection_flags::TLS) || conn.unproven()
}

/// The current thread has received on its descriptor, which may be a connection's that is followed.
#[inline(always)]
pub fn received(flow: &Flow, conn: Option<Shared>) {
    let conn = conn.filter(|conn| carries_tls(*conn));
    let Some(thread) = entry(flow.ids.tid, conn.is_some()) else { return };
    // SAFETY: see `entry`.
    let thread = unsafe { &mut *thread };
    match conn {
        Some(conn) => (thread.generation, thread.heard) = (conn.generation(), HERE),
        None => thread.heard = ELSEWHERE,
    }
    thread.fd = flow.fd;
    thread.within = u8::from(thread.ssl != 0);
}

/// The current thread has sent what a session made of its caller's bytes; `entered`: see [`profiler_common::Data`].
#[inline(always)]
pub fn sent(flow: &Flow, entered: u64) {
    let Some(thread) = TLS_THREADS.get_ptr_mut(flow.ids.tid) else { return };
    // SAFETY: see `entry`.
    unsafe { (*thread).entered = entered };
}

/// The current thread waits for the next event: what it received last was handed on.
#[inline(always)]
pub fn waits(tid: u32) {
    let Some(thread) = TLS_THREADS.get_ptr_mut(tid) else { return };
    // SAFETY: see `entry`.
    let thread = unsafe { &mut *thread };
    if thread.ssl == 0 {
        thread.heard = NOTHING;
    }
}

/// Whether the beginning of a record of the handshake stands here (RFC 8446, 5.1): its type, and the protocol's major
/// version.
#[inline(always)]
pub fn begins(first: u64, left: u64) -> bool {
    left >= 2 && first & 0xffff == 0x0316
}

/// For the records of what is seen here.
pub const MARK: u16 = flags::BY_TLS;
