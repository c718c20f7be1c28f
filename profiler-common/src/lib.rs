//! The binary interface between the kernel side and the daemon.
//!
//! In: nothing. Out: the records that travel through the ring buffer, the values that the daemon puts into BPF
//! maps, and the constants both sides must agree on. Plain `repr(C)` data with size assertions; a change of any
//! layout bumps [`ABI_VERSION`], which the daemon compares with the object's before it attaches anything.
//!
//! `pid` is always the process (the kernel's tgid), `tid` the thread (the kernel's pid). Times are nanoseconds of
//! `CLOCK_MONOTONIC`, as `bpf_ktime_get_ns` gives them.
#![no_std]

mod record;
mod target;
pub mod unwind;

pub use record::*;
pub use target::*;

/// Version of every layout in this crate.
pub const ABI_VERSION: u32 = 10;

/// What the kernel side counts, one slot each of the per-CPU array `STATS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stat {
    /// Samples of a target's thread written to the ring.
    SamplesEmitted = 0,
    /// Samples of a target's thread that was in no request; no stack is taken for them.
    SamplesOutsideRequest = 1,
    /// Samples lost because the ring was full, or too full to spend on samples.
    SamplesLostRing = 2,
    /// Samples given up because the walk could not go on (a missing tail-called program).
    SamplesLostWalk = 3,
    /// Requests the kernel side saw begin, whether or not their record reached the ring.
    RequestsStarted = 4,
    /// Connection records (data, accept, close) lost because the ring was full.
    BoundaryLostRing = 5,
    /// Process records (fork, exec, exit) lost because the ring was full.
    ProcessLostRing = 6,
    /// No room in `CONNECTIONS`.
    ConnectionsFull = 7,
    /// No room in `ACTIVE`.
    ActiveFull = 8,
    /// No room in `TARGETS` for a forked child.
    TargetsFull = 9,
    /// The bytes of a head could not be read from the process.
    HeadReadFault = 10,
    /// Of a transfer less was looked at than was there: more pipelined heads or elements than are looked for, or no
    /// room in `TRANSFERS`.
    PipelineOverflow = 11,
    /// Python frames could not be read (paged out, or not what they should be).
    PythonFault = 12,
    /// The thread has no Python thread state (a native thread, or one that is starting or ending).
    PythonNoState = 13,
    /// Stacks cut at the frame limit.
    StackTruncated = 14,
    /// Processes that became targets because they accepted a connection.
    Adopted = 15,
    /// Of `RequestsStarted` those whose first record was lost because the ring was full: they get no record at all.
    RequestsLostRing = 16,
    /// No room in `CONTEXTS` or `TURNS`.
    ContextsFull = 17,
    /// No room in `TLS_THREADS` or `TLS_SESSIONS`.
    TlsFull = 18,
    /// Responses by TLS whose requests were read unseen: by calls that began before the probes were there.
    TlsUnseen = 19,
}

/// Number of slots in `STATS`.
pub const STAT_COUNT: u32 = 20;

/// Bits of `Header::flags` and of the record-specific flag words.
pub mod flags {
    /// The stack was cut at the frame limit.
    pub const TRUNCATED: u16 = 1 << 0;
    /// Python frames were expected but could not be read.
    pub const PYTHON_FAULT: u16 = 1 << 1;
    /// The thread had no Python thread state.
    pub const PYTHON_NO_STATE: u16 = 1 << 2;
    /// Data: the captured bytes end at the end of a head (its empty line).
    pub const HEAD_END: u16 = 1 << 3;
    /// Data: the bytes could not be read from the process.
    pub const HEAD_FAULT: u16 = 1 << 4;
    /// Data: the connection was not seen being accepted and was recognised by its bytes.
    pub const UNSEEN_ACCEPT: u16 = 1 << 5;
    /// The sample was taken while the CPU was in kernel mode.
    pub const IN_KERNEL: u16 = 1 << 6;
    /// Data: begins what the kernel side takes for a new request; `activation` is new.
    pub const NEW_ACTIVATION: u16 = 1 << 7;
    /// Data: more heads followed in this transfer than were looked for.
    pub const PIPELINE_OVERFLOW: u16 = 1 << 8;
    /// Sample: some native frames were found by frame pointer, for want of tables.
    pub const GUESSED: u16 = 1 << 9;
    /// Sample: some native frame is in memory that is in no mapping known.
    pub const UNKNOWN_CODE: u16 = 1 << 10;
    /// Data and accept: seen at the system call, and not in a library.
    pub const BY_SYSCALL: u16 = 1 << 11;
    /// Data: the request that begins here is served by an event loop whose contexts are followed; of its later records and its
    /// connection's close, a context was made for it. Sample: its activation is that of the context that the thread worked in.
    pub const BY_CONTEXT: u16 = 1 << 12;
    /// Data and accept: clear text that a TLS library took from or handed to its caller. The bytes on the wire are others.
    pub const BY_TLS: u16 = 1 << 13;
}
