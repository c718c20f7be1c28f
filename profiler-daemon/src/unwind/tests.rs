//! Tables against gimli's own reading of the same files, and against forged ones.

mod cache;
mod forged;
mod kept;
mod nested;
mod oracle;

use profiler_common::unwind::{Block, Mapping, RULES_FROM, Rule, mapping_mark};
use profiler_ebpf::native::Tables;

use super::rows::Rows;
use super::table::Table;

/// One file's table, mapped where the file says.
pub(super) struct Host {
    pub table: Table,
    pub mapping: Mapping,
    pub rules: Vec<Rule>,
}

impl Host {
    pub(super) fn new(rows: &Rows) -> Self {
        let table = Table::new(rows, |place| place + RULES_FROM);
        let mapping = Mapping {
            start: 0,
            end: u64::MAX,
            base: table.base,
            root: table.blocks.len() as u32 - 1,
            mark: mapping_mark(table.levels, 0),
        };
        Self { table, mapping, rules: rows.rules.clone() }
    }
}

impl Tables for Host {
    fn mapping(&self, number: u32) -> Option<&Mapping> {
        (number == 0).then_some(&self.mapping)
    }
    fn block(&self, number: u32) -> Option<&Block> {
        self.table.blocks.get(number as usize)
    }
    fn rule(&self, number: u16) -> Option<&Rule> {
        self.rules.get(number.checked_sub(RULES_FROM)? as usize)
    }
}
