//! Boundary probes on C libraries: one set per library file, for every process that maps it.
//!
//! In: an opened libc. Out: uprobes at its cheap sites, and for each function whether it could be probed. The
//! kernel side looks at targets only, so a set serves all processes and is attached once.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use aya::Ebpf;
use aya::programs::uprobe::{UProbeLink, UProbeLinkId, UProbeScope};
use aya::programs::{ProgramError, UProbe};

use super::{ProbeState, ProbeTable};
use crate::process::elf::{ElfError, ElfFile, FileId};
use crate::process::sites::{self, SiteError};

/// What tells one library file from another.
pub type LibraryKey = FileId;

/// Which program follows which libc function.
const PROGRAMS: [(&str, &str); 14] = [
    ("recv", "http_recv"),
    ("recvfrom", "http_recv"),
    ("read", "http_read"),
    ("readv", "http_readv"),
    ("recvmsg", "http_recvmsg"),
    ("send", "http_send"),
    ("sendto", "http_send"),
    ("write", "http_send"),
    ("writev", "http_writev"),
    ("sendmsg", "http_sendmsg"),
    ("sendfile", "http_sendfile"),
    ("sendfile64", "http_sendfile"),
    ("accept", "http_accept"),
    ("accept4", "http_accept"),
];

/// The program in front of the system call of what sends, and the functions that it follows.
const ENTER: (&str, [&str; 6]) = ("http_enter", ["send", "sendto", "write", "writev", "sendmsg", "sendfile"]);

/// Without these no request can be followed at all.
const REQUIRED: [&str; 4] = ["recv", "send", "accept4", "close"];

/// A library cannot be probed.
#[derive(Debug, thiserror::Error)]
pub enum BoundaryError {
    #[error("{0}")]
    Elf(#[from] ElfError),
    #[error("{}", .0.join("; "))]
    NoSites(Vec<String>),
    #[error("attaching to {function}: {reason}")]
    Attach { function: String, reason: String },
}

/// Sets of uprobes, by library.
#[derive(Default)]
pub struct BoundaryProbes {
    libraries: HashMap<LibraryKey, Result<usize, String>>,
    /// With the program that each belongs to.
    links: Vec<(&'static str, UProbeLinkId)>,
}

/// Most library files probed. A host has one libc per distribution in use, containers included; 64 sets of about
/// 30 probes keep the kernel's work at detaching bounded.
const LIBRARIES_MAX: usize = 64;

impl BoundaryProbes {
    /// Whether this library has been seen, and what became of it.
    pub fn state(&self, key: &LibraryKey) -> Option<&Result<usize, String>> {
        self.libraries.get(key)
    }

    /// Attaches to a library unless that was tried before. `name` is for people.
    pub fn attach(
        &mut self,
        object: &mut Ebpf,
        file: File,
        name: &str,
        probes: &ProbeTable,
    ) -> Result<usize, String> {
        let key = FileId::of(&file).map_err(|e| e.to_string())?;
        if let Some(known) = self.libraries.get(&key) {
            return known.clone();
        }
        if self.libraries.len() >= LIBRARIES_MAX {
            return Err(format!("{LIBRARIES_MAX} C libraries are probed already"));
        }
        let result = attach_library(object, file, &mut self.links).map_err(|e| e.to_string());
        let state = match &result {
            Ok((sites, missing)) if missing.is_empty() => {
                ProbeState::Active { detail: format!("{sites} sites") }
            }
            Ok((sites, missing)) => {
                ProbeState::Active { detail: format!("{sites} sites; without {}", missing.join("; ")) }
            }
            Err(reason) => ProbeState::Failed { reason: reason.clone() },
        };
        probes.set(format!("boundaries in {name}"), state);
        let result = result.map(|(sites, _)| sites);
        self.libraries.insert(key, result.clone());
        result
    }

    /// Detaches everything. The kernel waits a few times for every CPU at each probe; waiting for all of them at
    /// once is much faster than one after the other.
    pub fn detach(&mut self, object: &mut Ebpf) {
        let links: Vec<UProbeLink> =
            self.links.drain(..).filter_map(|(program, link)| take_link(object, program, link)).collect();
        std::thread::scope(|scope| {
            for link in links {
                // Where no thread can be had, the link is dropped here.
                let _ = std::thread::Builder::new().spawn_scoped(scope, move || drop(link));
            }
        });
        self.libraries.clear();
    }

    /// Libraries that carry probes.
    pub fn attached(&self) -> usize {
        self.libraries.values().filter(|r| r.is_ok()).count()
    }
}

fn take_link(object: &mut Ebpf, program: &str, link: UProbeLinkId) -> Option<UProbeLink> {
    let program: &mut UProbe = object.program_mut(program)?.try_into().ok()?;
    program.take_link(link).ok()
}

fn attach_library(
    object: &mut Ebpf,
    file: File,
    links: &mut Vec<(&'static str, UProbeLinkId)>,
) -> Result<(usize, Vec<String>), BoundaryError> {
    let elf = ElfFile::parse(file)?;
    // Aliases (`sendfile` and `sendfile64`) share their code: a site is probed once.
    let mut wanted: BTreeMap<u64, (&str, &'static str)> = BTreeMap::new();
    let mut missing = Vec::new();
    for function in sites::FUNCTIONS {
        let program = PROGRAMS.iter().find(|(name, _)| *name == function.name).map(|(_, program)| *program);
        let Some(program) = program else { continue };
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
    match sites::entry_site(&elf, "close") {
        Ok(site) => {
            wanted.insert(site, ("close", "http_close"));
        }
        Err(error) => missing.push(describe(error)),
    }
    let unfit = REQUIRED.iter().any(|name| !wanted.values().any(|(function, _)| function == name));
    if unfit {
        return Err(BoundaryError::NoSites(missing));
    }
    // The path leads to the very file that was examined, whatever its name means by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", elf.file().as_raw_fd()));
    for (site, (function, program)) in &wanted {
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
    Ok((wanted.len(), missing))
}

fn describe(error: SiteError) -> String {
    error.to_string()
}
