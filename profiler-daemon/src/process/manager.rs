//! Follows the host's processes and keeps the kernel side in step.
//!
//! In: process events from the pipeline, a scan now and then. Out: entries of the kernel's `TARGETS` map, probes
//! ([`Attaching`]), sampling on CPUs as they come and go, and the table of [`Targets`](super::targets::Targets). It owns the
//! loaded object and runs on a thread of its own, because it reads files and memory of processes that may be slow to
//! answer.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::Ebpf;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use profiler_common::target_flags;

use super::attaching::Attaching;
use super::identity::{self, Identity, ProcessKey};
use super::joining;
use super::maps::Maps;
use super::named::Named;
use super::patience::{FILES, MEMORY, PATIENCE};
use super::pending::Pending;
use super::program;
use super::roster::Roster;
use super::runtime::{self, Found};
use super::service;
use super::sockets::{self, Listening};
use super::targets::{Feature, TargetInfo};
use crate::bpf::{CodeDeaths, Contexts, CpuSampler, KernelLogger, ProbeState, ProbeTable, Resident, sys};
use crate::config::Selection;
use crate::correlate::ProcessEvent;
use crate::correlate::http::Protocol;
use crate::health::Pulse;
use crate::pipeline;
use crate::unwind::Unwinding;

/// What the manager is told.
pub enum Message {
    Process(ProcessEvent),
    /// Something else than HTTP/1 was met on a connection of this process, at this time of the kernel's clock, ns.
    Protocol {
        pid: u32,
        protocol: Protocol,
        time: u64,
    },
    /// Look at this process and its children, whatever the selection says.
    Include {
        pid: u32,
        done: Sender<()>,
    },
    /// Process events were dropped: look for what they would have told.
    Rescan,
    Stop,
}

/// Scans of `/proc`, for what no event told.
const SCAN_EVERY: Duration = Duration::from_secs(5);
/// One of so many scans looks at processes again that were not selected before, though nobody listens who did not:
/// a process can change its name.
const FULL_SCAN: u32 = 6;
/// CPUs, and processes that died unseen.
const HOUSEKEEPING_EVERY: Duration = Duration::from_secs(1);

/// How long sampling waits for the tables of what is selected at the start; those of a service take 50 ms.
const TABLES: Duration = Duration::from_secs(2);

/// See the module.
pub struct Manager {
    pub object: Ebpf,
    pub logger: Option<KernelLogger>,
    pub roster: Roster,
    pub sampler: CpuSampler,
    pub attaching: Attaching,
    pub deaths: Resident<CodeDeaths>,
    pub contexts: Resident<Contexts>,
    pub probes: ProbeTable,
    pub selection: Selection,
    /// Told to the symboliser: targets.
    pub tell: Box<dyn Fn(pipeline::Message) + Send>,
    /// Told to the correlator: a process found dead, or not selected.
    pub tell_reader: Box<dyn Fn(pipeline::Control) + Send>,
    pub pulse: Option<Pulse>,
    /// Makes unwind tables of what the targets map.
    pub unwinding: Option<Unwinding>,
    /// Looked at with their children, whatever else the selection says.
    included: Named,
    /// The selection's.
    named: Named,
    pending: Pending,
    /// Looked at by the last scan, and the sockets it found.
    scanned: HashMap<u32, ProcessKey>,
    listening: Listening,
    scans: u32,
    own_pid: u32,
}

impl Manager {
    #[allow(clippy::too_many_arguments, reason = "each is a part that the loader took apart")]
    pub fn new(
        object: Ebpf,
        logger: Option<KernelLogger>,
        roster: Roster,
        attaching: Attaching,
        deaths: CodeDeaths,
        contexts: Contexts,
        frequency: u64,
        probes: ProbeTable,
        selection: Selection,
        tell: Box<dyn Fn(pipeline::Message) + Send>,
        tell_reader: Box<dyn Fn(pipeline::Control) + Send>,
    ) -> Self {
        Self {
            named: named(&selection),
            object,
            logger,
            roster,
            sampler: CpuSampler::new(frequency),
            attaching,
            deaths: Resident::new(deaths),
            contexts: Resident::new(contexts),
            probes,
            selection,
            tell,
            tell_reader,
            pulse: None,
            unwinding: None,
            included: Named::default(),
            pending: Pending::default(),
            scanned: HashMap::new(),
            listening: Listening::default(),
            scans: 0,
            own_pid: std::process::id(),
        }
    }

    /// Attaches to what runs now. When it returns, requests are being seen.
    pub fn start(&mut self) {
        self.attaching.host_libc(&mut self.object);
        self.scan();
        self.settle();
        self.sampler.follow(&mut self.object, &self.probes);
    }

    /// Works until told to stop, and gives the object back: dropping it detaches everything, which takes a while.
    pub fn run(mut self, messages: &Receiver<Message>) -> Ebpf {
        let mut next_scan = Instant::now() + SCAN_EVERY;
        let mut next_housekeeping = Instant::now() + HOUSEKEEPING_EVERY;
        loop {
            self.beat();
            let now = Instant::now();
            let look = self.pending.next().unwrap_or(next_scan);
            let wake = next_scan.min(next_housekeeping).min(look);
            match messages.recv_timeout(wake.saturating_duration_since(now)) {
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(message) => self.message(message),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(logger) = &mut self.logger {
                logger.flush();
            }
            let now = Instant::now();
            self.look_at_pending(now);
            if now >= next_housekeeping {
                next_housekeeping = now + HOUSEKEEPING_EVERY;
                self.sampler.follow(&mut self.object, &self.probes);
                self.roster.targets.sweep();
                self.bury();
                self.attaching.tend(&mut self.object);
                let beat = || self.pulse.iter().for_each(Pulse::beat);
                self.deaths.tend(&mut self.object, &self.roster.targets, &self.probes, beat);
                self.contexts.tend(&mut self.object, &self.roster.targets, &self.probes, beat);
            }
            if now >= next_scan {
                next_scan = now + SCAN_EVERY;
                self.scan();
                self.roster.sweep(sys::monotonic_ns(), |pid| identity::key(pid).ok());
            }
        }
        self.sampler.detach(&mut self.object);
        self.attaching.detach(&mut self.object);
        self.deaths.detach(&mut self.object);
        self.contexts.detach(&mut self.object);
        self.object
    }

    fn beat(&self) {
        if let Some(pulse) = &self.pulse {
            pulse.beat();
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Process(ProcessEvent::Accepted { pid }) => {
                if !self.roster.targets.is_live(pid) && !self.roster.targets.is_rejected(pid) {
                    self.consider(pid, true);
                }
            }
            Message::Process(ProcessEvent::Forked { parent, child }) => self.fork(parent, child),
            Message::Process(ProcessEvent::Exec { pid }) => self.exec(pid),
            Message::Process(ProcessEvent::Exited { pid }) => {
                self.pending.remove(pid);
                self.roster.targets.ended(pid);
                self.forget_code(pid);
            }
            Message::Process(ProcessEvent::MayHaveExited { pid }) => {
                if identity::key(pid).is_err() {
                    self.dead(pid);
                }
            }
            Message::Protocol { pid, protocol, time } => {
                let beat = || self.pulse.iter().for_each(Pulse::beat);
                if protocol == Protocol::Tls && self.attaching.met_tls(&mut self.object, pid, time, beat) {
                    return;
                }
                self.roster.targets.update(pid, |info| {
                    if !info.other_protocols.contains(&protocol.name()) {
                        info.other_protocols.push(protocol.name());
                    }
                });
            }
            Message::Include { pid, done } => {
                if self.included.add(pid) {
                    self.consider(pid, false);
                    self.settle();
                }
                // Whoever asked may have gone; that is its business.
                let _ = done.send(());
            }
            Message::Rescan => self.rescan(),
            Message::Stop => {}
        }
    }

    /// Looks at every process that may have become one of ours. Most have not, and reading all that `/proc` knows of
    /// them every time would cost more than everything else that an idle daemon does.
    fn scan(&mut self) {
        let Ok(entries) = std::fs::read_dir("/proc") else { return };
        let pids: Vec<u32> =
            entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let listening = Listening::of(self.own_pid);
        let full = self.scans.is_multiple_of(FULL_SCAN) || listening != self.listening;
        self.scans = self.scans.wrapping_add(1);
        let before = std::mem::take(&mut self.scanned);
        for pid in pids {
            self.beat();
            if self.roster.targets.is_live(pid) {
                continue;
            }
            let Ok(key) = identity::key(pid) else { continue };
            if full || before.get(&pid) != Some(&key) {
                self.consider_with(pid, false, Some(&listening));
            }
            self.scanned.insert(pid, key);
        }
        self.listening = listening;
    }

    /// Makes up for events that did not come: ends, children that the kernel side follows already, new programs (which
    /// may be in the same file), and whatever else a full scan finds.
    fn rescan(&mut self) {
        self.deaths.forget_all();
        self.contexts.forget_all();
        self.attaching.forget_gone();
        self.bury();
        for pid in self.roster.unknown() {
            // One that is waiting for another look has its own reason not to be a target yet.
            if !self.pending.contains(pid)
                && let Ok(who) = identity::read(pid)
            {
                self.fork(who.ppid, pid);
                if self.roster.targets.is_live(pid) {
                    // Its fork was not told to the symboliser either.
                    (self.tell)(pipeline::Message::Target(who.key));
                }
            }
        }
        for info in self.roster.targets.list() {
            if let Ok(who) = identity::read(info.pid)
                && !self.make_target(who, info.ports.clone())
            {
                self.pending.begin(info.key, Instant::now());
            }
        }
        self.scans = 0;
        self.scan();
    }

    /// Targets that ended without an event.
    fn bury(&mut self) {
        for info in self.roster.targets.list() {
            if identity::key(info.pid).ok() != Some(info.key) {
                self.dead(info.pid);
            }
        }
    }

    fn reject(&mut self, key: ProcessKey) {
        // Its end is not noticed any more.
        self.deaths.ended(key.pid);
        self.contexts.ended(key.pid);
        self.attaching.ended(key.pid);
        self.roster.reject(key);
        (self.tell_reader)(pipeline::Control::ProcessRejected(key.pid));
    }

    fn dead(&mut self, pid: u32) {
        self.roster.bury(pid);
        self.forget_code(pid);
        self.pending.remove(pid);
        (self.tell_reader)(pipeline::Control::ProcessGone(pid));
    }

    /// Waits for the tables of what was found to be a target.
    fn settle(&self) {
        if let Some(unwinding) = &self.unwinding {
            unwinding.settle(TABLES);
        }
    }

    /// What the process maps is no more, or another program's.
    fn forget_code(&mut self, pid: u32) {
        self.deaths.ended(pid);
        self.contexts.ended(pid);
        self.attaching.ended(pid);
        if let Some(unwinding) = &self.unwinding {
            unwinding.ended(pid);
        }
    }

    fn fork(&mut self, parent: u32, child: u32) {
        let Some(mother) = self.roster.targets.get(parent) else {
            self.consider(child, true);
            return;
        };
        let mut info = (*mother).clone();
        (info.pid, info.ppid) = (child, parent);
        let Ok(key) = identity::key(child) else {
            // It served and ended before its turn came here; its requests are still on the way.
            info.key = ProcessKey { pid: child, start_time: 0 };
            self.roster.targets.insert_ended(info);
            return;
        };
        info.key = key;
        let ready = (info.interpreter_stacks.works || info.runtime.name != "python")
            && self.roster.inherited(parent, child);
        self.attaching.forked(&mut self.object, parent, &mut info);
        self.roster.enter(info);
        if let Some(unwinding) = &self.unwinding {
            unwinding.forked(parent, child);
        }
        if !ready {
            self.pending.begin(key, Instant::now());
        }
    }

    fn exec(&mut self, pid: u32) {
        if self.roster.targets.is_live(pid) {
            self.roster.targets.ended(pid);
        }
        self.forget_code(pid);
        if let Ok(key) = identity::key(pid) {
            self.pending.begin(key, Instant::now());
        }
    }

    fn look_at_pending(&mut self, now: Instant) {
        for pid in self.pending.due(now) {
            self.beat();
            let finished = self.consider(pid, false);
            let gone = || identity::key(pid).ok() != self.pending.key(pid);
            let settled = finished || gone();
            if self.pending.looked(pid, settled) {
                // What a target's child runs now is not selected: it is let go, if it was held.
                self.roster.let_go(pid);
            }
        }
    }

    fn consider(&mut self, pid: u32, accepted: bool) -> bool {
        self.consider_with(pid, accepted, None)
    }

    /// Looks at a process and makes it a target if it is selected. `accepted`: it was seen accepting a connection.
    /// Returns whether there is no point in looking again.
    fn consider_with(&mut self, pid: u32, accepted: bool, listening: Option<&Listening>) -> bool {
        if pid == self.own_pid {
            return true;
        }
        let Ok(who) = identity::read(pid) else { return true };
        if who.exe.is_none() {
            if accepted {
                self.reject(who.key);
            }
            return true; // a kernel thread, or nothing we may look at
        }
        // Reading sockets is the dear part, and every program that starts on the host comes by here.
        let by_ports = match &self.selection {
            Selection::All => true,
            Selection::Only(selectors) => !selectors.ports.is_empty(),
        };
        let mut selected = self.selected(&who, &[], accepted);
        let mut ports = Vec::new();
        if selected || by_ports {
            let found = match listening {
                Some(listening) => listening.ports(pid),
                None => sockets::listened(pid),
            };
            let serves = accepted || found.is_some();
            ports = found.unwrap_or_default();
            selected = self.selected(&who, &ports, serves);
        }
        if !selected {
            if accepted {
                self.reject(who.key);
            }
            return false;
        }
        self.make_target(who, ports)
    }

    fn selected(&self, who: &Identity, ports: &[u16], serves: bool) -> bool {
        if self.named.covers(who.key, who.ppid) || self.included.covers(who.key, who.ppid) {
            return true;
        }
        match &self.selection {
            Selection::All => serves,
            Selection::Only(_) => {
                let exe = who.exe.as_deref().unwrap_or(Path::new(""));
                self.selection.matches(&who.comm, exe, ports)
            }
        }
    }

    fn make_target(&mut self, who: Identity, ports: Vec<u16>) -> bool {
        let pid = who.key.pid;
        let maps = match PATIENCE.ask(pid, MEMORY, move || Maps::read(pid)) {
            Ok(Ok(maps)) => maps,
            Ok(Err(_)) => return true,
            // It is a target whose entry says why nothing works.
            Err(_) => Maps::default(),
        };
        let program = PATIENCE.ask(pid, FILES, move || program::read(pid));
        let program = program.ok().and_then(Result::ok);
        let (boundary, calls) = self.attaching.boundary(&mut self.object, pid, program.as_ref(), &maps);
        let Found { mut target, runtime, interpreter_stacks, settled } =
            runtime::examine(pid, program.as_ref(), &maps);
        let attribution = runtime::attribution(&runtime, &maps);
        let tls = self.attaching.tls(&mut self.object, who.key, runtime.name, who.exe.as_deref(), &maps);
        if !attribution.works {
            // Whose they are nobody could tell.
            target.flags &= !target_flags::SAMPLE;
        }
        if calls {
            target.flags |= target_flags::SYSCALLS;
        }
        let settled = settled && boundary.works;
        let native_stacks = Feature::works("unwind tables (.eh_frame); frame pointers where code has none");
        if let Err(error) = self.roster.follow(pid, target) {
            self.probes.set(
                "targets",
                ProbeState::Failed { reason: format!("process {pid} was not added: {error}") },
            );
            return true;
        }
        if let Some(unwinding) = &self.unwinding {
            unwinding.follow(pid);
        }
        if boundary.works && !self.roster.targets.is_live(pid) {
            self.join_connections(pid);
        }
        (self.tell)(pipeline::Message::Target(who.key));
        let service: Arc<str> = service::name(&who).into();
        self.roster.enter(TargetInfo {
            key: who.key,
            pid,
            ppid: who.ppid,
            comm: who.comm,
            exe: who.exe.map(|exe| exe.to_string_lossy().into_owned()).unwrap_or_default(),
            service,
            ports,
            runtime,
            boundary,
            tls,
            speaks_tls: false,
            by_calls: calls,
            attribution,
            native_stacks,
            interpreter_stacks,
            other_protocols: Vec::new(),
        });
        settled
    }

    /// Connections that are open already; what cannot be followed is found by its next request, if it is by `recv`.
    fn join_connections(&self, pid: u32) {
        if let Err(error) = joining::join(pid, &self.roster.connections) {
            let reason = format!("open connections of process {pid} were not all added: {error}");
            self.probes.set("open connections", ProbeState::Failed { reason });
        }
    }
}

/// The processes that a selection names by pid, as they are now.
fn named(selection: &Selection) -> Named {
    match selection {
        Selection::Only(selectors) => Named::of(&selectors.pids),
        Selection::All => Named::default(),
    }
}
