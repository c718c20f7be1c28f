//! What the daemon reports about itself and the requests it sees, for Prometheus.
//!
//! In: finished requests ([`Metrics::observe`]) and totals counted elsewhere, in the kernel's maps or in the stages
//! (`set_…`, absolute values). Out: Prometheus text, or OpenMetrics with exemplars. Labels come from bounded sets:
//! never a raw path, a pid or an id.

mod histogram;
mod labels;
mod mirror;
mod openmetrics;
mod process;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Encoder, Gauge, IntGaugeVec, Opts, Registry, TextEncoder};

use self::histogram::DurationHistogram;
use self::mirror::Mirror;
use crate::correlate::route::OTHER;
use crate::record::{Outcome, RequestRecord};
use crate::store::{Counters, DropReason};

/// The text format to answer in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Prometheus,
    OpenMetrics,
}

impl Encoding {
    /// From an `Accept` header: OpenMetrics if it is named there and not refused.
    pub fn negotiate(accept: &str) -> Self {
        let asked = accept.split(',').any(|range| {
            let mut parts = range.split(';').map(str::trim);
            parts.next().is_some_and(|media| media.eq_ignore_ascii_case("application/openmetrics-text"))
                && !parts.any(|p| p.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0_f32)))
        });
        if asked { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// All metrics of the daemon.
pub struct Metrics {
    registry: Registry,
    durations: DurationHistogram,
    requests: Mirror,
    routes_overflow: Mirror,
    samples: Mirror,
    unattributed: Mirror,
    lost: Mirror,
    unwind_errors: Mirror,
    stacks: Mirror,
    map_entries: IntGaugeVec,
    map_capacity: IntGaugeVec,
    store_bytes: Gauge,
    store_dropped: Mirror,
    probe_seconds: Mirror,
    sample_rate: Gauge,
    reload_successful: Gauge,
}

impl Metrics {
    /// Fails only on a name that Prometheus does not allow or that comes twice, so never in a tested program.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let metrics = Self {
            durations: DurationHistogram::new()?,
            requests: Mirror::new(
                "reqprof_requests_total",
                "Requests seen, by how they ended.",
                &["outcome"],
            )?,
            routes_overflow: Mirror::new(
                "reqprof_routes_overflow_total",
                "Requests counted under _OTHER because their service has too many routes.",
                &[],
            )?,
            samples: Mirror::new("reqprof_samples_total", "CPU samples taken of targets.", &[])?,
            unattributed: Mirror::new(
                "reqprof_samples_unattributed_total",
                "CPU samples of targets that belong to no request, by reason.",
                &["reason"],
            )?,
            lost: Mirror::new(
                "reqprof_events_lost_total",
                "Events lost between the kernel and the store, by stage and reason.",
                &["stage", "reason"],
            )?,
            unwind_errors: Mirror::new(
                "reqprof_unwind_errors_total",
                "Frames that could not be read or named, by kind and reason.",
                &["kind", "reason"],
            )?,
            stacks: Mirror::new(
                "reqprof_stacks_total",
                "CPU samples by how the walk of their native frames ended.",
                &["result"],
            )?,
            map_entries: gauges("reqprof_map_entries", "Entries in a BPF map.")?,
            map_capacity: gauges("reqprof_map_capacity", "Entries that a BPF map has room for.")?,
            store_bytes: Gauge::new("reqprof_store_bytes", "Bytes of the store on disk.")?,
            store_dropped: Mirror::new(
                "reqprof_store_dropped_total",
                "Requests, or profiles of requests, that were not stored, by reason.",
                &["reason"],
            )?,
            probe_seconds: Mirror::new(
                "reqprof_probe_seconds_total",
                "Time spent inside our BPF programs.",
                &["probe"],
            )?,
            sample_rate: Gauge::new(
                "reqprof_effective_sample_rate_hertz",
                "Samples per second and CPU that the timers are set to; what came of them is reqprof_samples_total.",
            )?,
            reload_successful: Gauge::new(
                "reqprof_config_last_reload_successful",
                "Whether the last reading of the configuration succeeded.",
            )?,
            registry,
        };
        for outcome in Outcome::ALL {
            metrics.requests.set(&[outcome.name()], 0.0);
        }
        metrics.samples.set(&[], 0.0);
        metrics.routes_overflow.set(&[], 0.0);
        metrics.reload_successful.set(1.0);
        metrics.register()?;
        Ok(metrics)
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        let build = Opts::new("reqprof_build_info", "Always 1; the version is the label.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        let build = Gauge::with_opts(build)?;
        build.set(1.0);
        let all: [Box<dyn Collector>; 17] = [
            Box::new(self.durations.clone()),
            Box::new(self.requests.clone()),
            Box::new(self.routes_overflow.clone()),
            Box::new(self.samples.clone()),
            Box::new(self.unattributed.clone()),
            Box::new(self.lost.clone()),
            Box::new(self.unwind_errors.clone()),
            Box::new(self.stacks.clone()),
            Box::new(self.map_entries.clone()),
            Box::new(self.map_capacity.clone()),
            Box::new(self.store_bytes.clone()),
            Box::new(self.store_dropped.clone()),
            Box::new(self.probe_seconds.clone()),
            Box::new(self.sample_rate.clone()),
            Box::new(self.reload_successful.clone()),
            Box::new(build),
            Box::new(process::Process::of_this_one()),
        ];
        all.into_iter().try_for_each(|collector| self.registry.register(collector))
    }

    /// Counts a finished request.
    pub fn observe(&self, record: &RequestRecord) {
        self.requests.add(&[record.outcome.name()], 1.0);
        // The router's bound comes first; the labels have theirs.
        if self.durations.observe(record) || record.route.as_deref() == Some(OTHER) {
            self.routes_overflow.add(&[], 1.0);
        }
    }

    /// Counts a finished stream of events. How long its client listened says nothing of how long its server takes.
    pub fn observe_stream(&self, record: &RequestRecord) {
        self.requests.add(&[record.outcome.name()], 1.0);
    }

    pub fn set_samples(&self, total: u64) {
        self.samples.set(&[], float(total));
    }

    pub fn set_samples_unattributed(&self, reason: &str, total: u64) {
        self.unattributed.set(&[reason], float(total));
    }

    pub fn set_events_lost(&self, stage: &str, reason: &str, total: u64) {
        self.lost.set(&[stage, reason], float(total));
    }

    pub fn set_unwind_errors(&self, kind: &str, reason: &str, total: u64) {
        self.unwind_errors.set(&[kind, reason], float(total));
    }

    pub fn set_stacks(&self, result: &str, total: u64) {
        self.stacks.set(&[result], float(total));
    }

    /// `map` is the name of one of our own maps, so there are few.
    pub fn set_map(&self, map: &str, entries: u64, capacity: u64) {
        let set = |gauges: &IntGaugeVec, n| {
            gauges.with_label_values(&[map]).set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        set(&self.map_entries, entries);
        set(&self.map_capacity, capacity);
    }

    pub fn set_probe_seconds(&self, probe: &str, total: f64) {
        self.probe_seconds.set(&[probe], total);
    }

    pub fn set_sample_rate(&self, hertz: f64) {
        self.sample_rate.set(hertz);
    }

    pub fn set_reload_successful(&self, successful: bool) {
        self.reload_successful.set(f64::from(u8::from(successful)));
    }

    /// Everything as text. The store's totals are taken at this moment.
    pub fn encode(&self, encoding: Encoding, store: Option<&Counters>) -> String {
        if let Some(counters) = store {
            self.store_bytes.set(float(counters.bytes()));
            for reason in DropReason::ALL {
                self.store_dropped.set(&[reason.name()], float(counters.dropped(reason)));
            }
        }
        let families: Vec<MetricFamily> = self.registry.gather();
        match encoding {
            Encoding::OpenMetrics => openmetrics::encode(&families, &self.durations.exemplars()),
            Encoding::Prometheus => {
                let mut text = Vec::new();
                if let Err(e) = TextEncoder::new().encode(&families, &mut text) {
                    tracing::error!("the metrics could not be written: {e}");
                }
                String::from_utf8_lossy(&text).into_owned()
            }
        }
    }
}

fn gauges(name: &str, help: &str) -> Result<IntGaugeVec, prometheus::Error> {
    IntGaugeVec::new(Opts::new(name, help), &["map"])
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has no integers; exact up to 2^53")]
fn float(n: u64) -> f64 {
    n as f64
}
