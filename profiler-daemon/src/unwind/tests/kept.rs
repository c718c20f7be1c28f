//! The kernel's maps, in our own memory.

use std::collections::BTreeMap;

use profiler_common::unwind::{Block, Mapping, Rule, Space};
use profiler_ebpf::native::Tables;

use crate::unwind::cache::Sink;

/// See the module.
#[derive(Default)]
pub(super) struct Kept {
    pub mappings: Vec<Mapping>,
    pub blocks: Vec<Block>,
    pub rules: Vec<Rule>,
    /// By pid.
    pub spaces: BTreeMap<u32, Space>,
    /// Nothing can be written from now on.
    pub broken: bool,
}

fn put<T: Clone>(all: &mut Vec<T>, at: usize, value: T, empty: T) {
    if all.len() <= at {
        all.resize(at + 1, empty);
    }
    all[at] = value;
}

impl Sink for &mut Kept {
    fn rules(&mut self, rules: &[(u16, Rule)]) -> std::io::Result<()> {
        rules.iter().for_each(|(at, rule)| put(&mut self.rules, (*at).into(), *rule, Rule::default()));
        Ok(())
    }
    fn blocks(&mut self, numbers: &[u32], blocks: &[Block]) -> std::io::Result<()> {
        let both = numbers.iter().zip(blocks);
        both.for_each(|(at, block)| put(&mut self.blocks, *at as usize, *block, Block::zeroed()));
        Ok(())
    }
    fn mappings(&mut self, first: u32, mappings: &[Mapping]) -> std::io::Result<()> {
        if self.broken {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        for (at, mapping) in mappings.iter().enumerate() {
            put(&mut self.mappings, first as usize + at, *mapping, Mapping::default());
        }
        Ok(())
    }
    fn space(&mut self, pid: u32, space: Space) -> std::io::Result<()> {
        self.spaces.insert(pid, space);
        Ok(())
    }
    fn forget(&mut self, pid: u32) {
        self.spaces.remove(&pid);
    }
}

impl Tables for Kept {
    fn mapping(&self, number: u32) -> Option<&Mapping> {
        self.mappings.get(number as usize)
    }
    fn block(&self, number: u32) -> Option<&Block> {
        self.blocks.get(number as usize)
    }
    fn rule(&self, number: u16) -> Option<&Rule> {
        self.rules.get(usize::from(number))
    }
}
