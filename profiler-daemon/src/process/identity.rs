//! Who a process is.
//!
//! In: a pid. Out: a [`ProcessKey`] that stays unique when the kernel reuses the pid, and the [`Identity`] that
//! target selection and service names are made from. Names come from the target as they are (invalid UTF-8
//! replaced): whoever prints them escapes them.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use super::patience::{MEMORY, PATIENCE};
use crate::bpf::sys;

/// A process across pid reuse: no two processes share a pid and a start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    pub pid: u32,
    /// Clock ticks since boot (field 22 of `/proc/PID/stat`); 0 = the process was gone before it could be read.
    pub start_time: u64,
}

/// What `/proc` says about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub key: ProcessKey,
    pub ppid: u32,
    /// The main thread's name, which the process can set.
    pub comm: String,
    /// Where the program was started from; `None` for kernel threads and without permission.
    pub exe: Option<PathBuf>,
    /// The arguments, which the process can overwrite; empty for zombies and kernel threads.
    pub cmdline: Vec<String>,
    /// The path in the unified cgroup hierarchy (or the first listed), empty if there is none.
    pub cgroup: String,
}

/// Why a process could not be read.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("process {0} is gone")]
    Gone(u32),
    #[error("process {pid}: {file}: {source}")]
    Io { pid: u32, file: &'static str, source: io::Error },
    #[error("process {pid}: /proc/{pid}/stat is not understood")]
    Stat { pid: u32 },
}

/// One line of at most 64 bytes of name and some fifty numbers.
const STAT_MAX: u64 = 4096;
/// Arguments serve to show and to derive a service's name; the rest of a long command line adds nothing.
const CMDLINE_MAX: u64 = 16 * 1024;
/// Threads looked at for one that lives.
const THREADS_MAX: usize = 256;
/// One line per hierarchy, paths of up to 4 KiB.
const CGROUP_MAX: u64 = 64 * 1024;

/// Reads at most `max` bytes of a file.
pub(super) fn read_bounded(path: &str, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_proc(pid: u32, file: &'static str, max: u64) -> Result<Vec<u8>, IdentityError> {
    read_bounded(&format!("/proc/{pid}/{file}"), max).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => IdentityError::Gone(pid),
        _ => IdentityError::Io { pid, file, source },
    })
}

/// Reads only what tells this process from an earlier or later one of the same pid.
pub fn key(pid: u32) -> Result<ProcessKey, IdentityError> {
    let stat = read_proc(pid, "stat", STAT_MAX)?;
    let stat = parse_stat(&stat).ok_or(IdentityError::Stat { pid })?;
    Ok(ProcessKey { pid, start_time: stat.start_time })
}

/// No record of this process is older, ns of `CLOCK_MONOTONIC`. Its start is known in ticks of the clock that goes on
/// while the machine sleeps; what it slept so far is taken off, which is more than what it had slept by then.
pub fn earliest(key: ProcessKey) -> u64 {
    // SAFETY: asks for a constant.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let tick = 1_000_000_000 / u64::try_from(ticks).unwrap_or_default().max(1);
    let slept = sys::boottime_ns().saturating_sub(sys::monotonic_ns());
    key.start_time.saturating_mul(tick).saturating_sub(slept)
}

/// The thread through which a process's memory, map and files can be seen: its first, unless that ended before the
/// others.
pub(crate) fn via(pid: u32) -> u32 {
    let ended =
        read_proc(pid, "stat", STAT_MAX).ok().and_then(|stat| parse_stat(&stat)).is_some_and(|s| s.ended);
    if ended { live_thread(pid).unwrap_or(pid) } else { pid }
}

/// A thread of a process other than its first that has not ended.
pub(super) fn live_thread(pid: u32) -> Option<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    threads
        .flatten()
        .take(THREADS_MAX)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|tid| *tid != pid)
        .find(|tid| {
            let stat = read_proc(*tid, "stat", STAT_MAX).ok();
            stat.and_then(|stat| parse_stat(&stat)).is_some_and(|stat| !stat.ended)
        })
}

/// Reads everything. The parts besides `stat` may be missing (permissions, a process that just ended, one that does
/// not answer): those fields stay empty.
pub fn read(pid: u32) -> Result<Identity, IdentityError> {
    let bytes = read_proc(pid, "stat", STAT_MAX)?;
    let stat = parse_stat(&bytes).ok_or(IdentityError::Stat { pid })?;
    let alive = if stat.ended { live_thread(pid).unwrap_or(pid) } else { pid };
    let cgroup = read_proc(pid, "cgroup", CGROUP_MAX).unwrap_or_default();
    // The arguments are the process's own memory, which it can make wait for.
    let cmdline = PATIENCE.ask(pid, MEMORY, move || read_proc(alive, "cmdline", CMDLINE_MAX));
    let cmdline = cmdline.ok().and_then(Result::ok).unwrap_or_default();
    Ok(Identity {
        key: ProcessKey { pid, start_time: stat.start_time },
        ppid: stat.ppid,
        comm: stat.comm,
        exe: std::fs::read_link(format!("/proc/{alive}/exe")).ok(),
        cmdline: parse_cmdline(&cmdline),
        cgroup: parse_cgroup(&cgroup),
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    comm: String,
    /// The main thread is no more: there is no memory, map or descriptor to be seen through it.
    ended: bool,
    ppid: u32,
    start_time: u64,
}

/// `pid (comm) state ppid … starttime …`. The name may itself hold parentheses, spaces and newlines, so it ends
/// at the *last* closing parenthesis.
fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let open = memchr::memchr(b'(', bytes)?;
    let close = memchr::memrchr(b')', bytes)?;
    let comm = String::from_utf8_lossy(bytes.get(open + 1..close)?).into_owned();
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    // The first field after the name is number 3.
    let mut fields = rest.split_ascii_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    let ppid = fields.next()?.parse().ok()?;
    let start_time = fields.nth(22 - 5)?.parse().ok()?;
    Some(Stat { comm, ended, ppid, start_time })
}

fn parse_cmdline(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|&b| b == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
}

/// Lines are `hierarchy:controllers:path`; hierarchy 0 is the unified one.
fn parse_cgroup(bytes: &[u8]) -> String {
    let mut lines = bytes.split(|&b| b == b'\n').filter(|line| !line.is_empty());
    let first = lines.clone().next();
    let line = lines.find(|line| line.starts_with(b"0::")).or(first).unwrap_or_default();
    let path = line.splitn(3, |&b| b == b':').nth(2).unwrap_or_default();
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbered fields: the expected values can be read off the text.
    fn stat_line(comm: &str) -> String {
        let rest: Vec<String> = (4..=52).map(|n| (n * 10).to_string()).collect();
        format!("1234 ({comm}) S {}\n", rest.join(" "))
    }

    #[test]
    fn stat_fields_are_counted_after_the_last_parenthesis() {
        for comm in ["cat", "a b", "x) R 1 2 3", "((", "\n) S 7 7", ""] {
            let stat = parse_stat(stat_line(comm).as_bytes()).unwrap();
            assert_eq!(stat, Stat { comm: comm.to_owned(), ended: false, ppid: 40, start_time: 220 });
        }
    }

    #[test]
    fn a_truncated_stat_is_refused() {
        for text in ["", "1", "1 (a", "1 (a)", "1 (a) S 1 2 3", "1 )a( S"] {
            assert_eq!(parse_stat(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn arguments_are_split_at_nul_and_made_valid() {
        assert_eq!(parse_cmdline(b""), Vec::<String>::new());
        assert_eq!(parse_cmdline(b"\0"), Vec::<String>::new());
        assert_eq!(parse_cmdline(b"a\0\0b c\0"), ["a", "", "b c"]);
        assert_eq!(parse_cmdline(b"\xff\0x"), ["\u{fffd}", "x"]);
    }

    #[test]
    fn the_unified_cgroup_is_preferred() {
        assert_eq!(parse_cgroup(b"9:cpu:/a\n0::/b:c\n"), "/b:c");
        assert_eq!(parse_cgroup(b"9:cpu:/a\n"), "/a");
        assert_eq!(parse_cgroup(b""), "");
    }

    #[test]
    fn this_process_is_known_by_what_the_standard_library_says() {
        let me = read(std::process::id()).unwrap();
        assert_eq!(me.key, key(std::process::id()).unwrap());
        assert!(me.key.start_time > 0);
        let age = sys::monotonic_ns().checked_sub(earliest(me.key)).expect("it began before now");
        let slept = sys::boottime_ns().saturating_sub(sys::monotonic_ns());
        assert!(age < slept + 86_400_000_000_000, "a test process that is days old: {age} ns");
        assert_eq!(me.exe, Some(std::env::current_exe().unwrap()));
        assert_eq!(me.cmdline, std::env::args().collect::<Vec<_>>());
        assert_eq!(me.ppid, std::os::unix::process::parent_id());
    }

    #[test]
    fn a_pid_that_cannot_exist_is_gone() {
        // Above PID_MAX_LIMIT of every kernel.
        assert!(matches!(read(u32::MAX), Err(IdentityError::Gone(u32::MAX))));
    }

    /// A process whose main thread ends while another waits to be told to end.
    const LEADERLESS: &str = "
import ctypes, os, sys, threading
def wait():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=wait).start()
ctypes.CDLL(None).syscall(60, 0)
";

    #[test]
    fn a_process_without_its_main_thread_is_seen_through_another() {
        use crate::process::maps::{Maps, open};
        use crate::process::memory::{Memory, ProcessMemory};
        let child = std::process::Command::new("python3")
            .args(["-c", LEADERLESS])
            .stdin(std::process::Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            crate::skip::skip(
                "a_process_without_its_main_thread_is_seen_through_another",
                "there is no python3",
            );
            return;
        };
        let pid = child.id();
        let began = std::time::Instant::now();
        while via(pid) == pid {
            assert!(began.elapsed() < std::time::Duration::from_secs(60), "the main thread does not end");
            std::thread::yield_now();
        }
        let who = read(pid).unwrap();
        assert!(who.exe.is_some() && who.cmdline.len() == 3);
        let maps = Maps::read(pid).unwrap();
        let code = maps.iter().find(|m| m.executable && m.is_file()).unwrap();
        assert!(open(pid, code).is_ok());
        assert!(ProcessMemory::new(pid).read_u64(code.start).is_ok());
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
