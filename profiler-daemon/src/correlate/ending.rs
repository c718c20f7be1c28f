//! Ends: of connections and processes, told by a record or not, and of profiling itself.

use profiler_common::{ConnId, Header};
use rustc_hash::FxHashMap;

use super::engine::{Engine, IDLE_AFTER};
use super::http::{Direction, Piece};
use super::output::{Output, Place, ProcessEvent, RequestKey, Sink};

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

    pub(super) fn close(&mut self, id: ConnId, header: &Header, sink: Sink<'_>) {
        let place = (id.pid, id.fd);
        match self.conn(place).map(|conn| conn.generation) {
            // Its own record came late, or it was never known.
            Some(generation) if generation > id.generation => {}
            None => {}
            Some(generation) => {
                // Another use of the descriptor, or what came before the close did not all reach us.
                let gap = generation != id.generation || header.lost > 0;
                self.close_place(place, header.time, gap, header.tid, sink);
            }
        }
    }

    /// `gap`: records in front of the close are missing. `actor`: the thread that closes, 0 = nobody that is known.
    pub(super) fn close_place(&mut self, place: Place, time: u64, gap: bool, actor: u32, sink: Sink<'_>) {
        if gap {
            let missing = Piece {
                time,
                handed: time,
                tid: 0,
                activation: 0,
                begins: false,
                direction: Direction::Out,
                advance: 0,
                captured: &[],
                tail: [0; 8],
                tail_len: 0,
                lost: 1,
                blind: false,
            };
            self.drive(place, 0, sink, |machine, events| machine.piece(&missing, events));
        }
        self.drive(place, actor, sink, |machine, events| machine.close(time, events));
        let fds = self.connections.get_mut(&place.0);
        if let Some(conn) = fds.and_then(|fds| fds.remove(&place.1)) {
            self.connection_count -= 1;
            // The machine has ended them all; should one be left, it is not to stay open for ever.
            for (_, key) in conn.requests {
                self.discard(key, sink);
            }
        }
    }

    pub(super) fn exit(&mut self, pid: u32, tid: u32, time: u64, live: u32, sink: Sink<'_>) {
        self.forget_thread(tid, sink);
        match live {
            0 => {
                self.end_process(pid, u64::MAX, time, tid, sink);
                sink(Output::Process(ProcessEvent::Exited { pid }));
            }
            profiler_common::LIVE_UNKNOWN => sink(Output::Process(ProcessEvent::MayHaveExited { pid })),
            _ => {}
        }
    }

    /// Ends what is older than `before`. `actor`: the thread that ended it all, 0 = nobody that is known.
    pub(super) fn end_process(&mut self, pid: u32, before: u64, time: u64, actor: u32, sink: Sink<'_>) {
        let fds: Vec<u32> = self.connections.get(&pid).map_or_else(Vec::new, |fds| {
            fds.iter().filter(|(_, conn)| conn.generation < before).map(|(fd, _)| *fd).collect()
        });
        for fd in fds {
            self.drive((pid, fd), actor, sink, |machine, events| machine.exit(time, events));
            let left = self.connections.get_mut(&pid).and_then(|fds| fds.remove(&fd));
            let Some(conn) = left else { continue };
            self.connection_count -= 1;
            for (_, key) in conn.requests {
                self.discard(key, sink);
            }
            sink(Output::Left(ConnId { generation: conn.generation, pid, fd }));
        }
        if self.connections.get(&pid).is_some_and(FxHashMap::is_empty) {
            self.connections.remove(&pid);
        }
        self.forget_threads(pid, before, sink);
    }

    /// Forgets the threads of a process that began nothing since `before`.
    pub(super) fn forget_threads(&mut self, pid: u32, before: u64, sink: Sink<'_>) {
        let threads: Vec<u32> = self.tids.get(&pid).map_or_else(Vec::new, |tids| {
            let old = |tid: &&u32| self.threads.get(tid).is_some_and(|thread| thread.began < before);
            tids.iter().filter(old).copied().collect()
        });
        for tid in threads {
            self.forget_thread(tid, sink);
        }
    }
}
