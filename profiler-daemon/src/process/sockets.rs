//! Which processes listen, and on which ports.
//!
//! In: `/proc/net/*` of a process's network namespace and `/proc/PID/fd`. Out: listening TCP ports, and whether it
//! listens at all (unix sockets included).

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};

use super::identity::via;

/// Listening sockets of one network namespace: inode → TCP port, 0 for a unix socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listening(HashMap<u64, u16>);

/// Lines read of each table; a host has far fewer sockets that listen.
const LINES_MAX: usize = 100_000;
/// Bytes read of each table: as many lines of 160 bytes.
const BYTES_MAX: u64 = 16 << 20;
/// Bytes read at a time of a table that is not read to its end.
const CHUNK: usize = 4096;
/// Descriptors looked at per process.
const FDS_MAX: usize = 65_536;

impl Listening {
    /// The tables of the network namespace that `pid` is in.
    pub fn of(pid: u32) -> Self {
        let mut found = HashMap::new();
        for table in ["tcp", "tcp6"] {
            if let Ok(file) = fs::File::open(format!("/proc/{pid}/net/{table}")) {
                found.extend(listeners(lines(file.take(BYTES_MAX))));
            }
        }
        if let Ok(file) = fs::File::open(format!("/proc/{pid}/net/unix")) {
            found.extend(
                lines(file.take(BYTES_MAX)).skip(1).take(LINES_MAX).filter_map(|line| unix_line(&line)),
            );
        }
        Self(found)
    }

    /// Ports that `pid` listens on; `None` when it listens on nothing.
    pub fn ports(&self, pid: u32) -> Option<Vec<u16>> {
        if self.0.is_empty() {
            return None;
        }
        let entries = fs::read_dir(format!("/proc/{}/fd", via(pid))).ok()?;
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

/// The lines of a table. Whoever names a unix socket chooses the bytes of its name, which are no matter here.
fn lines(table: impl Read) -> impl Iterator<Item = String> {
    let table = BufReader::with_capacity(CHUNK, table);
    table.split(b'\n').map_while(Result::ok).map(|line| String::from_utf8_lossy(&line).into_owned())
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
    fn a_name_that_is_no_text_hides_no_other_socket() {
        let table = b"Num RefCount Protocol Flags Type St Inode Path\n\
            0: 00000002 00000000 00010000 0001 01 5 @\xff\xfe\n\
            0: 00000002 00000000 00010000 0001 01 6 /run/app.sock\n";
        let found: Vec<_> = lines(table.as_slice()).skip(1).filter_map(|line| unix_line(&line)).collect();
        assert_eq!(found, [(5, 0), (6, 0)]);
    }

    #[test]
    fn our_own_listener_is_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let me = std::process::id();
        assert!(Listening::of(me).ports(me).unwrap().contains(&port));
    }
}
