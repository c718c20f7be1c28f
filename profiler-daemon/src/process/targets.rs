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
    /// Ended, with when.
    ended: HashMap<u32, (Arc<TargetInfo>, Instant)>,
    /// Looked at, and not selected.
    rejected: HashMap<u32, ProcessKey>,
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

    pub fn insert(&self, info: TargetInfo) {
        self.write(|t| {
            t.rejected.remove(&info.pid);
            t.ended.remove(&info.pid);
            t.live.insert(info.pid, Arc::new(info));
        });
    }

    pub fn reject(&self, key: ProcessKey) {
        self.write(|t| {
            t.live.remove(&key.pid);
            t.rejected.insert(key.pid, key);
        });
    }

    /// Forgets rejected processes of which `alive` does not hold: their end is not always reported.
    pub fn sweep_rejected(&self, alive: impl Fn(ProcessKey) -> bool) {
        let keys: Vec<ProcessKey> = self.read(|t| t.rejected.values().copied().collect());
        let gone: Vec<ProcessKey> = keys.into_iter().filter(|key| !alive(*key)).collect();
        self.write(|t| t.rejected.retain(|_, key| !gone.contains(key)));
    }

    pub fn is_rejected(&self, pid: u32) -> bool {
        self.read(|t| t.rejected.contains_key(&pid))
    }

    pub fn ended(&self, pid: u32) {
        self.write(|t| {
            t.rejected.remove(&pid);
            if let Some(info) = t.live.remove(&pid) {
                t.ended.insert(pid, (info, Instant::now()));
            }
        });
    }

    /// Forgets what ended long ago.
    pub fn sweep(&self) {
        self.write(|t| t.ended.retain(|_, (_, at)| at.elapsed() < REMEMBERED));
    }

    /// A process that is a target, or was one a moment ago.
    pub fn get(&self, pid: u32) -> Option<Arc<TargetInfo>> {
        self.read(|t| t.live.get(&pid).cloned().or_else(|| t.ended.get(&pid).map(|(info, _)| info.clone())))
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
