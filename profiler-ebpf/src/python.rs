//! Walking CPython's frames.
//!
//! In: a thread pointer or a frame's address, and the offsets of this interpreter's version. Out: one
//! [`RawFrame`] at a time, leaf first. Nothing here knows about BPF.

use profiler_common::{ENTRY_FLAG, FRAME_PYTHON, NO_FIELD, PythonOffsets, RawFrame, Target, code_check};

use crate::memory::{Block, Fault, Memory};

/// The newest frame of the thread whose thread pointer is `thread_pointer`: `Ok(0)` when the thread has no
/// interpreter state or runs no Python.
///
/// The state is taken from the thread-specific slot and not from the interpreter's "current thread", because that
/// is another thread's (or nobody's) whenever this thread does not hold the GIL.
#[inline(always)]
pub fn current_frame<M: Memory>(memory: &M, target: &Target, thread_pointer: u64) -> Result<u64, Fault> {
    // glibc: struct pthread { …; struct pthread_key_data { uintptr_t seq; void *data; } specific_1stblock[32]; … }
    let slot = thread_pointer + u64::from(target.tss_block) + u64::from(target.tss_key) * 16 + 8;
    let state = memory.word(slot)?;
    if state == 0 {
        return Ok(0);
    }
    let offsets = &target.python;
    let holder = if offsets.tstate_cframe == NO_FIELD {
        state
    } else {
        memory.word(state + u64::from(offsets.tstate_cframe))?
    };
    if holder == 0 {
        return Ok(0);
    }
    memory.word(holder + u64::from(offsets.current_frame))
}

/// One step of the walk.
pub struct Step {
    pub frame: RawFrame,
    /// The caller's frame, 0 at the end.
    pub previous: u64,
    /// This frame was entered from C: what called it is a native frame.
    pub entry: bool,
}

/// Reads the frame at `address`. `block` is scratch.
#[inline(always)]
pub fn step<M: Memory>(
    memory: &M,
    offsets: &PythonOffsets,
    address: u64,
    block: &mut Block,
) -> Result<Step, Fault> {
    memory.block(address, block)?;
    let code = block.u64(offsets.frame_code);
    let previous = block.u64(offsets.frame_previous);
    let instruction = block.u64(offsets.frame_instr);
    let mark = block.u8(offsets.frame_entry);
    let entry = if offsets.entry_mode == ENTRY_FLAG { mark != 0 } else { mark == offsets.entry_value };
    memory.block(code, block)?;
    let check = code_check(
        block.u32(offsets.code_argcount),
        block.u32(offsets.code_kwonly),
        block.u32(offsets.code_flags),
        block.u32(offsets.code_firstline),
    );
    let lasti = instruction.wrapping_sub(code + u64::from(offsets.code_bytecode)) as u32;
    Ok(Step { frame: RawFrame::new(FRAME_PYTHON, code, lasti, check), previous, entry })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Sparse memory, by byte.
    #[derive(Default)]
    struct Fake(HashMap<u64, u8>);

    impl Fake {
        fn put(&mut self, address: u64, bytes: &[u8]) {
            for (i, b) in bytes.iter().enumerate() {
                self.0.insert(address + i as u64, *b);
            }
        }
    }

    impl Memory for Fake {
        fn word(&self, address: u64) -> Result<u64, Fault> {
            let mut bytes = [0; 8];
            for (i, b) in bytes.iter_mut().enumerate() {
                *b = *self.0.get(&(address + i as u64)).ok_or(Fault)?;
            }
            Ok(u64::from_le_bytes(bytes))
        }
        fn block(&self, address: u64, block: &mut Block) -> Result<(), Fault> {
            if !self.0.contains_key(&address) {
                return Err(Fault);
            }
            for i in 0..Block::READ {
                // SAFETY: READ is less than the block's capacity.
                unsafe { *block.as_mut_ptr().add(i) = *self.0.get(&(address + i as u64)).unwrap_or(&0) };
            }
            Ok(())
        }
    }

    /// Offsets of 3.11, from Include/internal/pycore_frame.h and Include/cpython/code.h.
    const PY311: PythonOffsets = PythonOffsets {
        tstate_cframe: 56,
        current_frame: 8,
        frame_code: 32,
        frame_previous: 48,
        frame_instr: 56,
        frame_entry: 68,
        code_argcount: 56,
        code_kwonly: 64,
        code_flags: 48,
        code_firstline: 72,
        code_bytecode: 184,
        entry_mode: ENTRY_FLAG,
        entry_value: 0,
    };

    fn two_frames() -> Fake {
        let mut m = Fake::default();
        let (inner, outer, code) = (0x1000u64, 0x2000u64, 0x3000u64);
        m.put(inner, &[0; 96]);
        m.put(outer, &[0; 96]);
        m.put(code, &[0; 96]);
        m.put(inner + 32, &code.to_le_bytes());
        m.put(inner + 48, &outer.to_le_bytes());
        m.put(inner + 56, &(code + 184 + 12).to_le_bytes());
        m.put(outer + 32, &code.to_le_bytes());
        m.put(outer + 56, &(code + 184 + 40).to_le_bytes());
        m.put(outer + 68, &[1]);
        m.put(code + 56, &2u32.to_le_bytes());
        m.put(code + 64, &1u32.to_le_bytes());
        m.put(code + 48, &3u32.to_le_bytes());
        m.put(code + 72, &77u32.to_le_bytes());
        m
    }

    #[test]
    fn walks_to_the_entry_frame() {
        let m = two_frames();
        let mut block = Block::zeroed();
        let inner = step(&m, &PY311, 0x1000, &mut block).unwrap();
        assert_eq!(inner.frame, RawFrame::new(FRAME_PYTHON, 0x3000, 12, code_check(2, 1, 3, 77)));
        assert!(!inner.entry);
        let outer = step(&m, &PY311, inner.previous, &mut block).unwrap();
        assert_eq!(outer.frame.lasti(), 40);
        assert!(outer.entry);
        assert_eq!(outer.previous, 0);
    }

    #[test]
    fn a_thread_without_state_has_no_frame() {
        let mut m = two_frames();
        let target = Target { tss_key: 2, tss_block: 0x310, python: PY311, ..Target::default() };
        m.put(0x9000 + 0x310 + 2 * 16, &[0; 16]);
        assert_eq!(current_frame(&m, &target, 0x9000), Ok(0));
        m.put(0x9000 + 0x310 + 2 * 16 + 8, &0x5000u64.to_le_bytes());
        m.put(0x5000 + 56, &0x6000u64.to_le_bytes());
        m.put(0x6000 + 8, &0x1000u64.to_le_bytes());
        assert_eq!(current_frame(&m, &target, 0x9000), Ok(0x1000));
    }

    #[test]
    fn a_wild_frame_is_a_fault_and_not_a_guess() {
        let m = two_frames();
        assert!(step(&m, &PY311, 0xdead_0000, &mut Block::zeroed()).is_err());
    }
}
