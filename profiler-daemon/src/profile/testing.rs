//! Frames and stacks for the tests of this module.

use std::sync::Arc;

use super::{Frame, FrameKind};

pub fn frame(kind: FrameKind, name: &str, file: &str, line: u32, first_line: u32) -> Frame {
    Frame { name: Arc::from(name), file: Arc::from(file), line, first_line, kind }
}

/// A Python function of the application, which begins on line 1.
pub fn py(name: &str, line: u32) -> Frame {
    frame(FrameKind::Python, name, "/srv/shop/views.py", line, 1)
}

pub fn stack(frames: &[Frame]) -> Vec<Arc<Frame>> {
    frames.iter().cloned().map(Arc::new).collect()
}
