//! Unwind tables as the kernel side reads them: how to get from a program counter to the caller's registers.
//!
//! A table belongs to one ELF file. It is a tree of [`Block`]s of one size: leaves hold rows (where code begins that
//! one rule holds for, and that rule's number), the others where their children begin. Rules are few (some 4,500 for
//! all files of a large system), so there is one list of them for all tables. A process is a list of [`Mapping`]s.

use core::mem::size_of;

/// Rows of a leaf: 2 bytes of address, relative to the leaf's own beginning, and 2 bytes of rule.
pub const LEAF_ROWS: usize = 128;
/// Children of a block that is no leaf: 4 bytes of address, relative to the table's beginning, and 4 of block number.
pub const CHILDREN: usize = 64;
/// Levels above the leaves, at most: 64³ leaves hold far more than [`BLOCKS_MAX`].
pub const LEVELS_MAX: u32 = 3;
/// Blocks of all tables: 64 MiB. 1,597 files of a large system have 17.6 million rows, which are 67 MiB.
pub const BLOCKS_MAX: u32 = 131_072;
/// Blocks come into the kernel's memory so many at a time (1 MiB): most hosts need few.
pub const CHUNK_BLOCKS: u32 = 2048;
pub const CHUNKS_MAX: u32 = BLOCKS_MAX / CHUNK_BLOCKS;
/// Rules of all tables. What finds no room is [`RULE_UNSUPPORTED`].
pub const RULES_MAX: u32 = 16_384;
/// Mappings of all processes; forked ones share theirs. 600 programs with 100 each.
pub const MAPPINGS_MAX: u32 = 65_536;
/// Mappings of one process: Linux lets it have 65,530, but more than some hundred that hold code are unheard of.
pub const MAPPINGS_OF_ONE: u32 = 4096;

/// No unwind information covers this code.
pub const RULE_NONE: u16 = 0;
/// There is some, and it cannot be expressed as a [`Rule`].
pub const RULE_UNSUPPORTED: u16 = 1;
/// Nothing called this: its return address is undefined.
pub const RULE_STOP: u16 = 2;
/// The first that is not one of the above.
pub const RULES_FROM: u16 = 3;

/// A piece of a table. The memory is that of a leaf (`u16` addresses, then `u16` rules) or of an inner block (`u32`
/// addresses, then `u32` block numbers). What is not used repeats the last rule or child behind the highest address.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Block([u32; 128]);

impl Block {
    pub const fn zeroed() -> Self {
        Self([0; 128])
    }

    /// A leaf of these rows, at least one and in order; those that find no room are left out.
    pub fn leaf(rows: &[(u16, u16)]) -> Self {
        let mut block = Self::zeroed();
        let pad = (u16::MAX, rows.last().map_or(RULE_NONE, |row| row.1));
        for at in 0..LEAF_ROWS {
            let (key, rule) = rows.get(at).copied().unwrap_or(pad);
            block.0[at / 2] |= u32::from(key) << (at % 2 * 16);
            block.0[64 + at / 2] |= u32::from(rule) << (at % 2 * 16);
        }
        block
    }

    /// An inner block of these children, at least one and in order.
    pub fn inner(children: &[(u32, u32)]) -> Self {
        let mut block = Self::zeroed();
        let pad = (u32::MAX, children.last().map_or(0, |child| child.1));
        for at in 0..CHILDREN {
            (block.0[at], block.0[CHILDREN + at]) = children.get(at).copied().unwrap_or(pad);
        }
        block
    }

    /// Of an inner block: where child `at` begins.
    #[inline(always)]
    pub fn begin(&self, at: u32) -> u32 {
        self.0[at as usize & (CHILDREN - 1)]
    }

    /// Of an inner block: child `at`.
    #[inline(always)]
    pub fn child(&self, at: u32) -> u32 {
        self.0[CHILDREN + (at as usize & (CHILDREN - 1))]
    }

    pub fn set_child(&mut self, at: u32, block: u32) {
        self.0[CHILDREN + (at as usize & (CHILDREN - 1))] = block;
    }

    /// Of a leaf: where row `at` begins.
    #[inline(always)]
    pub fn key(&self, at: u32) -> u16 {
        // SAFETY: the masked index is below 128, and the block holds 256 halves.
        unsafe { *(&raw const self.0).cast::<u16>().add(at as usize & (LEAF_ROWS - 1)) }
    }

    /// Of a leaf: the rule of row `at`.
    #[inline(always)]
    pub fn rule(&self, at: u32) -> u16 {
        // SAFETY: as above.
        unsafe { *(&raw const self.0).cast::<u16>().add(LEAF_ROWS + (at as usize & (LEAF_ROWS - 1))) }
    }
}

/// How to get to the caller. The CFA (canonical frame address) is the stack pointer before the call that made the
/// frame; on x86-64 the return address lies right below it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// One of [`cfa`].
    pub cfa: u8,
    /// One of [`fp`].
    pub fp: u8,
    /// One of [`ra`].
    pub ra: u8,
    /// With [`cfa::LEAF`] the register, numbered as DWARF does.
    pub register: u8,
    pub cfa_offset: i32,
    pub fp_offset: i32,
    /// What to add to a CFA that was read from memory; with [`ra::AT_SP`] where the return address is.
    pub extra: i32,
}

/// Where the CFA is.
pub mod cfa {
    /// There is no rule (the rest says nothing).
    pub const NONE: u8 = 0;
    /// The stack pointer plus the offset.
    pub const SP: u8 = 1;
    /// The frame pointer plus the offset.
    pub const FP: u8 = 2;
    /// What is stored at the stack pointer plus the offset, plus `extra`.
    pub const AT_SP: u8 = 3;
    /// What is stored at the frame pointer plus the offset, plus `extra`.
    pub const AT_FP: u8 = 4;
    /// Another register plus the offset. Such registers are known only where the thread was interrupted, so this serves
    /// functions that call nobody (assembler of cryptography does this), and prologues.
    pub const LEAF: u8 = 6;
    /// A procedure linkage table: entries are of 16 bytes, and from the offset in each on a word more is pushed.
    pub const PLT: u8 = 5;
}

/// Where the caller's frame pointer is.
pub mod fp {
    /// Where it was.
    pub const SAME: u8 = 0;
    /// Stored at the CFA plus the offset.
    pub const AT_CFA: u8 = 1;
    /// Stored at the frame pointer plus the offset.
    pub const AT_FP: u8 = 2;
    /// Stored at the stack pointer plus the offset.
    pub const AT_SP: u8 = 3;
    /// Nowhere that could be told.
    pub const LOST: u8 = 4;
}

/// Where the return address is.
pub mod ra {
    /// Right below the CFA.
    pub const BELOW_CFA: u8 = 0;
    /// Stored at the stack pointer plus `extra`: a signal's trampoline. It is no return address then, but the
    /// instruction that was interrupted.
    pub const AT_SP: u8 = 1;
}

/// Executable memory of a process. Value of the map `MAPPINGS`; those of one process follow each other in the order of
/// their addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// The address that its table's addresses are relative to.
    pub base: u64,
    /// The block at the top of its table.
    pub root: u32,
    /// [`mapping_mark`].
    pub mark: u32,
}

impl Mapping {
    /// Levels above the leaves, 1 to [`LEVELS_MAX`]; 0: there is no table for this code (it is compiled at run time,
    /// or its file has none), and frame pointers are all there is.
    #[inline(always)]
    pub const fn levels(&self) -> u32 {
        self.mark & 3
    }

    /// The [`Space::generation`] that it belongs to.
    #[inline(always)]
    pub const fn generation(&self) -> u32 {
        self.mark >> 2
    }
}

/// The value of [`Mapping::mark`].
pub const fn mapping_mark(levels: u32, generation: u32) -> u32 {
    levels | generation << 2
}

/// Value of the map `SPACES`, keyed by pid: which mappings are the process's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// The number of the first, and how many.
    pub first: u32,
    pub count: u32,
    /// Below 2³⁰, and another one whenever these places are used anew: a process that was forked unseen may still name
    /// them.
    pub generation: u32,
    pub reserved: u32,
}

/// How the walk of a stack's native frames ended; in [`crate::Sample::end`].
pub mod end {
    /// At a frame that nothing called.
    pub const COMPLETE: u8 = 0;
    /// At the limit of frames.
    pub const TRUNCATED: u8 = 1;
    /// In code without a rule, where there is no frame pointer either.
    pub const NO_RULE: u8 = 2;
    /// In code of a file for which there is no table.
    pub const NO_TABLE: u8 = 3;
    /// At an address that is in no mapping.
    pub const UNMAPPED: u8 = 4;
    /// At a rule that is not supported.
    pub const UNSUPPORTED: u8 = 5;
    /// Where the stack could not be read.
    pub const FAULT: u8 = 6;
    /// Where the caller's frame would lie below its callee's.
    pub const DISORDER: u8 = 7;
    /// Before it began: the thread's registers in user space are not known.
    pub const NO_REGISTERS: u8 = 8;
    /// Number of these.
    pub const COUNT: usize = 9;
}

const _: () = {
    assert!(LEVELS_MAX < 4);
    assert!(size_of::<Block>() == 512);
    assert!(LEAF_ROWS * 4 == 512 && CHILDREN * 8 == 512);
    assert!(size_of::<Rule>() == 16);
    assert!(size_of::<Mapping>() == 32);
    assert!(size_of::<Space>() == 16);
    assert!(BLOCKS_MAX.is_multiple_of(CHUNK_BLOCKS));
};
