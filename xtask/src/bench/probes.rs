//! The time spent inside our BPF programs, as the kernel itself counts it. The counting costs something on every
//! program run, so it is on only for a slice of its own, never for the ones that are compared.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::peer::{Peer, Tools, metric};
use super::slices::{Shape, drive};
use crate::site::Site;

const METRIC: &str = "reqprof_probe_seconds_total";

pub struct ProbeTime {
    /// The metric's labels, as in `probe="sampler"`, and microseconds per request; the costliest first.
    pub per_request_us: Vec<(String, f64)>,
    /// All programs together, in percent of one core while the page was under full load.
    pub percent_of_core: f64,
}

/// Turns the kernel's run-time statistics on as long as it lives (bpf(2), `BPF_ENABLE_STATS`, kernel 5.8). Unlike the
/// sysctl `kernel.bpf_stats_enabled` this ends with the process, however the process ends.
struct Counting {
    _descriptor: OwnedFd,
}

impl Counting {
    fn start() -> Result<Self> {
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

pub fn measure(
    peer: Peer,
    tools: &Tools,
    site: &Site,
    shape: &Shape,
    duration: Duration,
) -> Result<ProbeTime> {
    let _counting = Counting::start()?;
    let attached = tools.attach(peer, site)?;
    let addr = attached.api.context("only reqprof tells the time of its probes")?;
    drive(site, shape, duration / 4)?;
    let before = metric(addr, METRIC)?;
    let report = drive(site, shape, duration)?;
    let after = metric(addr, METRIC)?;
    attached.detach()?;
    let time = difference(&before, &after, report.answered(), report.elapsed);
    ensure!(time.percent_of_core > 0.0, "reqprof reports no time in {METRIC}");
    Ok(time)
}

fn difference(
    before: &[(String, f64)],
    after: &[(String, f64)],
    requests: u64,
    elapsed: Duration,
) -> ProbeTime {
    let earlier =
        |labels: &str| before.iter().find(|(name, _)| name == labels).map_or(0.0, |(_, value)| *value);
    let mut seconds: Vec<(String, f64)> =
        after.iter().map(|(labels, value)| (labels.clone(), value - earlier(labels))).collect();
    seconds.sort_by(|one, other| other.1.total_cmp(&one.1));
    let total: f64 = seconds.iter().map(|(_, value)| value).sum();
    let per_request_us =
        seconds.into_iter().map(|(labels, value)| (labels, value * 1e6 / requests as f64)).collect();
    ProbeTime { per_request_us, percent_of_core: 100.0 * total / elapsed.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn the_kernels_statistics_can_be_turned_on_where_allowed() {
        match Counting::start() {
            Ok(counting) => assert!(counting._descriptor.as_raw_fd() >= 0),
            Err(error) => {
                let refused = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
                assert_eq!(refused, Some(libc::EPERM), "{error:#}");
            }
        }
    }

    #[test]
    fn counters_become_time_per_request() {
        let sample = |labels: &str, value| (labels.to_owned(), value);
        let before = [sample("a", 1.0), sample("b", 0.5)];
        let after = [sample("a", 1.001), sample("b", 0.504), sample("new", 0.0)];
        let time = difference(&before, &after, 100, Duration::from_secs(2));
        let rounded: Vec<(&str, f64)> =
            time.per_request_us.iter().map(|(labels, us)| (labels.as_str(), us.round())).collect();
        assert_eq!(rounded, [("b", 40.0), ("a", 10.0), ("new", 0.0)]);
        assert!((time.percent_of_core - 0.25).abs() < 1e-9);
    }
}
