//! One copy of each frame and of each name.
//!
//! Thousands of stacks repeat a few hundred frames, and forked workers resolve the same ones again. Equal frames
//! are one allocation, which also lets those who count them compare pointers.

use std::sync::Arc;

use rustc_hash::FxHashSet;

use super::text::clean;
use crate::profile::{Frame, FrameKind};

/// Bytes of frames and names kept for their own sake, about; beyond, those that nobody else holds are dropped. What others
/// hold is bounded where they hold it.
const BYTES_MAX: usize = 32 << 20;
/// What an entry costs beside its text: the allocation, the pointer and its share of the table.
const FRAME_COST: usize = size_of::<Frame>() + 40;
const NAME_COST: usize = 56;

#[derive(Debug, Default)]
pub(super) struct Interner {
    frames: FxHashSet<Arc<Frame>>,
    names: FxHashSet<Arc<str>>,
    bytes: usize,
    /// Grows with what others hold, so that a sweep is paid for by the insertions before it.
    limit: usize,
}

impl Interner {
    /// A name, cleaned.
    pub(super) fn name(&mut self, name: &str) -> Arc<str> {
        let name = clean(name);
        if let Some(known) = self.names.get(&*name) {
            return known.clone();
        }
        let name: Arc<str> = name.into();
        self.bytes += NAME_COST + name.len();
        self.names.insert(name.clone());
        name
    }

    pub(super) fn frame(&mut self, frame: Frame) -> Arc<Frame> {
        if let Some(known) = self.frames.get(&frame) {
            return known.clone();
        }
        if self.bytes >= self.limit.max(BYTES_MAX) {
            self.frames.retain(|frame| Arc::strong_count(frame) > 1);
            self.names.retain(|name| Arc::strong_count(name) > 1);
            let names: usize = self.names.iter().map(|name| NAME_COST + name.len()).sum();
            self.bytes = names + self.frames.len() * FRAME_COST;
            self.limit = 2 * self.bytes;
        }
        self.bytes += FRAME_COST;
        let frame = Arc::new(frame);
        self.frames.insert(frame.clone());
        frame
    }

    /// A frame of which only a name is known.
    pub(super) fn bare(&mut self, kind: FrameKind, name: &str, file: &str) -> Arc<Frame> {
        let (name, file) = (self.name(name), self.name(file));
        self.frame(Frame { name, file, line: 0, first_line: 0, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_frames_are_one() {
        let mut interner = Interner::default();
        let a = interner.bare(FrameKind::Native, "f\n", "x.c");
        let b = interner.bare(FrameKind::Native, "f\u{fffd}", "x.c");
        let c = interner.bare(FrameKind::Kernel, "f\n", "x.c");
        assert!(Arc::ptr_eq(&a, &b) && !Arc::ptr_eq(&a, &c));
        assert!(Arc::ptr_eq(&a.name, &c.name));
    }

    #[test]
    fn what_nobody_holds_is_dropped() {
        let mut interner = Interner::default();
        let held = interner.bare(FrameKind::Native, "held", "");
        // Each makes a frame and a name, of which the longest take most.
        let long = "x".repeat(400);
        for n in 0..2 * BYTES_MAX / 400 {
            interner.bare(FrameKind::Native, &format!("{n}{long}"), "");
            assert!(interner.bytes <= BYTES_MAX + 1024);
        }
        let names: usize = interner.names.iter().map(|name| name.len()).sum();
        assert!(names <= interner.bytes);
        assert!(Arc::ptr_eq(&held, &interner.bare(FrameKind::Native, "held", "")));
    }
}
