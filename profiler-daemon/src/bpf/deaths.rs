//! Probes on the deaths of code objects: one in each Python process that is followed.
//!
//! In: the table of targets, once a second. Out: entries of `CODE_LIVES` with the probes that keep them true, so that the
//! sampler need not read a code object again for every frame of it, which is a third of the time of a deep stack. It
//! is no loss where there is none: code objects are read then.
//!
//! A probe is in the memory of one process, not in the file: other programs of the same interpreter do not pay for it. A
//! fork gets none; it is a target of its own by the next second, if it lives so long.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use aya::Ebpf;
use aya::programs::UProbe;
use aya::programs::uprobe::{UProbeLinkId, UProbeScope};
use profiler_common::{CODE_LIVES_MAX, CodeLives};

use super::boundary::detach_links;
use super::{CodeLivesValue, HashOf, ProbeState, ProbeTable, sys};
use crate::process::identity::{self, ProcessKey};
use crate::process::memory::{Memory, ProcessMemory};
use crate::process::patience::{FILES, MEMORY, PATIENCE};
use crate::process::python::{self, DeathSite};
use crate::process::targets::Targets;

const PROGRAM: &str = "code_death";
const PROBE: &str = "deaths of code objects";
/// Processes that get their probe in one second: each costs a look at the interpreter's symbols, some milliseconds.
const AT_ONCE: usize = 8;
/// Deaths in a second at which a probe costs more than it saves: at half a microsecond each it takes 0.25 % of a core.
const TOO_MANY: u64 = 5000;
/// What the kernel writes over an instruction that has a probe (`int3`).
const BREAKPOINT: u8 = 0xcc;

struct Watch {
    key: ProcessKey,
    link: UProbeLinkId,
    /// Deaths when it was last looked at.
    deaths: u64,
}

/// See the module.
pub struct CodeDeaths {
    lives: HashOf<u32, CodeLivesValue>,
    watched: HashMap<u32, Watch>,
    /// Without a probe for good, with the reason.
    refused: HashMap<u32, (ProcessKey, String)>,
    /// Targets a second ago.
    known: HashSet<u32>,
    /// Of processes that are gone.
    loose: Vec<UProbeLinkId>,
}

impl CodeDeaths {
    pub fn new(lives: HashOf<u32, CodeLivesValue>) -> Self {
        Self {
            lives,
            watched: HashMap::new(),
            refused: HashMap::new(),
            known: HashSet::new(),
            loose: Vec::new(),
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
        let mut due: Vec<(u32, ProcessKey)> = live
            .iter()
            .filter(|(pid, _)| self.known.contains(*pid))
            .filter(|(pid, _)| !self.watched.contains_key(*pid) && !self.refused.contains_key(*pid))
            .map(|(pid, key)| (*pid, *key))
            .collect();
        due.sort_unstable_by_key(|(pid, _)| *pid);
        let room = (CODE_LIVES_MAX as usize).saturating_sub(self.watched.len());
        for (pid, key) in due.into_iter().take(AT_ONCE.min(room)) {
            beat();
            if let Err(reason) = self.watch(object, pid, key) {
                tracing::debug!(pid, reason, "deaths of code objects are not seen");
                self.refused.insert(pid, (key, reason));
            }
        }
        self.known = live.into_keys().collect();
        self.let_loose_go(object);
        self.tell(probes);
    }

    /// Whether a probe still is what it was, and worth it.
    fn look_after(&mut self, pid: u32, key: Option<ProcessKey>) {
        let lives = self.lives.get(&pid, 0).map(|value| value.0);
        let Some(watch) = self.watched.get_mut(&pid) else { return };
        match lives {
            Ok(lives) if key == Some(watch.key) => {
                let died = lives.deaths.saturating_sub(std::mem::replace(&mut watch.deaths, lives.deaths));
                if died > TOO_MANY {
                    let reason = format!("{died} code objects died in a second");
                    self.refused.insert(pid, (watch.key, reason));
                    self.ended(pid);
                }
            }
            // The kernel side takes it away where a process ends or runs another program.
            _ => self.ended(pid),
        }
    }

    fn watch(&mut self, object: &mut Ebpf, pid: u32, key: ProcessKey) -> Result<(), String> {
        let found = PATIENCE.ask(pid, FILES, move || python::death_site(pid).map_err(|e| e.to_string()));
        let DeathSite { elf, offset, address } = found.map_err(|e| e.to_string())??;
        // The path leads to the very file that was examined, whatever its name means by now.
        let path = PathBuf::from(format!("/proc/self/fd/{}", elf.file().as_raw_fd()));
        let program = object.program_mut(PROGRAM).ok_or("it is not in the object")?;
        let program: &mut UProbe = program.try_into().map_err(|e| format!("{e}"))?;
        let one = UProbeScope::OneProcess(NonZeroU32::new(pid).ok_or("no process")?);
        let link = program.attach(offset, &path, one).map_err(|e| format!("attaching: {e}"))?;
        // Code that was copied elsewhere has no file that a probe could be in.
        let byte = PATIENCE.ask(pid, MEMORY, move || {
            let mut byte = [0];
            ProcessMemory::new(pid).read(address, &mut byte).map(|()| byte[0])
        });
        let in_place = matches!(byte, Ok(Ok(BREAKPOINT))) && identity::key(pid).ok() == Some(key);
        let lives = CodeLives { epoch: (sys::monotonic_ns() << 8) | 0xff, deaths: 0 };
        let begun = in_place && self.lives.insert(pid, CodeLivesValue(lives), 0).is_ok();
        if !begun {
            self.loose.push(link);
            return Err("the probe is not where it should be, or there is no room".into());
        }
        self.watched.insert(pid, Watch { key, link, deaths: 0 });
        Ok(())
    }

    /// The process is gone, or runs another program, which has no probe: nothing more is remembered of it from now on.
    pub fn ended(&mut self, pid: u32) {
        if let Some(watch) = self.watched.remove(&pid) {
            // The kernel side may have taken it away.
            let _ = self.lives.remove(&pid);
            self.loose.push(watch.link);
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
        self.let_loose_go(object);
    }

    fn let_loose_go(&mut self, object: &mut Ebpf) {
        detach_links(object, self.loose.drain(..).map(|link| (PROGRAM, link)).collect());
    }

    fn tell(&self, probes: &ProbeTable) {
        if self.watched.is_empty() && self.refused.is_empty() {
            probes.remove(PROBE);
            return;
        }
        let (seen, not) = (self.watched.len(), self.refused.len());
        let mut detail = format!("in {seen} processes; their code objects are read once");
        if let Some((pid, (_, reason))) = self.refused.iter().min_by_key(|(pid, _)| **pid) {
            detail = format!("{detail}; not in {not}, such as {pid}: {reason}");
        }
        probes.set(PROBE, ProbeState::Active { detail });
    }
}
