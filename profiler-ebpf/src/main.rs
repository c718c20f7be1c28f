//! Entry points of the kernel side; each only unpacks its context. See the modules for what they do.
#![no_std]
#![no_main]

mod kernel;

use aya_ebpf::{
    macros::{perf_event, raw_tracepoint, uprobe, uretprobe},
    programs::{PerfEventContext, ProbeContext, RawTracePointContext, RetProbeContext},
};
use kernel::{
    boundary, call, code, context, events, lifecycle, sampler, syscall,
    tls::{self, Says},
    transfer,
};
use profiler_common::{DIR_IN, DIR_OUT};

/// CPU clock: one per CPU.
#[perf_event]
pub fn sample(ctx: PerfEventContext) -> u32 {
    sampler::begin(&ctx)
}

/// Tail-called by `sample` and by itself: some frames further.
#[perf_event]
pub fn sample_walk(ctx: PerfEventContext) -> u32 {
    sampler::walk(&ctx)
}

/// Tail-called at the end of a walk: writes the record.
#[perf_event]
pub fn sample_finish(ctx: PerfEventContext) -> u32 {
    sampler::finish(&ctx)
}

// The boundary probes sit behind the system call inside the libc function: `rax` is the result, `rdi`, `rsi`, `rdx`
// and `r10` are still the call's arguments. Those that see bytes tail-call `transfer_*` for each piece of them.

/// `recv`, `recvfrom`.
#[uprobe]
pub fn http_recv(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::recv(&ctx, ids, &call))
}

/// `read`.
#[uprobe]
pub fn http_read(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::read(&ctx, ids, &call))
}

/// `readv`.
#[uprobe]
pub fn http_readv(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::readv(&ctx, ids, &call))
}

/// `recvmsg`.
#[uprobe]
pub fn http_recvmsg(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::recvmsg(&ctx, ids, &call))
}

/// `send`, `sendto`, `write`.
#[uprobe]
pub fn http_send(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::send(&ctx, ids, &call))
}

/// `writev`.
#[uprobe]
pub fn http_writev(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::writev(&ctx, ids, &call))
}

/// `sendmsg`.
#[uprobe]
pub fn http_sendmsg(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::sendmsg(&ctx, ids, &call))
}

/// `sendfile`.
#[uprobe]
pub fn http_sendfile(ctx: ProbeContext) -> u32 {
    boundary::made(&ctx).map_or(0, |(ids, call)| boundary::sendfile(&ctx, ids, &call))
}

/// `send`, `sendto`, `write`, `writev`, `sendmsg`, before the system call.
#[uprobe]
pub fn http_enter(ctx: ProbeContext) -> u32 {
    boundary::enter(&ctx)
}

/// Tail-called for each piece of what was received.
#[uprobe]
pub fn transfer_in(ctx: ProbeContext) -> u32 {
    transfer::step_in(&ctx)
}

/// Tail-called for each piece of what was sent.
#[uprobe]
pub fn transfer_out(ctx: ProbeContext) -> u32 {
    transfer::step_out(&ctx)
}

/// `accept`, `accept4`.
#[uprobe]
pub fn http_accept(ctx: ProbeContext) -> u32 {
    boundary::accept(&ctx)
}

/// `close`, before the system call: afterwards the descriptor may be another's already.
#[uprobe]
pub fn http_close(ctx: ProbeContext) -> u32 {
    boundary::close(&ctx)
}

/// `epoll_wait` and its kin, before the system call.
#[uprobe]
pub fn epoll_wait(_ctx: ProbeContext) -> u32 {
    events::wait()
}

/// The entry of OpenSSL's `SSL_read`; the next ones likewise.
#[uprobe]
pub fn tls_read(ctx: ProbeContext) -> u32 {
    tls::enter(&ctx, DIR_IN, Says::Result)
}

/// `SSL_read_ex`.
#[uprobe]
pub fn tls_read_ex(ctx: ProbeContext) -> u32 {
    tls::enter(&ctx, DIR_IN, Says::There)
}

/// `SSL_write`.
#[uprobe]
pub fn tls_write(ctx: ProbeContext) -> u32 {
    tls::enter(&ctx, DIR_OUT, Says::Result)
}

/// `SSL_write_ex`.
#[uprobe]
pub fn tls_write_ex(ctx: ProbeContext) -> u32 {
    tls::enter(&ctx, DIR_OUT, Says::There)
}

/// `SSL_do_handshake`.
#[uprobe]
pub fn tls_handshake(ctx: ProbeContext) -> u32 {
    tls::enter(&ctx, tls::HANDSHAKE, Says::Result)
}

/// `SSL_free`.
#[uprobe]
pub fn tls_free(ctx: ProbeContext) -> u32 {
    tls::ended(call::Source::call(&ctx).map_or(0, |call| call.rdi))
}

/// The end of any of the others.
#[uretprobe]
pub fn tls_returned(ctx: RetProbeContext) -> u32 {
    tls::returned(&ctx, ctx.ret())
}

#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn syscall_enter(ctx: RawTracePointContext) -> i32 {
    syscall::enter(&ctx)
}

#[raw_tracepoint(tracepoint = "sys_exit")]
pub fn syscall_exit(ctx: RawTracePointContext) -> i32 {
    syscall::exit(&ctx)
}

/// Tail-called for each piece of what a system call received.
#[raw_tracepoint]
pub fn syscall_in(ctx: RawTracePointContext) -> i32 {
    transfer::step_in(&ctx) as i32
}

/// Tail-called for each piece of what a system call sent.
#[raw_tracepoint]
pub fn syscall_out(ctx: RawTracePointContext) -> i32 {
    transfer::step_out(&ctx) as i32
}

/// The end of CPython's `PyContext_CopyCurrent`.
#[uretprobe]
pub fn context_copied(ctx: RetProbeContext) -> u32 {
    context::copied(ctx.ret())
}

/// What CPython's type of contexts frees them by.
#[uprobe]
pub fn context_death(ctx: ProbeContext) -> u32 {
    context::death(call::Source::call(&ctx).map_or(0, |call| call.rdi))
}

/// CPython's `code_dealloc`.
#[uprobe]
pub fn code_death(_ctx: ProbeContext) -> u32 {
    code::death()
}

#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn process_fork(ctx: RawTracePointContext) -> i32 {
    lifecycle::fork(&ctx)
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn process_exec(ctx: RawTracePointContext) -> i32 {
    lifecycle::exec(&ctx)
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(ctx: RawTracePointContext) -> i32 {
    lifecycle::exit(&ctx)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: every panic is compiled out, or the verifier refuses the program.
    unsafe { core::hint::unreachable_unchecked() }
}

/// `bpf_get_stack` and reading kernel memory are for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
