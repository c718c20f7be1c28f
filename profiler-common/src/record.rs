//! Records of the ring buffer: what the kernel side says happened.
//!
//! Every record begins with a [`Header`]; its `kind` tells which structure follows. Records have variable length:
//! the length that the ring reports is the truth, and a decoder checks it against the counts inside.

use core::mem::size_of;

/// Which structure a record is.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Sample`], then its frames.
    Sample = 1,
    /// [`Data`], then the captured bytes.
    Data = 2,
    /// [`Accept`].
    Accept = 3,
    /// [`Close`].
    Close = 4,
    /// [`Fork`].
    Fork = 5,
    /// A bare [`Header`]: `pid` has a new program image.
    Exec = 6,
    /// [`Exit`].
    Exit = 7,
    /// [`Interleaved`].
    Interleaved = 8,
}

/// The start of every record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// A [`Kind`].
    pub kind: u16,
    /// Bits of [`crate::flags`].
    pub flags: u16,
    /// Records of the same connection (or samples of the same activation) that were lost since the last one.
    pub lost: u32,
    /// `CLOCK_MONOTONIC`, ns.
    pub time: u64,
    pub pid: u32,
    pub tid: u32,
}

/// A connection as the kernel side knows it: the file descriptor and when it was accepted (ns), which tells two
/// uses of one descriptor apart. A connection that was open before we looked has the time of its first sighting.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    pub generation: u64,
    pub pid: u32,
    pub fd: u32,
}

/// Direction of a transfer, seen from the profiled process.
pub const DIR_IN: u16 = 0;
pub const DIR_OUT: u16 = 1;

/// A piece of a connection's byte stream, in order per connection and direction.
///
/// One system call gives one piece, or several when it carried pipelined heads. Of the piece's `advance` bytes the
/// first `captured` follow this structure; the rest stayed in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Data {
    pub header: Header,
    pub conn: ConnId,
    /// The kernel side's mark for "this thread works on what began here"; unique per thread. 0 = none.
    pub activation: u64,
    /// Bytes of the stream this piece covers, as the call reported them transferred. 0 = end of stream.
    pub advance: u64,
    pub direction: u16,
    pub captured: u16,
    /// `errno` when the call failed (then `advance` is 0), else 0.
    pub errno: u32,
    /// Outgoing: the last bytes of the transfer, at most 8, in stream order; the end of a chunked body shows here.
    pub tail: [u8; 8],
    pub tail_len: u32,
    /// Samples of `activation` that were lost, and that no sample's header tells of.
    pub samples_lost: u32,
    /// Outgoing: when the call that wrote this piece was entered, if its thread never waited inside; then all bytes
    /// were handed over without delay, whenever the call returned. 0 = it waited, or nobody knows.
    pub entered: u64,
}

/// A connection was accepted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accept {
    pub header: Header,
    pub conn: ConnId,
}

/// A tracked connection's descriptor was closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Close {
    pub header: Header,
    pub conn: ConnId,
}

/// A thread that was marked with `activation` has turned to something else: it accepted a connection, transferred on
/// another one of which no [`Data`] tells, or waited for whatever event comes next. Once per activation; whether its request was over by then is the
/// daemon's to know.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interleaved {
    pub header: Header,
    pub activation: u64,
}

/// A target forked: `header.pid` is the parent; the child is a target already.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fork {
    pub header: Header,
    pub child: u32,
    pub reserved: u32,
}

/// A thread of a target ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    pub header: Header,
    /// Threads of the process still alive; 0 = the process is gone. [`LIVE_UNKNOWN`] where it cannot be told.
    pub live: u32,
    pub reserved: u32,
}

/// [`Exit::live`] on a kernel without type information.
pub const LIVE_UNKNOWN: u32 = u32::MAX;

/// A CPU sample of a thread that is inside a request.
///
/// `user_count` [`RawFrame`]s follow, leaf first, Python and native in call order, then `kernel_count` addresses
/// (`u64`), leaf first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    pub header: Header,
    /// The activation the thread was in; see [`Data::activation`].
    pub activation: u64,
    pub kernel_count: u16,
    pub user_count: u16,
    pub cpu: u16,
    /// How the walk of the native frames ended, one of [`crate::unwind::end`].
    pub end: u8,
    pub reserved: u8,
    /// CPU time this sample stands for, ns.
    pub weight: u64,
}

/// One frame of a user stack.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RawFrame {
    /// Native: the program counter. Python: the address of the code object.
    pub address: u64,
    /// The frame's kind ([`FRAME_NATIVE`] …) in the top four bits; below it, for Python, the offset of the
    /// instruction from the start of the byte code, in bytes.
    pub kind_lasti: u32,
    /// Python: [`code_check`] of the code object when the sample was taken, against reuse of its address.
    pub check: u32,
}

/// A native program counter that is exact: the sampled instruction itself.
pub const FRAME_NATIVE_LEAF: u32 = 0;
/// A return address found by following frame pointers, which code built without them makes a guess.
pub const FRAME_NATIVE_CALLER: u32 = 1;
/// A Python frame.
pub const FRAME_PYTHON: u32 = 2;
/// A return address found by unwind tables.
pub const FRAME_NATIVE_RETURN: u32 = 3;
/// Stands for native frames: from here on outwards only Python frames follow. It has no address.
pub const FRAME_LEFT_OUT: u32 = 4;

impl RawFrame {
    pub const fn new(kind: u32, address: u64, lasti: u32, check: u32) -> Self {
        Self { address, kind_lasti: (kind << 28) | (lasti & 0x0fff_ffff), check }
    }
    pub const fn kind(&self) -> u32 {
        self.kind_lasti >> 28
    }
    pub const fn lasti(&self) -> u32 {
        self.kind_lasti & 0x0fff_ffff
    }
}

/// A checksum over what identifies a code object besides its address; both sides compute it from the object.
pub const fn code_check(argcount: u32, kwonly: u32, flags: u32, first_line: u32) -> u32 {
    let mut h = argcount.wrapping_mul(0x9e37_79b1) ^ kwonly.rotate_left(8);
    h = h.wrapping_mul(0x85eb_ca6b) ^ flags.rotate_left(16);
    h.wrapping_mul(0xc2b2_ae35) ^ first_line
}

/// Most bytes of a head that are captured from one transfer; a longer head arrives in several pieces or is cut.
/// 4,096 covers request lines and the headers that frame a body; longer heads are nearly always cookies.
pub const HEAD_MAX: usize = 4096;
/// Most frames of a user stack: 256 of Python and 256 native. Django under middleware is 60 to 90 deep.
pub const USER_FRAMES_MAX: usize = 512;
/// Native frames of a stack that has Python frames further out: with what stands for the rest they leave room for 256.
pub const NATIVE_FRAMES_MAX: u32 = 255;
/// Most frames of a kernel stack.
pub const KERNEL_FRAMES_MAX: usize = 64;

const _: () = {
    assert!(size_of::<Header>() == 24);
    assert!(size_of::<ConnId>() == 16);
    assert!(size_of::<Data>() == 88);
    assert!(size_of::<Accept>() == 40);
    assert!(size_of::<Close>() == 40);
    assert!(size_of::<Fork>() == 32);
    assert!(size_of::<Exit>() == 32);
    assert!(size_of::<Interleaved>() == 32);
    assert!(size_of::<Sample>() == 48);
    assert!(size_of::<RawFrame>() == 16);
};
