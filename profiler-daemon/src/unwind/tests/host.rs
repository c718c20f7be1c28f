//! Tables of one file without a kernel, and what holds of all of them. The fuzz targets use it too.

use profiler_common::unwind::{Block, Mapping, RULE_NONE, RULES_FROM, Rule, mapping_mark};
use profiler_ebpf::native::{Tables, rule_number};

use crate::unwind::rows::{NONE, ROWS_MAX, Rows, STOP};
use crate::unwind::table::Table;

/// One file's table, mapped where the file says.
pub struct Host {
    pub table: Table,
    pub mapping: Mapping,
    pub rules: Vec<Rule>,
}

impl Host {
    pub fn new(rows: &Rows) -> Self {
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

/// What holds of the rows of any section.
pub fn check_rows(rows: &Rows) {
    assert!(rows.rows.len() <= ROWS_MAX);
    assert!(rows.rows.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1));
    assert_eq!(rows.rows.last().map(|row| row.1), Some(NONE));
    assert!(rows.rows.iter().all(|row| row.1 >= STOP || usize::from(row.1) < rows.rules.len()));
    // The tree says what the list says: that a row holds up to the next one.
    let host = Host::new(rows);
    let at = |pc| rule_number(&host, &host.mapping, pc);
    for pair in rows.rows.windows(2).step_by(rows.rows.len() / 200 + 1) {
        let [begin, next] = [pair[0].0, pair[1].0].map(|key| rows.base.wrapping_add(u64::from(key)));
        let here = at(begin);
        assert_eq!(at(next - 1), here);
        assert_eq!(here == RULE_NONE, pair[0].1 == NONE);
    }
    // And the last one up to the end.
    let last = rows.rows.last().map(|row| rows.base.wrapping_add(u64::from(row.0)));
    assert!(last.is_none_or(|last| at(last) == RULE_NONE && at(u64::MAX) == RULE_NONE));
}
