//! What a recording saw, per service and route: the table that `record` ends with.

use std::collections::BTreeMap;

use super::table;
use crate::percentile::nearest_rank;
use crate::record::RequestRecord;

/// See the module. Bounded: routes are, and durations are kept up to a number.
#[derive(Default)]
pub(super) struct Summary {
    routes: BTreeMap<(String, Option<String>), RouteSummary>,
    pub(super) requests: u64,
    pub(super) profiles: u64,
}

#[derive(Default)]
struct RouteSummary {
    count: u64,
    errors: u64,
    samples: u64,
    /// ns; the first [`DURATIONS_MAX`].
    durations: Vec<u64>,
}

/// For percentiles; 100,000 are 800 kB a route.
const DURATIONS_MAX: usize = 100_000;

impl Summary {
    pub(super) fn add(&mut self, record: &RequestRecord, profile: bool) {
        self.requests += 1;
        self.profiles += u64::from(profile);
        let route = self.routes.entry((record.service.clone(), record.route.clone())).or_default();
        route.count += 1;
        route.errors += u64::from(record.is_error());
        route.samples += record.samples;
        if route.durations.len() < DURATIONS_MAX {
            route.durations.push(record.duration_ns);
        }
    }

    pub(super) fn table(&mut self) -> String {
        let mut rows = Vec::new();
        for ((service, name), route) in &mut self.routes {
            route.durations.sort_unstable();
            let at = |percent| table::nanoseconds(nearest_rank(&route.durations, percent) as f64);
            rows.push(vec![
                service.clone(),
                name.clone().unwrap_or_else(|| "-".to_owned()),
                route.count.to_string(),
                route.errors.to_string(),
                at(50),
                at(95),
                at(99),
                route.samples.to_string(),
            ]);
        }
        table::table(&["service", "route", "count", "errors", "p50", "p95", "p99", "samples"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_reads_like_the_other_tables() {
        let mut route = RouteSummary { count: 3, samples: 160, ..RouteSummary::default() };
        route.durations = vec![1_604_200_000, 850_000, 12_340_000];
        let mut summary = Summary::default();
        summary.routes.insert(("shop".into(), Some("/reports/{id}".into())), route);
        let expected = "\
service  route          count  errors      p50    p95    p99  samples
shop     /reports/{id}      3       0  12.3 ms  1.6 s  1.6 s      160
";
        assert_eq!(summary.table(), expected);
    }
}
