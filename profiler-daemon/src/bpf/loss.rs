//! Whether the kernel side lost records, and which connections it still follows.

use std::sync::Arc;

use profiler_common::{ConnId, Stat, connection_key};

use super::{ConnectionValue, HashOf, KernelStats, total};

/// Asked by the reader, to close what was closed unseen.
pub struct Loss {
    stats: Arc<KernelStats>,
    connections: HashOf<u64, ConnectionValue>,
}

impl Loss {
    pub fn new(stats: Arc<KernelStats>, connections: HashOf<u64, ConnectionValue>) -> Self {
        Self { stats, connections }
    }

    /// Connection records lost since the start.
    pub fn records(&self) -> u64 {
        total(&self.stats.totals(), Stat::BoundaryLostRing)
    }

    /// Whether the kernel side still follows this very connection.
    pub fn is_open(&self, conn: ConnId) -> bool {
        self.connections
            .get(&connection_key(conn.pid, conn.fd), 0)
            .is_ok_and(|value| value.0.generation == conn.generation)
    }
}
