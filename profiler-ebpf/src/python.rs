//! Walking CPython's frames.
//!
//! In: a thread pointer or a frame's address, and the offsets of this interpreter's version. Out: one
//! [`RawFrame`] at a time, leaf first. Nothing here knows about BPF.

use profiler_common::{
    CODE_INTERNAL, CODE_READ, ENTRY_EVERY, ENTRY_FLAG, FRAME_HEAD, FRAME_OBJECT_HEAD, FRAME_PYTHON,
    OWNER_INTERPRETER, PythonOffsets, RawFrame, Target, code_check,
};

use crate::memory::{Block, Fault, Memory};
use crate::places::{Places, place};

/// The state in the thread-specific slot of the thread with this thread pointer: `Ok(0)` when it has none.
///
/// The slot is asked and not the interpreter's "current thread", because that is another thread's (or nobody's)
/// whenever this thread does not hold the GIL. For the exception see [`holders_frame`].
#[inline(always)]
pub fn thread_state<M: Memory>(memory: &M, target: &Target, thread_pointer: u64) -> Result<u64, Fault> {
    // glibc: struct pthread { …; struct pthread_key_data { uintptr_t seq; void *data; } specific_1stblock[32];
    //                         struct pthread_key_data *specific[32]; … }
    let first = thread_pointer + u64::from(target.tss_block);
    let key = u64::from(target.tss_key);
    let block = if key < BLOCK_KEYS {
        first
    } else {
        memory.word(first + BLOCK_KEYS * SLOT + key / BLOCK_KEYS * 8)?
    };
    if block == 0 {
        return Ok(0);
    }
    memory.word(block + key % BLOCK_KEYS * SLOT + 8)
}

/// The newest frame of a thread's state: `Ok(0)` when it runs no Python.
#[inline(always)]
pub fn current_frame<M: Memory>(memory: &M, target: &Target, thread_pointer: u64) -> Result<u64, Fault> {
    let state = thread_state(memory, target, thread_pointer)?;
    if state == 0 {
        return Ok(0);
    }
    let offsets = &target.python;
    let holder = if offsets.frames_on_state() {
        state
    } else {
        memory.word(state + u64::from(offsets.tstate_cframe))?
    };
    if holder == 0 {
        return Ok(0);
    }
    memory.word(holder + u64::from(offsets.current_frame))
}

/// The newest frame of the state that holds the GIL, if the interpreter loop whose stack frame begins at `stack_pointer`
/// runs it; else 0.
///
/// Up to 3.11 the slot keeps the state that a thread had first, also while the thread works in another interpreter of
/// the process, as uWSGI and mod_wsgi let it. What a state says of the thread that made it is no help: uWSGI makes those
/// of all its threads in one. But the loop keeps a structure on its stack that the state points at, and what lies in a
/// stack frame of this thread is no other's. Who holds the GIL may change meanwhile, so what is not there is no fault.
#[inline(always)]
pub fn holders_frame<M: Memory>(memory: &M, target: &Target, stack_pointer: u64) -> u64 {
    let offsets = &target.python;
    let state = memory.word(target.current).unwrap_or(0);
    if state == 0 {
        return 0;
    }
    let place = memory.word(state.wrapping_add(offsets.tstate_cframe.into())).unwrap_or(0);
    if place < stack_pointer || place - stack_pointer >= LOOP_FRAME {
        return 0;
    }
    let holder = if offsets.frames_on_state() { state } else { place };
    memory.word(holder.wrapping_add(offsets.current_frame.into())).unwrap_or(0)
}

/// Bytes of the loop's stack frame in which its structure lies: builds have 200 to 700. Behind the end of a stack are
/// its thread's own data, and a guard page before another's.
const LOOP_FRAME: u64 = 4096;

/// Keys in one block of thread-specific data, and bytes of one slot.
const BLOCK_KEYS: u64 = 32;
const SLOT: u64 = 16;

/// One step of the walk.
pub struct Step {
    pub frame: RawFrame,
    /// The caller's frame, 0 at the end.
    pub previous: u64,
    /// What comes next in the stack is the native frame that entered the interpreter loop.
    pub entry: bool,
    /// No frame of Python code, but one that the interpreter made for itself: not to be shown.
    pub shim: bool,
}

/// What a code object says of itself, as far as a walk needs it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Code {
    /// See [`code_check`].
    pub check: u32,
    /// 1: it is the interpreter's own.
    pub internal: u32,
}

/// A code object that was read.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// [`profiler_common::CodeLives::epoch`] then, 0 = none was.
    pub epoch: u64,
    pub address: u64,
    pub code: Code,
}

/// What walks have read of code objects, by their addresses. Each is in a place of its own in memory, and reading
/// one costs as much as everything else that is done for a frame.
///
/// A code object lives as long as a frame of it, and what is remembered of one is good until any of its process dies.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    pub places: &'a Places<Known>,
    /// Of the process that is walked.
    pub epoch: u64,
}

/// What has been read: a stretch of frames, and the head of a code object.
#[repr(C)]
pub struct Scratch {
    /// Address of the first byte of `frames`, and how many bytes are valid.
    base: u64,
    valid: u64,
    frames: Block<WINDOW>,
    code: Block<CODE>,
}

/// Bytes of frames read at once. From 3.11 on the frames of a thread lie one behind the other in chunks of 16 KiB or more
/// (Python/pystate.c, `push_chunk`), callers in front of callees, so one read serves about ten frames; a read costs
/// the same whether it fetches a word or a kilobyte, nearly.
const WINDOW: usize = 2048;
/// A read of all of it would be masked to nothing.
const WINDOW_READ: u64 = WINDOW as u64 - 8;
/// The next page may not be there.
const PAGE: u64 = 4096;
/// Low bits of a pointer to a code object that say how it is counted (3.14).
const TAG: u64 = 3;
const CODE: usize = CODE_READ as usize * 2;

impl Scratch {
    pub const fn new() -> Self {
        Self { base: 0, valid: 0, frames: Block::zeroed(), code: Block::zeroed() }
    }

    /// Memory has changed since.
    #[inline(always)]
    pub fn forget(&mut self) {
        self.valid = 0;
    }

    /// Where in `frames` the head of the frame at `address` is.
    #[inline(always)]
    fn frame<M: Memory>(&mut self, memory: &M, address: u64, objects: bool) -> Result<u32, Fault> {
        // No allocation of anybody's is like this.
        if address & 7 != 0 {
            return Err(Fault);
        }
        // Frame objects lie anywhere: there is nothing to gain from reading more than one.
        if objects {
            memory.fill(address, FRAME_OBJECT_HEAD as u32, &mut self.frames)?;
            return Ok(0);
        }
        let at = address.wrapping_sub(self.base);
        if at < WINDOW as u64 && at + FRAME_HEAD <= self.valid {
            return Ok(at as u32);
        }
        // All up to the end of this head, but no other page than those it lies in.
        let end = address.wrapping_add(FRAME_HEAD);
        let page = address & !(PAGE - 1);
        let furthest = end.wrapping_sub(WINDOW_READ);
        let base = if furthest > page { furthest } else { page };
        let size = end.wrapping_sub(base);
        self.valid = 0;
        memory.fill(base, size as u32, &mut self.frames)?;
        self.base = base;
        self.valid = size;
        Ok(address.wrapping_sub(base) as u32)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads the frame at `address`. `codes`: where nothing may be remembered there are none.
#[inline(always)]
pub fn step<M: Memory>(
    memory: &M,
    codes: Option<Codes<'_>>,
    offsets: &PythonOffsets,
    address: u64,
    scratch: &mut Scratch,
) -> Result<Step, Fault> {
    let objects = offsets.entry_mode == ENTRY_EVERY;
    let at = scratch.frame(memory, address, objects)?;
    let field = |offset: u16| at.wrapping_add(offset.into());
    let code = scratch.frames.u64(field(offsets.frame_code)) & !TAG;
    let previous = scratch.frames.u64(field(offsets.frame_previous));
    let instruction = if offsets.lasti_unit == 0 {
        scratch.frames.u64(field(offsets.frame_instr))
    } else {
        scratch.frames.u32(field(offsets.frame_instr)).into()
    };
    let mark = scratch.frames.u8(field(offsets.frame_entry));
    let entry = match offsets.entry_mode {
        ENTRY_EVERY => true,
        ENTRY_FLAG => mark != 0,
        _ if mark >= OWNER_INTERPRETER => {
            return Ok(Step { frame: RawFrame::default(), previous, entry: true, shim: true });
        }
        _ => false,
    };
    let Code { check, internal } = match codes {
        Some(codes) => {
            let place = place(codes.places, code);
            let Known { epoch, address, code: known } = place.get();
            if epoch == codes.epoch && address == code {
                known
            } else {
                let read = read_code(memory, offsets, code, scratch)?;
                place.set(Known { epoch: codes.epoch, address: code, code: read });
                read
            }
        }
        None => read_code(memory, offsets, code, scratch)?,
    };
    let lasti = if offsets.lasti_unit == 0 {
        instruction.wrapping_sub(code.wrapping_add(offsets.code_bytecode.into())) as u32
    } else {
        (instruction as u32).wrapping_mul(offsets.lasti_unit.into())
    };
    let frame = RawFrame::new(FRAME_PYTHON, code, lasti, check);
    Ok(Step { frame, previous, entry, shim: internal != 0 })
}

#[inline(always)]
fn read_code<M: Memory>(
    memory: &M,
    offsets: &PythonOffsets,
    address: u64,
    scratch: &mut Scratch,
) -> Result<Code, Fault> {
    let from = offsets.code_from();
    memory.fill(address.wrapping_add(from.into()), CODE_READ.into(), &mut scratch.code)?;
    let number = |offset: u16| scratch.code.u32(offset.wrapping_sub(from).into());
    let flags = number(offsets.code_flags);
    let (arguments, named) = (number(offsets.code_argcount), number(offsets.code_kwonly));
    Ok(Code {
        check: code_check(arguments, named, flags, number(offsets.code_firstline)),
        internal: u32::from(flags & CODE_INTERNAL != 0),
    })
}

#[cfg(test)]
mod tests;
