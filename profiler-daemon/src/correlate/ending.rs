//! Ends that no record tells: connections that are gone without a word, and profiling itself.

use profiler_common::ConnId;

use super::engine::{Engine, IDLE_AFTER};
use super::output::{Output, Place, RequestKey, Sink};

/// Between two audits, ns: longer than any record waits in the ring.
pub const AUDIT_EVERY: u64 = 6_000_000_000;

impl Engine {
    /// Called now and then, at least [`AUDIT_EVERY`] apart: closes the connections whose close did not reach us, because
    /// its record was lost, or because what closed them says nothing (`dup2`, `close_range`). `is_open` knows better. A
    /// connection has to be missing twice, because what was written just before the question may still be on its way.
    pub fn audit(&mut self, now: u64, is_open: &mut dyn FnMut(ConnId) -> bool, sink: Sink<'_>) {
        let mut gone = Vec::new();
        for (&pid, fds) in &mut self.connections {
            for (&fd, conn) in fds {
                let last = conn.machine.last_activity();
                let missing = now.saturating_sub(last) > IDLE_AFTER
                    && !is_open(ConnId { generation: conn.generation, pid, fd });
                if missing && conn.missing {
                    gone.push((ConnId { generation: conn.generation, pid, fd }, last));
                }
                conn.missing = missing;
            }
        }
        for (id, last) in gone {
            self.close_place((id.pid, id.fd), last, true, 0, sink);
            sink(Output::Left(id));
        }
    }

    /// The end of a recording or of the daemon: what looks over is, what is open is recorded as far as it went.
    /// `whole`: no record was lost. Else a request may be open because its end was lost, which the next record of its
    /// connection would have told, and what its thread did since is not its own.
    pub fn finish(&mut self, now: u64, whole: bool, sink: Sink<'_>) {
        let open: Vec<(RequestKey, Place)> =
            self.open.iter().map(|(key, request)| (*key, request.place)).collect();
        for (_, place) in &open {
            self.drive(*place, 0, sink, |machine, events| machine.flush(events));
        }
        // All of a connection's before the first of them ends.
        for (key, _) in open.iter().filter(|_| !whole) {
            self.revoke(*key, sink);
        }
        for (_, place) in open {
            self.drive(place, 0, sink, |machine, events| machine.stop(now, events));
        }
        let trailing: Vec<RequestKey> = self.trailing.keys().copied().collect();
        for key in trailing {
            self.release(key, sink);
        }
    }
}
