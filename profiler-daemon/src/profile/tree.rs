//! (stub; see the module's documentation)
use super::Frame;
use std::sync::Arc;

/// Collects stacks into a profile. One per open request.
#[derive(Default)]
pub struct Builder {}

impl Builder {
    /// Adds one sample: `stack` is root first, `weight` in ns of CPU time.
    pub fn add(&mut self, stack: &[Arc<Frame>], weight: u64) {
        let _ = (stack, weight);
    }
    /// Samples added so far.
    pub fn samples(&self) -> u64 {
        0
    }
    /// `duration`: the request's, ns; what the samples do not cover is shown as `[unsampled]` in the wall view.
    pub fn finish(self, duration: u64) -> Profile {
        let _ = duration;
        Profile {}
    }
}

/// A call tree of one request, or of many merged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {}

/// Stored bytes that are not a profile.
#[derive(Debug, thiserror::Error)]
#[error("not a stored profile: {0}")]
pub struct DecodeError(pub String);

impl Profile {
    /// Uncompressed binary form with a version byte first; the store compresses it.
    pub fn encode(&self) -> Vec<u8> {
        Vec::new()
    }
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let _ = bytes;
        Ok(Profile {})
    }
    /// Adds another's samples, durations and request count.
    pub fn merge(&mut self, other: &Profile) {
        let _ = other;
    }
    /// Number of samples.
    pub fn samples(&self) -> u64 {
        0
    }
}
