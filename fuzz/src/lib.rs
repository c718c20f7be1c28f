//! The readers under test, from where the daemon has them: building the whole daemon instrumented would take minutes.

pub mod process;
pub mod symbolize;
pub mod unwind;

#[rustfmt::skip]
#[path = "../../profiler-daemon/src/unwind/tests/host.rs"]
pub mod host;
