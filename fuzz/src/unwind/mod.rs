//! As in the daemon.

#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/unwind/rows.rs"]
pub mod rows;
#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/unwind/rule.rs"]
mod rule;
#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/unwind/section.rs"]
pub mod section;
#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/unwind/table.rs"]
pub mod table;
