//! CPU samples of threads inside requests.
//!
//! In: the CPU clock's interrupt. Out: one `Sample` record with the user stack (Python and native in call order)
//! and the kernel stack. A thread that is not in a request costs two map look-ups and no stack.
//!
//! The walk is a chain of tail calls, some frames each, because one program may not be long enough for a whole
//! stack; its state lives in the per-CPU scratch `Walk`.

use aya_ebpf::{
    EbpfContext,
    bindings::pt_regs,
    helpers::{bpf_get_current_task_btf, bpf_get_stack, bpf_task_pt_regs},
    programs::PerfEventContext,
};
use profiler_common::{
    FRAME_LEFT_OUT, FRAME_NATIVE_CALLER, FRAME_NATIVE_LEAF, FRAME_NATIVE_RETURN, KERNEL_FRAMES_MAX, Kind,
    NATIVE_FRAMES_MAX, RawFrame, Sample, Stat, Target, USER_FRAMES_MAX, flags, target_flags,
    unwind::{Space, end},
};
use profiler_ebpf::{
    native::Walker,
    python::{self, Scratch},
};

use super::{
    code,
    context::{self, Sampled},
    maps::{
        ACTIVE, EVENTS, QUIET, SAMPLE_STEPS, SPACES, STEP_FINISH, STEP_WALK, TARGETS, WALK, count, settings,
    },
    native,
    task::{Current, header, ids, now, read_kernel, task},
};

/// Frames walked by one program of the chain: small enough for the oldest verifier.
const FRAMES_PER_STEP: usize = 20;
/// Programs of the chain, which the kernel limits to 32 or 33 with the first and the last: enough for all frames, also
/// where some are not shown.
const STEPS_MAX: u32 = 28;
const _: () = assert!(FRAMES_PER_STEP * STEPS_MAX as usize > USER_FRAMES_MAX + USER_FRAMES_MAX / 16);
/// Of a thread's stack in the kernel (`THREAD_SIZE`, arch/x86/include/asm/page_64_types.h); its end holds the registers
/// that the thread had in user space. Kernels from 6.9 on may keep room behind them, but these have a helper.
const KERNEL_STACK: u32 = 16 << 10;
/// Of a process whose mappings are not known (yet).
const NO_SPACE: Space = Space { first: 0, count: 0, generation: 0, reserved: 0 };

/// Native frames are being walked.
const NATIVE: u32 = 0;
/// The program counter is in the interpreter loop: Python frames up to the next entry frame.
const PYTHON_SEGMENT: u32 = 1;
/// The native chain has ended: all remaining Python frames.
const PYTHON_REST: u32 = 2;
const DONE: u32 = 3;

/// The record under construction, and where the walk stands.
#[repr(C)]
pub struct Walk {
    sample: Sample,
    frames: [RawFrame; USER_FRAMES_MAX],
    /// The kernel stack lands behind the last user frame, at worst here.
    kernel: [u64; KERNEL_FRAMES_MAX],
    scratch: Scratch,
    target: Target,
    pub native: Walker,
    /// The Python frame to be emitted next, 0 = none.
    python: u64,
    /// See [`code::epoch`].
    epoch: u64,
    mode: u32,
    count: u32,
    /// Native frames among them.
    natives: u32,
    steps: u32,
    /// 1: the interpreter loop was not met yet, and who holds the GIL may be of use there.
    unasked: u32,
}

const RECORD_MAX: u64 =
    (size_of::<Sample>() + USER_FRAMES_MAX * size_of::<RawFrame>() + KERNEL_FRAMES_MAX * 8) as u64;

/// Decides whether this sample counts, and sets up the walk.
#[inline(always)]
pub fn begin(ctx: &PerfEventContext) -> u32 {
    let ids = ids();
    if ids.pid == 0 {
        return 0; // idle
    }
    // SAFETY: a lookup; used before anything else can change the map's entry.
    let Some(target) = (unsafe { TARGETS.get(ids.pid) }) else { return 0 };
    if target.flags & target_flags::SAMPLE == 0 {
        return 0;
    }
    let (active, owned) = match context::sampled(ids, target) {
        Sampled::Owned(activation) => (None, activation),
        Sampled::Nobodys if by_context(ids.tid) => {
            count(Stat::SamplesOutsideRequest);
            return 0;
        }
        _ => match ACTIVE.get_ptr_mut(ids.tid) {
            Some(active) => (Some(active), 0),
            None => {
                count(Stat::SamplesOutsideRequest);
                return 0;
            }
        },
    };
    let set = settings();
    // SAFETY: query only.
    if EVENTS.query(0) + set.ring_reserve + RECORD_MAX > EVENTS.query(1) {
        count(Stat::SamplesLostRing);
        if let Some(active) = active {
            // SAFETY: a live map value.
            unsafe { (*active).lost += 1 };
        }
        return 0;
    }
    let Some(walk) = WALK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's scratch, and the sampler does not interrupt itself.
    let walk = unsafe { &mut *walk };
    let mut head = header(Kind::Sample, ids, now());
    match active {
        // SAFETY: a live map value.
        Some(active) => unsafe {
            head.lost = (*active).lost;
            (*active).lost = 0;
            walk.sample.activation = (*active).activation;
        },
        None => {
            head.flags |= flags::BY_CONTEXT;
            walk.sample.activation = owned;
        }
    }
    walk.target = *target;
    walk.count = 0;
    walk.steps = 0;
    walk.sample.end = end::NO_REGISTERS;
    walk.native.unknown = 0;
    walk.natives = 0;
    walk.unasked = 0;
    walk.python = 0;
    walk.epoch = 0;
    walk.scratch.forget();
    // SAFETY: the context of a perf-event program is bpf_perf_event_data.
    let (regs, period) = unsafe { (&(*ctx.ctx).regs, (*ctx.ctx).sample_period) };
    walk.sample.weight = period;
    // SAFETY: a lookup; the value is copied at once.
    let space = (unsafe { SPACES.get(ids.pid) }).copied().unwrap_or(NO_SPACE);
    let known = if regs.cs & 3 == 3 {
        native::begin(&mut walk.native, regs, space);
        true
    } else {
        head.flags |= flags::IN_KERNEL;
        match interrupted_user_regs(set.has_task_pt_regs, set.kernel.task_stack) {
            Some(regs) => {
                native::begin(&mut walk.native, &regs, space);
                true
            }
            None => false,
        }
    };
    walk.mode = if known { NATIVE } else { PYTHON_REST };
    if target.flags & target_flags::PYTHON != 0 && set.kernel.valid != 0 {
        walk.unasked = u32::from(target.current != 0);
        walk.epoch = code::epoch(ids.pid);
        match read_kernel::<u64>(task(), set.kernel.task_fsbase)
            .and_then(|base| python::current_frame(&Current, &walk.target, base))
        {
            Ok(0) => head.flags |= flags::PYTHON_NO_STATE,
            Ok(frame) => walk.python = frame,
            Err(_) => {
                head.flags |= flags::PYTHON_FAULT;
                count(Stat::PythonFault);
            }
        }
    }
    walk.sample.header = head;
    // SAFETY: the array holds perf-event programs.
    unsafe { SAMPLE_STEPS.tail_call(ctx, STEP_WALK) };
    count(Stat::SamplesLostWalk);
    give_back(walk);
    0
}

/// Whether what the thread received last is told by contexts, and not by the thread.
#[inline(always)]
fn by_context(tid: u32) -> bool {
    // SAFETY: a lookup; only the mark is read.
    unsafe { ACTIVE.get(tid) }.is_none_or(|active| active.told == profiler_common::TOLD_BY_CONTEXT)
}

/// The sample came to nothing, so what it was to tell is still to be told.
#[inline(always)]
fn give_back(walk: &Walk) {
    let head = &walk.sample.header;
    if head.flags & flags::BY_CONTEXT != 0 {
        return;
    }
    if let Some(active) = ACTIVE.get_ptr_mut(head.tid) {
        // SAFETY: a live map value; the thread is interrupted, so it is where it was when the sample began.
        unsafe { (*active).lost += head.lost + 1 };
    }
}

/// The user registers of a task that is in the kernel.
#[inline(always)]
fn interrupted_user_regs(has_helper: u32, task_stack: u32) -> Option<pt_regs> {
    let at = if has_helper != 0 {
        // SAFETY: the helper takes the current task as it is; its result is read through a checked read.
        unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) as u64 }
    } else if task_stack != 0 {
        let stack: u64 = read_kernel(task(), task_stack).ok()?;
        stack + u64::from(KERNEL_STACK) - size_of::<pt_regs>() as u64
    } else {
        return None;
    };
    let regs: pt_regs = read_kernel(at, 0).ok()?;
    // A kernel thread, or a task that entered from nowhere.
    if regs.cs & 3 != 3 { None } else { Some(regs) }
}

/// Walks some frames further, then goes on to itself or to the end.
#[inline(always)]
pub fn walk(ctx: &PerfEventContext) -> u32 {
    let Some(walk) = WALK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's scratch, and the sampler does not interrupt itself.
    let walk = unsafe { &mut *walk };
    for _ in 0..FRAMES_PER_STEP {
        if walk.mode == DONE {
            break;
        }
        step(walk);
    }
    walk.steps += 1;
    if walk.steps > STEPS_MAX && walk.mode != DONE {
        walk.sample.header.flags |= flags::TRUNCATED;
        walk.sample.end = end::TRUNCATED;
        walk.mode = DONE;
    }
    let next = if walk.mode == DONE { STEP_FINISH } else { STEP_WALK };
    // SAFETY: the array holds perf-event programs.
    unsafe { SAMPLE_STEPS.tail_call(ctx, next) };
    count(Stat::SamplesLostWalk);
    give_back(walk);
    0
}

#[inline(always)]
fn push(walk: &mut Walk, frame: RawFrame) {
    let at = walk.count as usize;
    if at >= USER_FRAMES_MAX {
        walk.sample.header.flags |= flags::TRUNCATED;
        walk.sample.end = end::TRUNCATED;
        walk.mode = DONE;
        return;
    }
    // The mask is what the verifier believes; the test above is what keeps it true, and may not do away with the mask.
    walk.frames[core::hint::black_box(at) & (USER_FRAMES_MAX - 1)] = frame;
    walk.count = at as u32 + 1;
}

#[inline(always)]
fn step(walk: &mut Walk) {
    if walk.mode == NATIVE {
        let (pc, target) = (walk.native.pc, &walk.target);
        let hot = pc >= target.loop_start && pc < target.loop_end;
        let cold = pc >= target.cold_start && pc < target.cold_end;
        if (hot || cold) && walk.unasked != 0 {
            walk.unasked = 0;
            // Where a guess leads is no evidence of whose stack it is.
            let guessed = walk.native.guessed != 0;
            let frame = if guessed { 0 } else { python::holders_frame(&Current, target, walk.native.sp) };
            if frame != 0 {
                walk.python = frame;
                walk.sample.header.flags &= !flags::PYTHON_NO_STATE;
            }
        }
        let in_loop = walk.python != 0 && (hot || cold);
        if !in_loop {
            // What people wrote goes before what runs it.
            if walk.natives >= NATIVE_FRAMES_MAX && walk.python != 0 {
                walk.mode = PYTHON_REST;
                walk.sample.end = end::TRUNCATED;
                push(walk, RawFrame::new(FRAME_LEFT_OUT, 0, 0, 0));
                return;
            }
            walk.natives += 1;
            let kind = if walk.native.exact != 0 {
                FRAME_NATIVE_LEAF
            } else if walk.native.guessed != 0 {
                FRAME_NATIVE_CALLER
            } else {
                FRAME_NATIVE_RETURN
            };
            push(walk, RawFrame::new(kind, pc, 0, 0));
            if walk.mode != DONE {
                native_caller(walk);
            }
            return;
        }
        walk.mode = PYTHON_SEGMENT;
    }
    python_frame(walk);
}

/// Moves to the caller, or ends the native chain.
#[inline(always)]
fn native_caller(walk: &mut Walk) {
    let found = native::native_caller();
    if found == native::FOUND {
        if walk.native.guessed != 0 {
            walk.sample.header.flags |= flags::GUESSED;
        }
        walk.mode = NATIVE;
        return;
    }
    walk.sample.end = found as u8;
    walk.mode = if walk.python != 0 { PYTHON_REST } else { DONE };
}

#[inline(always)]
fn python_frame(walk: &mut Walk) {
    if walk.python == 0 {
        walk.mode = DONE;
        return;
    }
    let address = walk.python;
    // For each frame: what is chosen in front of the loop is verified as two loops.
    let codes = code::remembered(walk.epoch);
    match python::step(&Current, codes, &walk.target.python, address, &mut walk.scratch) {
        Ok(step) => {
            walk.python = step.previous;
            if !step.shim {
                push(walk, step.frame);
            }
            if step.entry && walk.mode == PYTHON_SEGMENT {
                native_caller(walk);
            }
        }
        Err(_) => {
            walk.sample.header.flags |= flags::PYTHON_FAULT;
            count(Stat::PythonFault);
            walk.python = 0;
            walk.mode = DONE;
        }
    }
}

/// Adds the kernel stack and writes the record.
#[inline(always)]
pub fn finish(ctx: &PerfEventContext) -> u32 {
    let Some(walk) = WALK.get_ptr_mut(0) else { return 0 };
    let frames_end = |count: u64| size_of::<Sample>() as u64 + count * size_of::<RawFrame>() as u64;
    // SAFETY: this CPU's scratch, and the sampler does not interrupt itself; the masked count keeps every offset
    // inside `Walk`.
    unsafe {
        // The mask is for the verifier: a full stack has as many.
        let users = u64::from((*walk).count) & (USER_FRAMES_MAX as u64 * 2 - 1);
        if users > USER_FRAMES_MAX as u64 {
            return 0;
        }
        let mut length = frames_end(users);
        let mut kernels = 0u64;
        if (*walk).sample.header.flags & flags::IN_KERNEL != 0 {
            let to = walk.cast::<u8>().add(length as usize);
            let got = bpf_get_stack(ctx.as_ptr(), to.cast(), (KERNEL_FRAMES_MAX * 8) as u32, 0);
            if got > 0 {
                kernels = (got as u64 & 1023) / 8;
            }
        }
        if kernels > KERNEL_FRAMES_MAX as u64 {
            kernels = KERNEL_FRAMES_MAX as u64;
        }
        length += kernels * 8;
        (*walk).sample.user_count = users as u16;
        (*walk).sample.kernel_count = kernels as u16;
        (*walk).sample.cpu = aya_ebpf::helpers::bpf_get_smp_processor_id() as u16;
        if (*walk).native.unknown != 0 {
            (*walk).sample.header.flags |= flags::UNKNOWN_CODE;
        }
        if (*walk).sample.header.flags & flags::TRUNCATED != 0 {
            count(Stat::StackTruncated);
        }
        if (*walk).sample.header.flags & flags::PYTHON_NO_STATE != 0 {
            count(Stat::PythonNoState);
        }
        if length > RECORD_MAX {
            return 0;
        }
        let ring = (&raw const EVENTS).cast_mut().cast();
        if aya_ebpf::helpers::bpf_ringbuf_output(ring, walk.cast(), length, QUIET) == 0 {
            count(Stat::SamplesEmitted);
        } else {
            count(Stat::SamplesLostRing);
            give_back(&*walk);
        }
    }
    0
}
