//! Rows as the blocks that the kernel side searches.
//!
//! In: [`Rows`] and the number that each of its rules has among all. Out: a tree of blocks, root last, whose children
//! are numbered from the table's first block on.

use profiler_common::unwind::{
    Block, CHILDREN, LEAF_ROWS, LEVELS_MAX, RULE_NONE, RULE_STOP, RULE_UNSUPPORTED,
};

use super::rows::{self, Rows};

/// One file's table.
#[derive(Clone)]
pub struct Table {
    /// The address in the file that the table's addresses are relative to.
    pub base: u64,
    /// Children before their parents; the root is the last.
    pub blocks: Vec<Block>,
    /// How many of them are leaves.
    pub leaves: usize,
    /// Levels above the leaves, at least one.
    pub levels: u32,
    pub rows: usize,
}

impl Table {
    /// `number`: that of a place in [`Rows::rules`].
    pub fn new(rows: &Rows, number: impl Fn(u16) -> u16) -> Self {
        let number = |rule: u16| match rule {
            rows::NONE => RULE_NONE,
            rows::UNSUPPORTED => RULE_UNSUPPORTED,
            rows::STOP => RULE_STOP,
            place => number(place),
        };
        let mut blocks = Vec::with_capacity(rows.rows.len() / LEAF_ROWS * 9 / 8 + 2);
        // What each block of the level before covers, and its number.
        let mut level: Vec<(u32, u32)> = Vec::new();
        let mut leaf: Vec<(u16, u16)> = Vec::with_capacity(LEAF_ROWS);
        let mut head = 0;
        for &(key, rule) in &rows.rows {
            let low = u16::try_from(key - head);
            if leaf.is_empty() || leaf.len() == LEAF_ROWS || low.is_err() {
                if !leaf.is_empty() {
                    level.push((head, blocks.len() as u32));
                    blocks.push(Block::leaf(&leaf));
                    leaf.clear();
                }
                head = key;
                leaf.push((0, number(rule)));
            } else if let Ok(low) = low {
                leaf.push((low, number(rule)));
            }
        }
        level.push((head, blocks.len() as u32));
        blocks.push(Block::leaf(&leaf));
        let leaves = blocks.len();
        let mut levels = 0;
        while level.len() > 1 || levels == 0 {
            let above: Vec<(u32, u32)> = level
                .chunks(CHILDREN)
                .map(|children| {
                    let number = blocks.len() as u32;
                    blocks.push(Block::inner(children));
                    (children[0].0, number)
                })
                .collect();
            level = above;
            levels += 1;
        }
        debug_assert!(levels <= LEVELS_MAX, "bounded by the number of rows");
        Self { base: rows.base, blocks, leaves, levels, rows: rows.rows.len() }
    }

    /// Renumbers children: block `n` of the table becomes block `numbers[n]`.
    pub fn place(&mut self, numbers: &[u32]) {
        for block in &mut self.blocks[self.leaves..] {
            for at in 0..CHILDREN as u32 {
                let child = block.child(at) as usize;
                block.set_child(at, numbers[child]);
            }
        }
    }
}
