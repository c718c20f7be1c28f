//! A call tree that can still grow, for [`Builder`](super::Builder) and [`Merger`](super::Merger).
//!
//! In: functions below nodes, and costs. Out: a [`Profile`] within its bounds: what would exceed them goes to a
//! `[truncated]` child where it happened.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::tree::{
    Cost, Function, LineCost, Lines, MAX_DEPTH, MAX_LINES, MAX_NODES, Node, ROOT, TRUNCATED,
    TRUNCATED_RESERVE,
};
use super::{FrameKind, Profile};

/// What stands for frames that found no place.
pub(super) fn truncated_function() -> Function {
    Function { name: Arc::from(TRUNCATED), file: Arc::from(""), first_line: 0, kind: FrameKind::Native }
}

/// A function that has a number, or none yet: a number is only given to what has a node.
enum Named {
    Known(u32),
    New(Function),
}

/// A profile that can still grow: the tree and what is needed to find things in it. Its totals are not valid.
#[derive(Default)]
pub(super) struct Growth {
    pub(super) profile: Profile,
    /// Position in `profile.functions`.
    functions: FxHashMap<Function, u32>,
    /// (node, function) to the child node.
    children: FxHashMap<(u32, u32), u32>,
    /// By node; the root has 0. Empty until the first child.
    depths: Vec<u16>,
    line_entries: usize,
}

impl Growth {
    pub(super) fn from_profile(profile: Profile) -> Self {
        let mut growth = Self {
            functions: profile.functions.iter().cloned().zip(0..).skip(1).collect(),
            line_entries: profile.nodes.iter().map(|n| n.own_lines.len() + n.call_lines.len()).sum(),
            ..Self::default()
        };
        growth.depths.push(0);
        for (node, index) in profile.nodes.iter().zip(0..).skip(1) {
            growth.children.insert((node.parent, node.function), index);
            growth.depths.push(growth.depths[node.parent as usize] + 1);
        }
        growth.profile = profile;
        growth
    }

    pub(super) fn reserve(&mut self, nodes: usize) {
        self.functions.reserve(nodes);
        self.children.reserve(nodes);
        self.depths.reserve(nodes);
        self.profile.functions.reserve(nodes);
        self.profile.nodes.reserve(nodes);
    }

    /// The child of `node` for a function, made if need be; `None` when the profile is full there. `known`: the
    /// function's number, for whoever has it. Also returns that.
    pub(super) fn child_for(
        &mut self,
        node: u32,
        known: Option<u32>,
        function: impl FnOnce() -> Function,
    ) -> Option<(u32, u32)> {
        let depth = self.depths.get(node as usize).copied().unwrap_or(0);
        if usize::from(depth) >= MAX_DEPTH {
            return None;
        }
        let function = match known {
            Some(id) => Named::Known(id),
            None => self.named(function()),
        };
        if let Named::Known(id) = function
            && let Some(&child) = self.children.get(&(node, id))
        {
            return Some((child, id));
        }
        if self.profile.nodes.len() >= MAX_NODES - TRUNCATED_RESERVE {
            return None;
        }
        Some(self.grow(node, function))
    }

    /// The `[truncated]` child of `node`; when even these have run out, the root's.
    pub(super) fn truncated(&mut self, node: u32) -> u32 {
        let function = self.named(truncated_function());
        let find = |at: u32| match function {
            Named::Known(id) => self.children.get(&(at, id)).copied(),
            Named::New(_) => None,
        };
        if let Some(fold) = find(node) {
            return fold;
        }
        // The last place is the root's.
        let full = self.profile.nodes.len() >= MAX_NODES - 1;
        match find(ROOT) {
            Some(fold) if full => fold,
            _ => self.grow(if full { ROOT } else { node }, function).0,
        }
    }

    fn named(&self, function: Function) -> Named {
        self.functions.get(&function).map_or_else(|| Named::New(function), |&id| Named::Known(id))
    }

    /// A new child, and the number of its function.
    fn grow(&mut self, parent: u32, function: Named) -> (u32, u32) {
        let id = match function {
            Named::Known(id) => id,
            Named::New(function) => {
                let id = self.profile.functions.len() as u32;
                self.profile.functions.push(function.clone());
                self.functions.insert(function, id);
                id
            }
        };
        if self.depths.is_empty() {
            self.depths.push(0);
        }
        let child = self.profile.nodes.len() as u32;
        self.profile.nodes.push(Node::new(id, parent));
        self.profile.nodes[parent as usize].children.push(child);
        self.children.insert((parent, id), child);
        self.depths.push(self.depths[parent as usize] + 1);
        (child, id)
    }

    pub(super) fn own(&mut self, node: u32, cost: Cost) {
        self.profile.nodes[node as usize].own.add(cost);
    }

    pub(super) fn own_line(&mut self, node: u32, line: u32, cost: Cost) {
        add_line(&mut self.profile.nodes[node as usize].own_lines, &mut self.line_entries, line, cost);
    }

    pub(super) fn call_line(&mut self, node: u32, line: u32, cost: Cost) {
        add_line(&mut self.profile.nodes[node as usize].call_lines, &mut self.line_entries, line, cost);
    }

    pub(super) fn finish(mut self) -> Profile {
        self.profile.derive_totals();
        self.profile
    }
}

/// Unknown lines are not stored: they are what is missing to the node's cost.
fn add_line(lines: &mut Lines, entries: &mut usize, line: u32, cost: Cost) {
    if line == 0 {
        return;
    }
    match lines.binary_search_by_key(&line, |entry| entry.line) {
        Ok(at) => lines[at].cost.add(cost),
        Err(at) if *entries < MAX_LINES => {
            *entries += 1;
            lines.insert(at, LineCost { line, cost });
        }
        Err(_) => {}
    }
}
