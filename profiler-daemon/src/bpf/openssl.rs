//! Probes on OpenSSL in single processes: its library, or the program that it was linked into.
//!
//! In: a target, and its files that may have OpenSSL in them. Out: where it moves clear text, with probes at entries and ends.
//!
//! The program at an end needs the function's first instruction, which is cheap if it is one that the kernel emulates. Those
//! of `SSL_read` and its kin often are not, but in OpenSSL 1.1.1 and 3 `SSL_read` and `SSL_read_ex` hand their work to one
//! function, which saves registers first. Its arguments are those of `SSL_read_ex` (ssl/ssl_lib.c, `ssl_read_internal`).
//!
//! To see an end, the kernel replaces the return address. A program that switches stacks inside the function (Crystal's
//! fibers do, in the functions that OpenSSL calls back) returns in another order than it was called, and would crash. So the
//! probes are in targets only of which it is known that they do not, and never in whoever else maps the file.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use aya::Ebpf;
use aya::programs::uprobe::UProbeScope;
use aya::programs::{ProgramError, UProbe};

use super::boundary::{BoundaryError, Links, detach_links};
use super::detacher::Detacher;
use super::{ProbeState, ProbeTable, sys};
use crate::process::elf::{ElfFile, FileId};
use crate::process::identity::{self, ProcessKey};
use crate::process::maps::in_user_space;
use crate::process::patience::{FILES, PATIENCE};
use crate::process::sites;

/// What moves clear text, in both manners of saying how much (those with `_ex` since 1.1.1; CPython uses them from 3.10
/// on), with the programs at their entries.
const MOVES: [[(&str, &str); 2]; 2] = [
    [("SSL_read", "tls_read"), ("SSL_read_ex", "tls_read_ex")],
    [("SSL_write", "tls_write"), ("SSL_write_ex", "tls_write_ex")],
];
/// For what is received within it. `SSL_accept` calls it.
const HANDSHAKE: (&str, &str) = ("SSL_do_handshake", "tls_handshake");
/// Without it the next session at the same address is taken for the same, so nothing is followed.
const FREE: (&str, &str) = ("SSL_free", "tls_free");
const RETURNED: &str = "tls_returned";

/// Its name in the table of probes.
const PROBE: &str = "TLS";
/// Processes that have probes: seven each, more than a host's services that end TLS themselves have workers.
const PROCESSES_MAX: usize = 512;
/// Files whose places are remembered; more are looked at anew.
const FILES_MAX: usize = 64;

/// A file and where its probes belong.
struct Examined {
    elf: ElfFile,
    /// By file offset and program: the function.
    wanted: BTreeMap<(u64, &'static str), &'static str>,
    /// What has only dear places.
    dear: Vec<&'static str>,
}

/// A process that has probes.
struct Probed {
    key: ProcessKey,
    /// When the last of them was in, ns of the kernel's clock.
    since: u64,
    files: HashMap<FileId, Links>,
}

/// Probes by process.
#[derive(Default)]
pub struct OpenSslProbes {
    processes: HashMap<u32, Probed>,
    /// `None`: there is no OpenSSL in it.
    files: HashMap<FileId, Option<Arc<Examined>>>,
    /// Of processes that are gone.
    loose: Links,
    detacher: Detacher,
}

impl OpenSslProbes {
    /// Puts probes into a process, on one of its files. The result is for people.
    pub fn attach(&mut self, object: &mut Ebpf, process: ProcessKey, file: File) -> Result<String, String> {
        let pid = process.pid;
        let id = FileId::of(&file).map_err(|e| e.to_string())?;
        let found = self.examined(pid, id, file)?;
        self.put(object, process, id, &found)?;
        Ok(match found.dear.len() {
            0 => format!("{} sites", found.wanted.len()),
            _ => format!("{} sites, none of them cheap in {}", found.wanted.len(), found.dear.join(", ")),
        })
    }

    /// Since when a process has probes, ns of the kernel's clock.
    pub fn since(&self, process: ProcessKey) -> Option<u64> {
        self.processes.get(&process.pid).filter(|probed| probed.key == process).map(|probed| probed.since)
    }

    /// A child maps what its parent maps, as long as it runs the same program; but a breakpoint of one process is not
    /// another's.
    pub fn inherit(&mut self, object: &mut Ebpf, parent: u32, child: ProcessKey) -> Result<(), String> {
        let files =
            self.processes.get(&parent).map_or_else(Vec::new, |of| of.files.keys().copied().collect());
        if files.is_empty() {
            return Err("its parent has no probes".into());
        }
        files.into_iter().try_for_each(|id| match self.files.get(&id).cloned().flatten() {
            Some(found) => self.put(object, child, id, &found),
            None => Err("its files were forgotten".into()),
        })
    }

    fn put(
        &mut self,
        object: &mut Ebpf,
        process: ProcessKey,
        id: FileId,
        found: &Examined,
    ) -> Result<(), String> {
        let pid = process.pid;
        if self.processes.get(&pid).is_some_and(|probed| probed.key != process) {
            self.ended(pid);
        }
        if self.processes.get(&pid).is_some_and(|probed| probed.files.contains_key(&id)) {
            return Ok(());
        }
        if self.processes.len() >= PROCESSES_MAX && !self.processes.contains_key(&pid) {
            return Err(format!("{PROCESSES_MAX} processes have probes on OpenSSL already"));
        }
        let mut links = Links::new();
        let attached = put_all(object, found, pid, &mut links);
        let same = identity::key(pid).ok() == Some(process);
        if attached.is_err() || !same {
            self.detacher.take(object, links);
            attached?;
            return Err("it ended".into());
        }
        let new = || Probed { key: process, since: 0, files: HashMap::new() };
        let probed = self.processes.entry(pid).or_insert_with(new);
        probed.files.insert(id, links);
        probed.since = sys::monotonic_ns();
        Ok(())
    }

    fn examined(&mut self, pid: u32, id: FileId, file: File) -> Result<Arc<Examined>, String> {
        let nothing = || BoundaryError::NoOpenSsl.to_string();
        if let Some(known) = self.files.get(&id) {
            return known.clone().ok_or_else(nothing);
        }
        // A process that does not answer now may do so another time.
        let examined = PATIENCE.ask(pid, FILES, move || examine(file)).map_err(|e| e.to_string())?;
        let found = match examined {
            Ok(found) => Some(Arc::new(found)),
            Err(BoundaryError::NoOpenSsl) => None,
            Err(error) => return Err(error.to_string()),
        };
        if self.files.len() >= FILES_MAX {
            self.files.clear();
        }
        self.files.insert(id, found.clone());
        found.ok_or_else(nothing)
    }

    /// The process is gone, or runs another program.
    pub fn ended(&mut self, pid: u32) {
        if let Some(probed) = self.processes.remove(&pid) {
            self.loose.extend(probed.files.into_values().flatten());
        }
    }

    /// Events were lost: any process may be another.
    pub fn forget_gone(&mut self) {
        let gone =
            |(pid, probed): (&u32, &Probed)| (identity::key(*pid).ok() != Some(probed.key)).then_some(*pid);
        let gone: Vec<u32> = self.processes.iter().filter_map(gone).collect();
        gone.into_iter().for_each(|pid| self.ended(pid));
    }

    /// To be called once a second.
    pub fn tend(&mut self, object: &mut Ebpf, probes: &ProbeTable) {
        self.detacher.take(object, std::mem::take(&mut self.loose));
        match self.processes.len() {
            0 => probes.remove(PROBE),
            n => probes.set(PROBE, ProbeState::Active { detail: format!("OpenSSL in {n} processes") }),
        }
    }

    pub fn detach(&mut self, object: &mut Ebpf) {
        let all: Vec<u32> = self.processes.keys().copied().collect();
        all.into_iter().for_each(|pid| self.ended(pid));
        detach_links(object, std::mem::take(&mut self.loose));
    }
}

fn put_all(object: &mut Ebpf, found: &Examined, pid: u32, links: &mut Links) -> Result<(), String> {
    // The path leads to the very file that was examined, whatever its name means by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", found.elf.file().as_raw_fd()));
    let pid = NonZeroU32::new(pid).ok_or("no process")?;
    for ((offset, name), function) in &found.wanted {
        let failed = |e: ProgramError| match std::error::Error::source(&e) {
            Some(source) => format!("attaching to {function}: {e}: {source}"),
            None => format!("attaching to {function}: {e}"),
        };
        let program = object.program_mut(name).ok_or("it is not in the object")?;
        let program: &mut UProbe = program.try_into().map_err(failed)?;
        links.push((name, program.attach(*offset, &path, UProbeScope::OneProcess(pid)).map_err(failed)?));
    }
    Ok(())
}

fn examine(file: File) -> Result<Examined, BoundaryError> {
    if in_user_space(&file) {
        return Err(BoundaryError::UserSpace);
    }
    let elf = ElfFile::parse(file)?;
    let names = [MOVES[0][0].0, MOVES[0][1].0, MOVES[1][0].0, MOVES[1][1].0, HANDSHAKE.0, FREE.0];
    let symbols = elf.symbols(&names)?;
    let offset = |name| symbols.get(name).and_then(|symbol| elf.offset_of(symbol.value));
    let (mut wanted, mut dear) = (BTreeMap::new(), Vec::new());
    let mut both = |at: u64, (function, program)| {
        wanted.insert((at, program), function);
        wanted.insert((at, RETURNED), function);
    };
    for [one, other] in MOVES {
        if offset(one.0).is_none() {
            return Err(BoundaryError::NoOpenSsl);
        }
        if let Some(inner) = sites::inner_function(&elf, one.0, other.0) {
            both(inner, other);
            continue;
        }
        for function in [one, other] {
            let Some(at) = offset(function.0) else { continue };
            both(at, function);
            if !sites::begins_cheaply(&elf, function.0) {
                dear.push(function.0);
            }
        }
    }
    // What is received within it is seen a call later, in what it is followed by.
    if let Some(at) = offset(HANDSHAKE.0) {
        both(at, HANDSHAKE);
    }
    let free = sites::entry_site(&elf, FREE.0).ok().or_else(|| offset(FREE.0));
    wanted.insert((free.ok_or(BoundaryError::NoOpenSsl)?, FREE.1), FREE.0);
    Ok(Examined { elf, wanted, dear })
}
