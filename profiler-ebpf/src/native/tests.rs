//! The walk over recorded memory, with tables made by hand.

use std::cell::Cell;
use std::collections::BTreeMap;

use profiler_common::unwind::{RULE_UNSUPPORTED, RULES_FROM, mapping_mark};

use super::*;

/// Words by address; the n-th read can be made to fail.
#[derive(Default)]
struct Recorded {
    words: BTreeMap<u64, u64>,
    reads: Cell<u32>,
    fails: Option<u32>,
}

impl Recorded {
    fn put(&mut self, address: u64, words: &[u64]) {
        for (at, word) in words.iter().enumerate() {
            self.words.insert(address + at as u64 * 8, *word);
        }
    }
}

impl Memory for Recorded {
    /// What was not recorded is 0 in pages of which something was, and not there otherwise.
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        let read = self.reads.get();
        self.reads.set(read + 1);
        if self.fails == Some(read) {
            return Err(Fault);
        }
        for at in 0..u64::from(size) {
            let byte = address + at;
            let page = byte & !(PAGE - 1);
            if self.words.range(page..page + PAGE).next().is_none() {
                return Err(Fault);
            }
            let word = self.words.get(&(byte & !7)).copied().unwrap_or(0).to_le_bytes();
            // SAFETY: `size` is at most N.
            unsafe { *block.as_mut_ptr().add(at as usize) = word[byte as usize & 7] };
        }
        Ok(())
    }
}

const CODE: u64 = 0x40_0000;
const JIT: u64 = 0x70_0000;

/// Functions, by where they begin in the code.
const ENTRY: u64 = CODE + 0x100;
const PUSHED: u64 = CODE + 0x110;
const FRAMED: u64 = CODE + 0x120;
const OUTERMOST: u64 = CODE + 0x180;
const TRAMPOLINE: u64 = CODE + 0x200;
const PLT: u64 = CODE + 0x300;
const LEAF: u64 = CODE + 0x400;
const OBSCURE: u64 = CODE + 0x500;
const NOTHING: u64 = CODE + 0x600;

struct Hand {
    mappings: Vec<Mapping>,
    blocks: Vec<Rows>,
    rules: Vec<Rule>,
}

impl Hand {
    fn new() -> Self {
        let rule = |kind, cfa_offset, fp, fp_offset| Rule {
            cfa: kind,
            cfa_offset,
            fp,
            fp_offset,
            ..Rule::default()
        };
        let rules = vec![
            rule(cfa::SP, 8, fp::SAME, 0),
            rule(cfa::SP, 16, fp::AT_CFA, -16),
            rule(cfa::FP, 16, fp::AT_CFA, -16),
            Rule { ra: ra::AT_SP, extra: 168, ..rule(cfa::AT_SP, 160, fp::AT_SP, 120) },
            rule(cfa::PLT, 11, fp::SAME, 0),
            Rule { register: 0, ..rule(cfa::LEAF, 8, fp::SAME, 0) },
        ];
        let number = |place: u16| RULES_FROM + place;
        let rows = [
            (ENTRY, number(0)),
            (PUSHED, number(1)),
            (FRAMED, number(2)),
            (OUTERMOST, RULE_STOP),
            (TRAMPOLINE, number(3)),
            (PLT, number(4)),
            (LEAF, number(5)),
            (OBSCURE, RULE_UNSUPPORTED),
            (NOTHING, RULE_NONE),
        ];
        let rows: Vec<(u16, u16)> = rows.iter().map(|(pc, rule)| ((pc - ENTRY) as u16, *rule)).collect();
        let blocks = vec![Rows::leaf(&rows), Rows::inner(&[((ENTRY - CODE) as u32, 0)])];
        let file = Mapping { start: CODE, end: CODE + 0x1000, base: CODE, root: 1, mark: mapping_mark(1, 5) };
        let jit = Mapping { start: JIT, end: JIT + 0x1000, base: 0, root: 0, mark: mapping_mark(0, 5) };
        Self { mappings: vec![file, jit], blocks, rules }
    }
}

impl Tables for Hand {
    fn mapping(&self, number: u32) -> Option<&Mapping> {
        self.mappings.get(number as usize)
    }
    fn block(&self, number: u32) -> Option<&Rows> {
        self.blocks.get(number as usize)
    }
    fn rule(&self, number: u16) -> Option<&Rule> {
        self.rules.get(usize::from(number.checked_sub(RULES_FROM)?))
    }
}

const SPACE: Space = Space { first: 0, count: 2, generation: 5, reserved: 0 };

const STACK: u64 = 0x7fff_0000_0f00;

fn registers(sp: u64, fp: u64) -> [u64; 16] {
    let mut registers = [0xdead_beef; 16];
    (registers[RSP], registers[RBP]) = (sp, fp);
    registers
}

/// (program counter, exact, guessed) of each frame, leaf first, and how it ended.
type Walked = (Vec<(u64, bool, bool)>, u8);

fn walk_from(memory: &Recorded, pc: u64, registers: [u64; 16]) -> Walked {
    let tables = Hand::new();
    let mut walker = Box::new(Walker::new());
    walker.begin(pc, registers, SPACE);
    let mut frames = Vec::new();
    loop {
        frames.push((walker.pc, walker.exact != 0, walker.guessed != 0));
        assert!(frames.len() < 100, "no end");
        if let Err(end) = walker.step(memory, &tables) {
            return (frames, end);
        }
    }
}

/// A leaf at its first instruction, called by one that has pushed its frame pointer, called by one that uses it (with a
/// large frame), called by the outermost.
fn chain() -> (Recorded, u64, [u64; 16]) {
    let mut memory = Recorded::default();
    memory.put(STACK, &[PUSHED + 4]);
    // The frame of the second: its caller's frame pointer, and where it returns to.
    let third = STACK + 0x2000;
    memory.put(STACK + 8, &[third, FRAMED + 4]);
    memory.put(third, &[0x1234_5678, OUTERMOST + 4]);
    (memory, ENTRY, registers(STACK, 0x9999))
}

#[test]
fn a_chain_is_followed_to_its_outermost_frame() {
    let (memory, pc, registers) = chain();
    let expected = vec![
        (ENTRY, true, false),
        (PUSHED + 4, false, false),
        (FRAMED + 4, false, false),
        (OUTERMOST + 4, false, false),
    ];
    assert_eq!(walk_from(&memory, pc, registers), (expected, end::COMPLETE));
}

#[test]
fn a_return_address_behind_a_function_belongs_to_it() {
    // A call that does not return may be its function's last instruction.
    let mut memory = Recorded::default();
    memory.put(STACK, &[OUTERMOST + 0x80]);
    let (frames, end) = walk_from(&memory, ENTRY, registers(STACK, 0));
    assert_eq!((frames.len(), end), (2, end::COMPLETE));
    // The same address as an instruction is the trampoline's first.
    let mut memory = Recorded::default();
    memory.put(STACK + 120, &[0; 8]);
    memory.put(STACK + 160, &[STACK + 0x800, ENTRY]);
    memory.put(STACK + 0x800, &[OUTERMOST + 4]);
    let (frames, end) = walk_from(&memory, TRAMPOLINE, registers(STACK, 0));
    assert_eq!(frames, [(TRAMPOLINE, true, false), (ENTRY, true, false), (OUTERMOST + 4, false, false)]);
    assert_eq!(end, end::COMPLETE);
}

#[test]
fn every_read_that_fails_ends_the_walk_where_it_is() {
    let (memory, pc, registers) = chain();
    let (whole, _) = walk_from(&memory, pc, registers);
    let reads = memory.reads.get();
    assert!(reads >= 2);
    for fails in 0..reads {
        let (mut memory, ..) = chain();
        memory.fails = Some(fails);
        let (frames, end) = walk_from(&memory, pc, registers);
        assert_eq!(end, end::FAULT);
        assert!(frames.len() < whole.len() && whole.starts_with(&frames), "{frames:?}");
    }
}

#[test]
fn a_stack_at_the_end_of_its_memory_is_read_to_its_last_word() {
    let top = 0x7fff_0000_1000;
    let mut memory = Recorded::default();
    memory.put(top - 24, &[PUSHED + 4, 0x77, OUTERMOST + 4]);
    let (frames, end) = walk_from(&memory, ENTRY, registers(top - 24, 0));
    assert_eq!((frames.len(), end), (3, end::COMPLETE));
    // A word that reaches into the next page is not there, and misaligned ones are read as they are.
    let (frames, end) = walk_from(&memory, ENTRY, registers(top - 4, 0));
    assert_eq!((frames.len(), end), (1, end::FAULT));
}

#[test]
fn words_that_are_not_aligned_are_what_is_there() {
    let mut memory = Recorded::default();
    memory.put(STACK, &[0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908, 0x1716_1514_1312_1110]);
    let mut window = Window::new();
    // Also where the window holds what is around them.
    for at in [5, 0, 3, 8, 11, 4] {
        let word = u64::from_le_bytes(core::array::from_fn(|n| (at + n) as u8));
        assert_eq!(window.word(&memory, STACK + at as u64), Ok(word), "{at}");
    }
}

#[test]
fn an_entry_of_the_linkage_table_has_pushed_from_its_second_instruction_on() {
    for (pc, words) in [(PLT, &[OUTERMOST + 4][..]), (PLT + 11, &[3, OUTERMOST + 4])] {
        let mut memory = Recorded::default();
        memory.put(STACK, words);
        let (frames, end) = walk_from(&memory, pc, registers(STACK, 0));
        assert_eq!((frames.len(), frames[1].0, end), (2, OUTERMOST + 4, end::COMPLETE));
    }
}

#[test]
fn other_registers_serve_where_the_thread_was_interrupted_and_nowhere_else() {
    let mut memory = Recorded::default();
    memory.put(STACK, &[LEAF + 4, 0, 0, OUTERMOST + 4]);
    let mut at = registers(STACK, 0);
    at[0] = STACK + 24;
    let (frames, end) = walk_from(&memory, LEAF, at);
    assert_eq!((frames.last().map(|f| f.0), end), (Some(OUTERMOST + 4), end::COMPLETE));
    // As a caller it has no frame pointer either.
    at[RBP] = 0x333;
    let (frames, end) = walk_from(&memory, ENTRY, at);
    assert_eq!((frames.len(), end), (2, end::UNSUPPORTED));
}

#[test]
fn without_a_rule_a_frame_pointer_is_followed_as_a_guess() {
    for (pc, reason) in [
        (JIT + 4, end::NO_TABLE),
        (NOTHING + 4, end::NO_RULE),
        (OBSCURE + 4, end::UNSUPPORTED),
        (0x1234, end::UNMAPPED),
    ] {
        let mut memory = Recorded::default();
        memory.put(STACK + 0x40, &[0x5678, OUTERMOST + 4]);
        let (frames, end) = walk_from(&memory, pc, registers(STACK, STACK + 0x40));
        assert_eq!(frames, [(pc, true, false), (OUTERMOST + 4, false, true)]);
        assert_eq!(end, end::COMPLETE);
        // What is no frame pointer is not followed: not aligned, below the stack, far above, not to be read, or
        // leading where no code is.
        for fp in [STACK + 0x41, STACK - 8, STACK + STACK_SPAN, 0, STACK + 0x4000] {
            let (frames, end) = walk_from(&memory, pc, registers(STACK, fp));
            assert_eq!((frames.len(), end), (1, reason), "{fp:#x}");
        }
        memory.put(STACK + 0x40, &[0x5678, 0x6666]);
        let (frames, end) = walk_from(&memory, pc, registers(STACK, STACK + 0x40));
        assert_eq!((frames.len(), end), (1, reason));
    }
}

#[test]
fn a_caller_below_its_callee_is_refused() {
    let mut memory = Recorded::default();
    memory.put(STACK - 0x100, &[0x1, OUTERMOST + 4]);
    let (frames, end) = walk_from(&memory, FRAMED, registers(STACK, STACK - 0x100));
    assert_eq!((frames.len(), end), (1, end::DISORDER));
}

#[test]
fn a_return_address_of_0_is_the_end() {
    let mut memory = Recorded::default();
    memory.put(STACK, &[0, 1]);
    assert_eq!(walk_from(&memory, ENTRY, registers(STACK, 0)).1, end::COMPLETE);
}

#[test]
fn mappings_of_another_time_are_not_believed() {
    let (memory, pc, registers) = chain();
    let mut walker = Box::new(Walker::new());
    walker.begin(pc, registers, Space { generation: 4, ..SPACE });
    assert_eq!(walker.step(&memory, &Hand::new()), Err(end::UNMAPPED));
    assert_eq!(walker.unknown, 1);
}

#[test]
fn any_memory_comes_to_an_end() {
    /// Every word is one of some that lead on.
    struct Wild(Cell<u64>);
    impl Memory for Wild {
        fn fill<const N: usize>(&self, _: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
            for at in 0..size as usize / 8 {
                // xorshift64
                let mut x = self.0.get();
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                self.0.set(x);
                let word = match x % 4 {
                    0 => CODE + (x >> 8) % 0x1000,
                    1 => STACK + (x >> 8) % 0x1_0000,
                    2 => JIT + (x >> 8) % 0x1000,
                    _ => x,
                };
                // SAFETY: `size` is at most N.
                unsafe { block.as_mut_ptr().cast::<u64>().add(at).write_unaligned(word) };
            }
            Ok(())
        }
    }
    let tables = Hand::new();
    let mut longest = 0;
    for seed in 1..2000 {
        let mut walker = Box::new(Walker::new());
        walker.begin(CODE + seed % 0x700, registers(STACK, STACK + seed * 8 % 0x1000), SPACE);
        let memory = Wild(Cell::new(seed));
        let mut steps = 0;
        // As many as the kernel side takes: memory that is made to lead on for ever does.
        while steps < 512 && walker.step(&memory, &tables).is_ok() {
            steps += 1;
        }
        longest = longest.max(steps);
    }
    assert!(longest > 3, "nothing was walked");
}
