//! As in the daemon.

#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/symbolize/python/linetable/mod.rs"]
pub mod linetable;
