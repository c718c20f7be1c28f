//! The table of targets: what is known of each process we look at, for whoever asks.
//!
//! Written by the manager, read by the pipeline (names, keys) and the HTTP side. Processes stay for a while after
//! they are gone, because their last requests are still on the way.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::identity::{self, ProcessKey};

/// How long a process that ended is remembered; the pipeline is never that far behind.
const REMEMBERED: Duration = Duration::from_secs(10);

/// One process.
#[derive(Clone, Debug, Serialize)]
pub struct TargetInfo {
    #[serde(skip)]
    pub key: ProcessKey,
    pub pid: u32,
    pub ppid: u32,
    pub comm: String,
    pub exe: String,
    pub service: Arc<str>,
    pub ports: Vec<u16>,
    pub runtime: Runtime,
    /// Where requests are seen.
    pub boundary: Feature,
    /// Where requests within TLS are seen that it ends itself.
    pub tls: Feature,
    /// TLS was met on a connection of it, or of another worker of the same service.
    #[serde(skip)]
    pub speaks_tls: bool,
    /// They are seen at its system calls.
    #[serde(skip)]
    pub by_calls: bool,
    /// Which request its threads work on.
    pub attribution: Feature,
    /// Stacks of native code.
    pub native_stacks: Feature,
    /// Stacks of the interpreter, where there is one.
    pub interpreter_stacks: Feature,
    /// Other protocols that were met on its connections, by name.
    pub other_protocols: Vec<&'static str>,
}

/// What runs the code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Runtime {
    pub name: &'static str,
    pub version: Option<String>,
}

/// Whether something works on a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    pub works: bool,
    /// The source where it works, the reason where it does not.
    pub detail: String,
}

impl Feature {
    pub fn works(detail: impl Into<String>) -> Self {
        Self { works: true, detail: detail.into() }
    }
    pub fn missing(detail: impl Into<String>) -> Self {
        Self { works: false, detail: detail.into() }
    }
}

#[derive(Default)]
struct Table {
    live: HashMap<u32, Arc<TargetInfo>>,
    /// Ended, with when; `None`: it was not selected.
    ended: HashMap<u32, (Option<Arc<TargetInfo>>, Instant)>,
    /// Looked at, and not selected.
    rejected: HashMap<u32, ProcessKey>,
    /// See [`Targets::early`].
    early: u64,
}

/// What is known of a pid that a request came from.
#[derive(Clone, Debug)]
pub enum Decision {
    /// A target, or one a moment ago.
    Selected(Arc<TargetInfo>),
    /// Looked at and not selected, or so a moment ago.
    Rejected,
    /// Nobody has looked at it yet.
    Undecided,
}

/// The table; cheap to clone.
#[derive(Clone, Default)]
pub struct Targets(Arc<RwLock<Table>>);

impl Targets {
    fn read<R>(&self, f: impl FnOnce(&Table) -> R) -> R {
        f(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
    fn write<R>(&self, f: impl FnOnce(&mut Table) -> R) -> R {
        f(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is known of a target now. What was met on its connections before stays.
    pub fn insert(&self, mut info: TargetInfo) {
        self.write(|t| {
            if let Some(before) = t.live.get(&info.pid).filter(|before| before.key == info.key) {
                info.other_protocols.clone_from(&before.other_protocols);
                info.speaks_tls |= before.speaks_tls;
            }
            t.rejected.remove(&info.pid);
            t.ended.remove(&info.pid);
            t.live.insert(info.pid, Arc::new(info));
        });
    }

    /// Connections with TLS that began before their process had the probes that see within. Requests of theirs may not have
    /// been seen.
    pub fn early(&self) -> u64 {
        self.read(|t| t.early)
    }

    pub fn count_early(&self) {
        self.write(|t| t.early += 1);
    }

    /// A process that was gone before it could be looked at, but is known to be one of ours.
    pub fn insert_ended(&self, info: TargetInfo) {
        self.write(|t| t.ended.insert(info.pid, (Some(Arc::new(info)), Instant::now())));
    }

    pub fn reject(&self, key: ProcessKey) {
        self.write(|t| {
            t.live.remove(&key.pid);
            t.ended.remove(&key.pid);
            t.rejected.insert(key.pid, key);
        });
    }

    /// Forgets rejected processes of which `alive` does not hold: their end is not always reported.
    pub fn sweep_rejected(&self, alive: impl Fn(ProcessKey) -> bool) {
        let keys: Vec<ProcessKey> = self.read(|t| t.rejected.values().copied().collect());
        let gone: Vec<ProcessKey> = keys.into_iter().filter(|key| !alive(*key)).collect();
        self.write(|t| {
            for key in gone {
                if t.rejected.get(&key.pid) == Some(&key) {
                    t.rejected.remove(&key.pid);
                    t.ended.insert(key.pid, (None, Instant::now()));
                }
            }
        });
    }

    pub fn is_rejected(&self, pid: u32) -> bool {
        self.read(|t| t.rejected.contains_key(&pid))
    }

    pub fn ended(&self, pid: u32) {
        self.write(|t| {
            let rejected = t.rejected.remove(&pid).is_some();
            let info = t.live.remove(&pid);
            if rejected || info.is_some() {
                t.ended.insert(pid, (info, Instant::now()));
            }
        });
    }

    /// Whether requests of this pid are wanted.
    pub fn decision(&self, pid: u32) -> Decision {
        self.read(|t| {
            if t.rejected.contains_key(&pid) {
                return Decision::Rejected;
            }
            let ended = || t.ended.get(&pid).map(|(info, _)| info.clone());
            match t.live.get(&pid).cloned().map(Some).or_else(ended) {
                Some(Some(info)) => Decision::Selected(info),
                Some(None) => Decision::Rejected,
                None => Decision::Undecided,
            }
        })
    }

    /// Forgets what ended long ago.
    pub fn sweep(&self) {
        self.write(|t| t.ended.retain(|_, (_, at)| at.elapsed() < REMEMBERED));
    }

    /// A process that is a target, or was one a moment ago.
    pub fn get(&self, pid: u32) -> Option<Arc<TargetInfo>> {
        self.read(|t| {
            t.live.get(&pid).cloned().or_else(|| t.ended.get(&pid).and_then(|(info, _)| info.clone()))
        })
    }

    pub fn is_live(&self, pid: u32) -> bool {
        self.read(|t| t.live.contains_key(&pid))
    }

    /// All live targets, by pid.
    pub fn list(&self) -> Vec<Arc<TargetInfo>> {
        let mut all: Vec<_> = self.read(|t| t.live.values().cloned().collect());
        all.sort_unstable_by_key(|info| info.pid);
        all
    }

    /// The key of a process, known or not.
    pub fn key(&self, pid: u32) -> ProcessKey {
        self.get(pid)
            .map(|info| info.key)
            .or_else(|| identity::key(pid).ok())
            .unwrap_or(ProcessKey { pid, start_time: 0 })
    }

    /// Changes what is known of a live process.
    pub fn update(&self, pid: u32, change: impl FnOnce(&mut TargetInfo)) {
        self.write(|t| {
            if let Some(info) = t.live.get_mut(&pid) {
                change(Arc::make_mut(info));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(pid: u32) -> TargetInfo {
        TargetInfo {
            key: ProcessKey { pid, start_time: 7 },
            pid,
            ppid: 1,
            comm: "shop".into(),
            exe: "/shop".into(),
            service: "shop".into(),
            ports: Vec::new(),
            runtime: Runtime { name: "native", version: None },
            boundary: Feature::works("uprobe"),
            tls: Feature::missing("it maps no OpenSSL"),
            speaks_tls: false,
            by_calls: false,
            attribution: Feature::works("thread"),
            native_stacks: Feature::works("frame pointers"),
            interpreter_stacks: Feature::missing("none"),
            other_protocols: Vec::new(),
        }
    }

    fn name(decision: &Decision) -> &'static str {
        match decision {
            Decision::Selected(_) => "selected",
            Decision::Rejected => "rejected",
            Decision::Undecided => "undecided",
        }
    }

    #[test]
    fn another_look_at_a_process_keeps_what_was_met_on_its_connections() {
        let targets = Targets::default();
        let protocols = || targets.get(5).unwrap().other_protocols.clone();
        targets.insert(target(5));
        targets.update(5, |info| info.other_protocols.push("TLS"));
        targets.insert(TargetInfo { ports: vec![80], ..target(5) });
        assert_eq!((protocols(), targets.get(5).unwrap().ports.clone()), (vec!["TLS"], vec![80]));
        // Another process, and another program of the same.
        let other = ProcessKey { pid: 5, start_time: 8 };
        targets.insert(TargetInfo { key: other, ..target(5) });
        assert_eq!(protocols(), [""; 0]);
        targets.update(5, |info| info.other_protocols.push("TLS"));
        targets.ended(5);
        targets.insert(TargetInfo { key: other, ..target(5) });
        assert_eq!(protocols(), [""; 0]);
    }

    #[test]
    fn what_was_decided_holds_for_a_moment_after_the_end() {
        let targets = Targets::default();
        let decided = |pid| name(&targets.decision(pid));
        assert_eq!(decided(5), "undecided");
        targets.insert(target(5));
        targets.reject(ProcessKey { pid: 6, start_time: 7 });
        targets.reject(ProcessKey { pid: 7, start_time: 7 });
        assert_eq!((decided(5), decided(6), decided(7)), ("selected", "rejected", "rejected"));
        targets.ended(5);
        targets.ended(6);
        targets.sweep_rejected(|key| key.pid != 7);
        assert_eq!((decided(5), decided(6), decided(7)), ("selected", "rejected", "rejected"));
        assert!(!targets.is_rejected(6) && !targets.is_rejected(7), "a new process of this pid is looked at");
        // The pid belongs to another process now.
        targets.insert(target(6));
        targets.reject(ProcessKey { pid: 5, start_time: 8 });
        assert_eq!((decided(5), decided(6)), ("rejected", "selected"));
        targets.insert_ended(target(8));
        assert_eq!(decided(8), "selected");
        assert!(!targets.is_live(8));
    }
}
