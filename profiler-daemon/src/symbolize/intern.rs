//! One copy of each frame and of each name.
//!
//! Thousands of stacks repeat a few hundred frames, and forked workers resolve the same ones again. Equal frames
//! are one allocation, which also lets those who count them compare pointers.

use std::sync::Arc;

use rustc_hash::FxHashSet;

use super::text::clean;
use crate::profile::{Frame, FrameKind};

/// Frames kept for their own sake; beyond, those that nobody else holds are dropped. About 30 MiB.
const FRAMES_MAX: usize = 200_000;

#[derive(Debug, Default)]
pub(super) struct Interner {
    frames: FxHashSet<Arc<Frame>>,
    names: FxHashSet<Arc<str>>,
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
        self.names.insert(name.clone());
        name
    }

    pub(super) fn frame(&mut self, frame: Frame) -> Arc<Frame> {
        if let Some(known) = self.frames.get(&frame) {
            return known.clone();
        }
        if self.frames.len() + self.names.len() >= self.limit.max(FRAMES_MAX) {
            self.frames.retain(|frame| Arc::strong_count(frame) > 1);
            self.names.retain(|name| Arc::strong_count(name) > 1);
            self.limit = 2 * (self.frames.len() + self.names.len());
        }
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
        // Each makes a frame and a name.
        for n in 0..FRAMES_MAX {
            interner.bare(FrameKind::Native, &n.to_string(), "");
            assert!(interner.frames.len() + interner.names.len() <= FRAMES_MAX + 2);
        }
        assert!(Arc::ptr_eq(&held, &interner.bare(FrameKind::Native, "held", "")));
    }
}
