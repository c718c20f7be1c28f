//! How full a hash map is, by reading it in large pieces: asking for one key after the other costs a system call per
//! entry, a thousand times as much.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use aya::maps::{MapData, MapError};

/// `BPF_MAP_LOOKUP_BATCH` (5.6; include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
/// Entries read at a time: a full `CONNECTIONS` takes 16 calls and 300 kB.
const BATCH: usize = 4096;

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

/// A second handle on a hash map, only for counting.
pub struct Entries {
    fd: OwnedFd,
    key: usize,
    value: usize,
    capacity: u32,
}

impl Entries {
    pub(super) fn of(map: &MapData) -> Result<Self, MapError> {
        let fd = map.fd().as_fd().try_clone_to_owned()?;
        let info = map.info()?;
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        Ok(Self { fd, key, value, capacity: info.max_entries() })
    }

    /// Entries that there is room for.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Entries at this moment.
    pub fn count(&self) -> io::Result<u64> {
        let (mut keys, mut values) = (vec![0u8; BATCH * self.key], vec![0u8; BATCH * self.value]);
        let mut position = 0u64;
        let mut attr = Attr {
            out_batch: (&raw mut position) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            map_fd: self.fd.as_raw_fd() as u32,
            ..Attr::default()
        };
        add_up(|| {
            attr.count = BATCH as u32;
            // SAFETY: every pointer is to a local that outlives the call; keys and values have room for `count`.
            let failed = unsafe {
                libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<Attr>())
            };
            let error = (failed != 0).then(io::Error::last_os_error);
            // Where to go on is read before where to go on next is written.
            attr.in_batch = attr.out_batch;
            (attr.count, error)
        })
    }
}

/// Adds up batches until the end. `read` gives the next one's number of entries, and the error it came with.
fn add_up(mut read: impl FnMut() -> (u32, Option<io::Error>)) -> io::Result<u64> {
    let mut total = 0;
    loop {
        let (count, error) = read();
        match error {
            None => total += u64::from(count),
            // The end; the last entries are in this answer.
            Some(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(total + u64::from(count)),
            Some(error) => return Err(error),
        }
    }
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

    #[test]
    fn batches_are_added_up_to_the_last() {
        let os = io::Error::from_raw_os_error;
        let count = |answers: &[(u32, i32)]| {
            let mut answers = answers.iter();
            let result = add_up(|| {
                let (count, errno) = answers.next().expect("nothing is read behind the end");
                (*count, (*errno != 0).then(|| os(*errno)))
            });
            assert_eq!(answers.len(), 0, "it stopped early");
            result.map_err(|e| e.raw_os_error())
        };
        assert_eq!(count(&[(0, libc::ENOENT)]), Ok(0), "an empty map");
        assert_eq!(count(&[(4096, 0), (4096, 0), (17, libc::ENOENT)]), Ok(8209));
        assert_eq!(count(&[(4096, 0), (0, libc::ENOENT)]), Ok(4096));
        // What an old kernel says, and a bucket that holds more than a batch: never a number that is not true.
        assert_eq!(count(&[(0, libc::EINVAL)]), Err(Some(libc::EINVAL)));
        assert_eq!(count(&[(4096, 0), (0, libc::ENOSPC)]), Err(Some(libc::ENOSPC)));
    }
}
