//! Probes on CPython's contexts, by which the work of event loops is told apart.
//!
//! In: a Python process. Out: its entry in `CONTEXT_PROCESSES`; from then on the kernel side knows which context works for
//! which request. A process that runs no event loop copies no contexts, and pays nothing.

use aya::Ebpf;
use profiler_common::{CONTEXT_PROCESSES_MAX, ContextKey, context_use};

use super::boundary::Links;
use super::resident::{Kind, Worth, put};
use super::{ContextKeyValue, HashOf};
use crate::process::identity::ProcessKey;
use crate::process::patience::{FILES, PATIENCE};
use crate::process::python::{self, ContextSites};

/// See the module.
pub struct Contexts {
    processes: HashOf<u32, u32>,
    owners: HashOf<ContextKeyValue, u64>,
}

impl Contexts {
    pub fn new(processes: HashOf<u32, u32>, owners: HashOf<ContextKeyValue, u64>) -> Self {
        Self { processes, owners }
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
        let sites = PATIENCE.ask(pid, FILES, move || python::contexts(pid).map_err(|e| e.to_string()));
        let ContextSites { copy, death } = sites.map_err(|e| e.to_string())??;
        // Deaths first: what is remembered of a context must not outlive it.
        put(object, "context_death", &death, process, links)?;
        put(object, "context_copied", &copy, process, links)?;
        self.processes.insert(pid, context_use::READY, 0).map_err(|_| "there is no room")?;
        Ok(())
    }

    fn check(&mut self, pid: u32) -> Worth {
        match self.processes.get(&pid, 0) {
            Ok(_) => Worth::Kept,
            Err(_) => Worth::Gone,
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
