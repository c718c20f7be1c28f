//! The kernel side's table of connections, as far as the daemon must look after it.
//!
//! A `close` takes a connection out of it, but a process that ends closes without saying so, and a BPF program cannot
//! search a map for what belongs to a process. An entry that stayed would fill the table in time, and be taken for a
//! connection of whichever process gets the same pid and descriptor next.

use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::MapError;
use profiler_common::{ConnId, Connection, connection_flags, connection_key};

use super::{ConnectionValue, HashOf, sys};

/// Entries looked at in one go: the map's size.
const ENTRIES_MAX: usize = 65_536;

/// `BPF_NOEXIST` (include/uapi/linux/bpf.h): only where there is no such entry.
const BPF_NOEXIST: u64 = 1;

/// The map `CONNECTIONS`; cheap to clone.
#[derive(Clone)]
pub struct Connections(Arc<Mutex<HashOf<u64, ConnectionValue>>>);

impl Connections {
    pub fn new(map: HashOf<u64, ConnectionValue>) -> Self {
        Self(Arc::new(Mutex::new(map)))
    }

    fn with<R>(&self, f: impl FnOnce(&mut HashOf<u64, ConnectionValue>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the kernel side still follows this very connection.
    pub fn is_open(&self, id: ConnId) -> bool {
        let key = connection_key(id.pid, id.fd);
        self.with(|map| map.get(&key, 0).is_ok_and(|value| value.0.generation == id.generation))
    }

    /// Lets the kernel side follow a connection that was open before its process was looked at. `None` where it follows
    /// one on this descriptor already: what it has seen itself is newer.
    pub fn join(&self, pid: u32, fd: u32) -> Result<Option<ConnId>, MapError> {
        let id = ConnId { generation: sys::monotonic_ns(), pid, fd };
        // Everything else is 0: a head is expected next.
        let value = Connection {
            generation: id.generation,
            flags: connection_flags::UNSEEN,
            ..Connection::default()
        };
        let inserted =
            self.with(|map| map.insert(connection_key(pid, fd), ConnectionValue(value), BPF_NOEXIST));
        match inserted {
            Ok(()) => Ok(Some(id)),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes this connection out, unless its descriptor is another one's by now.
    pub fn forget(&self, id: ConnId) {
        let key = connection_key(id.pid, id.fd);
        self.with(|map| {
            if map.get(&key, 0).is_ok_and(|value| value.0.generation == id.generation) {
                // It may have been closed this moment.
                let _ = map.remove(&key);
            }
        });
    }

    /// Takes out what belongs to processes of which `alive` does not hold, and was there before `before` (ns of the
    /// kernel's clock): a process may have begun since it was asked about.
    pub fn sweep(&self, before: u64, mut alive: impl FnMut(u32) -> bool) {
        let keys: Vec<u64> = self.with(|map| map.keys().take(ENTRIES_MAX).flatten().collect());
        let mut last = None;
        for key in keys {
            let pid = (key >> 32) as u32;
            let known = match last {
                Some((of, alive)) if of == pid => alive,
                _ => alive(pid),
            };
            last = Some((pid, known));
            if known {
                continue;
            }
            self.with(|map| {
                if map.get(&key, 0).is_ok_and(|value| value.0.generation < before) {
                    let _ = map.remove(&key);
                }
            });
        }
    }
}
