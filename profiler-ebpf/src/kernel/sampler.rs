//! CPU samples of threads inside requests.
//!
//! In: the CPU clock's interrupt. Out: one `Sample` record with the user stack (Python and native in call order)
//! and the kernel stack. A thread that is not in a request costs two map look-ups and no stack.
//!
//! The walk is a chain of tail calls, some frames each, because one program may not be long enough for a whole
//! stack; its state lives in the per-CPU scratch `Walk`.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_current_task_btf, bpf_get_stack, bpf_task_pt_regs},
    programs::PerfEventContext,
};
use profiler_common::{
    FRAME_LEFT_OUT, FRAME_NATIVE_CALLER, FRAME_NATIVE_LEAF, KERNEL_FRAMES_MAX, Kind, NATIVE_FRAMES_MAX,
    RawFrame, Sample, Stat, Target, USER_FRAMES_MAX, flags, target_flags,
};
use profiler_ebpf::{
    memory::Memory,
    python::{self, Scratch},
};

use super::{
    maps::{ACTIVE, EVENTS, QUIET, SAMPLE_STEPS, STEP_FINISH, STEP_WALK, TARGETS, WALK, count, settings},
    task::{Current, UserRegs, header, ids, now, read_kernel, task},
};

/// Frames walked by one program of the chain: small enough for the oldest verifier.
const FRAMES_PER_STEP: usize = 20;
/// Programs of the chain, which the kernel limits to 32 or 33 with the first and the last: enough for all frames, also
/// where some are not shown.
const STEPS_MAX: u32 = 28;
const _: () = assert!(FRAMES_PER_STEP * STEPS_MAX as usize > USER_FRAMES_MAX + USER_FRAMES_MAX / 16);
/// A frame pointer further than this above the stack pointer is not one: the default thread stack is 8 MiB.
const STACK_SPAN: u64 = 8 << 20;

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
    pc: u64,
    sp: u64,
    fp: u64,
    /// The Python frame to be emitted next, 0 = none.
    python: u64,
    mode: u32,
    leaf: u32,
    count: u32,
    steps: u32,
    /// Native frames among them.
    natives: u32,
    reserved: u32,
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
    let Some(active) = ACTIVE.get_ptr_mut(ids.tid) else {
        count(Stat::SamplesOutsideRequest);
        return 0;
    };
    let set = settings();
    // SAFETY: query only.
    if EVENTS.query(0) + set.ring_reserve + RECORD_MAX > EVENTS.query(1) {
        count(Stat::SamplesLostRing);
        // SAFETY: a live map value.
        unsafe { (*active).lost += 1 };
        return 0;
    }
    let Some(walk) = WALK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's scratch, and the sampler does not interrupt itself.
    let walk = unsafe { &mut *walk };
    let mut head = header(Kind::Sample, ids, now());
    // SAFETY: a live map value.
    unsafe {
        head.lost = (*active).lost;
        (*active).lost = 0;
        walk.sample.activation = (*active).activation;
    }
    walk.target = *target;
    walk.count = 0;
    walk.steps = 0;
    walk.natives = 0;
    walk.leaf = 1;
    walk.python = 0;
    walk.scratch.forget();
    // SAFETY: the context of a perf-event program is bpf_perf_event_data.
    let (regs, period) = unsafe { (&(*ctx.ctx).regs, (*ctx.ctx).sample_period) };
    walk.sample.weight = period;
    let user = if regs.cs & 3 == 3 {
        Some(UserRegs::of(regs))
    } else {
        head.flags |= flags::IN_KERNEL;
        interrupted_user_regs(set.has_task_pt_regs)
    };
    walk.mode = match user {
        Some(user) => {
            (walk.pc, walk.sp, walk.fp) = (user.pc, user.sp, user.fp);
            NATIVE
        }
        None => PYTHON_REST,
    };
    if target.flags & target_flags::PYTHON != 0 && set.kernel.valid != 0 {
        match read_kernel::<u64>(task(), set.kernel.task_fsbase)
            .and_then(|base| python::current_frame(&Current, &walk.target, base))
        {
            Ok(0) => {
                head.flags |= flags::PYTHON_NO_STATE;
                count(Stat::PythonNoState);
            }
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

/// The sample came to nothing, so what it was to tell is still to be told.
#[inline(always)]
fn give_back(walk: &Walk) {
    let head = &walk.sample.header;
    if let Some(active) = ACTIVE.get_ptr_mut(head.tid) {
        // SAFETY: a live map value; the thread is interrupted, so it is where it was when the sample began.
        unsafe { (*active).lost += head.lost + 1 };
    }
}

/// The user registers of a task that is in the kernel.
#[inline(always)]
fn interrupted_user_regs(has_helper: u32) -> Option<UserRegs> {
    if has_helper == 0 {
        return None;
    }
    // SAFETY: the helper takes the current task as it is; its result is read through a checked read.
    let regs = unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64;
    let regs: aya_ebpf::bindings::pt_regs = read_kernel(regs, 0).ok()?;
    // A kernel thread, or a task that entered from nowhere.
    if regs.cs & 3 != 3 { None } else { Some(UserRegs::of(&regs)) }
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
        let (pc, target) = (walk.pc, &walk.target);
        let hot = pc >= target.loop_start && pc < target.loop_end;
        let cold = pc >= target.cold_start && pc < target.cold_end;
        let in_loop = walk.python != 0 && (hot || cold);
        if !in_loop {
            // What people wrote goes before what runs it.
            if walk.natives >= NATIVE_FRAMES_MAX && walk.python != 0 {
                walk.mode = PYTHON_REST;
                push(walk, RawFrame::new(FRAME_LEFT_OUT, 0, 0, 0));
                return;
            }
            walk.natives += 1;
            let kind = if walk.leaf != 0 { FRAME_NATIVE_LEAF } else { FRAME_NATIVE_CALLER };
            push(walk, RawFrame::new(kind, walk.pc, 0, 0));
            if walk.mode != DONE {
                native_caller(walk);
            }
            return;
        }
        walk.mode = PYTHON_SEGMENT;
    }
    python_frame(walk);
}

/// Moves to the caller by frame pointer, or ends the native chain.
#[inline(always)]
fn native_caller(walk: &mut Walk) {
    walk.leaf = 0;
    let fp = walk.fp;
    if fp & 7 == 0
        && fp > walk.sp
        && fp - walk.sp < STACK_SPAN
        && let Ok((next, ret)) = Current.pair(fp)
        && ret != 0
    {
        (walk.pc, walk.sp, walk.fp) = (ret, fp + 8, next);
        walk.mode = NATIVE;
        return;
    }
    walk.mode = if walk.python != 0 { PYTHON_REST } else { DONE };
}

#[inline(always)]
fn python_frame(walk: &mut Walk) {
    if walk.python == 0 {
        walk.mode = DONE;
        return;
    }
    let address = walk.python;
    match python::step(&Current, &walk.target.python, address, &mut walk.scratch) {
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
        (*walk).sample.cpu = aya_ebpf::helpers::bpf_get_smp_processor_id();
        if (*walk).sample.header.flags & flags::TRUNCATED != 0 {
            count(Stat::StackTruncated);
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
