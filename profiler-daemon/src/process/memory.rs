//! Reading a process's memory.
//!
//! In: an address. Out: its bytes, or why not. [`Memory`] is a trait so that everything above it can be tested on
//! recorded or hostile memory.
//!
//! A read of a page that a FUSE file or `userfaultfd` backs waits for the target to serve it, which may be for
//! ever: reads go through [`super::patience`]. Nothing here ever writes to a target.

use std::io;

use super::identity;

/// Why memory could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ReadError {
    /// No such page (any more), or only part of the range is mapped.
    #[error("not mapped")]
    Fault,
    #[error("the process is gone")]
    Gone,
    #[error("not permitted (needs CAP_SYS_PTRACE)")]
    Denied,
    #[error("system error {0}")]
    Os(i32),
}

/// An address space.
pub trait Memory {
    /// Fills `buf` from `address`, or fails; a partial read is a failure.
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), ReadError>;

    fn read_u32(&self, address: u64) -> Result<u32, ReadError> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read_u64(&self, address: u64) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// The memory of a live process, by `process_vm_readv`.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory {
    pid: u32,
}

impl ProcessMemory {
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }
}

impl Memory for ProcessMemory {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        if buf.is_empty() {
            return Ok(());
        }
        match read_of(self.pid, address, buf) {
            // The main thread may have ended before the others.
            Err(ReadError::Gone) => match identity::live_thread(self.pid) {
                Some(tid) => read_of(tid, address, buf),
                None => Err(ReadError::Gone),
            },
            done => done,
        }
    }
}

fn read_of(task: u32, address: u64, buf: &mut [u8]) -> Result<(), ReadError> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buf.len() };
    let pid = libc::pid_t::try_from(task).map_err(|_| ReadError::Gone)?;
    // SAFETY: `local` describes `buf`, which is ours to write for its whole length; `remote` is only
    // interpreted in the other process, where the kernel checks it.
    let n = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    match usize::try_from(n) {
        Ok(n) if n == buf.len() => Ok(()),
        Ok(_) => Err(ReadError::Fault),
        Err(_) => Err(match io::Error::last_os_error().raw_os_error().unwrap_or(0) {
            libc::EFAULT => ReadError::Fault,
            libc::ESRCH => ReadError::Gone,
            libc::EPERM => ReadError::Denied,
            other => ReadError::Os(other),
        }),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Memory made of pieces; a read must lie within one.
    #[derive(Default)]
    pub(crate) struct FakeMemory(pub(crate) Vec<(u64, Vec<u8>)>);

    impl Memory for FakeMemory {
        fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), ReadError> {
            for (base, bytes) in &self.0 {
                let Some(start) = address.checked_sub(*base).and_then(|n| usize::try_from(n).ok()) else {
                    continue;
                };
                let Some(found) = start.checked_add(buf.len()).and_then(|end| bytes.get(start..end)) else {
                    continue;
                };
                buf.copy_from_slice(found);
                return Ok(());
            }
            Err(ReadError::Fault)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_there_and_nothing_else() {
        let me = ProcessMemory::new(std::process::id());
        let here: [u64; 2] = [0x0123_4567_89ab_cdef, 7];
        let address = here.as_ptr() as u64;
        assert_eq!(me.read_u64(address), Ok(here[0]));
        assert_eq!(me.read_u32(address), Ok(0x89ab_cdef));
        assert_eq!(me.read(8, &mut []), Ok(()));
        assert_eq!(me.read_u64(8), Err(ReadError::Fault));
        assert_eq!(me.read_u64(u64::MAX - 3), Err(ReadError::Fault));
        assert_eq!(ProcessMemory::new(i32::MAX as u32).read_u64(address), Err(ReadError::Gone));
        assert_eq!(ProcessMemory::new(u32::MAX).read_u64(address), Err(ReadError::Gone));
    }
}
