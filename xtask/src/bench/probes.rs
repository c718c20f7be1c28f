//! The time spent inside our BPF programs, as the kernel itself counts it. The counting costs something on every
//! program run, so it is on only for a slice of its own, never for the ones that are compared.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::peer::{Peer, Tools, metric};
use super::slices::{Shape, drive};
use crate::site::Site;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
const METRIC: &str = "reqprof_probe_seconds_total";

pub struct ProbeTime {
    /// The metric's labels, as in `probe="sampler"`, and microseconds per request; the costliest first.
    pub per_request_us: Vec<(String, f64)>,
    /// All programs together, in percent of one core while the page was under full load.
    pub percent_of_core: f64,
}

/// Turns the kernel's statistics on, and back to what they were when dropped.
struct Counting {
    before: String,
}

impl Counting {
    fn start() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("cannot read {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("cannot write {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SWITCH, self.before.trim()) {
            eprintln!("warning: cannot restore {SWITCH}: {error}");
        }
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
    Ok(difference(&before, &after, report.answered(), report.elapsed))
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
    use super::*;

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
