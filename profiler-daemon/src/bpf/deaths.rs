//! Probes on the deaths of code objects, so that the sampler need not read a code object again for every frame of it,
//! which is a third of the time of a deep stack. It is no loss where there is none: code objects are read then.
//!
//! In: a Python process. Out: its entry in `CODE_LIVES`, which the probe keeps true.

use std::collections::HashMap;

use aya::Ebpf;
use profiler_common::{CODE_LIVES_MAX, CodeLives};

use super::boundary::Links;
use super::resident::{Kind, Worth, put};
use super::{CodeLivesValue, HashOf, sys};
use crate::process::identity::ProcessKey;
use crate::process::patience::{FILES, PATIENCE};
use crate::process::python;

/// Deaths in a second at which a probe costs more than it saves: at half a microsecond each it takes 0.25 % of a core.
const TOO_MANY: u64 = 5000;

/// See the module.
pub struct CodeDeaths {
    lives: HashOf<u32, CodeLivesValue>,
    /// Deaths of each process when it was last looked at.
    deaths: HashMap<u32, u64>,
}

impl CodeDeaths {
    pub fn new(lives: HashOf<u32, CodeLivesValue>) -> Self {
        Self { lives, deaths: HashMap::new() }
    }
}

impl Kind for CodeDeaths {
    const PROBE: &'static str = "deaths of code objects";
    const MAX: usize = CODE_LIVES_MAX as usize;

    fn detail(processes: usize) -> String {
        format!("in {processes} processes; their code objects are read once")
    }

    fn install(&mut self, object: &mut Ebpf, process: ProcessKey, links: &mut Links) -> Result<(), String> {
        let pid = process.pid;
        let site = PATIENCE.ask(pid, FILES, move || python::code_death(pid).map_err(|e| e.to_string()));
        put(object, "code_death", &site.map_err(|e| e.to_string())??, process, links)?;
        let lives = CodeLives { epoch: (sys::monotonic_ns() << 8) | 0xff, deaths: 0 };
        self.lives.insert(pid, CodeLivesValue(lives), 0).map_err(|_| "there is no room")?;
        self.deaths.insert(pid, 0);
        Ok(())
    }

    fn check(&mut self, pid: u32) -> Worth {
        let Ok(lives) = self.lives.get(&pid, 0) else { return Worth::Gone };
        let before = self.deaths.insert(pid, lives.0.deaths).unwrap_or(0);
        match lives.0.deaths.saturating_sub(before) {
            died if died > TOO_MANY => Worth::TooDear(format!("{died} code objects died in a second")),
            _ => Worth::Kept,
        }
    }

    fn removed(&mut self, pid: u32) {
        self.deaths.remove(&pid);
        // The kernel side may have taken it away.
        let _ = self.lives.remove(&pid);
    }
}
