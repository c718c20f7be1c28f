//! The kernel side's table of connections, as far as the daemon must look after it.
//!
//! A `close` takes a connection out of it, but a process that ends closes without saying so, and a BPF program cannot
//! search a map for what belongs to a process. An entry that stayed would fill the table in time, and be taken for a
//! connection of whichever process gets the same pid and descriptor next.

use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{IterableMap, MapError};
use profiler_common::{ConnId, Connection, connection_flags, connection_key};

use super::{ConnectionValue, HashOf, sys};

/// `BPF_NOEXIST` (include/uapi/linux/bpf.h): only where there is no such entry.
const BPF_NOEXIST: u64 = 1;

/// What is asked of the map, so that it can be another one in tests.
trait Table: Send {
    fn keys(&self) -> Vec<u64>;
    /// See [`ConnId::generation`]; `None`: there is no such entry.
    fn generation(&self, key: u64) -> Option<u64>;
    /// Fails with `EEXIST` where there is such an entry.
    fn add(&mut self, key: u64, value: Connection) -> Result<(), MapError>;
    fn remove(&mut self, key: u64);
}

impl Table for HashOf<u64, ConnectionValue> {
    fn keys(&self) -> Vec<u64> {
        // Begun anew whenever the entry it stands on goes away, so without a bound this might not end.
        let most = IterableMap::map(self).info().map_or(0, |info| info.max_entries());
        self.keys().take(most as usize).flatten().collect()
    }

    fn generation(&self, key: u64) -> Option<u64> {
        self.get(&key, 0).ok().map(|value| value.0.generation)
    }

    fn add(&mut self, key: u64, value: Connection) -> Result<(), MapError> {
        self.insert(key, ConnectionValue(value), BPF_NOEXIST)
    }

    fn remove(&mut self, key: u64) {
        // It may have been closed this moment.
        let _ = self.remove(&key);
    }
}

/// The map `CONNECTIONS`; cheap to clone.
#[derive(Clone)]
pub struct Connections(Arc<Mutex<dyn Table>>);

impl Connections {
    pub fn new(map: HashOf<u64, ConnectionValue>) -> Self {
        Self(Arc::new(Mutex::new(map)))
    }

    fn with<R>(&self, f: impl FnOnce(&mut dyn Table) -> R) -> R {
        f(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the kernel side still follows this very connection.
    pub fn is_open(&self, id: ConnId) -> bool {
        let key = connection_key(id.pid, id.fd);
        self.with(|map| map.generation(key) == Some(id.generation))
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
        let inserted = self.with(|map| map.add(connection_key(pid, fd), value));
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
            if map.generation(key) == Some(id.generation) {
                map.remove(key);
            }
        });
    }

    /// Takes out what belongs to processes of which `alive` does not hold, and was there before `before` (ns of the
    /// kernel's clock): a process may have begun since it was asked about.
    pub fn sweep(&self, before: u64, mut alive: impl FnMut(u32) -> bool) {
        let keys = self.with(|map| map.keys());
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
                if map.generation(key).is_some_and(|generation| generation < before) {
                    map.remove(key);
                }
            });
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::io;

    use aya::sys::SyscallError;

    use super::*;

    impl Table for BTreeMap<u64, u64> {
        fn keys(&self) -> Vec<u64> {
            self.keys().copied().collect()
        }
        fn generation(&self, key: u64) -> Option<u64> {
            self.get(&key).copied()
        }
        fn add(&mut self, key: u64, value: Connection) -> Result<(), MapError> {
            if self.contains_key(&key) {
                let exists = io::Error::from_raw_os_error(libc::EEXIST);
                return Err(SyscallError { call: "bpf_map_update_elem", io_error: exists }.into());
            }
            self.insert(key, value.generation);
            Ok(())
        }
        fn remove(&mut self, key: u64) {
            self.remove(&key);
        }
    }

    /// Without a kernel: entries as process, descriptor and generation.
    pub(crate) fn connections(entries: &[(u32, u32, u64)]) -> Connections {
        let entry = |(pid, fd, generation): &(u32, u32, u64)| (connection_key(*pid, *fd), *generation);
        Connections(Arc::new(Mutex::new(entries.iter().map(entry).collect::<BTreeMap<_, _>>())))
    }

    fn id(pid: u32, fd: u32, generation: u64) -> ConnId {
        ConnId { generation, pid, fd }
    }

    #[test]
    fn another_use_of_a_descriptor_is_another_connection() {
        let table = connections(&[(1, 5, 100), (2, 5, 200)]);
        assert!(table.is_open(id(1, 5, 100)));
        assert!(
            !table.is_open(id(1, 5, 99)) && !table.is_open(id(1, 6, 100)) && !table.is_open(id(5, 1, 100))
        );
        table.forget(id(1, 5, 99));
        table.forget(id(3, 5, 100));
        assert!(table.is_open(id(1, 5, 100)), "what was to be forgotten was an earlier one");
        table.forget(id(1, 5, 100));
        assert!(!table.is_open(id(1, 5, 100)));
        assert!(table.is_open(id(2, 5, 200)));
    }

    #[test]
    fn what_the_kernel_side_has_seen_is_newer() {
        let table = connections(&[(1, 5, 100)]);
        assert_eq!(table.join(1, 5).expect("exists"), None);
        assert!(table.is_open(id(1, 5, 100)));
        let joined = table.join(1, 6).expect("added").expect("new");
        assert!(table.is_open(joined) && (joined.pid, joined.fd) == (1, 6));
    }

    #[test]
    fn a_sweep_takes_what_the_dead_left() {
        let table = connections(&[(1, 5, 100), (1, 6, 100), (2, 5, 100), (3, 5, 100), (3, 6, 300)]);
        let mut asked = Vec::new();
        table.sweep(200, |pid| {
            asked.push(pid);
            pid == 2
        });
        assert_eq!(asked, [1, 2, 3], "once for each process");
        assert!(
            !table.is_open(id(1, 5, 100)) && !table.is_open(id(1, 6, 100)) && !table.is_open(id(3, 5, 100))
        );
        assert!(table.is_open(id(2, 5, 100)), "its process lives");
        assert!(table.is_open(id(3, 6, 300)), "its process may have begun since it was asked about");
    }

    /// The pid is given to a new process, which accepts a connection, just after the question was answered.
    #[test]
    fn a_sweep_leaves_what_comes_meanwhile() {
        let table = connections(&[(1, 5, 100)]);
        table.sweep(200, |_| {
            table.with(|map| map.remove(connection_key(1, 5)));
            false
        });
        assert!(!table.is_open(id(1, 5, 100)), "it was closed meanwhile, which is no error");
        let shared = Arc::new(Mutex::new(BTreeMap::from([(connection_key(1, 5), 100)])));
        let table = Connections(shared.clone());
        table.sweep(200, |_| {
            shared.lock().unwrap().insert(connection_key(1, 5), 250);
            false
        });
        assert!(table.is_open(id(1, 5, 250)));
    }
}
