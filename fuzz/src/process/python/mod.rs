//! As in the daemon, for what is read there.

#[rustfmt::skip]
#[path = "../../../../profiler-daemon/src/process/python/layout.rs"]
pub mod layout;

/// What `layout` asks of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    pub major: u8,
    pub minor: u8,
}
