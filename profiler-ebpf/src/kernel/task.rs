//! The current task: identity, registers, memory.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_smp_processor_id, bpf_ktime_get_ns,
    bpf_probe_read_kernel, generated::bpf_probe_read_user,
};
use profiler_common::{Header, Kind};
use profiler_ebpf::memory::{Block, Fault, Memory};

use super::maps::settings;

/// Process and thread of the current task.
#[derive(Clone, Copy)]
pub struct Ids {
    pub pid: u32,
    pub tid: u32,
}

#[inline(always)]
pub fn ids() -> Ids {
    let both = bpf_get_current_pid_tgid();
    Ids { pid: (both >> 32) as u32, tid: both as u32 }
}

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// The clock, with the CPU below it: no other is the same.
#[inline(always)]
pub fn unique() -> u64 {
    // SAFETY: no arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    (now() << 8) | u64::from(cpu & 0xff)
}

#[inline(always)]
pub fn header(kind: Kind, ids: Ids, time: u64) -> Header {
    Header { kind: kind as u16, flags: 0, lost: 0, time, pid: ids.pid, tid: ids.tid }
}

/// Reads user memory into a destination of known size.
///
/// # Safety
/// `to` is valid for `size` bytes.
#[inline(always)]
pub unsafe fn read_user(to: *mut u8, size: u32, from: u64) -> Result<(), Fault> {
    // SAFETY: the destination by contract; the source may be anything, the helper checks it.
    let failed = unsafe { bpf_probe_read_user(to.cast(), size, from as *const _) };
    if failed == 0 { Ok(()) } else { Err(Fault) }
}

/// Reads up to `MAX` bytes of user memory. More is a fault.
///
/// The bound is checked here, on a value that the compiler knows nothing of: where it knows the size to be small enough
/// it leaves the check out, and before 6.5 the verifier cannot follow why it may.
///
/// # Safety
/// `to` is valid for `MAX` bytes.
#[inline(always)]
pub unsafe fn read_at_most<const MAX: usize>(to: *mut u8, size: u64, from: u64) -> Result<(), Fault> {
    let size = core::hint::black_box(size);
    if size > MAX as u64 {
        return Err(Fault);
    }
    // SAFETY: by contract and the check above.
    unsafe { read_user(to, size as u32, from) }
}

/// Reads a kernel value at `base + offset`.
#[inline(always)]
pub fn read_kernel<T>(base: u64, offset: u32) -> Result<T, Fault> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T) }.map_err(|_| Fault)
}

#[inline(always)]
pub fn task() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_task() }
}

/// What a descriptor leads to.
pub struct Opened {
    pub inode: u64,
    pub number: u64,
    pub socket: bool,
    /// An epoll instance waits for it, or it cannot be told.
    pub watched: bool,
    pub nonblocking: bool,
}

/// What a descriptor of the current process leads to at this moment; `None` where nothing does, or it cannot be told.
#[inline(always)]
pub fn opened(fd: u32) -> Option<Opened> {
    const FORMAT: u16 = 0o170_000;
    const SOCKET: u16 = 0o140_000;
    const NONBLOCK: u32 = 0o4000;
    let at = settings().kernel;
    if at.valid == 0 {
        return None;
    }
    let files: u64 = read_kernel(task(), at.task_files).ok()?;
    let table: u64 = read_kernel(files, at.files_fdt).ok()?;
    if fd >= read_kernel::<u32>(table, at.fdtable_max_fds).ok()? {
        return None;
    }
    let array: u64 = read_kernel(table, at.fdtable_fd).ok()?;
    let file: u64 = read_kernel(array + u64::from(fd) * 8, 0).ok()?;
    if file == 0 {
        return None;
    }
    let inode: u64 = read_kernel(file, at.file_inode).ok()?;
    let number = read_kernel(inode, at.inode_number).ok()?;
    let mode: u16 = read_kernel(inode, at.inode_mode).ok()?;
    let nonblocking = read_kernel::<u32>(file, at.file_flags).ok()? & NONBLOCK != 0;
    Some(Opened { inode, number, socket: mode & FORMAT == SOCKET, watched: watched(file), nonblocking })
}

/// Whether an epoll instance waits for this `struct file` (fs/eventpoll.c, `attach_epitem` and its reverse).
#[inline(always)]
fn watched(file: u64) -> bool {
    let at = settings().kernel;
    if at.file_epoll != 0 {
        return read_kernel::<u64>(file, at.file_epoll) != Ok(0);
    }
    // A list head that points to itself is empty.
    let head = file + u64::from(at.file_epoll_list);
    at.file_epoll_list == 0 || read_kernel::<u64>(head, 0) != Ok(head)
}

/// The current process's memory.
pub struct Current;

impl Memory for Current {
    #[inline(always)]
    fn word(&self, address: u64) -> Result<u64, Fault> {
        let mut word = 0u64;
        // SAFETY: a local of eight bytes.
        unsafe { read_user((&raw mut word).cast(), 8, address) }?;
        Ok(word)
    }

    #[inline(always)]
    fn pair(&self, address: u64) -> Result<(u64, u64), Fault> {
        let mut pair = [0u64; 2];
        // SAFETY: a local of sixteen bytes.
        unsafe { read_user((&raw mut pair).cast(), 16, address) }?;
        Ok((pair[0], pair[1]))
    }

    #[inline(always)]
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        // SAFETY: the masked size is below the block's; the mask is what the verifier believes.
        unsafe { read_user(block.as_mut_ptr(), size & (N as u32 - 1), address) }
    }
}
