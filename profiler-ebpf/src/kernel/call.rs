//! A system call as the boundary programs see it, wherever they meet it.
//!
//! In: the registers behind a system call inside a libc function (a uprobe), or at the kernel's own entry and exit
//! (raw tracepoints). Out: descriptor, buffers and result. Beyond this, one source is like the other; what a TLS library
//! moved, which is no call of this kind, goes the same way from [`transfer`](super::transfer) on.

use aya_ebpf::{
    EbpfContext,
    bindings::pt_regs,
    maps::ProgramArray,
    programs::{ProbeContext, RawTracePointContext, RetProbeContext},
};
use profiler_common::{flags, target_flags};
use profiler_ebpf::memory::Memory;

use super::{
    maps::{SYSCALL_STEPS, TRANSFER_STEPS},
    task::{Current, read_kernel},
};

/// Where transfers are looked at.
pub trait Stepping: EbpfContext {
    /// What looks at the next piece of a transfer, by direction.
    fn steps() -> &'static ProgramArray;
}

/// Where system calls are seen.
pub trait Source: Stepping {
    /// For the records' flags.
    const MARK: u16;
    /// Of [`target_flags::HTTP`] and [`target_flags::SYSCALLS`] those that a process has which is followed here.
    const FOLLOWS: u32;
    /// `None` where the registers cannot be read.
    fn call(&self) -> Option<Call>;
}

/// Registers of a system call.
#[derive(Clone, Copy)]
pub struct Call {
    /// Its number, where a source sees calls of all kinds.
    pub number: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub r10: u64,
    /// `-errno` on failure. Of no meaning before the call.
    pub result: i64,
}

impl Call {
    #[inline(always)]
    pub fn fd(&self) -> u32 {
        self.rdi as u32
    }

    #[inline(always)]
    pub fn buffers(&self, shape: Shape) -> Buffers {
        let (address, elements) = match shape {
            Shape::Flat => return Buffers { address: self.rsi, elements: 0, vector: 0 },
            Shape::Vector => (self.rsi, self.rdx),
            // `struct msghdr` on x86-64 (include/linux/socket.h, `user_msghdr`): `msg_iov` at 16, `msg_iovlen` at 24. What
            // cannot be read has no elements, so its bytes stay invisible.
            Shape::Message => match (Current.word(self.rsi + 16), Current.word(self.rsi + 24)) {
                (Ok(array), Ok(length)) => (array, length),
                _ => (0, 0),
            },
        };
        Buffers { address, elements, vector: 1 }
    }
}

/// What the second argument of a call points to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Bytes.
    Flat,
    /// `struct iovec`, as many as the third says.
    Vector,
    /// A `struct msghdr`.
    Message,
}

/// Where the bytes of a transfer are.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Buffers {
    /// Of the bytes, or of an array of `struct iovec`. 0 = they are not in memory.
    pub address: u64,
    pub elements: u64,
    /// 1: an array.
    pub vector: u64,
}

impl Buffers {
    /// The address of the first byte.
    #[inline(always)]
    pub fn first(&self) -> Option<u64> {
        if self.vector == 0 { Some(self.address) } else { Current.word(self.address).ok() }
    }
}

impl Stepping for ProbeContext {
    #[inline(always)]
    fn steps() -> &'static ProgramArray {
        &TRANSFER_STEPS
    }
}

/// Where a TLS library's function returns.
impl Stepping for RetProbeContext {
    #[inline(always)]
    fn steps() -> &'static ProgramArray {
        &TRANSFER_STEPS
    }
}

impl Stepping for RawTracePointContext {
    #[inline(always)]
    fn steps() -> &'static ProgramArray {
        &SYSCALL_STEPS
    }
}

impl Source for ProbeContext {
    const MARK: u16 = 0;
    const FOLLOWS: u32 = target_flags::HTTP;

    #[inline(always)]
    fn call(&self) -> Option<Call> {
        // SAFETY: the context of a uprobe is the interrupted registers.
        let regs: &pt_regs = unsafe { &*self.regs };
        let (rdi, rsi, rdx, r10) = (regs.rdi, regs.rsi, regs.rdx, regs.r10);
        Some(Call { number: 0, rdi, rsi, rdx, r10, result: regs.rax as i64 })
    }
}

/// What is read of `struct pt_regs` (arch/x86/include/asm/ptrace.h): from `r10` to `orig_rax`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Saved {
    r10: u64,
    r9: u64,
    r8: u64,
    rax: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    orig_rax: u64,
}

const _: () = {
    assert!(core::mem::offset_of!(pt_regs, r10) == 56);
    assert!(core::mem::offset_of!(pt_regs, orig_rax) == 56 + core::mem::offset_of!(Saved, orig_rax));
};

impl Source for RawTracePointContext {
    const MARK: u16 = flags::BY_SYSCALL;
    const FOLLOWS: u32 = target_flags::HTTP | target_flags::SYSCALLS;

    #[inline(always)]
    fn call(&self) -> Option<Call> {
        // SAFETY: the first argument of `sys_enter` and `sys_exit` is a pointer to the thread's registers.
        let regs = unsafe { *self.as_ptr().cast::<u64>() };
        let Saved { r10, rax, rdx, rsi, rdi, orig_rax, .. } =
            read_kernel(regs, core::mem::offset_of!(pt_regs, r10) as u32).ok()?;
        Some(Call { number: orig_rax, rdi, rsi, rdx, r10, result: rax as i64 })
    }
}
