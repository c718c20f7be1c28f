//! What the kernel answers when it is asked: every system call of the doctor.
//!
//! In: nothing, or a pid or a path. Out: facts, each as the kernel gave it or with the error it gave. Nothing is
//! changed: a map and a perf event are made and closed at once.

use std::fs;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// An `errno`.
pub type Errno = i32;

/// `BPF_MAP_CREATE` (linux/bpf.h).
const BPF_MAP_CREATE: libc::c_long = 0;
/// `BPF_MAP_TYPE_RINGBUF` (linux/bpf.h), since 5.8.
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
/// `PERF_TYPE_SOFTWARE` and `PERF_COUNT_SW_CPU_CLOCK` (linux/perf_event.h).
const PERF_TYPE_SOFTWARE: u32 = 1;
const PERF_COUNT_SW_CPU_CLOCK: u64 = 0;
/// `PERF_FLAG_FD_CLOEXEC` (linux/perf_event.h).
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// The start of `union bpf_attr` for BPF_MAP_CREATE; the kernel takes a shorter structure than its own.
#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// `struct perf_event_attr` up to `PERF_ATTR_SIZE_VER0`, 64 bytes.
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    /// A frequency, with bit 10 of `flags`.
    sample_freq: u64,
    sample_type: u64,
    read_format: u64,
    /// Bit 0 `disabled`, bit 10 `freq`.
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    bp_addr: u64,
}

const _: () = assert!(size_of::<PerfEventAttr>() == 64);

fn last_errno() -> Errno {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Takes the descriptor a system call returned and closes it, or tells the error.
fn closed(result: libc::c_long) -> Result<(), Errno> {
    if result < 0 {
        return Err(last_errno());
    }
    let fd = libc::c_int::try_from(result).map_err(|_| libc::EBADF)?;
    // SAFETY: the kernel has just given us this descriptor and nobody else has it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// The kernel's release and the machine, as `uname -r` and `uname -m` print them.
pub fn kernel() -> (String, String) {
    let mut name = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: the pointer is valid for the structure that uname fills in.
    unsafe { libc::uname(name.as_mut_ptr()) };
    // SAFETY: all zeroes is a valid utsname, and uname only writes text into it.
    let name = unsafe { name.assume_init() };
    let text = |field: &[libc::c_char]| {
        let bytes: Vec<u8> = field.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    (text(&name.release), text(&name.machine))
}

/// Whether a ring buffer can be made: BPF is there, its ring buffer is, and we may.
pub fn ring_buffer() -> Result<(), Errno> {
    // Before 5.11 a map's memory counts against this limit; for the daemon aya raises it. Where we may not, the map says so.
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the pointer is that of a structure that outlives the call.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    // 64 KiB is a multiple of every page size.
    let attr = MapCreate { map_type: BPF_MAP_TYPE_RINGBUF, max_entries: 1 << 16, ..MapCreate::default() };
    // SAFETY: the pointer and the size are those of a structure that outlives the call; the kernel only reads it.
    closed(unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, &raw const attr, size_of::<MapCreate>()) })
}

/// Whether the CPU clock can be sampled on CPU 0 for all processes and in the kernel too, as the sampler does.
pub fn cpu_clock() -> Result<(), Errno> {
    let attr = PerfEventAttr {
        kind: PERF_TYPE_SOFTWARE,
        size: size_of::<PerfEventAttr>() as u32,
        config: PERF_COUNT_SW_CPU_CLOCK,
        sample_freq: 99,
        flags: 1 | 1 << 10,
        ..PerfEventAttr::default()
    };
    let (pid, cpu, group): (libc::pid_t, libc::c_int, libc::c_int) = (-1, 0, -1);
    // SAFETY: the pointer is that of a structure that outlives the call and states its own size.
    closed(unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attr, pid, cpu, group, PERF_FLAG_FD_CLOEXEC)
    })
}

/// Whether the memory of another process can be read: the first bytes of our parent's first readable mapping.
/// `None` without a parent that has memory (we are a container's first process).
pub fn foreign_memory() -> Option<Result<(), Errno>> {
    let parent = std::os::unix::process::parent_id();
    if parent == 0 {
        return None;
    }
    let maps = match fs::read_to_string(format!("/proc/{parent}/maps")) {
        Ok(maps) => maps,
        Err(e) => return Some(Err(e.raw_os_error().unwrap_or(libc::EIO))),
    };
    let readable = |line: &str| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with('r'));
    let line = maps.lines().find(|line| readable(line))?;
    let address = usize::from_str_radix(line.split('-').next()?, 16).ok()?;
    let mut bytes = [0_u8; 8];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: the local vector describes `bytes`, which outlives the call; the remote one is only an address in
    // the other process, which the kernel checks.
    let read = unsafe {
        libc::process_vm_readv(parent as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0)
    };
    Some(if read < 0 { Err(last_errno()) } else { Ok(()) })
}

/// Bytes that are free for us on the file system of `path`.
pub fn disk_free(path: &Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut stat = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the path is NUL-terminated and the pointer valid for the structure that statvfs fills in.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes is a valid statvfs, and the call succeeded.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Our effective user.
pub fn user() -> u32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() }
}

/// The process that holds a `flock` on `file`, without trying to take it, which could get into a starting daemon's
/// way. `/proc/locks` has lines `1: FLOCK ADVISORY WRITE 1234 fd:01:5678 0 EOF`.
pub fn lock_holder(file: &Path) -> Option<u32> {
    let meta = fs::metadata(file).ok()?;
    let id = format!("{:02x}:{:02x}:{}", libc::major(meta.dev()), libc::minor(meta.dev()), meta.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = fields.as_slice() else { return None };
        (*place == id).then(|| pid.parse().ok()).flatten()
    })
}
