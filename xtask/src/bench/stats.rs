//! The statistics of paired measurements: medians with intervals that assume nothing about how values are
//! distributed. Timings on a shared machine have long tails, so means and their normal intervals would lie.

use std::fmt;

/// More pairs would take days; and up to here the binomial weights below stay above the smallest float.
const MAX_VALUES: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    pub median: f64,
    /// Covers the true median with at least 95 % confidence. `None` below six values, where no interval does.
    pub interval: Option<(f64, f64)>,
    pub values: usize,
}

impl Estimate {
    /// Of no values: `None`. Values that are not finite (a slice without a request) do not count.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut ascending: Vec<f64> =
            values.into_iter().filter(|value| value.is_finite()).take(MAX_VALUES).collect();
        ascending.sort_unstable_by(f64::total_cmp);
        let median = median(&ascending)?;
        let interval =
            interval_rank(ascending.len()).map(|k| (ascending[k - 1], ascending[ascending.len() - k]));
        Some(Self { median, interval, values: ascending.len() })
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:.3}", self.median)?;
        match self.interval {
            Some((low, high)) => write!(out, " ({low:.3} to {high:.3})"),
            None => write!(out, " (n={})", self.values),
        }
    }
}

fn median(ascending: &[f64]) -> Option<f64> {
    let upper = *ascending.get(ascending.len() / 2)?;
    if ascending.len() % 2 == 1 {
        return Some(upper);
    }
    Some((ascending[ascending.len() / 2 - 1] + upper) / 2.0)
}

/// The largest k for which the k-th smallest and the k-th largest of `count` values enclose the median with at least
/// 95 % confidence: how many values fall below the median is binomial with probability one half, so k is the
/// largest rank with P(X < k) at most 2.5 %.
fn interval_rank(count: usize) -> Option<usize> {
    let mut weight = 0.5_f64.powi(i32::try_from(count).ok()?);
    let mut below = 0.0;
    let mut rank = 0;
    for successes in 0..count {
        below += weight;
        if below > 0.025 {
            break;
        }
        rank = successes + 1;
        weight *= (count - successes) as f64 / (successes + 1) as f64;
    }
    (rank > 0).then_some(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(Estimate::of([3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(Estimate::of([4.0, 1.0, 3.0, 2.0]).unwrap().median, 2.5);
        assert_eq!(Estimate::of([]), None);
    }

    /// From the published tables of the sign test's intervals: 6 values need both extremes, 10 the second, 20 the
    /// sixth, 40 the fourteenth smallest and largest.
    #[test]
    fn ranks_agree_with_the_tables() {
        let expected = [
            (5, None),
            (6, Some(1)),
            (8, Some(1)),
            (9, Some(2)),
            (10, Some(2)),
            (20, Some(6)),
            (40, Some(14)),
        ];
        for (count, rank) in expected {
            assert_eq!(interval_rank(count), rank, "{count} values");
        }
        assert!(interval_rank(MAX_VALUES).is_some_and(|rank| (460..480).contains(&rank)));
    }

    #[test]
    fn the_interval_is_made_of_measured_values() {
        let estimate = Estimate::of((1..=10).map(f64::from)).unwrap();
        assert_eq!((estimate.median, estimate.interval), (5.5, Some((2.0, 9.0))));
        assert_eq!(estimate.to_string(), "5.500 (2.000 to 9.000)");
    }

    #[test]
    fn slices_without_requests_do_not_count() {
        let estimate = Estimate::of([f64::NAN, 1.0, f64::INFINITY, 3.0]).unwrap();
        assert_eq!((estimate.median, estimate.values, estimate.interval), (2.0, 2, None));
    }
}
