//! The first stage: records out of the ring, requests out of records.
//!
//! In: raw records. Out: batches of messages for the finisher, process events for the manager. One thread; it polls
//! the ring, because being woken for each record costs more than looking a hundred times a second.

use std::time::Duration;

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, TryRecvError, TrySendError};
use profiler_common::{ConnId, RawFrame, flags};

use super::Stats;
use crate::bpf::{Connections, Loss, Ring, sys};
use crate::correlate::{AUDIT_EVERY, Engine, Finished, Output, ProcessEvent, RequestKey};
use crate::decode;
use crate::health::Pulse;
use crate::process::identity::{self, ProcessKey};
use crate::process::targets::Targets;
use crate::process::{manager, sockets};
use crate::replay::Recorder;
use crate::unwind::quality::Counted;
use crate::unwind::{Quality, Unwinding};

/// How long to wait when the ring is empty: what a request's record is late by, at most.
const POLL: Duration = Duration::from_millis(10);
/// Records handled in one go, which is a batch: the largest are samples of 8.8 KB, so a batch is at most 1.7 MB, and all
/// batches in flight are at most 29 MiB (see `BATCHES`).
const DRAIN: usize = 192;
/// How often a reader that waits for the finisher says that it lives.
const SEND_BEAT: Duration = Duration::from_secs(1);
/// Between two looks at what was silent, ns.
pub const TICK: u64 = 100_000_000;

/// Orders on their way to the reader. They are few, mostly processes that were found dead or are not selected; who sends more waits for
/// the reader, which never waits for a sender.
pub const CONTROLS: usize = 256;

/// Looks after the last loss: one at which a connection may not be silent for long enough, two to find it missing.
const AUDITS: u32 = 3;
/// Between two looks without a loss, ns: each asks about every connection that is silent, which takes two system calls.
const LEISURE: u64 = 60_000_000_000;

/// To the finisher.
#[derive(Debug)]
pub enum Message {
    Sample(Box<RawSample>),
    /// Forget the samples of this request, it stays.
    Revoke(RequestKey),
    /// Forget this request.
    Discard(RequestKey),
    Finished(Box<Finished>),
    /// This process is a target: it may be gone before its first sample is resolved, so it is asked now.
    Target(ProcessKey),
    /// In the order of the ring, like the two below: the child may run another program or be gone a moment later.
    Forked {
        parent: u32,
        child: u32,
    },
    Exec(u32),
    Exited(u32),
}

/// A sample's stack, not yet resolved.
#[derive(Debug)]
pub struct RawSample {
    pub key: RequestKey,
    pub pid: u32,
    pub weight: u64,
    /// Bits of [`profiler_common::flags`]: what the stack lacks.
    pub flags: u16,
    pub user: Vec<RawFrame>,
    pub kernel: Vec<u64>,
}

/// To the reader.
pub enum Control {
    ProcessGone(u32),
    /// Not selected, as it turned out.
    ProcessRejected(u32),
    /// Takes what is in the ring, then ends.
    Stop,
}

/// Which output goes where.
struct Route<'a> {
    batch: &'a mut Vec<Message>,
    manager: Option<&'a Sender<manager::Message>>,
    targets: &'a Targets,
    connections: Option<&'a Connections>,
    untold: &'a mut u64,
}

/// Borrows all but the engine.
macro_rules! route {
    ($reader:ident) => {
        Route {
            batch: &mut $reader.batch,
            manager: $reader.manager.as_ref(),
            targets: &$reader.targets,
            connections: $reader.connections.as_ref(),
            untold: &mut $reader.untold,
        }
    };
}

/// See the module.
pub struct Reader {
    pub engine: Engine,
    pub out: Sender<Vec<Message>>,
    pub manager: Option<Sender<manager::Message>>,
    pub targets: Targets,
    pub stats: Stats,
    pub recorder: Option<Recorder>,
    pub loss: Option<Loss>,
    /// The kernel side's, for what it cannot know to be gone.
    pub connections: Option<Connections>,
    pub undecodable: u64,
    pub batch: Vec<Message>,
    pub pulse: Option<Pulse>,
    /// Told of samples in code that is in no mapping known.
    pub unwinding: Option<Unwinding>,
    pub quality: Quality,
    counted: Counted,
    /// Processes to be forgotten once what the ring holds of them is read.
    rejected: Vec<u32>,
    audit: Audit,
    /// Messages that the manager's queue had no room for, and how many of them it has made up for.
    untold: u64,
    made_up: u64,
}

/// When to look for connections whose close was not seen.
#[derive(Default)]
struct Audit {
    next: u64,
    lost: u64,
    left: u32,
    leisurely: u64,
}

impl Reader {
    pub fn new(
        out: Sender<Vec<Message>>,
        manager: Option<Sender<manager::Message>>,
        targets: Targets,
        stats: Stats,
    ) -> Self {
        Self {
            engine: Engine::default(),
            out,
            manager,
            targets,
            stats,
            recorder: None,
            loss: None,
            audit: Audit::default(),
            connections: None,
            undecodable: 0,
            batch: Vec::new(),
            rejected: Vec::new(),
            untold: 0,
            made_up: 0,
            pulse: None,
            unwinding: None,
            quality: Quality::default(),
            counted: Counted::default(),
        }
    }

    /// Reads until told to stop.
    pub fn run(mut self, mut ring: Ring, control: &Receiver<Control>) {
        let mut next_tick = sys::monotonic_ns() + TICK;
        let mut stopping = false;
        loop {
            self.beat();
            // At most a queue full of them, so that the ring gets its turn.
            for _ in 0..CONTROLS {
                match control.try_recv() {
                    Ok(Control::ProcessGone(pid)) => self.process_gone(pid),
                    Ok(Control::ProcessRejected(pid)) => self.rejected.push(pid),
                    Ok(Control::Stop) | Err(TryRecvError::Disconnected) => stopping = true,
                    Err(TryRecvError::Empty) => break,
                }
            }
            let drained = ring.drain(DRAIN, |bytes| self.record(bytes));
            if drained < DRAIN {
                self.reject();
            }
            let now = sys::monotonic_ns();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick(now);
                self.audit(now);
            }
            if !self.flush() || (stopping && drained == 0) {
                break;
            }
            if drained < DRAIN {
                std::thread::sleep(POLL);
            }
        }
        self.end(sys::monotonic_ns());
    }

    /// Handles one raw record.
    pub fn record(&mut self, bytes: &[u8]) {
        let event = match decode::decode(bytes) {
            Ok(event) => event,
            Err(_) => {
                self.undecodable += 1;
                return;
            }
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.record(bytes);
        }
        match &event {
            decode::Event::Sample(event) => {
                self.counted.count(&event.sample);
                if let Some(unwinding) = &self.unwinding
                    && event.sample.header.flags & flags::UNKNOWN_CODE != 0
                {
                    unwinding.unknown(event.sample.header.pid);
                }
            }
            decode::Event::Exec(header) => self.counted.began(header.pid),
            decode::Event::Fork { child, .. } => self.counted.began(*child),
            decode::Event::Exit { header, live: 0 } => self.counted.ended(header.pid),
            _ => {}
        }
        let mut route = route!(self);
        self.engine.event(&event, &mut |output| route.output(output));
    }

    /// What time alone brings about.
    pub fn tick(&mut self, now: u64) {
        let mut route = route!(self);
        self.engine.tick(now, &mut |output| route.output(output));
        let (counters, requests, connections) =
            (self.engine.counters(), self.engine.open_requests(), self.engine.open_connections());
        if self.untold != self.made_up
            && self.manager.as_ref().is_some_and(|manager| manager.try_send(manager::Message::Rescan).is_ok())
        {
            self.made_up = self.untold;
        }
        self.quality.take(&mut self.counted, |pid| self.targets.is_live(pid));
        let (undecodable, untold) = (self.undecodable, self.untold);
        self.stats.update(|s| {
            s.correlate = counters;
            s.open_requests = requests as u64;
            s.open_connections = connections as u64;
            s.undecodable = undecodable;
            s.manager_untold = untold;
        });
    }

    /// Looks for connections that are gone though no close was seen: soon after a loss, else at leisure.
    fn audit(&mut self, now: u64) {
        let Some(loss) = self.loss.as_ref().filter(|_| now >= self.audit.next) else { return };
        self.audit.next = now + AUDIT_EVERY;
        let lost = loss.records();
        if lost != self.audit.lost {
            self.audit.lost = lost;
            self.audit.left = AUDITS;
        }
        if self.audit.left > 0 || now >= self.audit.leisurely {
            self.audit.left = self.audit.left.saturating_sub(1);
            self.audit.leisurely = now + LEISURE;
            let mut route = route!(self);
            let mut descriptors = sockets::Descriptors::default();
            // What was closed by `dup2` or `close_range` the kernel side takes for open.
            let mut open = |conn: ConnId| loss.is_open(conn) && descriptors.may_be_socket(conn.pid, conn.fd);
            self.engine.audit(now, &mut open, &mut |output| route.output(output));
        }
    }

    /// Hands the batch on. `false`: nobody is there to take it.
    pub fn flush(&mut self) -> bool {
        if self.batch.is_empty() {
            return true;
        }
        let mut batch = std::mem::take(&mut self.batch);
        loop {
            match self.out.send_timeout(batch, SEND_BEAT) {
                Ok(()) => return true,
                Err(SendTimeoutError::Disconnected(_)) => return false,
                // It is the finisher that does not come round, not this.
                Err(SendTimeoutError::Timeout(unsent)) => batch = unsent,
            }
            self.beat();
        }
    }

    fn beat(&self) {
        if let Some(pulse) = &self.pulse {
            pulse.beat();
        }
    }

    /// Ends all requests: those that wait for their tail, and those that are open.
    pub fn end(mut self, now: u64) {
        // A recording does not say what was lost at its end.
        let whole = self.loss.as_ref().is_some_and(|loss| loss.records() == 0);
        let mut route = route!(self);
        self.engine.finish(now, whole, &mut |output| route.output(output));
        self.tick(now);
        self.flush();
    }

    /// Forgets processes that are not selected.
    fn reject(&mut self) {
        for pid in std::mem::take(&mut self.rejected) {
            let mut route = route!(self);
            self.engine.reject(pid, &mut |output| route.output(output));
        }
    }

    fn process_gone(&mut self, pid: u32) {
        // Its end was not reported, so another process may have its pid by now, and be known.
        let before = identity::key(pid).map_or(u64::MAX, identity::earliest);
        let mut route = route!(self);
        self.engine.process_gone(pid, before, sys::monotonic_ns(), &mut |output| route.output(output));
        if before == u64::MAX {
            self.counted.ended(pid);
        }
        self.batch.push(Message::Exited(pid));
    }
}

impl Route<'_> {
    fn output(&mut self, output: Output<'_>) {
        match output {
            Output::Sample { key, event } => self.batch.push(Message::Sample(Box::new(RawSample {
                key,
                pid: event.sample.header.pid,
                weight: event.sample.weight,
                flags: event.sample.header.flags,
                user: event.user().collect(),
                kernel: event.kernel().collect(),
            }))),
            Output::Revoke { key } => self.batch.push(Message::Revoke(key)),
            Output::Discard { key } => self.batch.push(Message::Discard(key)),
            Output::Left(id) => {
                if let Some(connections) = self.connections {
                    connections.forget(id);
                }
            }
            Output::Finished(finished) => self.batch.push(Message::Finished(finished)),
            Output::Protocol { pid, protocol, time } => {
                self.tell(manager::Message::Protocol { pid, protocol, time });
            }
            Output::Process(event) => {
                match event {
                    // Nearly always of a process that is known.
                    ProcessEvent::Accepted { pid } if self.targets.is_live(pid) => return,
                    ProcessEvent::Forked { parent, child } => {
                        self.batch.push(Message::Forked { parent, child });
                    }
                    ProcessEvent::Exec { pid } => self.batch.push(Message::Exec(pid)),
                    ProcessEvent::Exited { pid } => self.batch.push(Message::Exited(pid)),
                    _ => {}
                }
                self.tell(manager::Message::Process(event));
            }
        }
    }

    /// The reader does not wait for the manager, who waits for processes: what it has no room for, it finds by itself.
    fn tell(&mut self, message: manager::Message) {
        if let Some(manager) = self.manager
            && let Err(TrySendError::Full(_)) = manager.try_send(message)
        {
            *self.untold += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use profiler_common::{Header, Kind};

    /// A record of a process that runs another program, for which the manager is told.
    fn exec(pid: u32) -> Vec<u8> {
        let header = Header { kind: Kind::Exec as u16, pid, tid: pid, ..Header::default() };
        let Header { kind, flags, lost, time, pid, tid } = header;
        let mut bytes = [kind.to_ne_bytes(), flags.to_ne_bytes()].concat();
        bytes.extend(lost.to_ne_bytes());
        bytes.extend(time.to_ne_bytes());
        bytes.extend(pid.to_ne_bytes());
        bytes.extend(tid.to_ne_bytes());
        bytes
    }

    /// A record of a process that forked.
    fn fork(pid: u32, child: u32) -> Vec<u8> {
        let mut bytes = exec(pid);
        bytes[..2].copy_from_slice(&(Kind::Fork as u16).to_ne_bytes());
        bytes.extend(child.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn what_a_child_inherits_is_told_before_what_it_runs() {
        let (out, _batches) = bounded(1);
        let mut reader = Reader::new(out, None, Targets::default(), Stats::default());
        reader.record(&fork(5, 6));
        reader.record(&exec(6));
        assert!(matches!(reader.batch[..], [Message::Forked { .. }, Message::Exec(6)]), "{:?}", reader.batch);
    }

    #[test]
    fn what_the_manager_has_no_room_for_is_counted_and_made_up_for() {
        let (out, _batches) = bounded(1);
        let (to_manager, manager) = bounded(2);
        let stats = Stats::default();
        let mut reader = Reader::new(out, Some(to_manager), Targets::default(), stats.clone());
        let told = |n: usize| -> Vec<_> { manager.try_iter().take(n).collect() };
        for pid in 1..=5 {
            reader.record(&exec(pid));
        }
        reader.tick(TICK);
        assert_eq!(stats.snapshot().manager_untold, 3);
        // Two had room; the order to look for the others has none yet.
        let of_either =
            |m: &manager::Message| matches!(m, manager::Message::Process(ProcessEvent::Exec { pid: 1 | 2 }));
        let both = told(9);
        assert!(both.len() == 2 && both.iter().all(of_either));
        reader.tick(2 * TICK);
        assert!(matches!(told(9)[..], [manager::Message::Rescan]));
        // Once is enough, until something is dropped again.
        reader.tick(3 * TICK);
        assert!(told(9).is_empty());
        for pid in 6..=8 {
            reader.record(&exec(pid));
        }
        assert_eq!(told(9).len(), 2);
        reader.tick(4 * TICK);
        assert!(matches!(told(9)[..], [manager::Message::Rescan]));
        assert_eq!(stats.snapshot().manager_untold, 4);
    }
}
