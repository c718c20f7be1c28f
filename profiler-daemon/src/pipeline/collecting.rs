//! The profiles of open requests.
//!
//! In: stacks, by request. Out: a builder when its request ends. All of them together are bounded: beyond, samples are
//! counted without their stacks, or not taken at all.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::correlate::RequestKey;
use crate::profile::{Builder, Frame};

/// Requests a profile is collected for at a time: threads inside requests, as many as the kernel side follows.
const BUILDERS_MAX: usize = 16_384;
/// Nodes of all profiles being collected together: about 400 bytes each with lines and look-up tables, so 100 MiB.
/// Beyond, samples are counted without their stacks.
const NODES_MAX: usize = 262_144;

/// See the module.
#[derive(Default)]
pub(super) struct Collecting {
    builders: FxHashMap<RequestKey, Builder>,
    /// Of all `builders`.
    nodes: usize,
    /// Samples of requests for which there was no room.
    pub(super) without_room: u64,
    /// Samples whose stacks there was no room for.
    pub(super) folded: u64,
}

impl Collecting {
    /// Whether this request has a profile or may begin one; else its sample is counted.
    pub(super) fn takes(&mut self, key: RequestKey) -> bool {
        let takes = self.builders.len() < BUILDERS_MAX || self.builders.contains_key(&key);
        self.without_room += u64::from(!takes);
        takes
    }

    /// `elsewhere`: nodes of profiles that are not collected any more, but not yet handed on either.
    pub(super) fn grow(&mut self, key: RequestKey, stack: &[Arc<Frame>], weight: u64, elsewhere: usize) {
        let (builder, before) = match self.builders.entry(key) {
            Entry::Occupied(known) => {
                let nodes = known.get().nodes();
                (known.into_mut(), nodes)
            }
            Entry::Vacant(new) => (new.insert(Builder::default()), 0),
        };
        if self.nodes + elsewhere >= NODES_MAX {
            self.folded += 1;
            builder.fold(weight);
        } else {
            builder.add(stack, weight);
        }
        self.nodes += builder.nodes() - before;
    }

    pub(super) fn take(&mut self, key: RequestKey) -> Option<Builder> {
        let builder = self.builders.remove(&key)?;
        self.nodes -= builder.nodes();
        Some(builder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::FrameKind;

    fn frame(n: u32) -> Arc<Frame> {
        let name = format!("f{n}").into();
        Arc::new(Frame { name, file: "".into(), line: 0, first_line: n, kind: FrameKind::Native })
    }

    #[test]
    fn profiles_have_a_common_bound_and_samples_beyond_it_count() {
        let mut collecting = Collecting::default();
        let stacks: Vec<Vec<Arc<Frame>>> = (0..2000).map(|n| vec![frame(n); 100]).collect();
        let (mut key, mut given) = (0, 0);
        while collecting.folded == 0 {
            for stack in stacks.iter().take(100) {
                collecting.grow(key, stack, 10, 0);
                given += 1;
            }
            key += 1;
            assert!(collecting.nodes <= NODES_MAX + 100, "{} nodes", collecting.nodes);
        }
        let folded = collecting.folded;
        let counted: usize = collecting.builders.values().map(Builder::nodes).sum();
        assert_eq!(collecting.nodes, counted);
        let (mut samples, mut truncated) = (0, 0);
        for key in 0..key {
            let builder = collecting.take(key).unwrap();
            let ns = builder.sampled_ns();
            let profile = builder.finish(1);
            assert_eq!(ns, profile.sampled_ns());
            samples += profile.samples();
            truncated += profile.truncated_samples();
        }
        assert_eq!((samples, truncated, collecting.nodes), (given, folded, 0));
        collecting.grow(7, &stacks[0], 10, 0);
        assert_eq!(collecting.folded, folded);
        collecting.grow(7, &stacks[0], 10, NODES_MAX);
        assert_eq!(collecting.folded, folded + 1, "what waits elsewhere takes room too");
    }

    #[test]
    fn requests_beyond_the_limit_are_counted() {
        let mut collecting = Collecting::default();
        for key in 0..BUILDERS_MAX as u64 {
            assert!(collecting.takes(key));
            collecting.grow(key, &[], 1, 0);
        }
        assert!(collecting.takes(0) && !collecting.takes(u64::MAX));
        assert_eq!(collecting.without_room, 1);
    }
}
