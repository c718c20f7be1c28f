//! Entry points of the kernel side; each only unpacks its context. See the modules for what they do.
#![no_std]
#![no_main]

mod kernel;

use aya_ebpf::{
    macros::{perf_event, raw_tracepoint, uprobe},
    programs::{PerfEventContext, ProbeContext, RawTracePointContext},
};
use kernel::{boundary, code, lifecycle, sampler, transfer};

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
    boundary::recv(&ctx)
}

/// `read`.
#[uprobe]
pub fn http_read(ctx: ProbeContext) -> u32 {
    boundary::read(&ctx)
}

/// `readv`.
#[uprobe]
pub fn http_readv(ctx: ProbeContext) -> u32 {
    boundary::readv(&ctx)
}

/// `recvmsg`.
#[uprobe]
pub fn http_recvmsg(ctx: ProbeContext) -> u32 {
    boundary::recvmsg(&ctx)
}

/// `send`, `sendto`, `write`.
#[uprobe]
pub fn http_send(ctx: ProbeContext) -> u32 {
    boundary::send(&ctx)
}

/// `writev`.
#[uprobe]
pub fn http_writev(ctx: ProbeContext) -> u32 {
    boundary::writev(&ctx)
}

/// `sendmsg`.
#[uprobe]
pub fn http_sendmsg(ctx: ProbeContext) -> u32 {
    boundary::sendmsg(&ctx)
}

/// `sendfile`.
#[uprobe]
pub fn http_sendfile(ctx: ProbeContext) -> u32 {
    boundary::sendfile(&ctx)
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
