//! Counters of the kernel side: losses, map fill, time spent in our programs.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use aya::Ebpf;
use aya::maps::{Map, MapData, MapError, PerCpuArray};
use profiler_common::{STAT_COUNT, Stat};

use super::{LoadError, sys};

/// The `STATS` map.
pub struct KernelStats(PerCpuArray<MapData, u64>);

impl KernelStats {
    pub(super) fn new(map: Map) -> Result<Self, LoadError> {
        PerCpuArray::try_from(map)
            .map(Self)
            .map_err(|e: MapError| LoadError::Map { name: "STATS", reason: e.to_string() })
    }

    /// Totals over all CPUs, by [`Stat`].
    pub fn totals(&self) -> [u64; STAT_COUNT as usize] {
        std::array::from_fn(|slot| {
            self.0.get(&(slot as u32), 0).map(|per_cpu| per_cpu.iter().sum()).unwrap_or_default()
        })
    }
}

/// One total out of [`KernelStats::totals`].
pub fn total(totals: &[u64; STAT_COUNT as usize], stat: Stat) -> u64 {
    totals[stat as usize]
}

/// Time spent in each of our programs, as the kernel counts it when `kernel.bpf_stats_enabled` is 1.
pub struct RunTimes(BTreeMap<String, OwnedFd>);

impl RunTimes {
    pub fn of(object: &Ebpf) -> Self {
        Self(
            object
                .programs()
                .filter_map(|(name, program)| {
                    let fd = program.fd().ok()?.as_fd().try_clone_to_owned().ok()?;
                    Some((name.to_owned(), fd))
                })
                .collect(),
        )
    }

    /// Nanoseconds and runs, by program.
    pub fn read(&self) -> Vec<(&str, u64, u64)> {
        self.0
            .iter()
            .filter_map(|(name, fd)| {
                let (time, runs) = sys::program_run_time(fd.as_fd()).ok()?;
                Some((name.as_str(), time, runs))
            })
            .collect()
    }
}
