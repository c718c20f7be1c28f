//! The correlator: connections, threads and the requests between them.
//!
//! ```text
//! Data ──► http::Connection ──► Started ──► a Request opens, its thread works on it
//!                           └─► Finished ─► the Request closes; its thread's tail runs on for a moment
//! Sample ─► its thread's activation ─► that connection's current request ─► attributed, or counted by reason
//! ```

use profiler_common::{ConnId, DIR_IN, Data, flags};
use rustc_hash::{FxHashMap, FxHashSet};

use super::http::{self, Connection, Direction, Exchange, Piece, Protocol};
use super::output::{Counters, Finished, Output, Place, ProcessEvent, RequestKey, Sink};
use super::thread::Thread;
use crate::decode::Event;
use crate::record::{Boundary, Outcome};

/// How long after its end a request's tail is waited for, ns. A server that closes or goes on to its next request
/// ends it sooner.
const TAIL_WAIT: u64 = 250_000_000;
/// How long a chunked response that looks over may be silent before it is over, ns.
const FLUSH_AFTER: u64 = 200_000_000;
/// How long a response of unreadable length may be silent before it is over, ns.
pub(super) const IDLE_AFTER: u64 = 5_000_000_000;
/// Open connections remembered: as many as the kernel side tracks.
pub(super) const CONNECTIONS_MAX: usize = 65_536;
/// Threads remembered: more than the kernel side's map of active ones, since these stay until they end.
pub(super) const THREADS_MAX: usize = 65_536;
/// When there are that many, those that began nothing for so long make room, ns: the end of a thread may be lost.
const THREAD_IDLE: u64 = 60_000_000_000;
/// Between two attempts to make room, ns: each looks at every thread.
const PRUNE_EVERY: u64 = 1_000_000_000;

/// Errors after which a connection carries nothing more.
const ENDED: [i32; 6] =
    [libc::EPIPE, libc::ECONNRESET, libc::ECONNABORTED, libc::ETIMEDOUT, libc::ENOTCONN, libc::EBADF];

#[derive(Debug)]
pub(super) struct Conn {
    pub(super) generation: u64,
    pub(super) machine: Connection,
    pub(super) boundary: Boundary,
    /// The mark that the kernel side made last for this connection, and whether contexts tell who works for it.
    begun: (u64, bool),
    /// Open requests by the machine's number; nearly always one.
    pub(super) requests: Vec<(u64, RequestKey)>,
    /// The request that was finished last.
    pub(super) last: Option<RequestKey>,
    /// The kernel side did not know it when it was last asked; see [`Engine::audit`].
    pub(super) missing: bool,
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) place: Place,
    pub(super) tid: u32,
    pub(super) start: u64,
    pub(super) samples: u64,
    pub(super) lost: u64,
    pub(super) attributed: bool,
    /// Samples after what looks like the end of its response.
    pub(super) tail: u64,
    /// Its thread did something elsewhere meanwhile.
    pub(super) overlapped: bool,
    /// An event loop serves it, and contexts tell what is done for it: what its thread does besides says nothing.
    pub(super) by_context: bool,
    /// Then the kernel side's marks of it, nearly always one.
    pub(super) marks: Vec<u64>,
    /// And whether anything was begun for it in a context of its own. If not, who works for it is not known.
    pub(super) has_contexts: bool,
}

/// A finished request whose tail may go on.
#[derive(Debug)]
pub(super) struct Trailing {
    pub(super) finished: Finished,
    /// Attributed to it.
    pub(super) samples: u64,
    pub(super) marks: Vec<u64>,
}

/// See the module.
#[derive(Default)]
pub struct Engine {
    pub(super) connections: FxHashMap<u32, FxHashMap<u32, Conn>>,
    pub(super) connection_count: usize,
    pub(super) threads: FxHashMap<u32, Thread>,
    /// The threads of each process: most processes that fork or end have none here.
    pub(super) tids: FxHashMap<u32, FxHashSet<u32>>,
    pub(super) open: FxHashMap<RequestKey, Request>,
    /// Requests told by contexts, open or trailing, by process and mark.
    pub(super) marked: FxHashMap<(u32, u64), RequestKey>,
    /// Finished, but their tail may go on.
    pub(super) trailing: FxHashMap<RequestKey, Trailing>,
    pub(super) next_key: RequestKey,
    pub(super) counters: Counters,
    pub(super) pruned: u64,
    /// The mark of the record at hand, if the kernel side counted a request for it and none was announced yet.
    pub(super) beginning: Option<u64>,
    /// Events of a connection's machine, collected before they are acted upon; here to keep its allocation.
    scratch: Vec<Found>,
}

/// A machine's event without what it borrows.
#[derive(Debug)]
enum Found {
    Started { seq: u64, time: u64, tid: u32, activation: u64 },
    Discarded { seq: u64 },
    Activation { seq: u64, activation: u64 },
    Finished(Box<Exchange>),
    Unseen,
    Unowned,
    Verdict(Protocol),
}

impl Engine {
    /// Takes the next event.
    pub fn event(&mut self, event: &Event<'_>, sink: Sink<'_>) {
        match event {
            Event::Sample(sample) => self.sample(sample, sink),
            Event::Data { data, captured } => {
                let begins = data.header.flags & flags::NEW_ACTIVATION != 0;
                self.beginning = begins.then_some(data.activation);
                if !begins && data.header.flags & flags::BY_CONTEXT != 0 {
                    self.has_contexts(data.conn, data.activation);
                }
                self.data(data, captured, sink);
                // Nothing came of it. Should it turn out to be one after all, that counts as pipelined.
                self.counters.requests_discarded += u64::from(self.beginning.take().is_some());
            }
            Event::Accept(header, conn) => {
                self.turns_to(None, header.pid, header.tid, sink);
                // A descriptor that is accepted anew was closed, whether or not that reached us.
                self.close_place((conn.pid, conn.fd), header.time, true, 0, sink);
                self.insert(*conn, Connection::accepted(), header.flags);
                sink(Output::Process(ProcessEvent::Accepted { pid: header.pid }));
            }
            Event::Close(header, conn) => {
                if header.flags & flags::BY_CONTEXT != 0 {
                    self.has_contexts_at_its_end(*conn);
                }
                self.close(*conn, header, sink);
                // A close ends the tail of what its thread did on the connection.
                let thread = self.threads.get(&header.tid);
                let here = thread.filter(|thread| thread.place == Some((conn.pid, conn.fd)));
                if let Some(key) = here.and_then(|thread| thread.tail) {
                    self.release(key, sink);
                }
            }
            Event::Fork { header, child } => {
                // Whatever had this pid before is gone, whether or not that reached us.
                self.end_process(*child, header.time, header.time, 0, sink);
                sink(Output::Process(ProcessEvent::Forked { parent: header.pid, child: *child }));
            }
            Event::Exec(header) => {
                // The old program's requests ended with it.
                self.end_process(header.pid, u64::MAX, header.time, header.tid, sink);
                sink(Output::Process(ProcessEvent::Exec { pid: header.pid }));
            }
            Event::Exit { header, live } => self.exit(header.pid, header.tid, header.time, *live, sink),
            Event::Interleaved { header, activation } => {
                self.interleaved(header.pid, header.tid, *activation, sink)
            }
        }
    }

    /// Called a few times a second with the events' clock: ends what has been silent for long enough.
    pub fn tick(&mut self, now: u64, sink: Sink<'_>) {
        let over: Vec<RequestKey> = self
            .trailing
            .iter()
            .filter(|(_, t)| now.saturating_sub(t.finished.exchange.end) > TAIL_WAIT)
            .map(|(key, _)| *key)
            .collect();
        for key in over {
            self.release(key, sink);
        }
        let places: Vec<Place> = self.open.values().map(|request| request.place).collect();
        for place in places {
            let Some(conn) = self.conn(place) else { continue };
            let silent = now.saturating_sub(conn.machine.last_activity());
            if silent > IDLE_AFTER {
                self.drive(place, 0, sink, |machine, events| machine.idle(events));
            } else if silent > FLUSH_AFTER {
                self.drive(place, 0, sink, |machine, events| machine.flush(events));
            }
        }
    }

    /// The process is gone, as the daemon found out by itself. What is not older than `before` belongs to the process
    /// that has its pid now.
    pub fn process_gone(&mut self, pid: u32, before: u64, now: u64, sink: Sink<'_>) {
        self.end_process(pid, before, now, 0, sink);
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Those that were not yet handed on, so that `begun` is the sum of what became of them at any time.
    pub fn open_requests(&self) -> usize {
        self.open.len() + self.trailing.len()
    }

    pub fn open_connections(&self) -> usize {
        self.connection_count
    }

    pub(super) fn conn(&mut self, place: Place) -> Option<&mut Conn> {
        self.connections.get_mut(&place.0)?.get_mut(&place.1)
    }

    fn insert(&mut self, id: ConnId, machine: Connection, bits: u16) {
        if self.connection_count >= CONNECTIONS_MAX {
            self.counters.refused += 1;
            return;
        }
        let boundary = if bits & flags::BY_TLS != 0 {
            Boundary::Tls
        } else if bits & flags::BY_SYSCALL != 0 {
            Boundary::Syscall
        } else {
            Boundary::Uprobe
        };
        let generation = id.generation;
        let conn = Conn {
            generation,
            machine,
            boundary,
            begun: (0, false),
            requests: Vec::new(),
            last: None,
            missing: false,
        };
        if self.connections.entry(id.pid).or_default().insert(id.fd, conn).is_none() {
            self.connection_count += 1;
        }
    }

    fn data(&mut self, data: &Data, captured: &[u8], sink: Sink<'_>) {
        let place = (data.conn.pid, data.conn.fd);
        match self.conn(place).map(|conn| conn.generation) {
            Some(generation) if generation == data.conn.generation => {}
            // A call on the descriptor's former connection that returns late.
            Some(generation) if generation > data.conn.generation => return,
            known => {
                if known.is_some() {
                    // The descriptor was closed and used again, and neither reached us.
                    self.close_place(place, data.header.time, true, 0, sink);
                }
                let joined = data.header.flags & flags::UNSEEN_ACCEPT != 0;
                let machine = if joined { Connection::joined() } else { Connection::accepted() };
                self.insert(data.conn, machine, data.header.flags);
            }
        }
        let header = &data.header;
        if header.flags & flags::NEW_ACTIVATION != 0
            && let Some(conn) = self.conn(place)
        {
            conn.begun = (data.activation, header.flags & flags::BY_CONTEXT != 0);
        }
        if data.samples_lost > 0 {
            self.samples_lost(place, header.tid, data);
        }
        self.turns_to(Some(place), place.0, header.tid, sink);
        if data.errno != 0 {
            // Other errors say something about the call: sendfile from what is no file, a bad address.
            if ENDED.contains(&(data.errno as i32)) {
                let time = header.time;
                self.drive(place, header.tid, sink, |machine, events| machine.reset(time, events));
            }
            return;
        }
        if data.advance == 0 {
            return; // the client will send no more; the server may still answer
        }
        if data.direction != DIR_IN {
            self.answers(place, header.tid, header.lost);
        }
        let piece = Piece {
            time: header.time,
            handed: match data.entered {
                0 => header.time,
                entered => entered.min(header.time),
            },
            tid: header.tid,
            activation: data.activation,
            begins: header.flags & flags::NEW_ACTIVATION != 0,
            direction: if data.direction == DIR_IN { Direction::In } else { Direction::Out },
            advance: data.advance,
            captured,
            tail: data.tail,
            tail_len: data.tail_len as u8,
            lost: header.lost,
            blind: header.flags & flags::PIPELINE_OVERFLOW != 0,
        };
        self.drive(place, header.tid, sink, |machine, events| machine.piece(&piece, events));
    }

    /// Lets a connection's machine work, and acts on what it says. `actor`: the thread that made it, 0 = time.
    pub(super) fn drive(
        &mut self,
        place: Place,
        actor: u32,
        sink: Sink<'_>,
        work: impl FnOnce(&mut Connection, http::Sink<'_>),
    ) {
        let mut found = std::mem::take(&mut self.scratch);
        if let Some(conn) = self.conn(place) {
            work(&mut conn.machine, &mut |event| {
                found.push(match event {
                    http::Event::Started { seq, time, tid, activation } => {
                        Found::Started { seq, time, tid, activation }
                    }
                    http::Event::Discarded { seq } => Found::Discarded { seq },
                    http::Event::Activation { seq, activation } => Found::Activation { seq, activation },
                    http::Event::Finished(exchange) => Found::Finished(Box::new(exchange)),
                    http::Event::Unseen => Found::Unseen,
                    http::Event::Verdict(protocol) => Found::Verdict(protocol),
                    http::Event::Unowned => Found::Unowned,
                });
            });
        }
        for event in found.drain(..) {
            match event {
                Found::Started { seq, time, tid, activation } => {
                    self.started(place, seq, time, tid, activation, sink);
                }
                Found::Activation { seq, activation } => {
                    if let Some(key) = self.key_of(place, seq) {
                        let request = self.open.get(&key);
                        let tid = request.map_or(0, |request| request.tid);
                        if request.is_some_and(|request| request.by_context) {
                            self.mark(key, place.0, activation, sink);
                        } else if tid != actor {
                            self.revoke(key, sink); // another thread reads on: it was handed over
                        } else if let Some(thread) = self.threads.get_mut(&tid) {
                            (thread.activation, thread.place) = (activation, Some(place));
                        }
                    }
                }
                Found::Discarded { seq } => {
                    if let Some(key) = self.take_key(place, seq) {
                        self.discard(key, sink);
                    }
                }
                Found::Finished(exchange) => self.finished(place, *exchange, actor, sink),
                Found::Unseen => {
                    self.counters.requests_unseen += 1;
                    self.revoke_all(place, sink);
                }
                Found::Unowned => self.unowned(place, sink),
                Found::Verdict(protocol) => {
                    let time = self.conn(place).map_or(0, |conn| conn.machine.last_activity());
                    sink(Output::Protocol { pid: place.0, protocol, time });
                }
            }
        }
        self.scratch = found;
    }

    fn key_of(&mut self, place: Place, seq: u64) -> Option<RequestKey> {
        self.conn(place)?.requests.iter().find(|(s, _)| *s == seq).map(|(_, key)| *key)
    }

    fn take_key(&mut self, place: Place, seq: u64) -> Option<RequestKey> {
        let requests = &mut self.conn(place)?.requests;
        let at = requests.iter().position(|(s, _)| *s == seq)?;
        Some(requests.swap_remove(at).1)
    }

    pub(super) fn discard(&mut self, key: RequestKey, sink: Sink<'_>) {
        if let Some(request) = self.open.remove(&key) {
            self.unmark(request.place.0, &request.marks);
            if let Some(thread) = self.threads.get_mut(&request.tid) {
                thread.forget(key);
                if thread.open.is_empty() {
                    thread.activation = 0; // what the mark stood for was nothing
                }
            }
            self.counters.requests_discarded += 1;
            self.counters.samples_attributed -= request.samples;
            self.counters.samples_revoked += request.samples;
            sink(Output::Discard { key });
        }
    }

    fn started(&mut self, place: Place, seq: u64, time: u64, tid: u32, activation: u64, sink: Sink<'_>) {
        self.make_room(tid, time);
        // A thread of another process had this id, and its end did not reach us.
        if self.threads.get(&tid).is_some_and(|thread| thread.pid != place.0) {
            self.forget_thread(tid, sink);
        }
        // The tail of what this thread did before is over.
        if let Some(key) = self.threads.get_mut(&tid).and_then(|thread| thread.tail.take()) {
            self.release(key, sink);
        }
        self.next_key += 1;
        let key = self.next_key;
        let shares_mark = self.beginning.take_if(|begun| *begun == activation).is_none();
        self.counters.requests_pipelined += u64::from(shares_mark);
        let mut attributed = true;
        if self.conn(place).is_some_and(|conn| !conn.requests.is_empty()) {
            // The one before is not answered: the server may work on either, and write both answers at once.
            self.revoke_all(place, sink);
            attributed = false;
        }
        if let Some(conn) = self.conn(place) {
            conn.requests.push((seq, key));
        }
        let by_context = self.conn(place).is_some_and(|conn| conn.begun == (activation, true));
        if by_context {
            self.marked.insert((place.0, activation), key);
        } else if self.threads.len() < THREADS_MAX || self.threads.contains_key(&tid) {
            let thread = self.threads.entry(tid).or_default();
            thread.pid = place.0;
            attributed &= !thread.interleaves && thread.open.is_empty();
            thread.begin(activation, place, key, time);
            self.tids.entry(place.0).or_default().insert(tid);
        } else {
            self.counters.refused += 1;
            attributed = false;
        }
        let marks = if by_context { vec![activation] } else { Vec::new() };
        let request = Request {
            place,
            tid,
            start: time,
            samples: 0,
            lost: 0,
            attributed,
            tail: 0,
            overlapped: false,
            by_context,
            marks,
            has_contexts: false,
        };
        self.open.insert(key, request);
    }

    /// Forgets threads that did nothing for long, when there are too many.
    fn make_room(&mut self, tid: u32, time: u64) {
        let full = self.threads.len() >= THREADS_MAX && !self.threads.contains_key(&tid);
        if full && time.saturating_sub(self.pruned) > PRUNE_EVERY {
            self.pruned = time;
            let tids = &mut self.tids;
            self.threads.retain(|tid, thread| {
                let stays = !thread.open.is_empty()
                    || thread.tail.is_some()
                    || time.saturating_sub(thread.began) < THREAD_IDLE;
                if !stays {
                    forget_tid(tids, thread.pid, *tid);
                }
                stays
            });
        }
    }

    pub(super) fn forget_thread(&mut self, tid: u32, sink: Sink<'_>) {
        let Some(thread) = self.threads.remove(&tid) else { return };
        forget_tid(&mut self.tids, thread.pid, tid);
        if let Some(key) = thread.tail {
            self.release(key, sink);
        }
    }

    /// `actor`: the thread that ended it, 0 = nobody that is known.
    fn finished(&mut self, place: Place, exchange: Exchange, actor: u32, sink: Sink<'_>) {
        let Some(key) = self.take_key(place, exchange.seq) else { return };
        // Another thread answered, or ended it unanswered, so the one that received did not do the work. Or where its
        // work ended is not known: its thread may have gone on to something else under the same activation.
        // That profiling stopped says nothing against what was seen until then.
        let stopped = exchange.note == Some(http::note::STOPPED);
        let unanswered = exchange.first_out.is_none() && actor != exchange.tid && !stopped;
        let request = self.open.get(&key);
        let by_context = request.is_some_and(|request| request.by_context);
        let untold = request.is_some_and(|request| request.by_context && !request.has_contexts);
        let passed_on = !by_context && (exchange.handoff || unanswered);
        if passed_on || untold || (exchange.outcome == Outcome::Incomplete && !stopped) {
            self.revoke(key, sink);
        }
        let Some(request) = self.open.remove(&key) else { return };
        let boundary = self.conn(place).map_or(Boundary::Uprobe, |conn| conn.boundary);
        let finished = Finished {
            key,
            pid: place.0,
            boundary,
            attributed: request.attributed,
            by_context,
            tail_samples: request.tail,
            lost: request.lost + u64::from(exchange.lost),
            exchange,
        };
        let Request { samples, marks, .. } = request;
        if by_context {
            if request.attributed && finished.exchange.outcome != Outcome::Exit {
                self.trailing.insert(key, Trailing { finished, samples, marks });
                if let Some(conn) = self.conn(place) {
                    conn.last = Some(key);
                }
                return;
            }
            self.unmark(place.0, &marks);
        } else if let Some(thread) = self.threads.get_mut(&request.tid) {
            thread.forget(key);
            let exchange = &finished.exchange;
            // It went on after another had begun, and nothing was lost: the thread does several things at a time.
            if request.overlapped && !passed_on && exchange.lost == 0 {
                thread.interleaves = true;
            }
            let busy = request.attributed && thread.open.is_empty() && exchange.outcome != Outcome::Exit;
            if busy {
                if let Some(old) = thread.tail.replace(key) {
                    self.release(old, sink);
                }
                self.trailing.insert(key, Trailing { finished, samples, marks });
                if let Some(conn) = self.conn(place) {
                    conn.last = Some(key);
                }
                return;
            }
        }
        sink(Output::Finished(Box::new(finished)));
    }

    /// A finished request's tail is over.
    pub(super) fn release(&mut self, key: RequestKey, sink: Sink<'_>) {
        if let Some(Trailing { finished, marks, .. }) = self.trailing.remove(&key) {
            self.unmark(finished.pid, &marks);
            if let Some(thread) = self.threads.get_mut(&finished.exchange.tid)
                && thread.tail == Some(key)
            {
                thread.tail = None;
            }
            sink(Output::Finished(Box::new(finished)));
        }
    }
}

fn forget_tid(tids: &mut FxHashMap<u32, FxHashSet<u32>>, pid: u32, tid: u32) {
    if let Some(of) = tids.get_mut(&pid) {
        of.remove(&tid);
        if of.is_empty() {
            tids.remove(&pid);
        }
    }
}
