//! How full a hash map is, by reading it in large pieces: asking for one key after the other costs a system call per
//! entry, a thousand times as much.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{MapData, MapError};

use super::batch::Lookup;

/// Entries read at a time: a full `CONNECTIONS` takes 16 calls and 300 kB.
const BATCH: u32 = 4096;

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
        let mut batches = Lookup::new(self.fd.as_fd(), self.key, self.value, BATCH);
        add_up(|| batches.next())
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
    use super::*;

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
