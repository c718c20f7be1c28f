//! The call tree itself, and how to read it.
//!
//! A node is a function in the context of its callers. A function is told apart by name, file, first line and kind;
//! the line being executed is not part of that, or one function would split into as many nodes as it has lines.
//! Lines are kept beside the tree instead: each node knows on which of its own lines time was spent, and from which
//! lines of its parent it was called. Both together give every node's time by line.
//!
//! Only what happened *in* a node is stored; totals are always derived from it, so they cannot disagree.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::FrameKind;
use super::format::View;

/// Most nodes in a profile. A request of a large framework has a few thousand; at about 200 bytes each this bounds a
/// profile to some 4 MB, and a page that draws it stays usable.
pub(super) const MAX_NODES: usize = 20_000;
/// Of these, nodes kept free for `[truncated]`, so that folding can still say where it happened.
pub(super) const TRUNCATED_RESERVE: usize = 1_000;
/// Most frames from the root to a leaf: what the kernel side delivers, with as many that compilers inlined. It bounds the
/// nesting of the JSON tree, which readers commonly parse with recursion.
pub(crate) const MAX_DEPTH: usize = 1_024;
/// Most (node, line) entries in a profile, 24 bytes each; further lines count as unknown.
pub(super) const MAX_LINES: usize = 100_000;
/// Longest name or file, bytes. C++ symbols reach several kilobytes, of which nobody reads the end.
pub(super) const MAX_NAME: usize = 1_024;

/// Name of the node that stands for frames beyond the bounds.
pub const TRUNCATED: &str = "[truncated]";
/// Name of the node that stands for the part of the duration that no CPU sample covers.
pub const UNSAMPLED: &str = "[unsampled]";

pub(super) const ROOT: u32 = 0;

/// What tells functions apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Function {
    pub name: Arc<str>,
    pub file: Arc<str>,
    /// 0 = unknown.
    pub first_line: u32,
    pub kind: FrameKind,
}

/// Time and the number of samples it was estimated from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    pub ns: u64,
    pub samples: u64,
}

impl Cost {
    /// Saturating: weights come from outside, and a wrapped sum would be worse than a capped one.
    pub(super) fn add(&mut self, other: Cost) {
        self.ns = self.ns.saturating_add(other.ns);
        self.samples = self.samples.saturating_add(other.samples);
    }
}

/// The cost on one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineCost {
    pub line: u32,
    pub cost: Cost,
}

/// A line's own time and, with what was called from it, its total, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineTotals {
    pub self_ns: u64,
    pub total_ns: u64,
}

/// Most nodes have one child, are called from one line, and have no time of their own: what they have lies in the node, and
/// a tree is not three times as many allocations as it has nodes.
type Children = SmallVec<[u32; 4]>;
pub(super) type Lines = SmallVec<[LineCost; 1]>;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub function: u32,
    pub parent: u32,
    pub children: Children,
    pub own: Cost,
    /// Derived: `own` and the children's totals.
    pub total: Cost,
    /// Where in this function `own` was spent, by line. What is missing to `own` was on unknown lines.
    pub own_lines: Lines,
    /// From which lines of the parent `total` was called. What is missing came from unknown lines.
    pub call_lines: Lines,
}

impl Node {
    pub(super) fn new(function: u32, parent: u32) -> Self {
        Self {
            function,
            parent,
            children: Children::new(),
            own: Cost::default(),
            total: Cost::default(),
            own_lines: Lines::new(),
            call_lines: Lines::new(),
        }
    }
}

/// A call tree of one request, or of many merged.
///
/// The root is not a function: it stands for the request.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Index 0 is the root's, which is empty.
    pub(super) functions: Vec<Function>,
    /// Index 0 is the root; a parent always comes before its children.
    pub(super) nodes: Vec<Node>,
    pub(super) duration_ns: u64,
    pub(super) requests: u64,
    pub(super) truncated_samples: u64,
}

impl Default for Profile {
    /// A profile of no requests.
    fn default() -> Self {
        let nothing: Arc<str> = Arc::from("");
        Self {
            functions: vec![Function {
                name: nothing.clone(),
                file: nothing,
                first_line: 0,
                kind: FrameKind::Native,
            }],
            nodes: vec![Node::new(0, ROOT)],
            duration_ns: 0,
            requests: 0,
            truncated_samples: 0,
        }
    }
}

impl Profile {
    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.nodes[0].total.samples
    }

    /// Samples of which not every frame is shown, because the profile was full.
    pub fn truncated_samples(&self) -> u64 {
        self.truncated_samples
    }

    /// Time that samples stand for, ns.
    pub fn sampled_ns(&self) -> u64 {
        self.nodes[0].total.ns
    }

    /// Sum of the requests' durations, ns.
    pub fn duration_ns(&self) -> u64 {
        self.duration_ns
    }

    /// How many requests this is the sum of.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Memory that it takes, about: what it may have is a hundred times what it usually has, so queues count it.
    pub fn heap_bytes(&self) -> usize {
        // What fits into the node is part of it.
        let lines = |lines: &Lines| if lines.spilled() { lines.len() * size_of::<LineCost>() } else { 0 };
        let beside = |node: &Node| {
            let children = if node.children.spilled() { node.children.len() * size_of::<u32>() } else { 0 };
            children + lines(&node.own_lines) + lines(&node.call_lines)
        };
        self.nodes.iter().map(|node| size_of::<Node>() + beside(node)).sum::<usize>()
            + self
                .functions
                .iter()
                .map(|f| size_of::<Function>() + f.name.len() + f.file.len())
                .sum::<usize>()
    }

    /// The request itself; its children are the outermost functions.
    pub fn root(&self) -> NodeRef<'_> {
        NodeRef { profile: self, index: ROOT }
    }

    /// All nodes, the root first, parents before children, otherwise in no useful order.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = NodeRef<'_>> {
        (0..self.nodes.len() as u32).map(|index| NodeRef { profile: self, index })
    }

    /// The functions that [`NodeRef::function_id`] counts; the first is the root's and empty.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// All nodes but the root with their depth (1 = outermost function), depth first, hottest child first.
    pub fn walk(&self) -> Walk<'_> {
        let mut walk = Walk { todo: Vec::new() };
        walk.push_children(0, self.root());
        walk
    }

    /// The tree as a view shows it. In the wall view the root's total is the requests' duration: what samples do not
    /// cover is a child `[unsampled]`. Sampling can also overshoot; then the sampled time stands and nothing is
    /// added. Off-CPU time is not measured, so that view is empty.
    pub fn in_view(&self, view: View) -> Cow<'_, Profile> {
        match view {
            View::Cpu => Cow::Borrowed(self),
            View::OffCpu => Cow::Owned(Profile {
                duration_ns: self.duration_ns,
                requests: self.requests,
                ..Profile::default()
            }),
            View::Wall => {
                let unsampled = self.duration_ns.saturating_sub(self.sampled_ns());
                if unsampled == 0 {
                    return Cow::Borrowed(self);
                }
                let mut with = self.clone();
                let mut node = Node::new(with.functions.len() as u32, ROOT);
                node.own.ns = unsampled;
                let index = with.nodes.len() as u32;
                with.nodes[0].children.push(index);
                with.nodes.push(node);
                with.functions.push(Function {
                    name: Arc::from(UNSAMPLED),
                    file: Arc::from(""),
                    first_line: 0,
                    kind: FrameKind::Wait,
                });
                with.derive_totals();
                Cow::Owned(with)
            }
        }
    }

    /// Sums `own` up the tree. Parents come first in `nodes`, so one pass from the end does it.
    pub(super) fn derive_totals(&mut self) {
        for node in &mut self.nodes {
            node.total = node.own;
        }
        for index in (1..self.nodes.len()).rev() {
            let total = self.nodes[index].total;
            let parent = self.nodes[index].parent as usize;
            self.nodes[parent].total.add(total);
        }
    }
}

/// A node of a profile.
#[derive(Clone, Copy)]
pub struct NodeRef<'a> {
    profile: &'a Profile,
    index: u32,
}

impl<'a> NodeRef<'a> {
    fn node(self) -> &'a Node {
        &self.profile.nodes[self.index as usize]
    }
    fn at(self, index: u32) -> Self {
        Self { profile: self.profile, index }
    }

    /// Position in [`Profile::nodes`].
    pub fn index(self) -> usize {
        self.index as usize
    }
    /// Position in [`Profile::functions`].
    pub fn function_id(self) -> usize {
        self.node().function as usize
    }
    pub fn function(self) -> &'a Function {
        &self.profile.functions[self.function_id()]
    }
    pub fn name(self) -> &'a str {
        &self.function().name
    }
    pub fn file(self) -> &'a str {
        &self.function().file
    }
    pub fn kind(self) -> FrameKind {
        self.function().kind
    }
    pub fn is_root(self) -> bool {
        self.index == ROOT
    }
    /// Time in the function itself, and the samples that saw it innermost.
    pub fn own(self) -> Cost {
        self.node().own
    }
    /// With everything it called.
    pub fn total(self) -> Cost {
        self.node().total
    }
    /// `None` for the root.
    pub fn parent(self) -> Option<Self> {
        (!self.is_root()).then(|| self.at(self.node().parent))
    }
    /// Callees, the one with the largest total first; ties by name, so that output is stable.
    pub fn children(self) -> Vec<Self> {
        let mut all: Vec<Self> = self.node().children.iter().map(|&index| self.at(index)).collect();
        all.sort_by(|a, b| b.total().ns.cmp(&a.total().ns).then_with(|| a.function().cmp(b.function())));
        all
    }
    /// Where in the function its own time was spent; sorted by line. What is missing to [`Self::own`] has no line.
    pub fn own_lines(self) -> &'a [LineCost] {
        &self.node().own_lines
    }
    /// From which lines of the parent it was called; sorted by line. What is missing to [`Self::total`] has no line.
    pub fn call_lines(self) -> &'a [LineCost] {
        &self.node().call_lines
    }

    /// The function's time by line: own, and with what was called from that line.
    pub fn lines(self) -> BTreeMap<u32, LineTotals> {
        let mut lines: BTreeMap<u32, LineTotals> = BTreeMap::new();
        for LineCost { line, cost } in self.own_lines() {
            let entry = lines.entry(*line).or_default();
            entry.self_ns = entry.self_ns.saturating_add(cost.ns);
            entry.total_ns = entry.total_ns.saturating_add(cost.ns);
        }
        for &child in &self.node().children {
            for LineCost { line, cost } in self.at(child).call_lines() {
                let entry = lines.entry(*line).or_default();
                entry.total_ns = entry.total_ns.saturating_add(cost.ns);
            }
        }
        lines
    }

    /// The line with the largest total, the first of equals; the first line where none is known.
    pub fn hottest_line(self) -> u32 {
        hottest(&self.lines()).unwrap_or(self.function().first_line)
    }
}

/// The line with the largest total, the first of equals.
pub(super) fn hottest(lines: &BTreeMap<u32, LineTotals>) -> Option<u32> {
    lines.iter().rev().max_by_key(|(_, totals)| totals.total_ns).map(|(line, _)| *line)
}

/// Iterator of [`Profile::walk`].
pub struct Walk<'a> {
    todo: Vec<(usize, NodeRef<'a>)>,
}

impl<'a> Walk<'a> {
    fn push_children(&mut self, depth: usize, node: NodeRef<'a>) {
        self.todo.extend(node.children().into_iter().rev().map(|child| (depth + 1, child)));
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = (usize, NodeRef<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let (depth, node) = self.todo.pop()?;
        self.push_children(depth, node);
        Some((depth, node))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{py, stack};
    use super::super::{Builder, FrameKind};
    use super::*;

    /// main:3 calls a (lines 10 and 11), and b from line 4; a calls itself.
    fn sample() -> Profile {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 100);
        b.add(&stack(&[py("main", 3), py("a", 11)]), 50);
        b.add(&stack(&[py("main", 3), py("a", 11), py("a", 10)]), 25);
        b.add(&stack(&[py("main", 4), py("b", 20)]), 5);
        b.finish(1_000)
    }

    #[test]
    fn totals_and_lines_are_as_worked_by_hand() {
        let p = sample();
        assert_eq!((p.samples(), p.sampled_ns(), p.requests(), p.duration_ns()), (4, 180, 1, 1_000));
        let main = p.root().children()[0];
        assert_eq!(main.name(), "main");
        assert_eq!((main.own(), main.total()), (Cost::default(), Cost { ns: 180, samples: 4 }));
        let lines: Vec<_> = main.lines().into_iter().map(|(l, t)| (l, t.self_ns, t.total_ns)).collect();
        assert_eq!(lines, [(3, 0, 175), (4, 0, 5)]);
        assert_eq!(main.hottest_line(), 3);

        let a = main.children()[0];
        assert_eq!((a.own().ns, a.total().ns), (150, 175), "recursion counts the inner call once");
        let lines: Vec<_> = a.lines().into_iter().map(|(l, t)| (l, t.self_ns, t.total_ns)).collect();
        assert_eq!(lines, [(10, 100, 100), (11, 50, 75)]);
        let inner = a.children()[0];
        assert_eq!((inner.name(), inner.own().ns, inner.own().samples), ("a", 25, 1));
        assert_eq!(inner.parent().map(NodeRef::index), Some(a.index()));
    }

    #[test]
    fn walk_is_depth_first_hottest_first() {
        let seen: Vec<String> = sample().walk().map(|(d, n)| format!("{d}{}", n.name())).collect();
        assert_eq!(seen, ["1main", "2a", "3a", "2b"]);
    }

    #[test]
    fn wall_view_adds_what_samples_do_not_cover() {
        let p = sample();
        assert_eq!(p.in_view(View::Cpu).root().total().ns, 180);
        let wall = p.in_view(View::Wall);
        assert_eq!(wall.root().total(), Cost { ns: 1_000, samples: 4 });
        let rest = wall.root().children()[0];
        assert_eq!((rest.name(), rest.kind(), rest.own().ns), (UNSAMPLED, FrameKind::Wait, 820));
    }

    #[test]
    fn wall_view_never_goes_below_what_was_sampled() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3)]), 1_500);
        let p = b.finish(1_000);
        let wall = p.in_view(View::Wall);
        assert_eq!(wall.root().total().ns, 1_500);
        assert_eq!(wall.nodes().len(), 2);
    }

    #[test]
    fn an_empty_profile_has_a_root_and_a_wall_view() {
        let p = Builder::default().finish(7);
        assert_eq!((p.samples(), p.nodes().len()), (0, 1));
        assert_eq!(p.in_view(View::Wall).root().total().ns, 7);
        assert_eq!(Profile::default().in_view(View::Wall).root().total().ns, 0);
    }
}
