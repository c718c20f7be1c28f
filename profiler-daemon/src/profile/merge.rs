//! How call trees grow from other trees.
//!
//! In: profiles. Out: their sum, within the same bounds as each of them.

use super::Profile;
use super::growth::{Growth, truncated_function};
use super::tree::ROOT;

/// Adds up profiles. For many it is much faster than [`Profile::merge`], which builds the look-up tables each time.
#[derive(Default)]
pub struct Merger {
    growth: Growth,
}

impl Merger {
    /// Starts from a profile instead of nothing.
    pub fn new(start: Profile) -> Self {
        Self { growth: Growth::from_profile(start) }
    }

    /// Adds another's samples, durations and request count.
    pub fn add(&mut self, other: &Profile) {
        let growth = &mut self.growth;
        // Where each of the other's nodes went, and whether it was folded there.
        let mut places: Vec<(u32, bool)> = Vec::with_capacity(other.nodes.len());
        places.push((ROOT, false));
        // The numbers that its functions have here.
        let mut numbers: Vec<Option<u32>> = vec![None; other.functions.len()];
        let mut folded = other.truncated_samples;
        growth.own(ROOT, other.nodes[0].own);
        let truncated = truncated_function();
        for node in &other.nodes[1..] {
            let (parent, parent_folded) = places[node.parent as usize];
            let function = &other.functions[node.function as usize];
            let number = &mut numbers[node.function as usize];
            let child =
                if parent_folded { None } else { growth.child_for(parent, *number, || function.clone()) };
            match child {
                Some((child, function)) => {
                    *number = Some(function);
                    growth.own(child, node.own);
                    for line in &node.own_lines {
                        growth.own_line(child, line.line, line.cost);
                    }
                    for line in &node.call_lines {
                        growth.call_line(child, line.line, line.cost);
                    }
                    places.push((child, false));
                }
                None => {
                    let fold = if parent_folded { parent } else { growth.truncated(parent) };
                    growth.own(fold, node.own);
                    // What had been folded before is among the other's truncated samples already.
                    if *function != truncated {
                        folded = folded.saturating_add(node.own.samples);
                    }
                    places.push((fold, true));
                }
            }
        }
        let sum = &mut growth.profile;
        sum.truncated_samples = sum.truncated_samples.saturating_add(folded);
        sum.duration_ns = sum.duration_ns.saturating_add(other.duration_ns);
        sum.requests = sum.requests.saturating_add(other.requests);
    }

    /// Adds requests that no sample hit, and the sum of their durations, ns.
    pub fn add_unsampled(&mut self, requests: u64, duration_ns: u64) {
        let sum = &mut self.growth.profile;
        sum.duration_ns = sum.duration_ns.saturating_add(duration_ns);
        sum.requests = sum.requests.saturating_add(requests);
    }

    pub fn finish(self) -> Profile {
        self.growth.finish()
    }
}

impl Profile {
    /// Adds another's samples, durations and request count.
    pub fn merge(&mut self, other: &Profile) {
        let mut merger = Merger::new(std::mem::take(self));
        merger.add(other);
        *self = merger.finish();
    }
}
