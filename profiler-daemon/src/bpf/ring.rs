//! The ring buffer's reading end.

use aya::maps::{Map, MapData, MapError, RingBuf};

use super::LoadError;

/// Reads records; one thread owns it.
pub struct Ring(RingBuf<MapData>);

impl Ring {
    pub(super) fn new(map: Map) -> Result<Self, LoadError> {
        RingBuf::try_from(map)
            .map(Self)
            .map_err(|e: MapError| LoadError::Map { name: "EVENTS", reason: e.to_string() })
    }

    /// Hands over at most `limit` records, and returns how many there were. Never waits.
    pub fn drain(&mut self, limit: usize, mut each: impl FnMut(&[u8])) -> usize {
        let mut n = 0;
        while n < limit {
            let Some(item) = self.0.next() else { break };
            each(&item);
            n += 1;
        }
        n
    }
}
