//! What the daemon tells the kernel side about a process, and the constants fixed at load time.

use core::mem::size_of;

/// Value of the map `TARGETS`, keyed by pid. A process that is not in the map is not looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Bits of [`target_flags`].
    pub flags: u32,
    /// Key of the thread-specific slot that holds the interpreter's thread state.
    pub tss_key: u32,
    /// Bytes from the thread pointer to the first block of thread-specific data (`specific_1stblock`).
    pub tss_block: u32,
    pub reserved: u32,
    /// Address of the pointer to the thread state that holds the GIL, in versions where the slot does not follow a thread
    /// from one interpreter of a process to another and a state says whose it is; 0 = only the slot.
    pub current: u64,
    /// The interpreter loop: program counters in `[loop_start, loop_end)` stand for Python frames.
    pub loop_start: u64,
    pub loop_end: u64,
    /// The part of it that the compiler put elsewhere; empty where there is none.
    pub cold_start: u64,
    pub cold_end: u64,
    pub python: PythonOffsets,
}

/// Bits of [`Target::flags`].
pub mod target_flags {
    /// Follow HTTP on this process's connections.
    pub const HTTP: u32 = 1 << 0;
    /// Take stacks.
    pub const SAMPLE: u32 = 1 << 1;
    /// `python` and the loop range are valid.
    pub const PYTHON: u32 = 1 << 2;
    /// Added by the kernel side itself when the process accepted a connection; the daemon has yet to look at it.
    pub const PROVISIONAL: u32 = 1 << 3;
    /// Its transfers are seen at system calls, and not in its C library.
    pub const SYSCALLS: u32 = 1 << 4;
}

/// Offsets, in bytes, into CPython's structures. Source of each value: see the daemon's `process::python`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PythonOffsets {
    /// `PyThreadState.cframe`, which points at a structure in the stack frame of the interpreter loop that runs the state;
    /// [`NO_FIELD`] where there is none (up to 3.9, from 3.13 on).
    pub tstate_cframe: u16,
    /// From the structure above, or the thread state ([`Self::frames_on_state`]), to the pointer to the current frame.
    pub current_frame: u16,
    pub frame_code: u16,
    pub frame_previous: u16,
    /// Where the frame is in its byte code, in the form that `lasti_unit` tells.
    pub frame_instr: u16,
    /// One byte: entry-frame flag or owner, by `entry_mode`; [`NO_FIELD`] with [`ENTRY_EVERY`].
    pub frame_entry: u16,
    pub code_argcount: u16,
    pub code_kwonly: u16,
    pub code_flags: u16,
    pub code_firstline: u16,
    pub code_bytecode: u16,
    /// [`ENTRY_FLAG`], [`ENTRY_OWNER`] or [`ENTRY_EVERY`].
    pub entry_mode: u8,
    /// 0: `frame_instr` is the address of an instruction. Else it is an `int` that counts units of so many bytes.
    pub lasti_unit: u8,
    /// `PyThreadState.context`; [`CONTEXT_VERSION`] follows.
    pub tstate_context: u16,
    pub reserved: [u16; 3],
}

/// From `PyThreadState.context` to `context_ver`, which grows with every context that the thread enters or leaves (in
/// all versions).
pub const CONTEXT_VERSION: u64 = 8;
/// `PyContext.ctx_prev`: the context from which this one was entered (in all versions).
pub const CONTEXT_PREVIOUS: u64 = 16;
/// `PyContext.ctx_entered`, an `int`: 1 while a thread is in it by `Context.run` and its kin; 0 in one that a thread was
/// given because it had none (in all versions).
pub const CONTEXT_ENTERED: u64 = 40;

impl PythonOffsets {
    /// Whether the thread state points at the current frame itself, and not by way of `cframe`: that of 3.10, where frames
    /// are objects, has nothing to do with frames.
    #[inline(always)]
    pub const fn frames_on_state(&self) -> bool {
        self.tstate_cframe == NO_FIELD || self.entry_mode == ENTRY_EVERY
    }

    /// Where the first of the fields of [`crate::code_check`] is: the number of arguments up to 3.10, then the flags.
    #[inline(always)]
    pub const fn code_from(&self) -> u16 {
        if self.code_argcount < self.code_flags { self.code_argcount } else { self.code_flags }
    }
}

/// Value of the map `CODE_LIVES`, keyed by pid: processes whose code objects are seen dying.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeLives {
    /// Another number after each death, never the same again in any process. What was read of a code object may be
    /// believed as long as this is what it was then.
    pub epoch: u64,
    /// How many died.
    pub deaths: u64,
}

/// Processes in `CODE_LIVES` at most: a host's Python workers. Each costs a probe, of which the kernel removes some tens
/// a second; further ones are read anew in every sample.
pub const CODE_LIVES_MAX: u32 = 256;

/// Processes whose contexts are followed, for the same reason.
pub const CONTEXT_PROCESSES_MAX: u32 = 256;

/// Key of `CONTEXTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextKey {
    pub pid: u32,
    pub reserved: u32,
    /// Of the interpreter's context object.
    pub address: u64,
}

/// Bits of the values of the map `CONTEXT_PROCESSES`, keyed by pid.
pub mod context_use {
    /// Its contexts can be followed: copies and deaths are seen.
    pub const READY: u32 = 1 << 0;
    /// An event loop of it has received on a connection.
    pub const USED: u32 = 1 << 1;
    /// Its event loop reads first and enters a context then (uvloop).
    pub const READS_FIRST: u32 = 1 << 2;
}

/// A field that this version does not have.
pub const NO_FIELD: u16 = u16::MAX;
/// The byte at `frame_entry` is not 0 for an entry frame (3.11).
pub const ENTRY_FLAG: u8 = 0;
/// The byte at `frame_entry` tells who owns the frame; [`OWNER_INTERPRETER`] and above are no frames of Python code but
/// stand between what was entered from C and its caller (3.12 and later).
pub const ENTRY_OWNER: u8 = 1;
/// Every call of a Python function is a call of the interpreter loop, and frames are objects (3.8 to 3.10).
pub const ENTRY_EVERY: u8 = 2;
/// `FRAME_OWNED_BY_CSTACK` in 3.12 and 3.13, `FRAME_OWNED_BY_INTERPRETER` in 3.14, where the former is 4.
pub const OWNER_INTERPRETER: u8 = 3;
/// Bytes of a frame that are read at least: every field that is needed lies before this, in 3.11 to 3.14.
pub const FRAME_HEAD: u64 = 80;
/// The same of a frame object, up to 3.10.
pub const FRAME_OBJECT_HEAD: u64 = 112;
/// The fields of [`crate::code_check`] lie in so many bytes from [`PythonOffsets::code_from`], in all versions: mostly
/// one line of the cache, which is what reading a code object costs.
pub const CODE_READ: u16 = 32;
/// Bit of a code object's flags: the interpreter's own code, as it puts below an `__init__` that it calls without C
/// (`CO_NO_MONITORING_EVENTS`, 3.13 and later; no older version gives this bit a meaning).
pub const CODE_INTERNAL: u32 = 1 << 25;

/// Value of the map `CONNECTIONS`, keyed by [`connection_key`]: where a server-side connection stands.
///
/// This is only as much HTTP as it takes to know which bytes are a head; the state machine proper is the daemon's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// See [`crate::ConnId::generation`].
    pub generation: u64,
    /// The activation of the latest request, 0 before the first.
    pub activation: u64,
    /// The inode that its descriptor led to, by address and number: what tells that it was closed without a `close` and
    /// is something else by now. Both 0 = not looked at yet.
    pub inode: u64,
    pub number: u64,
    /// The last four bytes of an unfinished head, per direction, latest in the highest byte.
    pub window_in: u32,
    pub window_out: u32,
    /// Records of this connection lost since the last one that reached the ring.
    pub lost: u32,
    /// Bytes captured of the head in progress, per direction.
    pub head_in: u32,
    pub head_out: u32,
    /// One of `connection_state`.
    pub in_state: u8,
    pub out_state: u8,
    /// Bits of [`connection_flags`].
    pub flags: u8,
    pub reserved: u8,
}

/// Key of `CONNECTIONS`.
pub const fn connection_key(pid: u32, fd: u32) -> u64 {
    ((pid as u64) << 32) | fd as u64
}

/// Values of [`Connection::in_state`] and [`Connection::out_state`].
pub mod connection_state {
    /// A head is expected next.
    pub const EXPECT: u8 = 0;
    /// Inside a head.
    pub const HEAD: u8 = 1;
    /// The head is over.
    pub const BODY: u8 = 2;
    /// In: the response has begun; the next bytes may be a new request.
    pub const RESPONDED: u8 = 3;
}

/// Bits of [`Connection::flags`].
pub mod connection_flags {
    /// Not seen being accepted: what came before is unknown, so until a request is proven by its method nothing of it
    /// is reported.
    pub const UNSEEN: u8 = 1 << 0;
    /// A request began here: this is HTTP.
    pub const HTTP: u8 = 1 << 1;
    /// Not HTTP: its transfers are not reported.
    pub const IGNORED: u8 = 1 << 2;
    /// The head being received is a request's for certain: bytes sent meanwhile answer an earlier one.
    pub const HELD: u8 = 1 << 3;
    /// An epoll instance waited for it when its latest request began: whoever serves it may be an event loop.
    pub const WATCHED: u8 = 1 << 4;
    /// Its socket did not block then, so a loop may serve it that asks before it waits (gevent, trio).
    pub const NONBLOCKING: u8 = 1 << 5;
    /// Something that works for its latest request was begun in a context of its own.
    pub const CONTEXTS: u8 = 1 << 6;
    /// It carries TLS: what its descriptor transfers says nothing, what a TLS library makes of it does. Together with
    /// `IGNORED`: no library was seen at it yet, or what it makes is not HTTP/1 either.
    pub const TLS: u8 = 1 << 7;
}

/// Value of the map `ACTIVE`, keyed by tid: what this thread is working on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Active {
    pub activation: u64,
    /// The connection that began it.
    pub key: u64,
    /// Samples of this activation that were lost and that no record tells of yet.
    pub lost: u32,
    /// 1: an [`crate::Interleaved`] was sent for this activation. [`TOLD_BY_CONTEXT`]: none is needed.
    pub told: u32,
    /// When the thread entered the call it is in that writes to this connection, 0 = it is in none.
    pub entered: u64,
    /// How often it had waited by then (`task_struct.nvcsw`).
    pub waits: u64,
}

/// [`Active::told`] where contexts tell who works for the request, and not what its thread does.
pub const TOLD_BY_CONTEXT: u32 = 2;

/// Offsets into the kernel's own structures, resolved from BTF at start and put into the object's read-only data.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelOffsets {
    /// 1 when the offsets below are valid.
    pub valid: u32,
    pub task_tgid: u32,
    /// `task_struct.stack`: where a kernel without `bpf_task_pt_regs` keeps a thread's registers.
    pub task_stack: u32,
    pub task_signal: u32,
    /// `task_struct.thread.fsbase`.
    pub task_fsbase: u32,
    /// `signal_struct.live.counter`.
    pub signal_live: u32,
    /// `task_struct.nvcsw`: how often the thread gave its CPU up to wait, as opposed to being preempted.
    pub task_nvcsw: u32,
    /// From a task to an open descriptor's inode: `task_struct.files`, `files_struct.fdt`, `fdtable.max_fds` and `.fd`,
    /// `file.f_inode`, `inode.i_ino` and `.i_mode`.
    pub task_files: u32,
    pub files_fdt: u32,
    pub fdtable_max_fds: u32,
    pub fdtable_fd: u32,
    pub file_inode: u32,
    pub inode_number: u32,
    pub inode_mode: u32,
    /// `file.f_ep`, which is not null while an epoll instance waits for the file (5.11 and later); 0 = there is none.
    pub file_epoll: u32,
    /// Before: `file.f_ep_links`, a list that is not empty then; 0 = there is none.
    pub file_epoll_list: u32,
    pub file_flags: u32,
    pub reserved: u32,
}

/// Settings fixed when the object is loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub kernel: KernelOffsets,
    /// The daemon's own pid, never profiled.
    pub own_pid: u32,
    /// 1: a process that accepts a connection becomes a target by itself (`--all`).
    pub adopt_acceptors: u32,
    /// 1: `bpf_task_pt_regs` exists (5.15).
    pub has_task_pt_regs: u32,
    pub reserved: u32,
    /// Bytes of the ring that samples must leave free for boundary records.
    pub ring_reserve: u64,
}

const _: () = {
    assert!(size_of::<PythonOffsets>() == 32);
    assert!(size_of::<Target>() == 88);
    assert!(size_of::<ContextKey>() == 16);
    assert!(size_of::<CodeLives>() == 16);
    assert!(size_of::<Connection>() == 56);
    assert!(size_of::<Active>() == 40);
    assert!(size_of::<KernelOffsets>() == 72);
    assert!(size_of::<Settings>() == 96);
};
