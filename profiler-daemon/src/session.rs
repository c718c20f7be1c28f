//! A profiling session: the kernel side loaded, every stage running.
//!
//! In: a configuration and where results go. Out: running threads, a way to ask how they do, and an orderly end.
//! `reqprof daemon` is a session with a store and an HTTP server; `reqprof record` one with files and a summary.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;
use crossbeam_channel::{Sender, bounded};
use profiler_common::unwind::{BLOCKS_MAX, Block, RULES_MAX};
use profiler_common::{STAT_COUNT, Stat};
use serde_json::{Value, json};

use crate::bpf::{
    self, Entries, KernelStats, LoadError, Loss, Options, ProbeState, ProbeTable, RunTimes, sys, total,
};
use crate::config::{Config, Selection};
use crate::health::{self, Health};
use crate::pipeline::{
    BATCHES, CONTROLS, Control, FileExporter, Finisher, Live, LiveSettings, Message, Naming, Observer,
    Reader, Snapshot, Stats,
};
use crate::process::attaching::Attaching;
use crate::process::manager::{self, Manager};
use crate::process::patience::{PATIENCE, Unanswered};
use crate::process::roster::Roster;
use crate::process::targets::{Feature, TargetInfo, Targets};
use crate::replay::Recorder;
use crate::serve::Metrics;
use crate::store;
use crate::unwind::quality::REASONS;
use crate::unwind::{self, Quality, Unwinding};

/// Process events on their way to the manager; when it is behind, those that find no room are counted and it is told
/// to look for itself.
const MANAGER_QUEUE: usize = 8192;

/// How long a stage's queue may take no message: it is full only while the stage hangs.
const TELL_LIMIT: Duration = Duration::from_secs(5);
/// How long a stage may take to end. A service manager kills after 90 s: four stages and the word to three of them take at
/// most 43 s, the server, its queries and a reload 15 s before that, the files 10 s and the store 20 s after it.
const STOP_LIMIT: Duration = Duration::from_secs(7);
/// Metrics are not read from the kernel again for whoever asks sooner.
const REFRESH_EVERY: Duration = Duration::from_secs(1);

/// Whether the kernel counts the time in BPF programs.
const STATS_SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// A session could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("starting a thread: {0}")]
    Thread(#[from] io::Error),
    #[error("metrics: {0}")]
    Metrics(String),
}

/// Where results go.
#[derive(Default)]
pub struct Outputs {
    pub store: Option<store::Sender>,
    pub files: Option<FileExporter>,
    pub observer: Option<Observer>,
    pub recorder: Option<std::path::PathBuf>,
    /// Where the stages report; the store's writer does already.
    pub health: Health,
}

/// What the HTTP side and the metrics ask; lives as long as anyone asks.
pub struct Gauges {
    pub metrics: Arc<Metrics>,
    pub probes: ProbeTable,
    pub targets: Targets,
    pub stats: Stats,
    kernel: Arc<KernelStats>,
    run_times: RunTimes,
    maps: Vec<(&'static str, Entries)>,
    sample_hz: u32,
    refreshed: Mutex<Option<Instant>>,
    started: jiff::Timestamp,
    pub health: Health,
    unwinding: Unwinding,
    quality: Quality,
}

/// See the module.
pub struct Session {
    pub gauges: Arc<Gauges>,
    live: Live,
    stages: Stages<Ebpf>,
}

/// The running threads, and how each is told to end. `T`: what the manager gives back.
struct Stages<T> {
    manager: Sender<manager::Message>,
    control: Sender<Control>,
    manager_thread: JoinHandle<T>,
    unwinding: Unwinding,
    reader_thread: JoinHandle<()>,
    unwinder_thread: JoinHandle<()>,
    finisher_thread: JoinHandle<()>,
}

impl<T> Stages<T> {
    /// Ends every stage in the order of the data, waiting at most `tell` for room in a queue and `stop` for an end.
    fn stop(self, tell: Duration, stop: Duration) -> Option<T> {
        // Whoever has no room for the message is waited for in vain, and named for that.
        let _ = self.manager.send_timeout(manager::Message::Stop, tell);
        let object = health::join("manager", self.manager_thread, stop);
        let _ = self.control.send_timeout(Control::Stop, tell);
        drop(self.control);
        health::join("reader", self.reader_thread, stop);
        health::join("finisher", self.finisher_thread, stop);
        self.unwinding.stop(tell);
        health::join("unwinder", self.unwinder_thread, stop);
        object
    }
}

/// The part of the configuration that a reload changes.
pub fn live_settings(config: &Config) -> LiveSettings {
    LiveSettings {
        routes: config.routes.clone(),
        patterns: config.route_patterns.clone(),
        min_duration: config.min_duration,
    }
}

impl Session {
    /// Loads and attaches everything. When it returns, requests are being seen.
    pub fn start(config: &Config, stats: Stats, outputs: Outputs) -> Result<Self, StartError> {
        let probes = ProbeTable::default();
        let targets = Targets::default();
        let metrics = Arc::new(Metrics::new().map_err(|e| StartError::Metrics(e.to_string()))?);
        let adopt = match &config.selection {
            Selection::All => true,
            Selection::Only(selectors) => !selectors.ports.is_empty(),
        };
        let kernel = bpf::load(
            Options {
                ring_bytes: config.ring_size,
                adopt_acceptors: adopt,
                // `RUST_LOG=profiler_ebpf=debug` switches it on.
                log: tracing::enabled!(target: "profiler_ebpf", tracing::Level::DEBUG),
            },
            &probes,
        )?;
        let (to_finisher, from_reader) = bounded::<Vec<Message>>(BATCHES);
        let (to_manager, for_manager) = bounded(MANAGER_QUEUE);
        let (to_reader, for_reader) = bounded(CONTROLS);
        let epoch = sys::epoch();
        let naming = Naming { epoch, salt: std::process::id().rotate_left(16) };

        let health = outputs.health.clone();
        let told = to_finisher.clone();
        let gone_out = to_reader.clone();
        let run_times = RunTimes::of(&kernel.object);
        let mut manager = Manager::new(
            kernel.object,
            kernel.logger,
            Roster::new(kernel.targets, kernel.connections.clone(), targets.clone()),
            Attaching::new(probes.clone(), targets.clone(), config.boundary),
            kernel.deaths,
            kernel.contexts,
            u64::from(config.freq),
            probes.clone(),
            config.selection.clone(),
            Box::new(move |message| {
                // At the end of the session nobody listens any more.
                let _ = told.send(vec![message]);
            }),
            Box::new(move |control| {
                let _ = gone_out.send(control);
            }),
        );
        let (unwinding, unwinder) = unwind::unwinding();
        let quality = Quality::default();
        manager.unwinding = Some(unwinding.clone());
        let kernel_stats = Arc::new(kernel.stats);
        let gauges = Arc::new(Gauges {
            metrics: metrics.clone(),
            probes,
            targets: targets.clone(),
            stats: stats.clone(),
            kernel: kernel_stats.clone(),
            run_times,
            maps: kernel.entries,
            sample_hz: config.freq,
            refreshed: Mutex::new(None),
            started: jiff::Timestamp::now(),
            health: health.clone(),
            unwinding: unwinding.clone(),
            quality: quality.clone(),
        });
        metrics.set_sample_rate(f64::from(config.freq));

        let live = Live::new(live_settings(config));
        let (live_for_finisher, finisher_targets, finisher_stats) =
            (live.clone(), targets.clone(), stats.clone());
        let native_frames = config.native_frames;
        // The symboliser stays on the thread that makes it.
        let pulse = health.stage("finisher");
        let finisher_thread = thread("finisher", move || {
            let _alive = pulse.alive();
            let mut finisher =
                Finisher::new(finisher_targets, naming, live_for_finisher, metrics, finisher_stats);
            finisher.native_frames = native_frames;
            finisher.store = outputs.store;
            finisher.files = outputs.files;
            finisher.observer = outputs.observer;
            finisher.pulse = Some(pulse);
            finisher.run(&from_reader);
        })?;
        let mut reader = Reader::new(to_finisher, Some(to_manager.clone()), targets, stats);
        reader.loss = Some(Loss::new(kernel_stats, kernel.connections.clone()));
        reader.connections = Some(kernel.connections);
        reader.unwinding = Some(unwinding.clone());
        reader.quality = quality;
        if let Some(path) = &outputs.recorder {
            reader.recorder = Some(Recorder::create(path, epoch)?);
        }
        let ring = kernel.ring;
        let pulse = health.stage("reader");
        reader.pulse = Some(pulse.clone());
        let reader_thread = thread("reader", move || {
            let _alive = pulse.alive();
            reader.run(ring, &for_reader);
        })?;
        let tables = kernel.unwind;
        let pulse = health.stage("unwinder");
        let unwinder_thread = thread("unwinder", move || {
            let _alive = pulse.alive();
            unwinder.run(tables, &pulse);
        })?;
        manager.start();
        let pulse = health.stage("manager");
        manager.pulse = Some(pulse.clone());
        let manager_thread = thread("manager", move || {
            let _alive = pulse.alive();
            manager.run(&for_manager)
        })?;
        let stages = Stages {
            manager: to_manager,
            control: to_reader,
            unwinding,
            manager_thread,
            reader_thread,
            unwinder_thread,
            finisher_thread,
        };
        Ok(Self { gauges, live, stages })
    }

    /// Takes over what a reload can change; see [`Config::reload_from`].
    pub fn configure(&self, config: &Config) {
        self.live.set(live_settings(config));
    }

    /// Looks at a process and its children from now on; returns when it does.
    pub fn include(&self, pid: u32) {
        let (done, wait) = bounded(1);
        if self.stages.manager.send_timeout(manager::Message::Include { pid, done }, TELL_LIMIT).is_ok() {
            let _ = wait.recv_timeout(TELL_LIMIT);
        }
    }

    /// Ends every stage in the order of the data, so that nothing that was seen is lost. A stage that hangs is named
    /// and left: the kernel takes its part back when the process ends.
    pub fn stop(self) {
        self.gauges.health.stopping();
        // Dropping what the manager gives back detaches everything.
        drop(self.stages.stop(TELL_LIMIT, STOP_LIMIT));
    }
}

fn thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

impl Gauges {
    /// Whether requests are being seen.
    pub fn ready(&self) -> Result<(), String> {
        self.health.check()?;
        let probes = self.probes.snapshot();
        let attached = probes.iter().any(|(name, state)| {
            (name.starts_with("boundaries in") || name == "system calls")
                && matches!(state, ProbeState::Active { .. })
        });
        if attached {
            Ok(())
        } else {
            Err("neither a C library nor system calls carry boundary probes".into())
        }
    }

    /// Brings the metrics up to date, for whoever is about to read them.
    pub fn refresh(&self) {
        // Held to the end: who asks meanwhile gets what is being read now.
        let mut refreshed = self.refreshed.lock().unwrap_or_else(PoisonError::into_inner);
        if refreshed.is_some_and(|last| last.elapsed() < REFRESH_EVERY) {
            return;
        }
        *refreshed = Some(Instant::now());
        let kernel = self.kernel.totals();
        let stats = self.stats.snapshot();
        let m = &self.metrics;
        m.set_samples(total(&kernel, Stat::SamplesEmitted) + total(&kernel, Stat::SamplesOutsideRequest));
        for (reason, n) in unattributed(&kernel, &stats) {
            m.set_samples_unattributed(reason, n);
        }
        let tables = self.unwinding.report();
        for (stage, reason, n) in lost(&kernel, &stats, &tables, &self.targets) {
            m.set_events_lost(stage, reason, n);
        }
        m.set_unwind_errors("python", "fault", total(&kernel, Stat::PythonFault));
        m.set_unwind_errors("python", "no_state", total(&kernel, Stat::PythonNoState));
        m.set_unwind_errors("user", "truncated", total(&kernel, Stat::StackTruncated));
        m.set_unwind_errors("user", "too_deep", stats.stacks_cut);
        let all = self.quality.all();
        for (reason, n) in REASONS.iter().zip(all.ends).skip(1) {
            m.set_stacks(reason, n);
        }
        m.set_stacks("guessed", all.guessed);
        m.set_stacks(REASONS[0], all.ends[0] - all.guessed);
        for (reason, n) in &tables.counts.without {
            m.set_unwind_errors("table", reason.name(), *n);
        }
        m.set_map("unwind_rules", tables.usage.rules as u64, RULES_MAX.into());
        m.set_map("unwind_blocks", (tables.usage.bytes / size_of::<Block>()) as u64, BLOCKS_MAX.into());
        for (kind, reason, n) in &stats.unresolved {
            m.set_unwind_errors(kind_name(*kind), reason, *n);
        }
        for (name, map) in &self.maps {
            // Before Linux 5.6 nobody can say, and nothing is better than 0.
            if let Ok(entries) = map.count() {
                m.set_map(name, entries, u64::from(map.capacity()));
            }
        }
        // 0 would read as "costs nothing" where the kernel does not count.
        let counts = std::fs::read_to_string(STATS_SWITCH).is_ok_and(|text| text.trim() != "0");
        for (program, ns, _) in self.run_times.read().into_iter().filter(|(_, ns, _)| counts || *ns > 0) {
            m.set_probe_seconds(program, ns as f64 / 1e9);
        }
    }

    /// The object of `/api/v1/status`.
    pub fn status(&self) -> Value {
        let kernel = self.kernel.totals();
        let s = self.stats.snapshot();
        let reads = PATIENCE.report();
        let tables = self.unwinding.report();
        let map = |pairs: Vec<(String, u64)>| {
            Value::Object(pairs.into_iter().map(|(k, v)| (k, v.into())).collect())
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "started": self.started.to_string(),
            "probes": self.probes.snapshot(),
            "rates": { "sample_hz": self.sample_hz },
            "targets": self.targets.list().len(),
            "requests": {
                // begun + pipelined = finished + open + lost + discarded
                "begun": total(&kernel, Stat::RequestsStarted),
                "pipelined": s.correlate.requests_pipelined,
                "lost": total(&kernel, Stat::RequestsLostRing),
                "discarded": s.correlate.requests_discarded,
                "open": s.open_requests,
                "finished": s.finished,
                "filtered": s.filtered,
            },
            "connections": { "open": s.open_connections },
            "samples": {
                "emitted": total(&kernel, Stat::SamplesEmitted),
                "attributed": s.correlate.samples_attributed,
                "unattributed": map(unattributed(&kernel, &s).map(|(r, n)| (r.to_owned(), n)).to_vec()),
            },
            "lost": map(lost(&kernel, &s, &tables, &self.targets).into_iter().map(|(stage, reason, n)| (format!("{stage}.{reason}"), n)).collect()),
            "unwind_errors": map(s.unresolved.iter().map(|(kind, reason, n)| (format!("{}.{reason}", kind_name(*kind)), *n)).collect()),
            "unwind": {
                "stacks": self.quality.all().json(),
                "processes": tables.processes,
                "tables": tables.usage.tables,
                "rows": tables.usage.rows,
                "rules": tables.usage.rules,
                "bytes": tables.usage.bytes,
                "built": tables.usage.built,
                "build_ms": tables.usage.build_time.as_secs_f64() * 1e3,
                "build_ms_longest": tables.usage.build_longest.as_secs_f64() * 1e3,
                "evicted": tables.usage.evicted,
                "looks": tables.counts.looks,
            },
            "symbol_bytes": s.symbol_bytes,
            "stages": self.health.states().into_iter().collect::<BTreeMap<_, _>>(),
            "reads": {
                "state": if reads.off() { "off" } else { "ok" },
                "reason": reads.off().then(|| Unanswered::Off.to_string()),
                "late": reads.late,
                "stuck": reads.stuck,
                "resting": reads.processes,
            },
            "adopted": total(&kernel, Stat::Adopted),
        })
    }

    /// The array `targets` of `/api/v1/targets`.
    pub fn target_list(&self) -> Value {
        let reads = PATIENCE.report();
        let unanswered = |pid: u32| {
            let resting = reads.processes.contains(&pid).then_some(Unanswered::Resting);
            reads.off().then_some(Unanswered::Off).or(resting)
        };
        json!(
            self.targets
                .list()
                .iter()
                .map(|info| {
                    let mut info = TargetInfo::clone(info);
                    if let Some(why) = unanswered(info.pid) {
                        info.native_stacks = Feature::missing(why.to_string());
                        info.interpreter_stacks = Feature::missing(why.to_string());
                    }
                    let mut about = json!(&info);
                    about["unwind"] = self.quality.of(info.pid).json();
                    about
                })
                .collect::<Vec<_>>()
        )
    }
}

/// Samples that are no request's, by reason.
fn unattributed(kernel: &[u64; STAT_COUNT as usize], stats: &Snapshot) -> [(&'static str, u64); 5] {
    let c = &stats.correlate;
    [
        ("outside_request", total(kernel, Stat::SamplesOutsideRequest)),
        ("after_response", c.samples_after_response),
        ("interleaved", c.samples_interleaved),
        ("revoked", c.samples_revoked),
        ("unknown_request", c.samples_unknown),
    ]
}

/// Everything that was lost between the kernel and the store, by stage and reason.
fn lost(
    kernel: &[u64; STAT_COUNT as usize],
    s: &Snapshot,
    tables: &unwind::Report,
    targets: &Targets,
) -> Vec<(&'static str, &'static str, u64)> {
    let k = |stat| total(kernel, stat);
    vec![
        ("kernel", "sample_ring_full", k(Stat::SamplesLostRing)),
        ("kernel", "sample_walk", k(Stat::SamplesLostWalk)),
        ("kernel", "boundary_ring_full", k(Stat::BoundaryLostRing)),
        ("kernel", "request_start_ring_full", k(Stat::RequestsLostRing)),
        ("kernel", "process_ring_full", k(Stat::ProcessLostRing)),
        ("kernel", "connections_full", k(Stat::ConnectionsFull)),
        ("kernel", "active_full", k(Stat::ActiveFull)),
        ("kernel", "targets_full", k(Stat::TargetsFull)),
        ("kernel", "head_fault", k(Stat::HeadReadFault)),
        ("kernel", "contexts_full", k(Stat::ContextsFull)),
        ("kernel", "tls_full", k(Stat::TlsFull)),
        ("kernel", "tls_request_unseen", k(Stat::TlsUnseen)),
        ("kernel", "pipeline_overflow", k(Stat::PipelineOverflow)),
        ("decode", "malformed", s.undecodable),
        ("manager", "queue_full", s.manager_untold),
        ("manager", "tls_connection_early", targets.early()),
        ("correlate", "pipelined_unseen", s.correlate.requests_unseen),
        ("correlate", "table_full", s.correlate.refused),
        ("profile", "builders_full", s.samples_without_room),
        ("profile", "nodes_full", s.samples_folded),
        ("process", "unanswered", PATIENCE.report().late),
        ("profile", "process_undecided", s.undecided),
        ("unwinder", "queue_full", tables.untold),
        ("unwinder", "table_full", tables.counts.full),
        ("unwinder", "failed", tables.counts.failed),
        ("files", "queue_full", s.files_dropped),
        ("files", "write_failed", s.files_failed),
    ]
}

fn kind_name(kind: crate::profile::FrameKind) -> &'static str {
    match kind {
        crate::profile::FrameKind::Python => "python",
        crate::profile::FrameKind::Native => "native",
        crate::profile::FrameKind::Kernel => "kernel",
        crate::profile::FrameKind::Wait => "wait",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The finisher hangs; so the reader waits for it and takes no controls, of which the manager has filled the queue.
    #[test]
    fn a_session_whose_stages_hang_ends_all_the_same() {
        let (manager, _for_manager) = bounded(1);
        let (control, _for_reader) = bounded(1);
        let (release, hang) = bounded::<()>(0);
        let (too, also) = (hang.clone(), hang.clone());
        let (unwinding, _worker) = unwind::unwinding();
        control.send(Control::ProcessGone(7)).unwrap();
        let stages = Stages {
            manager,
            control,
            unwinding,
            unwinder_thread: std::thread::spawn(move || {
                let _ = also.recv();
            }),
            manager_thread: std::thread::spawn(|| "the object"),
            reader_thread: std::thread::spawn(move || {
                let _ = hang.recv();
            }),
            finisher_thread: std::thread::spawn(move || {
                let _ = too.recv();
            }),
        };
        while !stages.manager_thread.is_finished() {
            std::thread::yield_now();
        }
        let (ended, end) = bounded(1);
        let limit = Duration::from_millis(20);
        std::thread::spawn(move || ended.send(stages.stop(limit, limit)));
        // What hangs is released only after this.
        assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok(Some("the object")));
        drop(release);
    }
}
