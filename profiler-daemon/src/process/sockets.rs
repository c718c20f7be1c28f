//! Which processes listen, on which ports, and what is connected to them.
//!
//! In: `/proc/net/*` of a process's network namespace and `/proc/PID/fd`. Out: listening TCP ports, whether a process
//! listens at all (unix sockets included), and which of its descriptors are connections that came in.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use super::identity::via;

/// Listening sockets of one network namespace: inode → TCP port, 0 for a unix socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listening(HashMap<u64, u16>);

const TCP_TABLES: [&str; 2] = ["tcp", "tcp6"];
/// Lines read of each table; a host has far fewer sockets that listen, and where more are connected, what is missed is
/// found by its next request.
const LINES_MAX: usize = 100_000;
/// Bytes read of each table: as many lines of 160 bytes.
const BYTES_MAX: u64 = 16 << 20;
/// Bytes read at a time of a table that is not read to its end.
const CHUNK: usize = 4096;
/// Descriptors looked at per process: as many as connections are followed at all.
const FDS_MAX: usize = 65_536;

/// What a descriptor of such a ring leads to (io_uring/io_uring.c).
const IO_URING: &str = "anon_inode:[io_uring]";

/// Descriptors of processes, looked at one by one.
#[derive(Default)]
pub struct Descriptors {
    /// By pid, the thread through which `/proc` shows the process: to find it out costs more than a descriptor.
    through: HashMap<u32, u32>,
}

impl Descriptors {
    /// Whether this one can be a connection: `false` only when it is closed or something else by now.
    pub fn may_be_socket(&mut self, pid: u32, fd: u32) -> bool {
        let through = self.through.entry(pid).or_insert_with(|| via(pid));
        match fs::read_link(format!("/proc/{through}/fd/{fd}")) {
            Ok(target) => target.as_os_str().as_encoded_bytes().starts_with(b"socket:"),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }
}

impl Listening {
    /// The tables of the network namespace that `pid` is in.
    pub fn of(pid: u32) -> Self {
        let mut found = HashMap::new();
        for table in TCP_TABLES {
            found.extend(listeners(lines(pid, table)));
        }
        found.extend(lines(pid, "unix").filter_map(|line| unix_line(&line)));
        Self(found)
    }

    /// Ports that `pid` listens on; `None` when it listens on nothing.
    pub fn ports(&self, pid: u32) -> Option<Vec<u16>> {
        if self.0.is_empty() {
            return None;
        }
        self.among(sockets(pid).map(|(_, inode)| inode))
    }

    fn among(&self, inodes: impl Iterator<Item = u64>) -> Option<Vec<u16>> {
        let found: Vec<u16> = inodes.filter_map(|inode| self.0.get(&inode).copied()).collect();
        let any = !found.is_empty();
        let mut ports: Vec<u16> = found.into_iter().filter(|port| *port != 0).collect();
        ports.sort_unstable();
        ports.dedup();
        any.then_some(ports)
    }
}

/// Ports that `pid` listens on, as [`Listening::ports`]. The tables list every socket of the namespace, so they are read
/// only for a process that has any.
pub fn listened(pid: u32) -> Option<Vec<u16>> {
    listened_by(sockets(pid).map(|(_, inode)| inode).collect(), || Listening::of(pid))
}

fn listened_by(inodes: Vec<u64>, tables: impl FnOnce() -> Listening) -> Option<Vec<u16>> {
    if inodes.is_empty() { None } else { tables().among(inodes.into_iter()) }
}

/// Descriptors of `pid` that are TCP connections which somebody made to a listening socket of its network namespace,
/// with their inodes. (The process need not hold that socket itself: descriptors are handed over.)
pub fn incoming(pid: u32) -> Vec<(u32, u64)> {
    let mut open: Vec<(u32, u64)> = sockets(pid).collect();
    let wanted: HashSet<u64> = open.iter().map(|(_, inode)| *inode).collect();
    let mut found = HashSet::new();
    for table in TCP_TABLES {
        if found.len() < wanted.len() {
            found.extend(accepted(lines(pid, table), &wanted));
        }
    }
    open.retain(|(_, inode)| found.contains(inode));
    open
}

/// Whether `pid` has rings of io_uring: what it transfers by them passes neither functions of a library nor system calls.
pub fn has_io_uring(pid: u32) -> bool {
    let entries = fs::read_dir(format!("/proc/{}/fd", via(pid))).into_iter().flatten().flatten();
    let leads = |entry: fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == IO_URING);
    entries.take(FDS_MAX).any(leads)
}

/// The inode of the socket that a descriptor is.
pub fn inode(pid: u32, fd: u32) -> Option<u64> {
    socket_inode(Path::new(&format!("/proc/{}/fd/{fd}", via(pid))))
}

/// Descriptors of `pid` that are sockets, with their inodes.
fn sockets(pid: u32) -> impl Iterator<Item = (u32, u64)> {
    let entries = fs::read_dir(format!("/proc/{}/fd", via(pid))).into_iter().flatten().flatten();
    entries.take(FDS_MAX).filter_map(|entry| {
        let fd = entry.file_name().to_str()?.parse().ok()?;
        Some((fd, socket_inode(&entry.path())?))
    })
}

fn socket_inode(descriptor: &Path) -> Option<u64> {
    let target = fs::read_link(descriptor).ok()?;
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The lines of a table of a process's network namespace, below its head.
fn lines(pid: u32, table: &str) -> impl Iterator<Item = String> {
    fs::File::open(format!("/proc/{}/net/{table}", via(pid)))
        .into_iter()
        .flat_map(|file| rows(file.take(BYTES_MAX)))
}

/// The lines of a table below its head. Whoever names a unix socket chooses the bytes of its name, which are no matter
/// here.
fn rows(table: impl Read) -> impl Iterator<Item = String> {
    let table = BufReader::with_capacity(CHUNK, table);
    let lines = table.split(b'\n').map_while(Result::ok).skip(1).take(LINES_MAX);
    lines.map(|line| String::from_utf8_lossy(&line).into_owned())
}

/// The listening sockets of a table. They come before all others, so the rest, which on a busy host are tens of
/// thousands of connections that the kernel is slow to list, stays unread.
fn listeners(lines: impl Iterator<Item = String>) -> impl Iterator<Item = (u64, u16)> {
    lines.map_while(|line| {
        let row = tcp_line(&line)?;
        (row.state == LISTEN).then_some((row.inode, row.port))
    })
}

/// Those of the `wanted` sockets that are connected and whose own end is one that is listened on. A connection that the
/// process made itself has a port of its own there.
fn accepted(lines: impl Iterator<Item = String>, wanted: &HashSet<u64>) -> Vec<u64> {
    let mut ends: HashSet<(String, u16)> = HashSet::new();
    let mut found = Vec::new();
    for line in lines {
        let Some(row) = tcp_line(&line) else { continue };
        if row.state == LISTEN {
            ends.insert((row.address.to_owned(), row.port));
        } else if row.state == ESTABLISHED && wanted.contains(&row.inode) {
            let any = "0".repeat(row.address.len());
            if ends.contains(&(row.address.to_owned(), row.port)) || ends.contains(&(any, row.port)) {
                found.push(row.inode);
            }
        }
    }
    found
}

/// States of a line (include/net/tcp_states.h).
const ESTABLISHED: &str = "01";
const LISTEN: &str = "0A";

/// One socket.
#[derive(Debug, PartialEq, Eq)]
struct Row<'a> {
    /// The local address, in hexadecimal.
    address: &'a str,
    port: u16,
    state: &'a str,
    inode: u64,
}

/// `/proc/net/tcp` (Documentation/networking/proc_net_tcp.rst): `sl local rem st … inode`.
fn tcp_line(line: &str) -> Option<Row<'_>> {
    let mut fields = line.split_whitespace();
    let (address, port) = fields.nth(1)?.rsplit_once(':')?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?.parse().ok()?;
    Some(Row { address, port: u16::from_str_radix(port, 16).ok()?, state, inode })
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
        assert!(
            Descriptors::default().may_be_socket(pid, replaced as u32)
                && Descriptors::default().may_be_socket(pid, closed as u32)
        );
        let null = fs::File::open("/dev/null").unwrap();
        // SAFETY: both descriptors are ours and open.
        assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), replaced) }, replaced);
        assert!(!Descriptors::default().may_be_socket(pid, replaced as u32));
        // One that is taken from nobody else: above all that other tests may open meanwhile.
        // SAFETY: as above; the new descriptor is nobody's.
        let high = unsafe { libc::fcntl(closed, libc::F_DUPFD, 900) };
        assert!(high >= 900 && Descriptors::default().may_be_socket(pid, high as u32));
        // SAFETY: the one that was just made.
        assert_eq!(unsafe { libc::close_range(high as u32, high as u32, 0) }, 0);
        assert!(!Descriptors::default().may_be_socket(pid, high as u32));
    }

    #[test]
    fn rings_are_found() {
        use std::os::fd::{FromRawFd, OwnedFd};
        let me = std::process::id();
        let before = has_io_uring(me);
        // `struct io_uring_params` (include/uapi/linux/io_uring.h): all that is asked for is 0.
        let mut parameters = [0u8; 120];
        // SAFETY: the structure lives until the call returns.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if ring < 0 {
            println!("not tried, no ring can be had: {}", io::Error::last_os_error());
            return;
        }
        // SAFETY: the call returned this descriptor just now.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        assert!(!before && has_io_uring(me));
        drop(ring);
        assert!(!has_io_uring(me));
    }

    #[test]
    fn tables_are_read() {
        let line = "   0: 0100007F:26F9 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 20715 1 0";
        let row = Row { address: "0100007F", port: 9977, state: LISTEN, inode: 20715 };
        assert_eq!(tcp_line(line), Some(row));
        assert_eq!(tcp_line("garbage"), None);
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
        let table = [line("0A", 1), line("0A", 2), line("01", 3), line("06", 0)];
        let mut rest = table.into_iter();
        assert_eq!(listeners(rest.by_ref()).collect::<Vec<_>>(), [(1, 9977), (2, 9977)]);
        assert_eq!(rest.count(), 1, "the last line was not looked at");
    }

    #[test]
    fn what_came_in_is_told_from_what_went_out() {
        let line = |local: &str, state: &str, inode: u32| {
            format!(
                "0: {local} 0100007F:9999 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1"
            )
        };
        let table = [
            line("0100007F:1F90", "0A", 1),
            line("00000000:1F91", "0A", 2),
            line("0100007F:1F90", "01", 3),
            line("0200007F:1F91", "01", 4),
            line("0200007F:1F90", "01", 5), // the port, but not the address
            line("0100007F:A000", "01", 6), // a port that nobody listens on
            line("0100007F:1F90", "06", 7), // over
            line("0100007F:1F90", "01", 8), // another process's
        ];
        assert_eq!(accepted(table.into_iter(), &(1..8).collect()), [3, 4]);
    }

    #[test]
    fn our_own_accepted_connections_are_found() {
        use std::net::{TcpListener, TcpStream};
        use std::os::fd::AsRawFd;
        let me = std::process::id();
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let listener = match TcpListener::bind(address) {
                Ok(listener) => listener,
                // A kernel without IPv6.
                Err(error) if address.starts_with('[') => {
                    println!("not tried, cannot be bound: {address}: {error}");
                    continue;
                }
                Err(error) => panic!("{address}: {error}"),
            };
            let client = TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
            let (server, _) = listener.accept().unwrap();
            let found = incoming(me);
            let fds = |fd: i32| found.iter().filter(|(f, _)| *f == fd as u32).count();
            assert_eq!(fds(server.as_raw_fd()), 1, "{address}: {found:?}");
            assert_eq!(fds(client.as_raw_fd()) + fds(listener.as_raw_fd()), 0, "{address}: {found:?}");
            let (fd, inode) = found[found.iter().position(|(f, _)| *f == server.as_raw_fd() as u32).unwrap()];
            assert_eq!(super::inode(me, fd), Some(inode));
            assert_ne!(super::inode(me, client.as_raw_fd() as u32), Some(inode));
        }
        assert_eq!(super::inode(me, u32::MAX), None);
    }

    #[test]
    fn a_name_that_is_no_text_hides_no_other_socket() {
        let table = b"Num RefCount Protocol Flags Type St Inode Path\n\
            0: 00000002 00000000 00010000 0001 01 5 @\xff\xfe\n\
            0: 00000002 00000000 00010000 0001 01 6 /run/app.sock\n";
        let found: Vec<_> = rows(table.as_slice()).filter_map(|line| unix_line(&line)).collect();
        assert_eq!(found, [(5, 0), (6, 0)]);
    }

    #[test]
    fn our_own_listener_is_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let me = std::process::id();
        assert!(Listening::of(me).ports(me).unwrap().contains(&port));
        assert!(listened(me).unwrap().contains(&port));
    }

    #[test]
    fn no_table_is_read_for_who_has_no_socket() {
        let tables = || Listening(HashMap::from([(5, 80), (6, 0), (7, 443), (8, 80)]));
        assert_eq!(listened_by(Vec::new(), || panic!("a table was read")), None);
        assert_eq!(listened_by(vec![4], tables), None);
        assert_eq!(listened_by(vec![6], tables), Some(vec![]));
        assert_eq!(listened_by(vec![8, 4, 7, 5], tables), Some(vec![80, 443]));
    }
}
