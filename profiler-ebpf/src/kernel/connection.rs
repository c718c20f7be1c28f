//! An entry of `CONNECTIONS`, which several threads may use at a time.
//!
//! A process may receive with one thread and send with another, and a program may be preempted anywhere, so a field may
//! change between any two looks at it. Each direction keeps to its own fields; what both write is a hint (`in_state`) or
//! a count that may be short by what was added between a load and a store (`lost`; the target has no atomics). What
//! belongs to one transfer is in `TRANSFERS` and never here.

use profiler_common::{Connection, connection_flags, connection_key, flags};

use super::{
    context,
    maps::CONNECTIONS,
    task::{Ids, ids, opened},
};

/// A pointer to such an entry.
///
/// Entries are preallocated, so it stays memory of the map; but the entry may be taken out at any moment, and be another
/// connection's then. A field that is written too late damages that one's state, never memory. [`Self::generation`]
/// tells them apart where it matters.
#[derive(Clone, Copy)]
pub struct Shared(*mut Connection);

macro_rules! fields {
    ($($name:ident $set:ident: $type:ty;)*) => {
        impl Shared { $(
            #[inline(always)]
            pub fn $name(self) -> $type {
                // SAFETY: memory of the map, see above; no reference is made, and each access is a single one.
                unsafe { (&raw const (*self.0).$name).read_volatile() }
            }
            #[inline(always)]
            pub fn $set(self, value: $type) {
                // SAFETY: as above.
                unsafe { (&raw mut (*self.0).$name).write_volatile(value) }
            }
        )* }
    };
}
fields! {
    activation set_activation: u64;
    inode set_inode: u64;
    number set_number: u64;
    window_in set_window_in: u32;
    window_out set_window_out: u32;
    lost set_lost: u32;
    head_in set_head_in: u32;
    head_out set_head_out: u32;
    in_state set_in_state: u8;
    out_state set_out_state: u8;
    flags set_flags: u8;
}

impl Shared {
    #[inline(always)]
    pub fn generation(self) -> u64 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).generation).read_volatile() }
    }

    #[inline(always)]
    pub fn of(key: u64) -> Option<Self> {
        CONNECTIONS.get_ptr_mut(key).map(Self)
    }

    #[inline(always)]
    pub fn is(self, flag: u8) -> bool {
        self.flags() & flag != 0
    }

    /// Whether the connection was open before it was looked at, and has carried nothing since that proves it to be HTTP.
    #[inline(always)]
    pub fn unproven(self) -> bool {
        self.flags() & (connection_flags::UNSEEN | connection_flags::HTTP) == connection_flags::UNSEEN
    }

    /// A record of it was lost.
    #[inline(always)]
    pub fn lose(self) {
        self.set_lost(self.lost().wrapping_add(1));
    }

    /// A record told of so many lost ones.
    #[inline(always)]
    pub fn told(self, lost: u32) {
        if lost != 0 {
            self.set_lost(self.lost().saturating_sub(lost));
        }
    }
}

/// What [`connection_begins`] says of a connection whose descriptor is another file's by now.
pub const REPLACED: u64 = u64::MAX;

/// A request may begin on the connection with this key. Whether its descriptor still leads to the socket that it was, as
/// far as can be told: `fclose`, `dup2` and `close_range` close as well, and are not seen. The first time settles what it
/// is. Whether an epoll instance waits for it, and whether it blocks, is noted. The result is [`REPLACED`], or
/// [`flags::BY_CONTEXT`] if contexts tell who works for the request, or 0.
///
/// It is a function of its own, and one that the verifier checks by itself, because each way through it would be gone on
/// with through all that its caller does.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn connection_begins(key: u64) -> u64 {
    let Some(conn) = Shared::of(key) else { return 0 };
    const ABOUT: u8 = connection_flags::WATCHED | connection_flags::NONBLOCKING;
    let others = conn.flags() & !ABOUT;
    let Some(file) = opened(key as u32) else {
        conn.set_flags(others | ABOUT);
        return 0;
    };
    let still = if conn.inode() == 0 {
        conn.set_inode(file.inode);
        conn.set_number(file.number);
        file.socket
    } else {
        conn.inode() == file.inode && conn.number() == file.number
    };
    if !still {
        return REPLACED;
    }
    let watched = if file.watched { connection_flags::WATCHED } else { 0 };
    let nonblocking = if file.nonblocking { connection_flags::NONBLOCKING } else { 0 };
    conn.set_flags(others | watched | nonblocking);
    if file.watched && context::tells(ids().pid) { flags::BY_CONTEXT.into() } else { 0 }
}

/// Whose transfer it is.
#[derive(Clone, Copy)]
pub struct Flow {
    pub ids: Ids,
    pub fd: u32,
    pub key: u64,
    pub direction: u16,
    /// Bits of [`profiler_common::flags`] that say by which source it was seen.
    pub source: u16,
}

impl Flow {
    #[inline(always)]
    pub fn new(ids: Ids, fd: u32, direction: u16, source: u16) -> Self {
        Self { ids, fd, key: connection_key(ids.pid, fd), direction, source }
    }
}
