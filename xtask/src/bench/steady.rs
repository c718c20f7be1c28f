//! What a profiler takes of the machine once it runs: attached for some seconds already, then watched over a longer time
//! under the same load as the slices. In a slice its start would count as if it went on for ever.
//!
//! For reqprof the kernel meanwhile counts the time inside our BPF programs. That counting costs something on every program
//! run, so it is on only here, never in the slices that are compared; it is the workers who pay for it, not the daemon.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::peer::{Attached, Peer, Tools, metric};
use super::slices::{Shape, drive};
use crate::site::Site;

/// How long a profiler runs under load before it counts: caches of names fill, the store has its first batches.
pub const SETTLE: Duration = Duration::from_secs(5);
const PROBE_METRIC: &str = "reqprof_probe_seconds_total";
const SAMPLE_METRIC: &str = "reqprof_samples_total";

pub struct Steady {
    /// Of the profiler's own processes, in percent of one core.
    pub cpu_percent: f64,
    pub requests_per_second: f64,
    pub resident_bytes: Option<u64>,
    /// `None`: not reqprof.
    pub sampling: Option<Sampling>,
}

pub struct Sampling {
    pub samples_per_second: f64,
    /// The metric's labels, as in `probe="sampler"`, and microseconds per request; the costliest first.
    pub probes_us_per_request: Vec<(String, f64)>,
    /// All programs together, in percent of one core.
    pub probes_percent_of_core: f64,
}

impl Steady {
    /// The profiler's own CPU, had it taken a thousand samples in each second; in percent of one core.
    pub fn cpu_percent_per_thousand_samples(&self) -> Option<f64> {
        let rate = self.sampling.as_ref()?.samples_per_second;
        (rate > 0.0).then(|| self.cpu_percent * 1000.0 / rate)
    }
}

/// Turns the kernel's run-time statistics on as long as it lives (bpf(2), `BPF_ENABLE_STATS`, kernel 5.8). Unlike the
/// sysctl `kernel.bpf_stats_enabled` this ends with the process, however the process ends.
pub struct Counting {
    _descriptor: OwnedFd,
}

impl Counting {
    pub fn start() -> Result<Self> {
        /// Both from the kernel's include/uapi/linux/bpf.h.
        const BPF_ENABLE_STATS: libc::c_long = 32;
        const BPF_STATS_RUN_TIME: u32 = 0;
        // The one member of `union bpf_attr` that this command reads: `enable_stats.type`.
        let attribute = BPF_STATS_RUN_TIME;
        // SAFETY: the kernel reads as many bytes as it is told, from a number that lives until the call returns.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_ENABLE_STATS, &attribute, size_of_val(&attribute)) };
        let Ok(descriptor @ 0..) = i32::try_from(result) else {
            return Err(io::Error::last_os_error()).context("cannot turn on the kernel's BPF statistics");
        };
        // SAFETY: the call returned this descriptor just now, so it is open and nobody else's.
        Ok(Self { _descriptor: unsafe { OwnedFd::from_raw_fd(descriptor) } })
    }
}

/// What reqprof has counted so far.
pub struct Counters {
    samples: f64,
    probe_seconds: Vec<(String, f64)>,
}

impl Counters {
    pub fn of(attached: &Attached) -> Result<Option<Self>> {
        let Some(addr) = attached.api else { return Ok(None) };
        let samples = metric(addr, SAMPLE_METRIC)?.into_iter().map(|(_, value)| value).sum();
        Ok(Some(Self { samples, probe_seconds: metric(addr, PROBE_METRIC)? }))
    }

    /// Seconds inside each program since then, the costliest first.
    pub fn spent_since(&self, before: &Self) -> Vec<(String, f64)> {
        let earlier = |labels: &str| {
            before.probe_seconds.iter().find(|(name, _)| name == labels).map_or(0.0, |(_, value)| *value)
        };
        let spent = |(labels, value): &(String, f64)| (labels.clone(), value - earlier(labels));
        let mut seconds: Vec<(String, f64)> = self.probe_seconds.iter().map(spent).collect();
        seconds.sort_by(|one, other| other.1.total_cmp(&one.1));
        seconds
    }

    /// Samples since then, and seconds inside the programs of this name.
    pub fn since(&self, before: &Self, probe: &str) -> (f64, f64) {
        let labels = format!("probe=\"{probe}\"");
        let seconds = |counters: &Self| -> f64 {
            counters.probe_seconds.iter().filter(|(name, _)| *name == labels).map(|(_, value)| value).sum()
        };
        (self.samples - before.samples, seconds(self) - seconds(before))
    }
}

pub fn measure(peer: Peer, tools: &Tools, site: &Site, shape: &Shape, duration: Duration) -> Result<Steady> {
    let _counting = if peer.is_reqprof() { Some(Counting::start()?) } else { None };
    let attached = tools.attach(peer, site)?;
    drive(site, shape, SETTLE)?;
    let cpu = || attached.cpu_ns().context("the profiler's processes cannot be read");
    let (counted, before) = (Counters::of(&attached)?, cpu()?);
    let report = drive(site, shape, duration)?;
    let cpu_ns = cpu()?.saturating_sub(before);
    let after = Counters::of(&attached)?;
    let resident_bytes = attached.resident_bytes();
    attached.detach()?;
    let sampling =
        counted.zip(after).map(|(from, to)| difference(&from, &to, report.answered(), report.elapsed));
    if let Some(sampling) = &sampling {
        ensure!(sampling.probes_percent_of_core > 0.0, "reqprof reports no time in {PROBE_METRIC}");
    }
    Ok(Steady {
        cpu_percent: 100.0 * cpu_ns as f64 / report.elapsed.as_nanos() as f64,
        requests_per_second: report.answered() as f64 / report.elapsed.as_secs_f64(),
        resident_bytes,
        sampling,
    })
}

fn difference(before: &Counters, after: &Counters, requests: u64, elapsed: Duration) -> Sampling {
    let seconds = after.spent_since(before);
    let total: f64 = seconds.iter().map(|(_, value)| value).sum();
    Sampling {
        samples_per_second: (after.samples - before.samples) / elapsed.as_secs_f64(),
        probes_us_per_request: seconds
            .into_iter()
            .map(|(labels, value)| (labels, value * 1e6 / requests as f64))
            .collect(),
        probes_percent_of_core: 100.0 * total / elapsed.as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn the_kernels_statistics_can_be_turned_on_where_allowed() {
        match Counting::start() {
            Ok(counting) => {
                let what = std::fs::read_link(format!("/proc/self/fd/{}", counting._descriptor.as_raw_fd()));
                assert_eq!(what.unwrap().to_str(), Some("anon_inode:bpf-stats"));
            }
            Err(error) => {
                let refused = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
                assert_eq!(refused, Some(libc::EPERM), "{error:#}");
            }
        }
    }

    #[test]
    fn counters_become_time_per_request_and_rates() {
        let entry = |labels: &str, value| (labels.to_owned(), value);
        let before = Counters { samples: 50.0, probe_seconds: vec![entry("a", 1.0), entry("b", 0.5)] };
        let after = Counters {
            samples: 450.0,
            probe_seconds: vec![entry("a", 1.001), entry("b", 0.504), entry("new", 0.0)],
        };
        let sampling = difference(&before, &after, 100, Duration::from_secs(2));
        let rounded: Vec<(&str, f64)> =
            sampling.probes_us_per_request.iter().map(|(labels, us)| (labels.as_str(), us.round())).collect();
        assert_eq!(rounded, [("b", 40.0), ("a", 10.0), ("new", 0.0)]);
        assert!((sampling.probes_percent_of_core - 0.25).abs() < 1e-9);
        assert!((sampling.samples_per_second - 200.0).abs() < 1e-9);
        let steady = Steady {
            cpu_percent: 3.0,
            requests_per_second: 50.0,
            resident_bytes: None,
            sampling: Some(sampling),
        };
        assert!((steady.cpu_percent_per_thousand_samples().unwrap() - 15.0).abs() < 1e-9);
    }
}
