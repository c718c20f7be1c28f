//! What is known about this machine: one place that looks, so that judging needs no machine and tests can make up
//! any.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::probe::{self, Errno};
use crate::process::maps::{Mapping, Maps};
use crate::process::patience::{FILES, PATIENCE};
use crate::process::python;

/// Everything the doctor judges.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub release: String,
    pub machine: String,
    pub btf: bool,
    /// `CapEff` of `/proc/self/status`; `None` = unreadable.
    pub capabilities: Option<u64>,
    pub perf_event_paranoid: Option<i64>,
    pub kptr_restrict: Option<i64>,
    pub bpf_stats: Option<i64>,
    pub ptrace_scope: Option<i64>,
    /// The mode in brackets; `None` = a kernel without lockdown.
    pub lockdown: Option<String>,
    pub initial_pid_namespace: bool,
    /// The number of the uprobe PMU.
    pub uprobe: Option<i64>,
    pub ring_buffer: Result<(), Errno>,
    pub cpu_clock: Result<(), Errno>,
    pub foreign_memory: Option<Result<(), Errno>>,
    pub store: StoreFacts,
    pub targets: Vec<TargetFacts>,
}

#[derive(Clone, Debug)]
pub(super) struct StoreFacts {
    pub path: PathBuf,
    /// `None` = the directory is not there.
    pub directory: Result<Option<DirectoryFacts>, String>,
    pub our_user: u32,
    /// On its file system, or that of its nearest parent.
    pub free: Result<u64, String>,
    /// The pid of the daemon that uses it.
    pub user: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct DirectoryFacts {
    pub is_dir: bool,
    pub uid: u32,
    pub mode: u32,
}

#[derive(Clone, Debug)]
pub(super) struct TargetFacts {
    pub pid: u32,
    /// Its executable, and what its mappings show; or why they cannot be read.
    pub image: Result<Image, String>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Image {
    pub exe: String,
    /// The C library's path, through whose functions requests are seen.
    pub libc: Option<String>,
    /// The interpreter's version, or why its frames cannot be read; `None` = no interpreter.
    pub python: Option<Result<String, String>>,
}

impl Facts {
    pub(super) fn gather(store: &Path, pids: &[u32]) -> Self {
        let (release, machine) = probe::kernel();
        Self {
            release,
            machine,
            btf: fs::File::open("/sys/kernel/btf/vmlinux").is_ok(),
            capabilities: fs::read_to_string("/proc/self/status").ok().and_then(|s| effective(&s)),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            kptr_restrict: number("/proc/sys/kernel/kptr_restrict"),
            bpf_stats: number("/proc/sys/kernel/bpf_stats_enabled"),
            ptrace_scope: number("/proc/sys/kernel/yama/ptrace_scope"),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown").ok().and_then(|s| in_brackets(&s)),
            // PROC_PID_INIT_INO (linux/proc_ns.h).
            initial_pid_namespace: fs::metadata("/proc/self/ns/pid").is_ok_and(|m| m.ino() == 0xEFFF_FFFC),
            uprobe: number("/sys/bus/event_source/devices/uprobe/type"),
            ring_buffer: probe::ring_buffer(),
            cpu_clock: probe::cpu_clock(),
            foreign_memory: probe::foreign_memory(),
            store: StoreFacts::gather(store),
            targets: pids.iter().map(|pid| TargetFacts { pid: *pid, image: image(*pid) }).collect(),
        }
    }
}

impl StoreFacts {
    fn gather(path: &Path) -> Self {
        let directory = match fs::symlink_metadata(path) {
            Ok(m) => Ok(Some(DirectoryFacts { is_dir: m.is_dir(), uid: m.uid(), mode: m.mode() & 0o7777 })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.to_string()),
        };
        let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        Self {
            path: path.to_owned(),
            directory,
            our_user: probe::user(),
            free: probe::disk_free(existing).map_err(|e| e.to_string()),
            user: probe::lock_holder(&path.join("lock")),
        }
    }
}

fn number(path: &str) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// `none [integrity] confidentiality` is `integrity`.
fn in_brackets(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

fn image(pid: u32) -> Result<Image, String> {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => "no such process".to_owned(),
        _ => e.to_string(),
    })?;
    let maps = Maps::read(pid).map_err(|e| e.to_string())?;
    Ok(Image { exe: exe.to_string_lossy().into_owned(), libc: libc(&maps), python: interpreter(pid, maps) })
}

fn libc(maps: &Maps) -> Option<String> {
    let is_libc = |mapping: &&Mapping| mapping.is_glibc() || mapping.file_name().starts_with("ld-musl-");
    maps.iter().find(is_libc).map(|mapping| mapping.path.to_string_lossy().into_owned())
}

/// Looks as the daemon will.
fn interpreter(pid: u32, maps: Maps) -> Option<Result<String, String>> {
    match PATIENCE.ask(pid, FILES, move || python::detect(pid, &maps)) {
        Ok(Ok(found)) => found.map(|python| Ok(python.release)),
        Ok(Err(error)) => Some(Err(error.to_string())),
        Err(unanswered) => Some(Err(unanswered.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_proc_are_understood() {
        assert_eq!(effective("CapPrm:\t0\nCapEff:\t000001fffeffffff\nCapBnd:\t0\n"), Some(0x1ff_feff_ffff));
        assert_eq!(effective("Name: x\n"), None);
        assert_eq!(in_brackets("none [integrity] confidentiality\n"), Some("integrity".into()));
        assert_eq!(in_brackets("none\n"), None);
    }

    #[test]
    fn mappings_show_the_libc() {
        let found = |maps: &[u8]| libc(&Maps::parse(maps));
        let python = b"5555-5556 r-xp 00000000 fe:01 12 /usr/bin/python3.11\n\
                       7f00-7f01 r--p 00000000 fe:01 13 /usr/lib/x86_64-linux-gnu/libc.so.6\n\
                       7f02-7f03 rw-p 00000000 00:00 0 \n";
        assert_eq!(found(python).as_deref(), Some("/usr/lib/x86_64-linux-gnu/libc.so.6"));
        let musl = b"7f00-7f01 r-xp 00000000 fe:01 13 /lib/ld-musl-x86_64.so.1\n";
        assert_eq!(found(musl).as_deref(), Some("/lib/ld-musl-x86_64.so.1"));
        assert_eq!(found(b"5555-5556 r-xp 00000000 fe:01 12 /usr/sbin/static\n"), None);
    }

    #[test]
    fn a_process_that_is_gone_is_said_to_be() {
        // Above the kernel's largest pid.
        assert_eq!(image(4_194_305).expect_err("no such pid"), "no such process");
        let own = image(std::process::id()).expect("ourselves");
        assert!(own.libc.is_some() && own.python.is_none());
    }
}
