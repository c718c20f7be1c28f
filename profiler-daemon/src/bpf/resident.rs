//! Probes in the memory of single Python processes.
//!
//! In: the table of targets, once a second. Out: for each of them the probes of a [`Kind`], and its entry in the map that
//! says so to the kernel side. They are in the memory of one process, not in the file: other programs of the same
//! interpreter do not pay for them. A fork gets none; it is a target of its own by the next second, if it lives so long.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use aya::Ebpf;
use aya::programs::UProbe;
use aya::programs::uprobe::UProbeScope;

use super::boundary::{Links, detach_links};
use super::detacher::Detacher;
use super::{ProbeState, ProbeTable};
use crate::process::identity::{self, ProcessKey};
use crate::process::memory::{Memory, ProcessMemory};
use crate::process::patience::{MEMORY, PATIENCE};
use crate::process::python::ProbeSite;
use crate::process::targets::Targets;

/// Processes that get their probes in one second: each costs a look at the interpreter's symbols, some milliseconds.
const AT_ONCE: usize = 8;
/// What the kernel writes over an instruction that has a probe (`int3`).
const BREAKPOINT: u8 = 0xcc;

/// What probes are for.
pub trait Kind {
    /// Their name in the table of probes.
    const PROBE: &'static str;
    /// Processes that have them at most.
    const MAX: usize;
    /// What it is good for that so many processes have them.
    fn detail(processes: usize) -> String;
    /// Puts the probes in, and says so to the kernel side. What is in `links` when it fails is taken out again.
    fn install(&mut self, object: &mut Ebpf, process: ProcessKey, links: &mut Links) -> Result<(), String>;
    /// Whether they still are what they were, and worth it.
    fn check(&mut self, pid: u32) -> Worth;
    /// The kernel side is not to count on them any more.
    fn removed(&mut self, pid: u32);
}

/// What became of a process's probes.
pub enum Worth {
    Kept,
    /// The kernel side has taken the process's entry away, because it ended or runs another program.
    Gone,
    /// They cost more than they are worth, or tell nothing, for this reason.
    TooDear(String),
}

struct Watch {
    key: ProcessKey,
    links: Links,
}

/// See the module.
pub struct Resident<K> {
    pub kind: K,
    watched: HashMap<u32, Watch>,
    /// Without probes for good, with the reason.
    refused: HashMap<u32, (ProcessKey, String)>,
    /// Targets a second ago.
    known: HashSet<u32>,
    /// Of processes that are gone.
    loose: Links,
    detacher: Detacher,
}

impl<K: Kind> Resident<K> {
    pub fn new(kind: K) -> Self {
        Self {
            kind,
            watched: HashMap::new(),
            refused: HashMap::new(),
            known: HashSet::new(),
            loose: Links::new(),
            detacher: Detacher::default(),
        }
    }

    /// To be called once a second. `beat` is called before each process that may let us wait.
    pub fn tend(&mut self, object: &mut Ebpf, targets: &Targets, probes: &ProbeTable, beat: impl Fn()) {
        let live: HashMap<u32, ProcessKey> = targets
            .list()
            .iter()
            .filter(|info| info.runtime.name == "python" && info.interpreter_stacks.works)
            .map(|info| (info.pid, info.key))
            .collect();
        self.refused.retain(|pid, (key, _)| live.get(pid) == Some(key));
        let watched: Vec<u32> = self.watched.keys().copied().collect();
        for pid in watched {
            self.look_after(pid, live.get(&pid).copied());
        }
        let mut due: Vec<ProcessKey> = live
            .iter()
            .filter(|(pid, _)| self.known.contains(*pid))
            .filter(|(pid, _)| !self.watched.contains_key(*pid) && !self.refused.contains_key(*pid))
            .map(|(_, key)| *key)
            .collect();
        due.sort_unstable_by_key(|key| key.pid);
        let room = K::MAX.saturating_sub(self.watched.len());
        for key in due.into_iter().take(AT_ONCE.min(room)) {
            beat();
            let mut links = Links::new();
            match self.kind.install(object, key, &mut links) {
                Ok(()) => drop(self.watched.insert(key.pid, Watch { key, links })),
                Err(reason) => {
                    tracing::debug!(key.pid, reason, "without {}", K::PROBE);
                    self.loose.extend(links);
                    self.refused.insert(key.pid, (key, reason));
                }
            }
        }
        self.known = live.into_keys().collect();
        self.detacher.take(object, std::mem::take(&mut self.loose));
        self.tell(probes);
    }

    fn look_after(&mut self, pid: u32, key: Option<ProcessKey>) {
        let Some(watch) = self.watched.get(&pid) else { return };
        if key != Some(watch.key) {
            return self.ended(pid);
        }
        let key = watch.key;
        match self.kind.check(pid) {
            Worth::Kept => {}
            Worth::Gone => self.ended(pid),
            Worth::TooDear(reason) => {
                self.refused.insert(pid, (key, reason));
                self.ended(pid);
            }
        }
    }

    /// The process is gone, or runs another program, which has no probes.
    pub fn ended(&mut self, pid: u32) {
        if let Some(watch) = self.watched.remove(&pid) {
            self.kind.removed(pid);
            self.loose.extend(watch.links);
        }
    }

    /// Events were lost: any process may be another.
    pub fn forget_all(&mut self) {
        let watched: Vec<u32> = self.watched.keys().copied().collect();
        for pid in watched {
            self.ended(pid);
        }
    }

    /// Takes all probes away.
    pub fn detach(&mut self, object: &mut Ebpf) {
        self.forget_all();
        detach_links(object, std::mem::take(&mut self.loose));
    }

    fn tell(&self, probes: &ProbeTable) {
        if self.watched.is_empty() && self.refused.is_empty() {
            probes.remove(K::PROBE);
            return;
        }
        let mut detail = K::detail(self.watched.len());
        if let Some((pid, (_, reason))) = self.refused.iter().min_by_key(|(pid, _)| **pid) {
            detail = format!("{detail}; not in {}, such as {pid}: {reason}", self.refused.len());
        }
        probes.set(K::PROBE, ProbeState::Active { detail });
    }
}

/// Puts a program in a place of a process, and looks whether it is there.
pub(super) fn put(
    object: &mut Ebpf,
    name: &'static str,
    site: &ProbeSite,
    process: ProcessKey,
    links: &mut Links,
) -> Result<(), String> {
    let ProbeSite { elf, offset, address } = site;
    let (pid, address) = (process.pid, *address);
    // The path leads to the very file that was examined, whatever its name means by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", elf.file().as_raw_fd()));
    let program = object.program_mut(name).ok_or("it is not in the object")?;
    let program: &mut UProbe = program.try_into().map_err(|e| format!("{e}"))?;
    let one = UProbeScope::OneProcess(NonZeroU32::new(pid).ok_or("no process")?);
    links.push((name, program.attach(*offset, &path, one).map_err(|e| format!("attaching: {e}"))?));
    // Code that was copied elsewhere has no file that a probe could be in.
    let byte = PATIENCE.ask(pid, MEMORY, move || {
        let mut byte = [0];
        ProcessMemory::new(pid).read(address, &mut byte).map(|()| byte[0])
    });
    let in_place = matches!(byte, Ok(Ok(BREAKPOINT))) && identity::key(pid).ok() == Some(process);
    if in_place { Ok(()) } else { Err("the probe is not where it should be".into()) }
}
