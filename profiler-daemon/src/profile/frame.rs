//! A resolved frame: where a thread was, in words a person can read.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// What kind of code a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrameKind {
    Python,
    Native,
    Kernel,
    Wait,
}

/// A resolved frame.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Python: the qualified name. Native and kernel: the demangled symbol, or `module+0x…`.
    pub name: Arc<str>,
    /// Source file, or the module (`libz.so.1.2.13`) where there is none; empty = unknown.
    pub file: Arc<str>,
    /// The line being executed, or of the call; 0 = unknown.
    pub line: u32,
    /// The function's first line; 0 = unknown. Part of the identity of a function; `line` is not.
    pub first_line: u32,
    pub kind: FrameKind,
}
