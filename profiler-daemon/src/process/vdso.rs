//! The kernel's code in every process.
//!
//! In: nothing. Out: a file with the vDSO's image, taken from our own memory. It is the same for all 64-bit processes of
//! a kernel, and what a process has mapped over its own is not believed.

use std::fs::File;
use std::io;

use super::anonymous;
use super::maps::Maps;

/// The name of its mapping in `/proc/PID/maps`.
pub const NAME: &str = "[vdso]";
/// It has two to eight pages on every architecture; one of a megabyte is none.
const BYTES_MAX: u64 = 1 << 20;

/// A file of this content, so that it is read as others are.
pub fn file() -> io::Result<File> {
    let maps = Maps::read(std::process::id())?;
    let missing = || io::Error::new(io::ErrorKind::NotFound, "no vDSO is mapped");
    let mapping = maps.iter().find(|m| m.path.as_os_str() == NAME).ok_or_else(missing)?;
    let size = mapping.end - mapping.start;
    if size > BYTES_MAX {
        return Err(missing());
    }
    // SAFETY: the kernel mapped this memory for reading when the process began, it never changes, and nothing in this
    // process unmaps it.
    let image = unsafe { std::slice::from_raw_parts(mapping.start as *const u8, size as usize) };
    anonymous::file(image)
}
