//! How full a hash map is, by reading it in large pieces: asking for one key after the other costs a system call per
//! entry, a thousand times as much.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use aya::maps::Map;

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
}

impl Entries {
    /// `None` for a map that is no hash map.
    pub(super) fn of<K, V>(map: &Map) -> io::Result<Option<Self>> {
        let Map::HashMap(data) = map else { return Ok(None) };
        let fd = data.fd().as_fd().try_clone_to_owned()?;
        Ok(Some(Self { fd, key: size_of::<K>(), value: size_of::<V>() }))
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
        let mut total = 0;
        loop {
            attr.count = BATCH as u32;
            // SAFETY: every pointer is to a local that outlives the call; keys and values have room for `count`.
            let failed = unsafe {
                libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<Attr>())
            };
            let error = (failed != 0).then(io::Error::last_os_error);
            match error {
                None => total += u64::from(attr.count),
                // The end; the last entries are in this answer.
                Some(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    return Ok(total + u64::from(attr.count));
                }
                Some(error) => return Err(error),
            }
            // Where to go on is read before where to go on next is written.
            attr.in_batch = attr.out_batch;
        }
    }
}
