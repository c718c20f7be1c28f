//! Call trees: what a request's samples add up to.
//!
//! In: resolved stacks with weights. Out: a [`Profile`], which can be stored, merged and written in any format.

pub mod format;
mod frame;
mod tree;

pub use frame::{Frame, FrameKind};
pub use tree::{Builder, DecodeError, Profile};
