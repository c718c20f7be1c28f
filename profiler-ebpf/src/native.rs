//! Walking native frames by unwind tables.
//!
//! In: registers, the process's mappings and the tables of its files (`profiler_common::unwind`). Out: the caller's
//! registers, one frame at a time. Where no table says how to go on, one step by frame pointer is tried, which is a
//! guess: code that is compiled at run time keeps them, code of files may not. Nothing here knows about BPF.

use profiler_common::unwind::Block as Rows;
use profiler_common::unwind::{
    CHILDREN, LEAF_ROWS, LEVELS_MAX, MAPPINGS_MAX, Mapping, RULE_NONE, RULE_STOP, Rule, Space, cfa, end, fp,
    ra,
};

use crate::memory::{Block, Fault, Memory};
use crate::places::{Places, place};

/// Where mappings, blocks and rules are looked up by number.
pub trait Tables {
    fn mapping(&self, number: u32) -> Option<&Mapping>;
    fn block(&self, number: u32) -> Option<&Rows>;
    fn rule(&self, number: u16) -> Option<&Rule>;
    /// Rules that were found before, by address and generation of the mappings, if any are remembered.
    fn found(&self) -> Option<&Places<Found>> {
        None
    }
}

/// A rule that was found. Most frames are of code that was in a stack before, and a search in a table touches six lines
/// of memory that nobody else does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub pc: u64,
    /// [`Space::generation`], 0 = nothing was found yet. While a process's mappings are of it, so are their tables' rules.
    pub generation: u32,
    pub rule: u32,
}

/// A frame pointer further than this above the stack pointer is not one: the default thread stack is 8 MiB.
const STACK_SPAN: u64 = 8 << 20;

/// Places of registers, as DWARF numbers them.
const RBP: usize = 6;
const RSP: usize = 7;

/// Where a walk stands.
#[repr(C)]
pub struct Walker {
    pub pc: u64,
    pub sp: u64,
    pub fp: u64,
    /// 1: `pc` is an instruction that was about to run, not a return address.
    pub exact: u32,
    /// 1: `pc` was found by frame pointer.
    pub guessed: u32,
    /// The registers where the walk began, numbered as DWARF does, and whether it is still there.
    registers: [u64; 16],
    leaf: u32,
    /// 1: somewhere on the way was code in no mapping.
    pub unknown: u32,
    /// The process's mappings.
    space: Space,
    /// The mapping that was found last: most frames are in the same as the one before.
    mapping: Mapping,
    stack: Window,
}

impl Walker {
    pub const fn new() -> Self {
        Self {
            pc: 0,
            sp: 0,
            fp: 0,
            exact: 0,
            guessed: 0,
            registers: [0; 16],
            leaf: 0,
            unknown: 0,
            space: Space { first: 0, count: 0, generation: 0, reserved: 0 },
            mapping: Mapping { start: 0, end: 0, base: 0, root: 0, mark: 0 },
            stack: Window::new(),
        }
    }

    /// Begins at these registers, of a thread of the process with these mappings.
    #[inline(always)]
    pub fn begin(&mut self, pc: u64, registers: [u64; 16], space: Space) {
        (self.pc, self.sp, self.fp) = (pc, registers[RSP], registers[RBP]);
        self.registers = registers;
        self.leaf = 1;
        self.space = space;
        (self.exact, self.guessed, self.unknown) = (1, 0, 0);
        self.mapping = Mapping::default();
        self.stack.valid = 0;
    }

    /// Moves to the caller. The error says why there is none, one of [`end`].
    #[inline(always)]
    pub fn step<M: Memory, T: Tables>(&mut self, memory: &M, tables: &T) -> Result<(), u8> {
        let leaf = self.leaf != 0;
        self.leaf = 0;
        // A return address may be the first of another function, where the call is the last of its own.
        let pc = if self.exact != 0 { self.pc } else { self.pc.wrapping_sub(1) };
        if !self.mapping_of(tables, pc) {
            self.unknown = 1;
            return self.by_frame_pointer(memory, tables, end::UNMAPPED);
        }
        if self.mapping.levels() == 0 {
            return self.by_frame_pointer(memory, tables, end::NO_TABLE);
        }
        let number = match tables.found() {
            Some(places) => {
                let place = place(places, pc ^ u64::from(self.space.generation) << 40);
                let found = place.get();
                if found.generation == self.space.generation && found.pc == pc {
                    found.rule as u16
                } else {
                    let number = rule_number(tables, &self.mapping, pc);
                    place.set(Found { pc, generation: self.space.generation, rule: number.into() });
                    number
                }
            }
            None => rule_number(tables, &self.mapping, pc),
        };
        if number == RULE_STOP {
            return Err(end::COMPLETE);
        }
        match tables.rule(number) {
            Some(rule) if rule.cfa != cfa::NONE && (leaf || rule.cfa != cfa::LEAF) => {
                self.by_rule(memory, rule)
            }
            _ => {
                let reason = if number == RULE_NONE { end::NO_RULE } else { end::UNSUPPORTED };
                self.by_frame_pointer(memory, tables, reason)
            }
        }
    }

    #[inline(always)]
    fn by_rule<M: Memory>(&mut self, memory: &M, rule: &Rule) -> Result<(), u8> {
        let base = match rule.cfa {
            cfa::FP | cfa::AT_FP => self.fp,
            cfa::LEAF => self.registers[rule.register as usize & 15],
            _ => self.sp,
        };
        let mut frame = plus(base, rule.cfa_offset);
        if rule.cfa == cfa::AT_SP || rule.cfa == cfa::AT_FP {
            let extra = if rule.ra == ra::AT_SP { 0 } else { rule.extra };
            frame = plus(self.word(memory, frame)?, extra);
        } else if rule.cfa == cfa::PLT {
            let pushed = (self.pc & 15) as i32 >= rule.cfa_offset;
            frame = self.sp.wrapping_add(if pushed { 16 } else { 8 });
        }
        // The frame pointer comes first, because it lies below the return address: one read serves both.
        let saved = match rule.fp {
            fp::SAME => self.fp,
            fp::LOST => 0,
            kind => {
                let base = if kind == fp::AT_CFA {
                    frame
                } else if kind == fp::AT_FP {
                    self.fp
                } else {
                    self.sp
                };
                self.word(memory, plus(base, rule.fp_offset))?
            }
        };
        let signal = rule.ra == ra::AT_SP;
        let at = if signal { plus(self.sp, rule.extra) } else { frame.wrapping_sub(8) };
        let pc = self.word(memory, at)?;
        // A handler may have a stack of its own; everybody else's callers lie above.
        if !signal && frame <= self.sp {
            return Err(end::DISORDER);
        }
        if pc == 0 {
            return Err(end::COMPLETE);
        }
        (self.pc, self.sp, self.fp) = (pc, frame, saved);
        (self.exact, self.guessed) = (u32::from(signal), 0);
        Ok(())
    }

    /// One step by frame pointer. `reason`: why it takes one.
    #[inline(always)]
    fn by_frame_pointer<M: Memory, T: Tables>(
        &mut self,
        memory: &M,
        tables: &T,
        reason: u8,
    ) -> Result<(), u8> {
        let at = self.fp;
        if at == 0 {
            // The outermost frame has none (System V ABI for x86-64, 3.4.1), but it does call something.
            return Err(if self.exact != 0 { reason } else { end::COMPLETE });
        }
        if at & 7 != 0 || at < self.sp || at - self.sp >= STACK_SPAN {
            return Err(reason);
        }
        let Ok((next, pc)) = memory.pair(at) else { return Err(reason) };
        if pc == 0 {
            return Err(end::COMPLETE);
        }
        // Where it is known what is code, it must lead there.
        if self.space.count != 0 && !self.mapping_of(tables, pc.wrapping_sub(1)) {
            return Err(reason);
        }
        (self.pc, self.sp, self.fp) = (pc, at.wrapping_add(16), next);
        (self.exact, self.guessed) = (0, 1);
        Ok(())
    }

    #[inline(always)]
    fn word<M: Memory>(&mut self, memory: &M, address: u64) -> Result<u64, u8> {
        self.stack.word(memory, address).map_err(|Fault| end::FAULT)
    }

    /// Makes `mapping` the one that holds an address.
    #[inline(always)]
    fn mapping_of<T: Tables>(&mut self, tables: &T, pc: u64) -> bool {
        if pc >= self.mapping.start && pc < self.mapping.end {
            return true;
        }
        let (mut low, mut high) = (0, self.space.count);
        for _ in 0..=MAPPINGS_MAX.ilog2() {
            if low >= high {
                break;
            }
            let middle = (low + high) / 2;
            let Some(mapping) = tables.mapping(self.space.first.wrapping_add(middle)) else { break };
            if pc < mapping.start {
                high = middle;
            } else if pc >= mapping.end {
                low = middle + 1;
            } else if mapping.generation() == self.space.generation {
                self.mapping = *mapping;
                return true;
            } else {
                break;
            }
        }
        false
    }
}

impl Default for Walker {
    fn default() -> Self {
        Self::new()
    }
}

#[inline(always)]
fn plus(base: u64, offset: i32) -> u64 {
    base.wrapping_add(i64::from(offset) as u64)
}

/// The number of the rule that holds at an address of a mapping with a table.
#[inline(always)]
pub fn rule_number<T: Tables>(tables: &T, mapping: &Mapping, pc: u64) -> u16 {
    let key = pc.wrapping_sub(mapping.base);
    if key > u64::from(u32::MAX) {
        return RULE_NONE;
    }
    let key = key as u32;
    let (mut number, mut begin) = (mapping.root, 0);
    for level in 0..LEVELS_MAX {
        if level >= mapping.levels() {
            break;
        }
        let Some(block) = tables.block(number) else { return RULE_NONE };
        if key < block.begin(0) {
            return RULE_NONE;
        }
        // The last child that begins at or before the address.
        let (mut at, mut half) = (0, CHILDREN as u32 / 2);
        while half > 0 {
            if block.begin(at + half) <= key {
                at += half;
            }
            half /= 2;
        }
        (number, begin) = (block.child(at), block.begin(at));
    }
    let Some(block) = tables.block(number) else { return RULE_NONE };
    let low = key.wrapping_sub(begin);
    let low = if low > u32::from(u16::MAX) { u16::MAX } else { low as u16 };
    let (mut at, mut half) = (0, LEAF_ROWS as u32 / 2);
    while half > 0 {
        if block.key(at + half) <= low {
            at += half;
        }
        half /= 2;
    }
    block.rule(at)
}

/// A stretch of the stack: most frames are small, and a read costs the same whether it fetches a word or some hundred
/// bytes, nearly.
#[repr(C)]
struct Window {
    base: u64,
    /// Bytes of `bytes` that were read.
    valid: u64,
    bytes: Block<WINDOW>,
}

const WINDOW: usize = 1024;
/// A read of all of it would be masked to nothing.
const WINDOW_READ: u64 = WINDOW as u64 - 8;
/// The next page may not be there.
const PAGE: u64 = 4096;

impl Window {
    const fn new() -> Self {
        Self { base: 0, valid: 0, bytes: Block::zeroed() }
    }

    #[inline(always)]
    fn word<M: Memory>(&mut self, memory: &M, address: u64) -> Result<u64, Fault> {
        // A table may say so; `Block` reads only what is aligned.
        if address & 7 != 0 {
            return memory.word(address);
        }
        let at = address.wrapping_sub(self.base);
        if at < WINDOW as u64 && at + 8 <= self.valid {
            return Ok(self.bytes.u64(at as u32));
        }
        let rest = PAGE - (address & (PAGE - 1));
        let size = if rest < WINDOW_READ { rest } else { WINDOW_READ };
        self.valid = 0;
        memory.fill(address, size as u32, &mut self.bytes)?;
        (self.base, self.valid) = (address, size);
        Ok(self.bytes.u64(0))
    }
}

#[cfg(test)]
mod tests;
