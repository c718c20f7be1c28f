use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use profiler_common::{ENTRY_OWNER, NO_FIELD};

use super::*;

/// Sparse memory, by byte.
#[derive(Default)]
struct Fake {
    bytes: HashMap<u64, u8>,
    pages: HashSet<u64>,
}

impl Fake {
    fn put(&mut self, address: u64, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            self.bytes.insert(address + i as u64, *b);
            self.pages.insert((address + i as u64) / PAGE);
        }
    }
}

impl Memory for Fake {
    /// What nobody put is not there, but for the pages of what was put: these are 0.
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        assert!(size as usize <= N);
        for i in 0..u64::from(size) {
            let at = address + i;
            let byte = self.bytes.get(&at).copied();
            if byte.is_none() && !self.pages.contains(&(at / PAGE)) {
                return Err(Fault);
            }
            // SAFETY: inside, by the assertion above.
            unsafe { *block.as_mut_ptr().add(i as usize) = byte.unwrap_or(0) };
        }
        Ok(())
    }
}

#[test]
fn code_is_read_once_until_any_dies() {
    let memory = two_frames();
    let counted = Counted { memory, fills: Cell::new(0) };
    let places: Places<Known> = core::array::from_fn(|_| Cell::default());
    let mut codes = Codes { places: &places, epoch: 7 };
    let mut scratch = Scratch::new();
    let (there, other) = (code_check(2, 1, 3, 77), code_check(2, 1, 3, 78));
    let mut walk = |counted: &Counted, codes: &Codes<'_>| {
        scratch.forget();
        let before = counted.fills.get();
        let check = step(counted, Some(*codes), &PY311, 0x1000, &mut scratch).map(|step| step.frame.check);
        (check, counted.fills.get() - before)
    };
    assert_eq!(walk(&counted, &codes), (Ok(there), 2));
    assert_eq!(walk(&counted, &codes), (Ok(there), 1), "the frame alone");
    // Another code object at the same address, of which nobody is told until the first is dead.
    let mut counted = counted;
    counted.memory.put(0x3000 + 72, &78u32.to_le_bytes());
    codes.epoch = 8;
    assert_eq!([walk(&counted, &codes), walk(&counted, &codes)], [(Ok(other), 2), (Ok(other), 1)]);
    // Another one in its place, then the first again.
    let same = |at: &u64| core::ptr::eq(place(&places, *at), place(&places, 0x3000));
    let rival = (0x10_0000u64..).step_by(16).find(same).expect("one of a thousand");
    counted.memory.put(rival, &[0; 96]);
    counted.memory.put(0x1000 + 32, &rival.to_le_bytes());
    assert_eq!(walk(&counted, &codes), (Ok(code_check(0, 0, 0, 0)), 2));
    counted.memory.put(0x1000 + 32, &0x3000u64.to_le_bytes());
    assert_eq!(walk(&counted, &codes), (Ok(other), 2));
    // What cannot be read is not taken for what was there.
    counted.memory.put(0x1000 + 32, &0xdead_0000u64.to_le_bytes());
    assert_eq!([walk(&counted, &codes), walk(&counted, &codes)], [(Err(Fault), 2); 2]);
    counted.memory.put(0x1000 + 32, &0x3000u64.to_le_bytes());
    assert_eq!(walk(&counted, &codes), (Ok(other), 1), "nobody took its place");
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
    lasti_unit: 0,
    tstate_context: 224,
    reserved: [0; 3],
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
    let mut scratch = Scratch::new();
    let inner = step(&m, None, &PY311, 0x1000, &mut scratch).unwrap();
    assert_eq!(inner.frame, RawFrame::new(FRAME_PYTHON, 0x3000, 12, code_check(2, 1, 3, 77)));
    assert!(!inner.entry);
    let outer = step(&m, None, &PY311, inner.previous, &mut scratch).unwrap();
    assert_eq!(outer.frame.lasti(), 40);
    assert!(outer.entry);
    assert_eq!(outer.previous, 0);
}

/// Offsets of 3.10, from Include/cpython/frameobject.h and Include/cpython/code.h.
const PY310: PythonOffsets = PythonOffsets {
    tstate_cframe: NO_FIELD,
    current_frame: 24,
    frame_code: 32,
    frame_previous: 24,
    frame_instr: 96,
    frame_entry: NO_FIELD,
    code_argcount: 16,
    code_kwonly: 24,
    code_flags: 36,
    code_firstline: 40,
    code_bytecode: 0,
    entry_mode: ENTRY_EVERY,
    lasti_unit: 2,
    tstate_context: 240,
    reserved: [0; 3],
};

/// Offsets of 3.14, from Include/internal/pycore_interpframe_structs.h and Include/cpython/code.h.
const PY314: PythonOffsets = PythonOffsets {
    tstate_cframe: NO_FIELD,
    current_frame: 72,
    frame_code: 0,
    frame_previous: 8,
    frame_instr: 56,
    frame_entry: 74,
    code_argcount: 52,
    code_kwonly: 60,
    code_flags: 48,
    code_firstline: 68,
    code_bytecode: 208,
    entry_mode: ENTRY_OWNER,
    lasti_unit: 0,
    tstate_context: 208,
    reserved: [0; 3],
};

#[test]
fn frame_objects_are_each_entered_from_c() {
    let mut m = Fake::default();
    let code = 0x3000u64;
    m.put(code, &[0; 96]);
    m.put(code + 16, &2u32.to_le_bytes());
    m.put(code + 24, &1u32.to_le_bytes());
    m.put(code + 36, &3u32.to_le_bytes());
    m.put(code + 40, &77u32.to_le_bytes());
    // The second ends with its page; what is behind is not there.
    let (inner, outer) = (0x1_0000u64, 0x2_1000 - FRAME_OBJECT_HEAD);
    for (frame, back, lasti) in [(inner, outer, 21i32), (outer, 0, -1)] {
        m.put(frame, &[0xee; FRAME_OBJECT_HEAD as usize]);
        m.put(frame + 24, &back.to_le_bytes());
        m.put(frame + 32, &code.to_le_bytes());
        m.put(frame + 96, &lasti.to_le_bytes());
    }
    let mut scratch = Scratch::new();
    let first = step(&m, None, &PY310, inner, &mut scratch).expect("readable");
    assert_eq!(first.frame, RawFrame::new(FRAME_PYTHON, code, 42, code_check(2, 1, 3, 77)));
    assert_eq!((first.entry, first.shim, first.previous), (true, false, outer));
    let second =
        step(&m, None, &PythonOffsets { lasti_unit: 1, ..PY310 }, outer, &mut scratch).expect("readable");
    assert_eq!((second.frame.lasti(), second.entry, second.previous), (0x0fff_ffff, true, 0));
}

#[test]
fn frames_that_the_interpreter_made_are_shims() {
    let mut m = Fake::default();
    let (code, internal, none) = (0x3000u64, 0x4000u64, 0x5000u64);
    m.put(code, &[0; 96]);
    m.put(internal, &[0; 96]);
    m.put(internal + 48, &0x0200_0001u32.to_le_bytes());
    // Called by an `__init__` that was called without C, which was called from C: tagged as references may be.
    let frames =
        [(0x1000u64, code | 1, 1u8), (0x1100, internal, 0), (0x1200, code, 2), (0x1300, none | 1, 3)];
    let frames = frames.into_iter().chain([(0x1400, none, 4)]);
    for (frame, executable, owner) in frames {
        m.put(frame, &executable.to_le_bytes());
        m.put(frame + 8, &(frame + 0x100).to_le_bytes());
        m.put(frame + 56, &(code + 208 + 6).to_le_bytes());
        m.put(frame + 74, &[owner]);
    }
    let mut scratch = Scratch::new();
    let mut address = 0x1000;
    let mut seen = Vec::new();
    for _ in 0..5 {
        // What `None` has in the place of a code object's fields is not looked at: nothing is there.
        let step = step(&m, None, &PY314, address, &mut scratch).expect("readable");
        seen.push((step.shim, step.entry));
        if !step.shim {
            assert_eq!((step.frame.address, step.frame.lasti()), (code, 6));
        }
        address = step.previous;
    }
    assert_eq!(seen, [(false, false), (true, false), (false, false), (true, true), (true, true)]);
}

#[test]
fn late_keys_are_in_blocks_of_their_own() {
    let mut m = two_frames();
    let target = Target { tss_key: 70, tss_block: 0x310, python: PY311, ..Target::default() };
    let block = 0x9000 + 0x310 + 32 * 16 + 2 * 8;
    m.put(block, &[0; 8]);
    assert_eq!(current_frame(&m, &target, 0x9000), Ok(0));
    m.put(block, &0xb000u64.to_le_bytes());
    m.put(0xb000 + 6 * 16 + 8, &0x5000u64.to_le_bytes());
    m.put(0x5000 + 56, &0x6000u64.to_le_bytes());
    m.put(0x6000 + 8, &0x1000u64.to_le_bytes());
    assert_eq!(current_frame(&m, &target, 0x9000), Ok(0x1000));
}

#[test]
fn the_state_that_holds_the_gil_counts_where_the_loop_has_it_on_its_stack() {
    let mut m = two_frames();
    let target = Target { current: 0xa000, python: PY311, ..Target::default() };
    let place = 0x8800u64;
    m.put(0xa000, &0x7000u64.to_le_bytes());
    m.put(0x7000 + 56, &place.to_le_bytes());
    m.put(place + 8, &0x2000u64.to_le_bytes());
    let from = |m: &Fake, stack_pointer| holders_frame(m, &target, stack_pointer);
    assert_eq!([place, place - 600, place - LOOP_FRAME + 8].map(|sp| from(&m, sp)), [0x2000; 3]);
    // It is a caller's, or another thread's: above or below.
    assert_eq!([place - LOOP_FRAME, place + 8, 0x100, u64::MAX].map(|sp| from(&m, sp)), [0; 4]);
    // Where frames hang on the state itself.
    let older = PythonOffsets { tstate_cframe: 48, ..PY310 };
    m.put(0x7000 + 48, &place.to_le_bytes());
    m.put(0x7000 + 24, &0x1000u64.to_le_bytes());
    assert_eq!(holders_frame(&m, &Target { python: older, ..target }, place - 100), 0x1000);
    // Somebody who is gone, and nobody.
    for state in [0xdead_0000u64, 0] {
        m.put(0xa000, &state.to_le_bytes());
        assert_eq!(from(&m, place), 0);
    }
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

/// Frames of a chunk, from its first byte to the last of a page, and one in the next: each is read as it is, and
/// nothing in front of the chunk is touched.
#[test]
fn frames_of_a_chunk_share_reads() {
    let mut m = Fake::default();
    let code = 0x3000u64;
    m.put(code, &[0; 96]);
    m.put(code + 72, &5u32.to_le_bytes());
    let frames: Vec<u64> = (0..40)
        .map(|i| 0x10_0000 + i * 152)
        .chain([0x10_0000 + PAGE * 2 - 40, 0x10_0000 + PAGE * 3])
        .collect();
    let mut previous = 0u64;
    for (i, frame) in frames.iter().enumerate() {
        m.put(*frame, &[0xee; FRAME_HEAD as usize]);
        m.put(frame + 32, &code.to_le_bytes());
        m.put(frame + 48, &previous.to_le_bytes());
        m.put(frame + 56, &(code + 184 + 2 * i as u64).to_le_bytes());
        m.put(frame + 68, &[u8::from(i % 3 == 0)]);
        previous = *frame;
    }
    let counted = Counted { memory: m, fills: Cell::new(0) };
    let mut scratch = Scratch::new();
    let mut address = previous;
    for (i, _) in frames.iter().enumerate().rev() {
        let step = step(&counted, None, &PY311, address, &mut scratch).expect("readable");
        assert_eq!(
            step.frame,
            RawFrame::new(FRAME_PYTHON, code, 2 * i as u32, code_check(0, 0, 0, 5)),
            "{i}"
        );
        assert_eq!(step.entry, i % 3 == 0);
        address = step.previous;
    }
    assert_eq!(address, 0);
    let of_frames = counted.fills.get() - frames.len();
    assert!(of_frames <= 6, "{of_frames} reads for {} frames", frames.len());
}

struct Counted {
    memory: Fake,
    fills: Cell<usize>,
}

impl Memory for Counted {
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        self.fills.set(self.fills.get() + 1);
        self.memory.fill(address, size, block)
    }
}

#[test]
fn a_wild_frame_is_a_fault_and_not_a_guess() {
    let m = two_frames();
    assert!(step(&m, None, &PY311, 0xdead_0000, &mut Scratch::new()).is_err());
    // There is memory, but nobody lays out frames like this.
    assert!(step(&m, None, &PY311, 0x1004, &mut Scratch::new()).is_err());
}
