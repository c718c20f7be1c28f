//! Processes that turn out not to be selected.
//!
//! The kernel side follows whoever accepts a connection until the manager has looked at it. What it reported of such a
//! process is forgotten here, since no more will come: neither the ends of its requests nor of its connections.

use profiler_common::ConnId;

use super::engine::Engine;
use super::output::{Output, Sink};

impl Engine {
    /// This process is none of ours: its open requests are discarded, its connections forgotten.
    pub fn reject(&mut self, pid: u32, sink: Sink<'_>) {
        for (fd, conn) in self.connections.remove(&pid).unwrap_or_default() {
            self.connection_count -= 1;
            for (_, key) in conn.requests {
                self.discard(key, sink);
            }
            sink(Output::Left(ConnId { generation: conn.generation, pid, fd }));
        }
        self.forget_threads(pid, u64::MAX, sink);
    }
}
