//! Call trees: what a request's samples add up to.
//!
//! In: resolved stacks with weights. Out: a [`Profile`], which can be stored, merged and written in any format.

mod build;
mod codec;
pub mod format;
mod frame;
mod growth;
mod merge;
#[cfg(test)]
pub(crate) mod testing;
mod tree;

pub use build::Builder;
pub use codec::DecodeError;
pub use frame::{Frame, FrameKind};
pub use merge::Merger;
pub(crate) use tree::MAX_DEPTH;
pub use tree::{Cost, Function, LineCost, LineTotals, NodeRef, Profile, TRUNCATED, UNSAMPLED, Walk};
