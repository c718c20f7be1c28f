//! Which processes listen, and on which ports.
//!
//! In: `/proc/net/*` of a process's network namespace and `/proc/PID/fd`. Out: listening TCP ports, and whether it
//! listens at all (unix sockets included).

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader};

/// Listening sockets of one network namespace: inode → TCP port, 0 for a unix socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listening(HashMap<u64, u16>);

/// Lines read of each table; a host has far fewer sockets that listen.
const LINES_MAX: usize = 100_000;
/// Bytes read at a time of a table that is not read to its end.
const CHUNK: usize = 4096;
/// Descriptors looked at per process.
const FDS_MAX: usize = 65_536;

/// Whether this descriptor of a process can be a connection: `false` only when it is closed or something else by now.
pub fn may_be_socket(pid: u32, fd: u32) -> bool {
    match fs::read_link(format!("/proc/{pid}/fd/{fd}")) {
        Ok(target) => target.as_os_str().as_encoded_bytes().starts_with(b"socket:"),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

impl Listening {
    /// The tables of the network namespace that `pid` is in.
    pub fn of(pid: u32) -> Self {
        let mut found = HashMap::new();
        for table in ["tcp", "tcp6"] {
            if let Ok(file) = fs::File::open(format!("/proc/{pid}/net/{table}")) {
                let lines = BufReader::with_capacity(CHUNK, file).lines().map_while(Result::ok);
                found.extend(listeners(lines));
            }
        }
        if let Ok(text) = fs::read_to_string(format!("/proc/{pid}/net/unix")) {
            found.extend(text.lines().skip(1).take(LINES_MAX).filter_map(unix_line));
        }
        Self(found)
    }

    /// Ports that `pid` listens on; `None` when it listens on nothing.
    pub fn ports(&self, pid: u32) -> Option<Vec<u16>> {
        if self.0.is_empty() {
            return None;
        }
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let mut ports = Vec::new();
        let mut any = false;
        for entry in entries.flatten().take(FDS_MAX) {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let inode = target
                .to_str()
                .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok());
            if let Some(port) = inode.and_then(|inode| self.0.get(&inode)) {
                any = true;
                if *port != 0 {
                    ports.push(*port);
                }
            }
        }
        ports.sort_unstable();
        ports.dedup();
        any.then_some(ports)
    }
}

/// The listening sockets of a table. They come before all others, so the rest, which on a busy host are tens of
/// thousands of connections that the kernel is slow to list, stays unread.
fn listeners(lines: impl Iterator<Item = String>) -> impl Iterator<Item = (u64, u16)> {
    lines.skip(1).take(LINES_MAX).map_while(|line| tcp_line(&line))
}

/// `/proc/net/tcp` (Documentation/networking/proc_net_tcp.rst): `sl local rem st … inode`; state 0A is LISTEN.
fn tcp_line(line: &str) -> Option<(u64, u16)> {
    let mut fields = line.split_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?.parse().ok()?;
    let port = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
    (state == "0A").then_some((inode, port))
}

/// `/proc/net/unix`: `Num RefCount Protocol Flags Type St Inode Path`; flag 0x10000 is `SO_ACCEPTCON`.
fn unix_line(line: &str) -> Option<(u64, u16)> {
    let mut fields = line.split_whitespace();
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    let inode = fields.nth(2)?.parse().ok()?;
    (flags & 0x1_0000 != 0).then_some((inode, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What none of the probes see: a descriptor that is closed in bulk, or becomes another file.
    #[test]
    fn a_descriptor_that_is_no_socket_any_more_is_found_out() {
        use std::os::fd::AsRawFd;
        let pid = std::process::id();
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let (replaced, closed) = (a.as_raw_fd(), b.as_raw_fd());
        assert!(may_be_socket(pid, replaced as u32) && may_be_socket(pid, closed as u32));
        let null = fs::File::open("/dev/null").unwrap();
        // SAFETY: both descriptors are ours and open.
        assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), replaced) }, replaced);
        assert!(!may_be_socket(pid, replaced as u32));
        // One that is taken from nobody else: above all that other tests may open meanwhile.
        // SAFETY: as above; the new descriptor is nobody's.
        let high = unsafe { libc::fcntl(closed, libc::F_DUPFD, 900) };
        assert!(high >= 900 && may_be_socket(pid, high as u32));
        // SAFETY: the one that was just made.
        assert_eq!(unsafe { libc::close_range(high as u32, high as u32, 0) }, 0);
        assert!(!may_be_socket(pid, high as u32));
    }

    #[test]
    fn tables_are_read() {
        let line = "   0: 0100007F:26F9 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 20715 1 0";
        assert_eq!(tcp_line(line), Some((20715, 9977)));
        assert_eq!(tcp_line(&line.replace(" 0A ", " 01 ")), None);
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 19123 /run/app.sock";
        assert_eq!(unix_line(line), Some((19123, 0)));
        assert_eq!(unix_line("garbage"), None);
    }

    #[test]
    fn a_table_is_read_as_far_as_sockets_listen() {
        let line = |state: &str, inode: u32| {
            format!(
                "   0: 0100007F:26F9 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0"
            )
        };
        let table = ["head".to_owned(), line("0A", 1), line("0A", 2), line("01", 3), line("06", 0)];
        let mut rest = table.into_iter();
        assert_eq!(listeners(rest.by_ref()).collect::<Vec<_>>(), [(1, 9977), (2, 9977)]);
        assert_eq!(rest.count(), 1, "the last line was not looked at");
    }

    #[test]
    fn our_own_listener_is_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let me = std::process::id();
        assert!(Listening::of(me).ports(me).unwrap().contains(&port));
    }
}
