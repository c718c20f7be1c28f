//! `http_server_request_duration_seconds`: OpenTelemetry's histogram of request durations, with exemplars.
//!
//! Each bucket remembers the last request that fell into it, so that a dashboard's spike leads to a profile. The
//! crate's own histogram has no place for that.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, Metric, MetricFamily, MetricType};
use rustc_hash::FxHashMap;

use super::float;
use super::labels::{Admission, Labels};
use super::mirror::{family, pairs};
use crate::record::RequestRecord;

pub(super) const NAME: &str = "http_server_request_duration_seconds";
pub(super) const LABELS: [&str; 4] =
    ["service_name", "http_request_method", "http_route", "http_response_status_code"];
/// Seconds; the boundaries that OpenTelemetry's semantic conventions for HTTP metrics prescribe.
const BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// One more for what is beyond the last boundary.
const BUCKETS: usize = BOUNDS.len() + 1;

/// A request that stands for a bucket.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Exemplar {
    pub request_id: String,
    pub trace_id: Option<String>,
    /// Its duration.
    pub seconds: f64,
    /// When it ended, seconds since the epoch.
    pub timestamp: f64,
}

/// Exemplars by series, for each bucket and `+Inf`.
pub(super) type Exemplars = FxHashMap<Labels, [Option<Exemplar>; BUCKETS]>;

#[derive(Default)]
struct Series {
    /// Not cumulative.
    counts: [u64; BUCKETS],
    sum: f64,
    exemplars: [Option<Exemplar>; BUCKETS],
}

#[derive(Default)]
struct Inner {
    admission: Admission,
    series: FxHashMap<Labels, Series>,
}

/// Clones are the same histogram.
#[derive(Clone)]
pub(super) struct DurationHistogram {
    desc: Arc<Desc>,
    inner: Arc<Mutex<Inner>>,
}

impl DurationHistogram {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let labels = LABELS.map(str::to_owned).to_vec();
        let help = "Duration of HTTP server requests.".to_owned();
        let desc = Desc::new(NAME.to_owned(), help, labels, std::collections::HashMap::new())?;
        Ok(Self { desc: Arc::new(desc), inner: Arc::default() })
    }

    /// Counts a request; `true` when its labels exceeded a limit.
    pub(super) fn observe(&self, record: &RequestRecord) -> bool {
        let seconds = float(record.duration_ns) / 1e9;
        let exemplar = Exemplar {
            request_id: record.id.clone(),
            // Longer ones would break OpenMetrics' limit of 128 characters.
            trace_id: record.trace_id.clone().filter(|id| id.len() == 32),
            seconds,
            #[expect(clippy::cast_precision_loss, reason = "a fraction of a microsecond")]
            timestamp: record.start as f64 / 1e9 + seconds,
        };
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (labels, over) = inner.admission.admit(record);
        let series = inner.series.entry(labels).or_default();
        let bucket = BOUNDS.partition_point(|bound| *bound < seconds);
        series.counts[bucket] += 1;
        series.sum += seconds;
        series.exemplars[bucket] = Some(exemplar);
        over
    }

    pub(super) fn exemplars(&self) -> Exemplars {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.series.iter().map(|(labels, series)| (labels.clone(), series.exemplars.clone())).collect()
    }
}

impl Collector for DurationHistogram {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.series.is_empty() {
            return Vec::new();
        }
        let metrics = inner.series.iter().map(|(labels, series)| {
            let mut total = 0;
            let mut buckets = Vec::with_capacity(BUCKETS);
            // Encoders add the bucket of everything by themselves, from the count.
            for (bound, count) in BOUNDS.iter().zip(series.counts) {
                total += count;
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(*bound);
                bucket.set_cumulative_count(total);
                buckets.push(bucket);
            }
            let mut histogram = Histogram::default();
            histogram.set_bucket(buckets);
            histogram.set_sample_count(series.counts.iter().sum());
            histogram.set_sample_sum(series.sum);
            let mut metric = Metric::from_label(pairs(&self.desc.variable_labels, labels));
            metric.set_histogram(histogram);
            metric
        });
        vec![family(&self.desc, MetricType::HISTOGRAM, metrics.collect())]
    }
}
