//! As in the daemon, for what is read there.

#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/process/anonymous.rs"]
pub mod anonymous;

#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/process/elf.rs"]
pub mod elf;

pub mod python;

#[rustfmt::skip]
#[path = "../../../profiler-daemon/src/process/usdt.rs"]
pub mod usdt;

/// What `elf` asks of a mapping.
pub mod maps {
    pub struct Mapping {
        pub start: u64,
        pub offset: u64,
        pub executable: bool,
    }
}
