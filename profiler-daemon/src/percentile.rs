//! Percentiles, in one way everywhere: two tables of the same requests must not disagree.

/// The value of the nearest rank: the smallest that at least `percent` % of all do not exceed. 0 of nothing.
/// `sorted`: in ascending order.
pub fn nearest_rank(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::nearest_rank;

    /// The example of the definition in textbooks.
    #[test]
    fn the_nearest_rank_is_a_value_that_occurred() {
        let scores = [15, 20, 35, 40, 50];
        assert_eq!([5, 30, 40, 50, 100].map(|p| nearest_rank(&scores, p)), [15, 20, 20, 35, 50]);
        assert_eq!((nearest_rank(&[7], 1), nearest_rank(&[], 50)), (7, 0));
        let even = [1, 2];
        assert_eq!(nearest_rank(&even, 50), 1, "not rounded up to the next");
    }
}
