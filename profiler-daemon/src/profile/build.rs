//! How call trees grow from stacks.
//!
//! In: stacks, root first, whose frames the symboliser has interned. Out: a [`Profile`] within its bounds: what would
//! exceed them is folded into a `[truncated]` child where it happened, and counted, never dropped.
//!
//! `Builder::add` runs once per sample on the hot path. Consecutive samples of a thread mostly share their outer
//! frames, so the path of the previous stack is reused as far as the frames are the same objects; below that, one
//! look-up per frame by (node, address of the frame) finds the child without touching a string. What samples cost the
//! lines of their callers is summed on the path, and booked when a frame leaves it.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::growth::Growth;
use super::tree::{Cost, Function, MAX_NAME, ROOT};
use super::{Frame, Profile};

/// Most look-ups by address that a builder remembers, about 24 bytes each and a frame kept alive. A caller that does
/// not intern its frames would otherwise make it grow with every sample; past this it starts over.
const MAX_EDGES: usize = 65_536;

/// Collects stacks into a profile. One per open request.
#[derive(Default)]
pub struct Builder {
    growth: Growth,
    samples: u64,
    sampled_ns: u64,
    /// The frames whose addresses `edges` and `path` use, with the numbers of their functions. Holding them keeps an
    /// address from being reused.
    kept: FxHashMap<usize, (Arc<Frame>, u32)>,
    /// (node, address of a frame) to the child node.
    edges: FxHashMap<(u32, usize), u32>,
    /// The previous stack.
    path: Vec<Step>,
}

/// A frame of the previous stack.
struct Step {
    /// Address of the frame.
    frame: usize,
    node: u32,
    /// Where its caller, the frame before, stood.
    line: u32,
    /// Of the samples that ended here or below since it came onto the path: not yet booked for `line`.
    cost: Cost,
}

impl Builder {
    /// Adds one sample: `stack` is root first, `weight` in ns of CPU time. A sample without frames counts as the
    /// request's own time.
    pub fn add(&mut self, stack: &[Arc<Frame>], weight: u64) {
        if self.samples == 0 {
            self.reserve(2 * stack.len());
        }
        let cost = Cost { ns: weight, samples: 1 };
        self.samples = self.samples.saturating_add(1);
        self.sampled_ns = self.sampled_ns.saturating_add(weight);
        let full = self.edges.len() >= MAX_EDGES;
        let seen = |step: &Step, frame: &Arc<Frame>| step.frame == address(frame);
        let same = if full {
            0
        } else {
            self.path.iter().zip(stack).take_while(|(step, frame)| seen(step, frame)).count()
        };
        self.leave(same);
        if full {
            self.kept.clear();
            self.edges.clear();
        }
        let mut node = self.path.last().map_or(ROOT, |last| last.node);
        for (at, frame) in stack.iter().enumerate().skip(same) {
            let Some(child) = self.child(node, frame) else { break };
            let line = at.checked_sub(1).map_or(0, |caller| stack[caller].line);
            self.path.push(Step { frame: address(frame), node: child, line, cost: Cost::default() });
            node = child;
        }
        let shown = self.path.len();
        if shown < stack.len() {
            self.growth.profile.truncated_samples = self.growth.profile.truncated_samples.saturating_add(1);
            let fold = self.growth.truncated(node);
            self.growth.own(fold, cost);
            if self.growth.profile.nodes[fold as usize].parent != node {
                return;
            }
            if let Some(caller) = shown.checked_sub(1) {
                self.growth.call_line(fold, stack[caller].line, cost);
            }
        } else {
            self.growth.own(node, cost);
            if let Some(leaf) = stack.last() {
                self.growth.own_line(node, leaf.line, cost);
            }
        }
        if let Some(last) = self.path.last_mut() {
            last.cost.add(cost);
        }
    }

    /// Makes room for so many frames: most requests have few stacks, which share most of their frames.
    fn reserve(&mut self, frames: usize) {
        self.kept.reserve(frames);
        self.edges.reserve(frames);
        self.path.reserve(frames);
        self.growth.reserve(frames);
    }

    /// Takes all but the first `keep` frames off the path.
    fn leave(&mut self, keep: usize) {
        while self.path.len() > keep {
            let Some(step) = self.path.pop() else { break };
            if step.cost.samples == 0 {
                continue;
            }
            // The outermost frame has no caller, and an unknown line is not stored.
            self.growth.call_line(step.node, step.line, step.cost);
            if let Some(caller) = self.path.last_mut() {
                caller.cost.add(step.cost);
            }
        }
    }

    /// Adds one sample whose stack there is no room for, as `[truncated]`.
    pub fn fold(&mut self, weight: u64) {
        self.samples = self.samples.saturating_add(1);
        self.sampled_ns = self.sampled_ns.saturating_add(weight);
        self.growth.profile.truncated_samples = self.growth.profile.truncated_samples.saturating_add(1);
        let fold = self.growth.truncated(ROOT);
        self.growth.own(fold, Cost { ns: weight, samples: 1 });
    }

    /// Nodes of the tree so far.
    pub fn nodes(&self) -> usize {
        self.growth.profile.nodes.len()
    }

    /// Samples added so far.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Time that these samples stand for, ns.
    pub fn sampled_ns(&self) -> u64 {
        self.sampled_ns
    }

    /// `duration`: the request's, ns; what the samples do not cover is shown as `[unsampled]` in the wall view.
    pub fn finish(mut self, duration: u64) -> Profile {
        self.leave(0);
        let mut profile = self.growth.finish();
        profile.duration_ns = duration;
        profile.requests = 1;
        profile
    }

    fn child(&mut self, node: u32, frame: &Arc<Frame>) -> Option<u32> {
        let edge = (node, address(frame));
        if let Some(&child) = self.edges.get(&edge) {
            return Some(child);
        }
        let known = self.kept.get(&edge.1).map(|(_, function)| *function);
        let (child, function) = self.growth.child_for(node, known, || Function {
            name: shorten(&frame.name),
            file: shorten(&frame.file),
            first_line: frame.first_line,
            kind: frame.kind,
        })?;
        if known.is_none() {
            self.kept.insert(edge.1, (frame.clone(), function));
        }
        self.edges.insert(edge, child);
        Some(child)
    }
}

fn address(frame: &Arc<Frame>) -> usize {
    Arc::as_ptr(frame) as usize
}

/// The name itself, or a copy of its beginning.
fn shorten(name: &Arc<str>) -> Arc<str> {
    if name.len() <= MAX_NAME { name.clone() } else { Arc::from(&name[..name.floor_char_boundary(MAX_NAME)]) }
}

#[cfg(test)]
mod tests {
    use super::super::FrameKind;
    use super::super::testing::{frame, py, stack};
    use super::super::tree::{LineCost, MAX_DEPTH, MAX_LINES, MAX_NODES, TRUNCATED};
    use super::*;

    fn named<'a>(profile: &'a Profile, path: &[&str]) -> super::super::NodeRef<'a> {
        path.iter().fold(profile.root(), |node, name| {
            node.children().into_iter().find(|c| c.name() == *name).expect("the path exists")
        })
    }

    #[test]
    fn equal_frames_need_not_be_the_same_object() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 1);
        b.add(&stack(&[py("main", 3), py("a", 10)]), 2);
        assert_eq!(b.samples(), 2);
        let p = b.finish(0);
        assert_eq!(p.nodes().len(), 3);
        assert_eq!(named(&p, &["main", "a"]).own(), Cost { ns: 3, samples: 2 });
    }

    #[test]
    fn shorter_longer_and_diverging_stacks_find_their_own_nodes() {
        let [main, a, b, a2] = [py("main", 3), py("a", 10), py("b", 20), py("a", 11)].map(Arc::new);
        let mut builder = Builder::default();
        for (s, w) in [
            (vec![main.clone(), a.clone(), b.clone()], 1),
            (vec![main.clone()], 10),
            (vec![main.clone(), b.clone(), a.clone()], 100),
            (vec![main.clone(), a2.clone(), b.clone()], 1_000),
            (vec![], 10_000),
        ] {
            builder.add(&s, w);
        }
        let p = builder.finish(0);
        assert_eq!(p.root().own().ns, 10_000);
        assert_eq!(named(&p, &["main"]).own().ns, 10);
        assert_eq!(named(&p, &["main"]).total().ns, 1_111);
        assert_eq!(named(&p, &["main", "b", "a"]).own().ns, 100);
        assert_eq!(named(&p, &["main", "a", "b"]).own().ns, 1_001);
        let calls: Vec<_> =
            named(&p, &["main", "a", "b"]).call_lines().iter().map(|l| (l.line, l.cost.ns)).collect();
        assert_eq!(calls, [(10, 1), (11, 1_000)]);
    }

    #[test]
    fn functions_differ_by_name_file_first_line_and_kind() {
        let mut b = Builder::default();
        for f in [
            frame(FrameKind::Python, "f", "/a.py", 5, 1),
            frame(FrameKind::Python, "g", "/a.py", 5, 1),
            frame(FrameKind::Python, "f", "/b.py", 5, 1),
            frame(FrameKind::Python, "f", "/a.py", 5, 4),
            frame(FrameKind::Native, "f", "/a.py", 5, 1),
            frame(FrameKind::Python, "f", "/a.py", 9, 1),
        ] {
            b.add(&stack(&[f]), 1);
        }
        assert_eq!(b.finish(0).root().children().len(), 5);
    }

    #[test]
    fn a_full_profile_folds_and_counts() {
        let mut b = Builder::default();
        let main = Arc::new(py("main", 3));
        let fresh = 30_000u32;
        for i in 0..fresh {
            b.add(&[main.clone(), Arc::new(frame(FrameKind::Python, "f", "/a.py", 5, i + 1))], 1);
        }
        let p = b.finish(0);
        assert!(p.nodes().len() <= MAX_NODES);
        assert_eq!(p.samples(), u64::from(fresh));
        // The root, `main` and 18,998 functions fit beside the reserve.
        let folded = u64::from(fresh) - 18_998;
        assert_eq!(p.truncated_samples(), folded);
        assert_eq!(named(&p, &["main", TRUNCATED]).own(), Cost { ns: folded, samples: folded });
    }

    #[test]
    fn when_even_folding_has_no_place_left_the_root_takes_it() {
        let mut b = Builder::default();
        // 3,000 callers, then callees of each until everything is full.
        for round in 0..20u32 {
            for caller in 0..3_000u32 {
                let f = frame(FrameKind::Python, "caller", "/a.py", 1, caller + 1);
                let g = frame(FrameKind::Python, "callee", "/a.py", 1, round + 1);
                b.add(&stack(&[f, g]), 1);
            }
        }
        let p = b.finish(0);
        assert_eq!(p.nodes().len(), MAX_NODES);
        assert_eq!(p.samples(), 60_000);
        assert!(named(&p, &[TRUNCATED]).own().samples > 0);
        let folds: u64 = p.nodes().filter(|n| n.name() == TRUNCATED).map(|n| n.own().samples).sum();
        assert_eq!(folds, p.truncated_samples());
    }

    #[test]
    fn deep_recursion_is_cut() {
        let mut b = Builder::default();
        let f = Arc::new(py("f", 2));
        b.add(&vec![f; 5_000], 7);
        let p = b.finish(0);
        assert_eq!(p.walk().map(|(depth, _)| depth).max(), Some(MAX_DEPTH + 1));
        assert_eq!((p.truncated_samples(), p.root().total().ns), (1, 7));
    }

    #[test]
    fn lines_and_names_are_bounded() {
        let mut b = Builder::default();
        for line in 0..120_000u32 {
            b.add(&stack(&[py("f", line + 1)]), 1);
        }
        let long = "é".repeat(3_000);
        b.add(&stack(&[py(&long, 1)]), 1);
        let p = b.finish(0);
        assert_eq!(named(&p, &["f"]).own_lines().len(), MAX_LINES);
        assert_eq!(named(&p, &["f"]).own().ns, 120_000);
        assert!(p.root().children().iter().all(|n| n.name().len() <= MAX_NAME));
    }

    #[test]
    fn merging_adds_everything() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 100);
        b.add(&stack(&[py("main", 4), py("b", 20)]), 5);
        let mut sum = b.finish(1_000);
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 4), py("a", 10)]), 30);
        b.add(&stack(&[py("main", 5)]), 1);
        sum.merge(&b.finish(500));
        assert_eq!((sum.requests(), sum.duration_ns(), sum.samples(), sum.sampled_ns()), (2, 1_500, 4, 136));
        let a = named(&sum, &["main", "a"]);
        assert_eq!(a.total(), Cost { ns: 130, samples: 2 });
        let lines: Vec<_> =
            named(&sum, &["main"]).lines().into_iter().map(|(l, t)| (l, t.self_ns, t.total_ns)).collect();
        assert_eq!(lines, [(3, 0, 100), (4, 0, 35), (5, 1, 1)]);
    }

    #[test]
    fn what_was_folded_before_is_counted_once() {
        let fill = |b: &mut Builder, name: &str| {
            for i in 0..20_000 {
                b.add(&stack(&[py("caller", 1), frame(FrameKind::Python, name, "/a.py", 5, i + 1)]), 1);
            }
        };
        let mut b = Builder::default();
        fill(&mut b, "f");
        let mut sum = b.finish(0);
        let before = sum.truncated_samples();
        let mut b = Builder::default();
        b.add(&stack(&[py("second", 1)]), 1);
        fill(&mut b, "g");
        b.add(&stack(&[py("second", 1), py("deeper", 2)]), 1);
        let other = b.finish(0);
        assert_eq!(named(&other, &["second", TRUNCATED]).own().samples, 1);
        sum.merge(&other);
        // Nothing of the other had a place, so each of its samples is cut, once.
        assert_eq!(sum.truncated_samples(), before + other.samples());
        let folds: u64 = sum.nodes().filter(|n| n.name() == TRUNCATED).map(|n| n.own().samples).sum();
        assert_eq!(folds, sum.truncated_samples());
    }

    #[test]
    fn merging_into_a_full_profile_folds_whole_subtrees() {
        let mut b = Builder::default();
        for i in 0..25_000u32 {
            b.add(&stack(&[frame(FrameKind::Python, "f", "/a.py", 5, i + 1)]), 1);
        }
        let mut sum = b.finish(0);
        let before = sum.truncated_samples();
        let mut b = Builder::default();
        b.add(&stack(&[py("new", 1), py("deeper", 2)]), 9);
        sum.merge(&b.finish(0));
        assert_eq!(sum.truncated_samples(), before + 1);
        assert_eq!(named(&sum, &[TRUNCATED]).own().ns, before + 9);
        assert_eq!(sum.samples(), 25_001);
    }

    /// What a node's lines must add up to, by the path to it: own and call costs by line.
    type Lines = std::collections::BTreeMap<Vec<String>, [std::collections::BTreeMap<u32, u64>; 2]>;

    fn lines_of(node: super::super::NodeRef<'_>, path: &[String], into: &mut Lines) {
        let by_line = |lines: &[LineCost]| lines.iter().map(|l| (l.line, l.cost.ns)).collect();
        into.insert(path.to_vec(), [by_line(node.own_lines()), by_line(node.call_lines())]);
        for child in node.children() {
            let mut path = path.to_vec();
            path.push(child.name().to_owned());
            lines_of(child, &path, into);
        }
    }

    proptest::proptest! {
        /// Against a sum over the stacks that knows nothing of paths and pending costs.
        #[test]
        fn lines_add_up_however_stacks_follow_each_other(
            stacks in proptest::collection::vec(proptest::collection::vec((0u8..3, 1u32..4), 0..7), 0..60),
        ) {
            let interned: Vec<Vec<Arc<Frame>>> = (0..3)
                .map(|f| (0..4).map(|line| Arc::new(py(&format!("f{f}"), line))).collect())
                .collect();
            let mut builder = Builder::default();
            let mut wanted = Lines::from([(Vec::new(), Default::default())]);
            for (n, stack) in stacks.iter().enumerate() {
                let weight = 1u64 << (n % 40);
                let frames: Vec<Arc<Frame>> =
                    stack.iter().map(|(f, line)| interned[usize::from(*f)][*line as usize].clone()).collect();
                builder.add(&frames, weight);
                let mut path = Vec::new();
                for (at, (f, line)) in stack.iter().enumerate() {
                    path.push(format!("f{f}"));
                    let [own, call] = wanted.entry(path.clone()).or_default();
                    if at > 0 {
                        *call.entry(stack[at - 1].1).or_default() += weight;
                    }
                    if at + 1 == stack.len() {
                        *own.entry(*line).or_default() += weight;
                    }
                }
            }
            let mut found = Lines::default();
            let profile = builder.finish(0);
            lines_of(profile.root(), &[], &mut found);
            proptest::prop_assert_eq!(found, wanted);
        }
    }
}
