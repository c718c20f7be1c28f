//! Boundary probes on C libraries: one set per library file, for every process that maps it.
//!
//! In: an opened libc. Out: uprobes at its cheap sites, and for each function whether it could be probed. The
//! kernel side looks at targets only, so a set serves all processes and is attached once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use aya::Ebpf;
use aya::programs::uprobe::{UProbeLink, UProbeLinkId, UProbeScope};
use aya::programs::{ProgramError, UProbe};

use super::{ProbeState, ProbeTable};
use crate::process::elf::{ElfError, ElfFile, FileId};
use crate::process::maps::in_user_space;
use crate::process::patience::{FILES, PATIENCE};
use crate::process::sites::{self, Reason, SiteError};

/// Which program follows the functions that make a system call.
fn program_for(syscall: u32) -> Option<&'static str> {
    Some(match i64::from(syscall) {
        libc::SYS_recvfrom => "http_recv",
        libc::SYS_read => "http_read",
        libc::SYS_readv => "http_readv",
        libc::SYS_recvmsg => "http_recvmsg",
        libc::SYS_sendto | libc::SYS_write => "http_send",
        libc::SYS_writev => "http_writev",
        libc::SYS_sendmsg => "http_sendmsg",
        libc::SYS_sendfile => "http_sendfile",
        libc::SYS_accept | libc::SYS_accept4 => "http_accept",
        _ => return None,
    })
}

/// The program in front of the system call of what sends, and the functions that it follows.
/// Not `sendfile`: nothing cheap comes before its system call.
const ENTER: (&str, [&str; 5]) = ("http_enter", ["send", "sendto", "write", "writev", "sendmsg"]);

/// The same where a thread begins to wait for events. The last one is new in glibc 2.35, and not every kernel's.
const WAIT: (&str, [&str; 3]) = ("epoll_wait", ["epoll_wait", "epoll_pwait", "epoll_pwait2"]);

/// Without these no request can be followed at all, or a thread that works on several passes for one that does not.
const REQUIRED: [&str; 5] = ["recv", "send", "accept4", "close", "epoll_wait"];

/// A library cannot be probed.
#[derive(Debug, thiserror::Error)]
pub enum BoundaryError {
    #[error("{0}")]
    Elf(#[from] ElfError),
    #[error("{}", .0.join("; "))]
    NoSites(Vec<String>),
    #[error("there is no OpenSSL in it")]
    NoOpenSsl,
    #[error("it lies on a file system in user space, which could make the kernel wait")]
    UserSpace,
    #[error("attaching to {function}: {reason}")]
    Attach { function: String, reason: String },
}

/// What a library carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    sites: usize,
    /// Functions that are not followed, with the reasons.
    missing: Vec<String>,
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sites", self.sites)?;
        if self.missing.is_empty() { Ok(()) } else { write!(f, ", without {}", self.missing.join("; ")) }
    }
}

/// Links, with the program that each belongs to.
pub type Links = Vec<(&'static str, UProbeLinkId)>;

struct Library {
    result: Result<Attached, String>,
    /// With the program that each belongs to.
    links: Links,
    /// Processes that map it.
    users: HashSet<u32>,
    /// Its name in the table of probes.
    label: String,
}

/// Sets of uprobes, by library.
#[derive(Default)]
pub struct BoundaryProbes {
    libraries: HashMap<FileId, Library>,
}

/// Most library files probed. A host has one libc per distribution in use, containers included; 64 sets of about
/// 30 probes keep the kernel's work at detaching bounded.
const LIBRARIES_MAX: usize = 64;

impl BoundaryProbes {
    /// Attaches to a library that `pid` maps, unless that was tried before. `name` is for people.
    pub fn attach(
        &mut self,
        object: &mut Ebpf,
        pid: u32,
        file: File,
        name: &str,
        probes: &ProbeTable,
    ) -> Result<Attached, String> {
        let id = FileId::of(&file).map_err(|e| e.to_string())?;
        if let Some(known) = self.libraries.get_mut(&id) {
            known.users.insert(pid);
            return known.result.clone();
        }
        if self.libraries.len() >= LIBRARIES_MAX && !self.make_room(object, probes) {
            return Err(format!("{LIBRARIES_MAX} C libraries are probed already"));
        }
        // A process that does not answer now may do so another time.
        let examined = PATIENCE.ask(pid, FILES, move || examine(file)).map_err(|e| e.to_string())?;
        let mut links = Links::new();
        let result = examined.and_then(|found| attach_all(object, &found, &mut links));
        if result.is_err() {
            detach_links(object, std::mem::take(&mut links));
        }
        let result = result.map_err(|e| e.to_string());
        let state = match &result {
            Ok(attached) => ProbeState::Active { detail: attached.to_string() },
            Err(reason) => ProbeState::Failed { reason: reason.clone() },
        };
        let mut label = format!("boundaries in {name}");
        if self.libraries.values().any(|library| library.label == label) {
            // Each container has its own file of this name.
            label = format!("{label} (device {:#x}, inode {})", id.dev, id.inode);
        }
        probes.set(label.clone(), state);
        self.libraries
            .insert(id, Library { result: result.clone(), links, users: HashSet::from([pid]), label });
        result
    }

    /// A process forked, and maps what its parent maps.
    pub fn inherit(&mut self, parent: u32, child: u32) {
        for library in self.libraries.values_mut().filter(|library| library.users.contains(&parent)) {
            library.users.insert(child);
        }
    }

    /// Forgets users of which `alive` does not hold.
    pub fn sweep(&mut self, alive: impl Fn(u32) -> bool) {
        for library in self.libraries.values_mut() {
            library.users.retain(|pid| alive(*pid));
        }
    }

    /// Lets a library go that could not be probed, or that nobody maps any more.
    fn make_room(&mut self, object: &mut Ebpf, probes: &ProbeTable) -> bool {
        let unneeded = |library: &Library| (library.result.is_ok(), !library.users.is_empty());
        let candidates = self.libraries.iter().filter(|(_, l)| l.result.is_err() || l.users.is_empty());
        let Some(id) = candidates.min_by_key(|(_, l)| unneeded(l)).map(|(id, _)| *id) else { return false };
        if let Some(library) = self.libraries.remove(&id) {
            probes.remove(&library.label);
            detach_links(object, library.links);
        }
        true
    }

    /// Detaches everything.
    pub fn detach(&mut self, object: &mut Ebpf) {
        let links = self.libraries.drain().flat_map(|(_, library)| library.links).collect();
        detach_links(object, links);
    }
}

/// The kernel waits a few times for every CPU at each probe; waiting for all of them at once is much faster than one
/// after the other.
pub(super) fn detach_links(object: &mut Ebpf, links: Links) {
    drop_all(links.into_iter().filter_map(|(program, link)| take_link(object, program, link)).collect());
}

pub(super) fn drop_all(links: Vec<UProbeLink>) {
    std::thread::scope(|scope| {
        for link in links {
            // Where no thread can be had, the link is dropped here.
            let _ = std::thread::Builder::new().spawn_scoped(scope, move || drop(link));
        }
    });
}

pub(super) fn take_link(object: &mut Ebpf, program: &str, link: UProbeLinkId) -> Option<UProbeLink> {
    let program: &mut UProbe = object.program_mut(program)?.try_into().ok()?;
    program.take_link(link).ok()
}

/// A library and where its probes belong.
struct Examined {
    elf: ElfFile,
    /// By file offset: the function, and the program for it.
    wanted: BTreeMap<u64, (&'static str, &'static str)>,
    missing: Vec<String>,
}

fn examine(file: File) -> Result<Examined, BoundaryError> {
    if in_user_space(&file) {
        return Err(BoundaryError::UserSpace);
    }
    let elf = ElfFile::parse(file)?;
    // Aliases (`sendfile` and `sendfile64`) share their code: a site is probed once.
    let mut wanted = BTreeMap::new();
    let mut missing = Vec::new();
    for function in sites::FUNCTIONS {
        let Some(program) = program_for(function.syscall) else { continue };
        let found = match sites::result_sites(&elf, function) {
            Ok(found) => found,
            Err(error) => {
                missing.push(describe(error));
                continue;
            }
        };
        wanted.extend(found.into_iter().map(|site| (site, (function.name, program))));
        if ENTER.1.contains(&function.name) {
            // Without it a response ends when the call returns, which can be later than when the client had it.
            match sites::entry_site(&elf, function.name) {
                Ok(site) => drop(wanted.insert(site, (function.name, ENTER.0))),
                Err(error) => missing.push(format!("the entry of {}", describe(error))),
            }
        }
    }
    let waits = WAIT.1.map(|function| (function, WAIT.0));
    for (function, program) in waits.into_iter().chain([("close", "http_close")]) {
        match sites::entry_site(&elf, function) {
            Ok(site) => drop(wanted.insert(site, (function, program))),
            Err(SiteError::NoCheapSite { reason: Reason::Undefined, .. }) if function != WAIT.1[0] => {}
            Err(error) => missing.push(describe(error)),
        }
    }
    let unfit = REQUIRED.iter().any(|name| !wanted.values().any(|(function, _)| function == name));
    if unfit { Err(BoundaryError::NoSites(missing)) } else { Ok(Examined { elf, wanted, missing }) }
}

fn attach_all(object: &mut Ebpf, found: &Examined, links: &mut Links) -> Result<Attached, BoundaryError> {
    let Examined { elf, wanted, missing } = found;
    // The path leads to the very file that was examined, whatever its name means by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", elf.file().as_raw_fd()));
    for (site, (function, program)) in wanted {
        let failed = |e: ProgramError| BoundaryError::Attach {
            function: (*function).to_owned(),
            reason: match std::error::Error::source(&e) {
                Some(source) => format!("{e}: {source}"),
                None => e.to_string(),
            },
        };
        if let Some(uprobe) = object.program_mut(program) {
            let uprobe: &mut UProbe = uprobe.try_into().map_err(failed)?;
            links.push((program, uprobe.attach(*site, &path, UProbeScope::AllProcesses).map_err(failed)?));
        }
    }
    Ok(Attached { sites: wanted.len(), missing: missing.clone() })
}

fn describe(error: SiteError) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_has_its_program() {
        assert!(sites::FUNCTIONS.iter().all(|function| program_for(function.syscall).is_some()));
        assert_eq!(program_for(libc::SYS_close as u32), None);
    }

    fn library(result: Result<Attached, String>, users: &[u32], label: &str) -> Library {
        Library {
            result,
            links: Links::new(),
            users: users.iter().copied().collect(),
            label: label.to_owned(),
        }
    }

    #[test]
    fn users_come_with_forks_and_go_with_their_end() {
        let mut probes = BoundaryProbes::default();
        let id = FileId { dev: 1, inode: 2, size: 3, mtime: 4 };
        let attached = Attached { sites: 3, missing: vec!["sendfile: none".into()] };
        assert_eq!(attached.to_string(), "3 sites, without sendfile: none");
        probes.libraries.insert(id, library(Ok(attached), &[10], "a"));
        probes.inherit(10, 11);
        probes.inherit(99, 100);
        probes.sweep(|pid| pid != 10);
        assert_eq!(probes.libraries[&id].users, HashSet::from([11]));
    }
}
