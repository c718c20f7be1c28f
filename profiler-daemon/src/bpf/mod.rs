//! The kernel side, seen from the daemon: loading it, attaching it, and reading what it says.
//!
//! In: the embedded object. Out: records from the ring, counters, and for each probe whether it works. All of the
//! daemon's `bpf(2)` and `perf_event_open(2)` work is in this folder.

mod batch;
mod boundary;
mod btf;
pub(crate) mod connections;
mod contexts;
mod deaths;
mod detacher;
mod entries;
mod load;
mod loss;
mod openssl;
mod resident;
mod ring;
mod sampler;
mod stats;
pub mod sys;
mod syscalls;
mod unwind;

pub use boundary::BoundaryProbes;
pub use connections::Connections;
pub use contexts::Contexts;
pub use deaths::CodeDeaths;
pub use entries::Entries;
pub use load::{HashOf, Kernel, KernelLogger, LoadError, Options, load};
pub use loss::Loss;
pub use openssl::OpenSslProbes;
pub use resident::Resident;
pub use ring::Ring;
pub use sampler::CpuSampler;
pub use stats::{KernelStats, RunTimes, total};
pub use syscalls::SyscallProbes;
pub use unwind::UnwindMaps;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use profiler_common::unwind::{Block, Mapping, Rule, Space};
use profiler_common::{CodeLives, Connection, ContextKey, Settings, Target};
use serde::Serialize;

macro_rules! pod {
    ($(#[$doc:meta] $name:ident($inner:ty);)*) => { $(
        #[$doc]
        #[repr(transparent)]
        #[derive(Clone, Copy)]
        pub struct $name(pub $inner);
        // SAFETY: a repr(C) structure of integers without padding (its size is asserted where it is defined), for
        // which every bit pattern is valid.
        unsafe impl aya::Pod for $name {}
    )* };
}
pod! {
    /// A map value; see [`Target`].
    TargetValue(Target);
    /// A map value; see [`Connection`].
    ConnectionValue(Connection);
    /// A map value; see [`Block`].
    BlockValue(Block);
    /// A map value; see [`Rule`].
    RuleValue(Rule);
    /// A map value; see [`Mapping`].
    MappingValue(Mapping);
    /// A map value; see [`Space`].
    SpaceValue(Space);
    /// A map key; see [`ContextKey`].
    ContextKeyValue(ContextKey);
    /// A map value; see [`CodeLives`].
    CodeLivesValue(CodeLives);
    /// A global; see [`Settings`].
    SettingsValue(Settings);
}

/// Whether a probe works. Partial attachment is a state to show, not an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum ProbeState {
    Active { detail: String },
    Disabled { reason: String },
    Failed { reason: String },
}

/// Every probe by name, shared with the HTTP side.
#[derive(Clone, Default)]
pub struct ProbeTable(Arc<Mutex<BTreeMap<String, ProbeState>>>);

impl ProbeTable {
    pub fn set(&self, name: impl Into<String>, state: ProbeState) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), state);
    }
    pub fn remove(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
    pub fn snapshot(&self) -> BTreeMap<String, ProbeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
