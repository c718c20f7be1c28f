//! Probes on CPython's contexts, by which the work of event loops is told apart.
//!
//! In: a Python process. Out: its entry in `CONTEXT_PROCESSES`; from then on the kernel side knows which context works for
//! which request. A process that runs no event loop copies no contexts, and pays nothing.

use aya::Ebpf;
use profiler_common::{CONTEXT_PROCESSES_MAX, ContextKey, context_use};

use super::boundary::Links;
use super::resident::{Kind, Worth, put};
use super::{ContextKeyValue, HashOf};
use crate::process::filtered;
use crate::process::identity::ProcessKey;
use crate::process::maps::Maps;
use crate::process::patience::{FILES, MEMORY, PATIENCE};
use crate::process::python::{self, ContextSites};

/// See the module.
pub struct Contexts {
    processes: HashOf<u32, u32>,
    owners: HashOf<ContextKeyValue, u64>,
    checks: u32,
}

/// One of so many looks at a process, one each second, is at what it has loaded.
const LOOK_EVERY: u32 = 4;
/// Only where there is an entry (include/uapi/linux/bpf.h).
const BPF_EXIST: u64 = 2;

impl Contexts {
    pub fn new(processes: HashOf<u32, u32>, owners: HashOf<ContextKeyValue, u64>) -> Self {
        Self { processes, owners, checks: 0 }
    }
}

impl Kind for Contexts {
    const PROBE: &'static str = "contexts of event loops";
    const MAX: usize = CONTEXT_PROCESSES_MAX as usize;

    fn detail(processes: usize) -> String {
        format!("in {processes} processes")
    }

    fn install(&mut self, object: &mut Ebpf, process: ProcessKey, links: &mut Links) -> Result<(), String> {
        let pid = process.pid;
        if let Some(reason) = filtered::refuses_return_probes(pid) {
            return Err(reason.into());
        }
        let sites = PATIENCE.ask(pid, FILES, move || python::contexts(pid).map_err(|e| e.to_string()));
        let ContextSites { copy, death, reads_first } = sites.map_err(|e| e.to_string())??;
        // Deaths first: what is remembered of a context must not outlive it.
        put(object, "context_death", &death, process, links)?;
        put(object, "context_copied", &copy, process, links)?;
        let kind = context_use::READY | if reads_first { context_use::READS_FIRST } else { 0 };
        self.processes.insert(pid, kind, 0).map_err(|_| "there is no room")?;
        Ok(())
    }

    fn check(&mut self, pid: u32) -> Worth {
        let Ok(kind) = self.processes.get(&pid, 0) else { return Worth::Gone };
        self.checks = self.checks.wrapping_add(1);
        // What a process loads decides how its loop is read, and it may have loaded it since.
        if kind & context_use::READS_FIRST != 0 || !(self.checks ^ pid).is_multiple_of(LOOK_EVERY) {
            return Worth::Kept;
        }
        let Ok(Ok(maps)) = PATIENCE.ask(pid, MEMORY, move || Maps::read(pid)) else { return Worth::Kept };
        match python::reads_first(&maps) {
            Ok(false) => Worth::Kept,
            // The kernel side may have taken it away this moment.
            Ok(true) => match self.processes.insert(pid, kind | context_use::READS_FIRST, BPF_EXIST) {
                Ok(()) => Worth::Kept,
                Err(_) => Worth::Gone,
            },
            Err(reason) => Worth::TooDear(reason.to_string()),
        }
    }

    fn removed(&mut self, pid: u32) {
        // The kernel side may have taken it away.
        let _ = self.processes.remove(&pid);
        // What has this pid next has other contexts. Begun anew whenever the entry it stands on goes away, so bounded.
        let of: Vec<ContextKeyValue> = self
            .owners
            .keys()
            .take(CONTEXTS_MAX)
            .flatten()
            .filter(|ContextKeyValue(ContextKey { pid: of, .. })| *of == pid)
            .collect();
        for key in of {
            let _ = self.owners.remove(&key);
        }
    }
}

/// As many as the map has.
const CONTEXTS_MAX: usize = 65_536;
