//! The first stage: records out of the ring, requests out of records.
//!
//! In: raw records. Out: batches of messages for the finisher, process events for the manager. One thread; it polls
//! the ring, because being woken for each record costs more than looking a hundred times a second.

use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use profiler_common::RawFrame;

use super::Stats;
use crate::bpf::{Connections, Loss, Ring, sys};
use crate::correlate::http::Protocol;
use crate::correlate::{AUDIT_EVERY, Engine, Finished, Output, ProcessEvent, RequestKey};
use crate::decode;
use crate::process::identity::{self, ProcessKey};
use crate::process::manager;
use crate::process::targets::Targets;
use crate::replay::Recorder;

/// How long to wait when the ring is empty: what a request's record is late by, at most.
const POLL: Duration = Duration::from_millis(10);
/// Records handled in one go.
const DRAIN: usize = 4096;
/// Between two looks at what was silent, ns.
pub const TICK: u64 = 100_000_000;

/// Looks after the last loss: one at which a connection may not be silent for long enough, two to find it missing.
const AUDITS: u32 = 3;

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
    Forked {
        parent: ProcessKey,
        child: ProcessKey,
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
    pub user: Vec<RawFrame>,
    pub kernel: Vec<u64>,
}

/// To the reader.
pub enum Control {
    ProcessGone(u32),
    /// Takes what is in the ring, then ends.
    Stop,
}

/// Which output goes where.
struct Route<'a> {
    batch: &'a mut Vec<Message>,
    manager: Option<&'a Sender<manager::Message>>,
    targets: &'a Targets,
    connections: Option<&'a Connections>,
}

/// Borrows all but the engine.
macro_rules! route {
    ($reader:ident) => {
        Route {
            batch: &mut $reader.batch,
            manager: $reader.manager.as_ref(),
            targets: &$reader.targets,
            connections: $reader.connections.as_ref(),
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
    audit: Audit,
}

/// When to look for connections whose close was lost.
#[derive(Default)]
struct Audit {
    next: u64,
    lost: u64,
    left: u32,
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
        }
    }

    /// Reads until told to stop.
    pub fn run(mut self, mut ring: Ring, control: &Receiver<Control>) {
        let mut next_tick = sys::monotonic_ns() + TICK;
        let mut stopping = false;
        loop {
            match control.try_recv() {
                Ok(Control::ProcessGone(pid)) => self.process_gone(pid),
                Ok(Control::Stop) | Err(TryRecvError::Disconnected) => stopping = true,
                Err(TryRecvError::Empty) => {}
            }
            let drained = ring.drain(DRAIN, |bytes| self.record(bytes));
            let now = sys::monotonic_ns();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick(now);
                self.audit(now);
            }
            if !self.flush() || (stopping && drained == 0) {
                break;
            }
            if drained < DRAIN / 8 {
                std::thread::sleep(POLL);
            }
        }
        self.end();
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
        let mut route = route!(self);
        self.engine.event(&event, &mut |output| route.output(output));
    }

    /// What time alone brings about.
    pub fn tick(&mut self, now: u64) {
        let mut route = route!(self);
        self.engine.tick(now, &mut |output| route.output(output));
        let (counters, requests, connections) =
            (self.engine.counters(), self.engine.open_requests(), self.engine.open_connections());
        let undecodable = self.undecodable;
        self.stats.update(|s| {
            s.correlate = counters;
            s.open_requests = requests as u64;
            s.open_connections = connections as u64;
            s.undecodable = undecodable;
        });
    }

    /// After a loss: looks for connections whose close was lost.
    fn audit(&mut self, now: u64) {
        let Some(loss) = self.loss.as_ref().filter(|_| now >= self.audit.next) else { return };
        self.audit.next = now + AUDIT_EVERY;
        let lost = loss.records();
        if lost != self.audit.lost {
            self.audit.lost = lost;
            self.audit.left = AUDITS;
        }
        if self.audit.left > 0 {
            self.audit.left -= 1;
            let mut route = route!(self);
            self.engine.audit(now, &|conn| loss.is_open(conn), &mut |output| route.output(output));
        }
    }

    /// Hands the batch on. `false`: nobody is there to take it.
    pub fn flush(&mut self) -> bool {
        if self.batch.is_empty() {
            return true;
        }
        self.out.send(std::mem::take(&mut self.batch)).is_ok()
    }

    /// Ends all requests that wait for their tail.
    pub fn end(mut self) {
        let mut route = route!(self);
        self.engine.finish(&mut |output| route.output(output));
        self.tick(0);
        self.flush();
    }

    fn process_gone(&mut self, pid: u32) {
        // Its end was not reported, so another process may have its pid by now, and be known.
        let before = identity::key(pid).map_or(u64::MAX, identity::earliest);
        let mut route = route!(self);
        self.engine.process_gone(pid, before, sys::monotonic_ns(), &mut |output| route.output(output));
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
            Output::Protocol { pid, protocol } => {
                let name = match protocol {
                    Protocol::NotHttp => "not HTTP",
                    Protocol::Http2 => "HTTP/2",
                    Protocol::Tls => "TLS",
                };
                self.tell(manager::Message::Protocol { pid, name });
            }
            Output::Process(event) => {
                match event {
                    // Nearly always of a process that is known.
                    ProcessEvent::Accepted { pid } if self.targets.is_live(pid) => return,
                    ProcessEvent::Exec { pid } => self.batch.push(Message::Exec(pid)),
                    ProcessEvent::Exited { pid } => self.batch.push(Message::Exited(pid)),
                    _ => {}
                }
                self.tell(manager::Message::Process(event));
            }
        }
    }

    fn tell(&self, message: manager::Message) {
        if let Some(manager) = self.manager {
            // The manager outlives the reader; at the end nobody needs to know.
            let _ = manager.try_send(message);
        }
    }
}
