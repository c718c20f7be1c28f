//! The readers under test, from where the daemon has them: building the whole daemon instrumented would take minutes.

pub mod process;
pub mod symbolize;
pub mod unwind;

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;

use profiler_common::unwind::{Block, Mapping, RULE_NONE, RULES_FROM, Rule, mapping_mark};
use profiler_ebpf::native::{Tables, rule_number};
use unwind::rows::{NONE, ROWS_MAX, Rows, STOP};
use unwind::table::Table;

/// A file in memory that holds these bytes.
pub fn file(bytes: &[u8]) -> File {
    // SAFETY: the name is a C string; the descriptor is nobody else's.
    let mut file = unsafe {
        let descriptor = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        assert!(descriptor >= 0, "no file in memory");
        File::from_raw_fd(descriptor)
    };
    file.write_all(bytes).expect("room");
    file
}

/// One file's table, mapped where the file says.
pub struct Host {
    pub table: Table,
    pub mapping: Mapping,
    rules: Vec<Rule>,
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
    for pair in rows.rows.windows(2).step_by(rows.rows.len() / 200 + 1) {
        let [begin, next] = [pair[0].0, pair[1].0].map(|key| rows.base.wrapping_add(u64::from(key)));
        let here = rule_number(&host, &host.mapping, begin);
        assert_eq!(rule_number(&host, &host.mapping, next - 1), here);
        assert_eq!(here == RULE_NONE, pair[0].1 == NONE);
    }
}
