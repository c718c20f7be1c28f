//! The CPU clock on every CPU, CPUs that come and go included.

use std::collections::BTreeMap;

use aya::Ebpf;
use aya::programs::perf_event::{
    PerfEventConfig, PerfEventLinkId, PerfEventScope, SamplePolicy, SoftwareEvent,
};
use aya::programs::{PerfEvent, ProgramError};

use super::{ProbeState, ProbeTable};

const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Keeps one sampling event open per online CPU.
pub struct CpuSampler {
    frequency: u64,
    links: BTreeMap<u32, PerfEventLinkId>,
}

impl CpuSampler {
    pub fn new(frequency: u64) -> Self {
        Self { frequency, links: BTreeMap::new() }
    }

    /// Attaches to CPUs that came online and lets go of those that went. Called at start and then every second.
    pub fn follow(&mut self, object: &mut Ebpf, probes: &ProbeTable) {
        let online = match std::fs::read_to_string(ONLINE) {
            Ok(text) => parse_list(&text),
            Err(error) => {
                probes.set("cpu clock", ProbeState::Failed { reason: format!("{ONLINE}: {error}") });
                return;
            }
        };
        if online.len() == self.links.len() && online.iter().all(|cpu| self.links.contains_key(cpu)) {
            return;
        }
        let Some(program) = Self::program(object) else { return };
        let gone: Vec<u32> = self.links.keys().filter(|cpu| !online.contains(cpu)).copied().collect();
        for cpu in gone {
            if let Some(link) = self.links.remove(&cpu) {
                // The event of a CPU that went away is dead already.
                let _ = program.detach(link);
            }
        }
        let mut failure = None;
        for cpu in online {
            if self.links.contains_key(&cpu) {
                continue;
            }
            match Self::attach(program, cpu, self.frequency) {
                Ok(link) => {
                    self.links.insert(cpu, link);
                }
                Err(error) => failure = Some((cpu, error)),
            }
        }
        let state = match failure {
            None => {
                ProbeState::Active { detail: format!("{} Hz on {} CPUs", self.frequency, self.links.len()) }
            }
            Some((cpu, error)) => {
                let cause = std::error::Error::source(&error).map(|s| format!(": {s}")).unwrap_or_default();
                ProbeState::Failed {
                    reason: format!(
                        "CPU {cpu}: {error}{cause}; {} CPUs are sampled. Remedy: lower kernel.perf_event_paranoid, or CAP_PERFMON",
                        self.links.len()
                    ),
                }
            }
        };
        probes.set("cpu clock", state);
    }

    pub fn detach(&mut self, object: &mut Ebpf) {
        if let Some(program) = Self::program(object) {
            for (_, link) in std::mem::take(&mut self.links) {
                let _ = program.detach(link);
            }
        }
    }

    fn program(object: &mut Ebpf) -> Option<&mut PerfEvent> {
        object.program_mut("sample")?.try_into().ok()
    }

    fn attach(program: &mut PerfEvent, cpu: u32, frequency: u64) -> Result<PerfEventLinkId, ProgramError> {
        program.attach(
            PerfEventConfig::Software(SoftwareEvent::CpuClock),
            PerfEventScope::AllProcessesOneCpu { cpu },
            SamplePolicy::Frequency(frequency),
            false,
        )
    }
}

/// A CPU list such as `0-3,5` (Documentation/admin-guide/cputopology.rst).
fn parse_list(text: &str) -> Vec<u32> {
    text.trim()
        .split(',')
        .filter_map(|part| {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            Some(low.parse::<u32>().ok()?..=high.parse::<u32>().ok()?)
        })
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::parse_list;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_list("0-1\n"), [0, 1]);
        assert_eq!(parse_list("0,2-4"), [0, 2, 3, 4]);
        assert!(parse_list("").is_empty());
    }
}
