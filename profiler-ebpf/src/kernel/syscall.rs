//! Boundaries at system calls: for programs that make them by themselves (static ones, Go) or through a C library that
//! has no cheap sites.
//!
//! In: `sys_enter` and `sys_exit`, which every system call of the host passes while they are attached. Out: the same as
//! from probes in a library.

use aya_ebpf::{EbpfContext, programs::RawTracePointContext};

use super::{boundary, events};

// Numbers of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
const READ: u64 = 0;
const WRITE: u64 = 1;
const CLOSE: u64 = 3;
const READV: u64 = 19;
const WRITEV: u64 = 20;
const SENDFILE: u64 = 40;
const ACCEPT: u64 = 43;
const SENDTO: u64 = 44;
const RECVFROM: u64 = 45;
const SENDMSG: u64 = 46;
const RECVMSG: u64 = 47;
const ACCEPT4: u64 = 288;
const EPOLL_WAIT: u64 = 232;
const EPOLL_PWAIT: u64 = 281;
const EPOLL_PWAIT2: u64 = 441;

/// `sys_enter(regs, number)`: what must be seen before the call.
#[inline(always)]
pub fn enter(ctx: &RawTracePointContext) -> i32 {
    // SAFETY: the arguments of this tracepoint are a pointer and the number.
    let number = unsafe { *ctx.as_ptr().cast::<u64>().add(1) };
    match number {
        WRITE | WRITEV | SENDTO | SENDMSG => boundary::enter(ctx),
        CLOSE => boundary::close(ctx),
        EPOLL_WAIT | EPOLL_PWAIT | EPOLL_PWAIT2 => events::wait(),
        _ => 0,
    };
    0
}

/// `sys_exit(regs, result)`.
#[inline(always)]
pub fn exit(ctx: &RawTracePointContext) -> i32 {
    let Some((ids, call)) = boundary::made(ctx) else { return 0 };
    match call.number {
        READ => boundary::read(ctx, ids, &call),
        READV => boundary::readv(ctx, ids, &call),
        RECVFROM => boundary::recv(ctx, ids, &call),
        RECVMSG => boundary::recvmsg(ctx, ids, &call),
        WRITE | SENDTO => boundary::send(ctx, ids, &call),
        WRITEV => boundary::writev(ctx, ids, &call),
        SENDMSG => boundary::sendmsg(ctx, ids, &call),
        SENDFILE => boundary::sendfile(ctx, ids, &call),
        ACCEPT | ACCEPT4 => boundary::accepted(ctx, ids, &call),
        _ => 0,
    };
    0
}
