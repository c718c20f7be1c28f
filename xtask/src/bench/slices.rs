//! Paired slices: the same load for a few seconds without and with a profiler, again and again, in turns. A machine
//! whose speed drifts by tens of percent within minutes slows both halves of a pair alike, so their ratio stays true.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::peer::{Attached, Peer, Tools};
use super::stats::Estimate;
use super::usage;
use crate::load::{self, Plan, Route};
use crate::site::Site;

/// Driven, and thrown away, before each slice: connections and caches settle in it.
pub const WARM_UP: Duration = Duration::from_millis(300);
/// The same before a slice that follows an attaching or detaching. A profiler that starts reads symbol tables, fills caches
/// and competes for the CPUs; one that ends takes its probes out of running code. Neither is what a request costs later.
const SETTLE: Duration = Duration::from_secs(1);

/// What is driven before the slice that follows a change between without and with.
pub fn settle(peer: Peer) -> Duration {
    if peer.transition().is_zero() { WARM_UP } else { SETTLE }
}

/// The shape of one measurement.
#[derive(Clone)]
pub struct Shape {
    pub pairs: u32,
    pub slice: Duration,
    pub connections: usize,
    pub path: String,
    /// No pair starts after this, except the first: a row without a figure says less than a rough one.
    pub deadline: Instant,
}

/// What a slice showed.
struct Slice {
    answered: u64,
    /// Answered in the warm-up before it, and in no figure.
    warm_up: u64,
    elapsed: Duration,
    cpu_ns: u64,
    latencies_ns: Vec<u64>,
}

impl Slice {
    fn cpu_ms_per_request(&self) -> f64 {
        self.cpu_ns as f64 / 1e6 / self.answered as f64
    }

    fn per_second(&self) -> f64 {
        self.answered as f64 / self.elapsed.as_secs_f64()
    }
}

/// What all pairs of one profiler on one page showed.
pub struct Outcome {
    pub pairs: Pairs,
    /// Median CPU time per request of the workers without the profiler, in milliseconds.
    pub cpu_off_ms: f64,
    pub cpu_ratio: Estimate,
    pub throughput_ratio: Estimate,
    /// Over all requests of all slices, in milliseconds, without and with.
    pub p99_ms: (f64, f64),
    /// Requests that reqprof recorded, of those that the client saw answered.
    pub recorded: Option<(u64, u64)>,
}

/// The deadline may have left fewer than were planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pairs {
    pub planned: u32,
    pub measured: u32,
}

impl Pairs {
    pub fn were_cut(self) -> bool {
        self.measured < self.planned
    }
}

#[derive(Default)]
struct Tally {
    off: Vec<Slice>,
    on: Vec<Slice>,
    recorded: Option<(u64, u64)>,
}

/// Measures a profiler that attaches to the running workers of `site`. It stays attached from one slice to the next
/// where two profiled ones follow each other, so that half of the attaching and detaching is saved.
pub fn attachable(peer: Peer, tools: &Tools, site: &Site, shape: &Shape) -> Result<Outcome> {
    let mut tally = Tally::default();
    // The profiler and how many requests it should have seen since it was attached.
    let mut attached: Option<(Attached, u64)> = None;
    in_turns(peer, shape, |profiled| {
        if profiled {
            let (profiler, answered, warm_up) = match attached.take() {
                Some((profiler, answered)) => (profiler, answered, WARM_UP),
                None => (tools.attach(peer, site)?, 0, settle(peer)),
            };
            let measured = slice(site, shape, warm_up)?;
            attached = Some((profiler, answered + measured.warm_up + measured.answered));
            tally.on.push(measured);
            return Ok(());
        }
        let warm_up = if let Some((profiler, answered)) = attached.take() {
            tally.detach(profiler, answered)?;
            settle(peer)
        } else {
            WARM_UP
        };
        tally.off.push(slice(site, shape, warm_up)?);
        Ok(())
    })?;
    attached.take().map_or(Ok(()), |(profiler, answered)| tally.detach(profiler, answered))?;
    tally.finish(shape.pairs)
}

/// Measures a middleware: `plain` and `profiled` are two servers of the same site, and the middleware writes one file
/// per request to `folder`.
pub fn middleware(
    peer: Peer,
    plain: &Site,
    profiled: &Site,
    folder: &Path,
    shape: &Shape,
) -> Result<Outcome> {
    let mut tally = Tally::default();
    in_turns(peer, shape, |on| {
        if on {
            tally.on.push(slice(profiled, shape, WARM_UP)?);
            empty(folder)
        } else {
            tally.off.push(slice(plain, shape, WARM_UP)?);
            Ok(())
        }
    })?;
    tally.finish(shape.pairs)
}

/// Off, on, on, off, off, on, …: a drift that goes one way favours neither half.
fn in_turns(peer: Peer, shape: &Shape, mut half: impl FnMut(bool) -> Result<()>) -> Result<()> {
    for pair in 0..shape.pairs {
        if pair > 0 && Instant::now() > shape.deadline {
            eprintln!("  {}: out of time after {pair} of {} pairs", peer.label(), shape.pairs);
            break;
        }
        let first = pair % 2 == 1;
        half(first)?;
        half(!first)?;
        if (pair + 1) % 10 == 0 {
            eprintln!("  {}: {} of {} pairs", peer.label(), pair + 1, shape.pairs);
        }
    }
    Ok(())
}

/// One slice: warm up, then drive the load and take the workers' CPU time around it.
fn slice(site: &Site, shape: &Shape, warm_up: Duration) -> Result<Slice> {
    let workers = site.workers();
    let warm_up = drive(site, shape, warm_up)?.answered();
    let before = usage::cpu_ns(&workers)?;
    let mut report = drive(site, shape, shape.slice)?;
    let cpu_ns = usage::cpu_ns(&workers)?.saturating_sub(before);
    let answered = report.answered();
    let latencies_ns =
        report.routes.values_mut().flat_map(|route| std::mem::take(&mut route.latencies_ns)).collect();
    Ok(Slice { answered, warm_up, elapsed: report.elapsed, cpu_ns, latencies_ns })
}

/// Drives the page alone; every answer has to be a good one, or the slice means nothing.
pub fn drive(site: &Site, shape: &Shape, duration: Duration) -> Result<load::Report> {
    let report = load::run(&Plan {
        server: site.addr,
        connections: shape.connections,
        keep_alive: true,
        routes: vec![Route::get("page", vec![shape.path.clone()], 1)],
        duration: Some(duration),
        count: None,
        log: false,
    })?;
    let error = report.first_error.as_deref().unwrap_or("an error status");
    ensure!(report.failures() == 0, "{} requests failed: {error}", report.failures());
    ensure!(report.answered() > 0, "not one request was answered in {duration:?}");
    Ok(report)
}

impl Tally {
    /// Ends an attachment under which `answered` requests were answered, and takes down how many reqprof has of them.
    fn detach(&mut self, attached: Attached, answered: u64) -> Result<()> {
        if let Some(recorded) = attached.recorded_in_the_end(answered)? {
            let (before, of) = self.recorded.unwrap_or_default();
            self.recorded = Some((before + recorded, of + answered));
        }
        attached.detach()
    }

    fn finish(mut self, planned: u32) -> Result<Outcome> {
        let pairs = || self.off.iter().zip(&self.on);
        let none = "no pair was measured";
        let cpu_off = Estimate::of(self.off.iter().map(Slice::cpu_ms_per_request)).context(none)?;
        let cpu_ratio =
            Estimate::of(pairs().map(|(off, on)| on.cpu_ms_per_request() / off.cpu_ms_per_request()));
        let throughput_ratio = Estimate::of(pairs().map(|(off, on)| on.per_second() / off.per_second()));
        let outcome = Outcome {
            pairs: Pairs { planned, measured: u32::try_from(pairs().count())? },
            cpu_off_ms: cpu_off.median,
            cpu_ratio: cpu_ratio.context(none)?,
            throughput_ratio: throughput_ratio.context(none)?,
            p99_ms: (p99_ms(&mut self.off).context(none)?, p99_ms(&mut self.on).context(none)?),
            recorded: self.recorded,
        };
        Ok(outcome)
    }
}

fn p99_ms(slices: &mut [Slice]) -> Option<f64> {
    let mut all: Vec<u64> =
        slices.iter_mut().flat_map(|slice| std::mem::take(&mut slice.latencies_ns)).collect();
    all.sort_unstable();
    load::percentile(&all, 99.0).map(|nanoseconds| nanoseconds as f64 / 1e6)
}

/// Removes the files that a middleware wrote: thousands of requests would fill the disk.
fn empty(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(answered: u64, cpu_ms: u64, seconds: u64, latencies_ms: &[u64]) -> Slice {
        Slice {
            answered,
            warm_up: 0,
            elapsed: Duration::from_secs(seconds),
            cpu_ns: cpu_ms * 1_000_000,
            latencies_ns: latencies_ms.iter().map(|ms| ms * 1_000_000).collect(),
        }
    }

    #[test]
    fn ratios_are_taken_within_pairs() {
        // The machine halves its speed between the pairs; the profiler costs 10 % in both.
        let tally = Tally {
            off: vec![slice(100, 1000, 2, &[10, 20]), slice(50, 1000, 2, &[40])],
            on: vec![slice(100, 1100, 4, &[11]), slice(50, 1100, 4, &[44, 5])],
            ..Tally::default()
        };
        let outcome = tally.finish(3).unwrap();
        assert!((outcome.cpu_ratio.median - 1.1).abs() < 1e-9);
        assert!((outcome.throughput_ratio.median - 0.5).abs() < 1e-9);
        assert_eq!(outcome.cpu_off_ms, 15.0);
        assert_eq!(outcome.pairs, Pairs { planned: 3, measured: 2 });
        assert!(outcome.pairs.were_cut());
        assert_eq!(outcome.p99_ms, (40.0, 44.0));
    }

    #[test]
    fn no_pairs_is_an_error_and_not_a_figure() {
        assert!(Tally::default().finish(3).is_err());
    }
}
