//! Files that are nowhere but in memory.
//!
//! In: bytes. Out: a file that holds them and that nobody else can change, so that they are read as any other file is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;

/// A file with all that `bytes` gives; the caller bounds it.
pub fn file(mut bytes: impl Read) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(c"reqprof".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor, and nobody else knows it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    io::copy(&mut bytes, &mut file)?;
    file.flush()?;
    Ok(file)
}
