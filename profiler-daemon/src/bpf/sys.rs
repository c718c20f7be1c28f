//! System calls that aya has no function for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `BPF_OBJ_GET_INFO_BY_FD` (include/uapi/linux/bpf.h).
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;

/// The start of `struct bpf_prog_info`, up to and including the run-time statistics (5.1).
#[repr(C)]
#[derive(Clone, Copy)]
struct ProgInfo {
    bytes: [u8; 256],
}

/// Offsets in `struct bpf_prog_info`: `run_time_ns` and `run_cnt` (include/uapi/linux/bpf.h).
const RUN_TIME: usize = 192;
const RUN_COUNT: usize = 200;

/// Time spent in a program and how often it ran; both are 0 unless `kernel.bpf_stats_enabled` is 1.
pub fn program_run_time(program: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        len: u32,
        info: u64,
        pad: [u64; 14],
    }
    let mut info = ProgInfo { bytes: [0; 256] };
    let attr = Attr {
        fd: program.as_raw_fd() as u32,
        len: size_of::<ProgInfo>() as u32,
        info: (&raw mut info) as u64,
        pad: [0; 14],
    };
    // SAFETY: both structures outlive the call, and the kernel writes at most `len` bytes.
    let failed =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const attr, size_of::<Attr>()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    let word = |at: usize| {
        let mut b = [0; 8];
        b.copy_from_slice(&info.bytes[at..at + 8]);
        u64::from_ne_bytes(b)
    };
    Ok((word(RUN_TIME), word(RUN_COUNT)))
}

/// `CLOCK_MONOTONIC`, ns: the clock of every record's time.
pub fn monotonic_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME`, ns since the epoch.
pub fn realtime_ns() -> u64 {
    clock(libc::CLOCK_REALTIME)
}

/// `CLOCK_BOOTTIME`, ns: as the monotonic clock, and it goes on while the machine sleeps.
pub fn boottime_ns() -> u64 {
    clock(libc::CLOCK_BOOTTIME)
}

fn clock(id: libc::clockid_t) -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours; these clocks always exist.
    unsafe { libc::clock_gettime(id, &raw mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// What to add to the monotonic clock to get the time since the epoch, ns. It changes: the clock is set, and the
/// monotonic one stands still while the machine is suspended.
pub fn epoch() -> i64 {
    let mut best = (u64::MAX, 0);
    // The narrowest of a few: something may come between the readings.
    for _ in 0..4 {
        let before = monotonic_ns();
        let real = realtime_ns();
        let took = monotonic_ns() - before;
        if took < best.0 {
            best = (took, real as i64 - (before + took / 2) as i64);
        }
    }
    best.1
}
