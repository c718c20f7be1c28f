//! Whether the kernel side lost records, and which connections it still follows.

use std::sync::Arc;

use profiler_common::{ConnId, Stat};

use super::{Connections, KernelStats, total};

/// Asked by the reader, to close what was closed unseen.
pub struct Loss {
    stats: Arc<KernelStats>,
    connections: Connections,
}

impl Loss {
    pub fn new(stats: Arc<KernelStats>, connections: Connections) -> Self {
        Self { stats, connections }
    }

    /// Connection records lost since the start.
    pub fn records(&self) -> u64 {
        total(&self.stats.totals(), Stat::BoundaryLostRing)
    }

    /// Whether the kernel side still follows this very connection.
    pub fn is_open(&self, conn: ConnId) -> bool {
        self.connections.is_open(conn)
    }
}
