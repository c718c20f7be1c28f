//! Reading and writing many entries of a map with one system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `BPF_MAP_LOOKUP_BATCH` and `BPF_MAP_UPDATE_BATCH` (5.6; include/uapi/linux/bpf.h).
const LOOKUP: libc::c_long = 24;
const UPDATE: libc::c_long = 26;

/// The part of `union bpf_attr` that batches use.
#[repr(C)]
#[derive(Default)]
struct Attr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Reads on from a position, as many entries as there is room for: how many it were, and the error that came with them
/// (`ENOENT`: these were the last).
pub(super) struct Lookup<'a> {
    map: BorrowedFd<'a>,
    keys: Vec<u8>,
    values: Vec<u8>,
    batch: u32,
    position: u64,
    begun: bool,
}

impl<'a> Lookup<'a> {
    /// `key` and `value` are sizes in bytes.
    pub(super) fn new(map: BorrowedFd<'a>, key: usize, value: usize, batch: u32) -> Self {
        let room = |size: usize| vec![0u8; batch as usize * size];
        Self { map, keys: room(key), values: room(value), batch, position: 0, begun: false }
    }

    pub(super) fn next(&mut self) -> (u32, Option<io::Error>) {
        let position = (&raw mut self.position) as u64;
        let mut attr = Attr {
            // Where to go on is read before where to go on next is written.
            in_batch: if self.begun { position } else { 0 },
            out_batch: position,
            keys: self.keys.as_mut_ptr() as u64,
            values: self.values.as_mut_ptr() as u64,
            count: self.batch,
            map_fd: self.map.as_raw_fd() as u32,
            ..Attr::default()
        };
        // SAFETY: every pointer is to memory of ours that outlives the call; keys and values have room for `count`.
        let failed = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP, &raw mut attr, size_of::<Attr>()) };
        self.begun = true;
        (attr.count, (failed != 0).then(io::Error::last_os_error))
    }
}

/// Writes entries of an array.
pub(super) fn update<V: aya::Pod>(map: BorrowedFd<'_>, keys: &[u32], values: &[V]) -> io::Result<()> {
    assert_eq!(keys.len(), values.len());
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = Attr {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        ..Attr::default()
    };
    // SAFETY: both slices outlive the call and have `count` elements, of the sizes that the map was made for.
    let failed = unsafe { libc::syscall(libc::SYS_bpf, UPDATE, &raw mut attr, size_of::<Attr>()) };
    if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The places of the batch commands' fields in `union bpf_attr` (include/uapi/linux/bpf.h, 5.6).
    #[test]
    fn the_kernel_finds_what_it_looks_for() {
        assert_eq!((offset_of!(Attr, in_batch), offset_of!(Attr, out_batch)), (0, 8));
        assert_eq!((offset_of!(Attr, keys), offset_of!(Attr, values)), (16, 24));
        assert_eq!((offset_of!(Attr, count), offset_of!(Attr, map_fd)), (32, 36));
        assert_eq!((offset_of!(Attr, elem_flags), offset_of!(Attr, flags)), (40, 48));
        assert_eq!(size_of::<Attr>(), 56);
    }
}
