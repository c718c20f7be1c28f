//! The second stage: stacks into words, samples into trees, requests into records.
//!
//! In: batches from the reader. Out: finished records with their profiles, to the store, to files, to the metrics
//! and to whoever observes. One thread, because the symboliser cannot be shared.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use profiler_common::{FRAME_PYTHON, USER_FRAMES_MAX, flags};
use rustc_hash::FxHashMap;

use super::collecting::Collecting;
use super::undecided::Undecided;
use super::{FileExporter, Message, RawSample, Stats};
use crate::bpf::sys;
use crate::config::Globs;
use crate::correlate::route::{Router, ServicePattern};
use crate::correlate::{Finished, RequestKey};
use crate::health::Pulse;
use crate::process::identity::{self, ProcessKey};
use crate::process::targets::{Decision, Targets};
use crate::profile::{Builder, Frame, FrameKind, MAX_DEPTH, Profile};
use crate::record::{Attribution, RequestRecord, TOO_SHORT};
use crate::serve::Metrics;
use crate::store::{self, Entry};
use crate::symbolize::Symbolizer;

const POLL: Duration = Duration::from_millis(10);
const STATS_EVERY: Duration = Duration::from_millis(250);

/// Settings that a reload may change.
#[derive(Clone, Debug, Default)]
pub struct LiveSettings {
    /// Keep only these routes; empty = all.
    pub routes: Globs,
    pub patterns: Vec<ServicePattern>,
    /// Shorter requests are kept without a profile.
    pub min_duration: Duration,
}

/// The settings in force, and the way to change them.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<Arc<LiveSettings>>>);

impl Live {
    pub fn new(settings: LiveSettings) -> Self {
        Self(Arc::new(Mutex::new(Arc::new(settings))))
    }
    pub fn set(&self, settings: LiveSettings) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
    }
    fn get(&self) -> Arc<LiveSettings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Sees every finished request.
pub type Observer = Box<dyn FnMut(&RequestRecord, Option<&Arc<Profile>>) + Send>;

/// How request ids and wall-clock times are made.
#[derive(Clone, Copy, Debug)]
pub struct Naming {
    /// Nanoseconds to add to a record's time to get the time since the epoch. Kept up to date, except for recordings.
    pub epoch: i64,
    /// Distinguishes ids of two runs that began in the same nanosecond.
    pub salt: u32,
}

impl Naming {
    /// 24 hexadecimal digits that sort by start: the start in ns since the epoch, then a number that tells requests
    /// of the same nanosecond apart.
    fn id(&self, start: i64, key: RequestKey) -> String {
        format!("{:016x}{:08x}", start, self.salt.wrapping_add(key as u32))
    }
}

/// See the module.
pub struct Finisher {
    pub symbolizer: Symbolizer,
    pub targets: Targets,
    pub naming: Naming,
    pub live: Live,
    pub router: Router,
    pub store: Option<store::Sender>,
    pub files: Option<FileExporter>,
    pub metrics: Arc<Metrics>,
    pub stats: Stats,
    pub observer: Option<Observer>,
    /// Whether stacks with Python frames show the native ones too.
    pub native_frames: bool,
    /// The processes are those of a recording: what runs now under their pids is none of them.
    pub recorded: bool,
    pub pulse: Option<Pulse>,
    collecting: Collecting,
    undecided: Undecided,
    keys: FxHashMap<u32, ProcessKey>,
    settings: Arc<LiveSettings>,
    /// A stack without what is not to be shown, or with what stands for its missing part; here to keep its allocation.
    shown: Vec<Arc<Frame>>,
    gaps: Gaps,
    /// Stacks without their outermost frames because they were deeper than a tree.
    cut: u64,
    finished: u64,
    filtered: u64,
}

impl Finisher {
    pub fn new(targets: Targets, naming: Naming, live: Live, metrics: Arc<Metrics>, stats: Stats) -> Self {
        let settings = live.get();
        Self {
            symbolizer: Symbolizer::default(),
            targets,
            naming,
            router: Router::new(settings.patterns.clone()),
            live,
            store: None,
            files: None,
            metrics,
            stats,
            observer: None,
            native_frames: true,
            recorded: false,
            pulse: None,
            collecting: Collecting::default(),
            undecided: Undecided::default(),
            keys: FxHashMap::default(),
            settings,
            shown: Vec::new(),
            gaps: Gaps::default(),
            cut: 0,
            finished: 0,
            filtered: 0,
        }
    }

    /// Works until every sender is gone.
    pub fn run(mut self, incoming: &Receiver<Vec<Message>>) {
        let mut next_stats = Instant::now() + STATS_EVERY;
        loop {
            self.beat();
            match incoming.try_recv() {
                Ok(batch) => {
                    self.refresh();
                    for message in batch {
                        self.beat();
                        self.message(message);
                    }
                }
                // The reader looks at the ring as often. To wait in the channel costs more: it spins before it sleeps.
                Err(TryRecvError::Empty) => std::thread::sleep(POLL),
                Err(TryRecvError::Disconnected) => break,
            }
            if Instant::now() >= next_stats {
                next_stats = Instant::now() + STATS_EVERY;
                self.settle();
                self.follow_clock();
                self.publish();
            }
        }
        self.settle();
        self.undecided.give_up();
        self.publish();
    }

    fn beat(&self) {
        if let Some(pulse) = &self.pulse {
            pulse.beat();
        }
    }

    /// Wall-clock time after a step of the clock, or after the machine slept.
    fn follow_clock(&mut self) {
        if !self.recorded {
            self.naming.epoch = sys::epoch();
        }
    }

    fn refresh(&mut self) {
        let settings = self.live.get();
        if !Arc::ptr_eq(&settings, &self.settings) {
            self.router.set_patterns(settings.patterns.clone());
            self.settings = settings;
        }
    }

    fn publish(&self) {
        let unresolved =
            self.symbolizer.counters().map(|(kind, reason, n)| (kind, reason.name(), n)).collect();
        let bytes = self.symbolizer.size() as u64;
        self.stats.update(|s| {
            s.unresolved = unresolved;
            s.finished = self.finished;
            s.filtered = self.filtered;
            s.undecided = self.undecided.dropped();
            s.samples_without_room = self.collecting.without_room;
            s.samples_folded = self.collecting.folded;
            s.stacks_cut = self.cut;
            s.symbol_bytes = bytes;
        });
    }

    /// Handles one message.
    pub fn message(&mut self, message: Message) {
        match message {
            Message::Sample(sample) => self.sample(&sample),
            Message::Revoke(key) | Message::Discard(key) => {
                self.collecting.take(key);
            }
            Message::Finished(finished) => self.finish(*finished),
            Message::Target(key) => {
                self.keys.insert(key.pid, key);
                self.symbolizer.target(key);
            }
            Message::Forked { parent, child } => self.forked(parent, child),
            Message::Exec(pid) => {
                if let Some(key) = self.keys.remove(&pid) {
                    self.symbolizer.exec(key);
                }
            }
            Message::Exited(pid) => {
                if let Some(key) = self.keys.remove(&pid) {
                    self.symbolizer.exited(key);
                }
            }
        }
    }

    fn forked(&mut self, parent: u32, child: u32) {
        // The processes of a recording cannot be asked, and of one that is not selected nothing will be.
        if self.recorded || matches!(self.targets.decision(parent), Decision::Rejected) {
            return;
        }
        let parent = self.key(parent);
        if parent.start_time == 0 {
            return;
        }
        // One that is gone by now is known by its parent until its end is told.
        let child = identity::key(child).unwrap_or(ProcessKey { pid: child, start_time: 0 });
        // Remembered even if neither is ever sampled, so that what is known of it ends with its program.
        self.keys.insert(parent.pid, parent);
        self.keys.insert(child.pid, child);
        self.symbolizer.forked(parent, child);
    }

    fn key(&mut self, pid: u32) -> ProcessKey {
        if let Some(key) = self.keys.get(&pid) {
            return *key;
        }
        let key = self.targets.key(pid);
        if key.start_time != 0 {
            self.keys.insert(pid, key);
        }
        key
    }

    fn sample(&mut self, sample: &RawSample) {
        if !self.collecting.takes(sample.key) {
            return;
        }
        let elsewhere = self.undecided.nodes();
        if self.recorded {
            self.collecting.grow(sample.key, &[], sample.weight, elsewhere);
            return;
        }
        let key = self.key(sample.pid);
        let (mut stack, _) = self.symbolizer.resolve(key, &sample.kernel, &sample.user);
        let mut gap = self.gaps.of(sample);
        let python_only = !self.native_frames && stack.iter().any(|f| f.kind == FrameKind::Python);
        let shown = |frame: &&Arc<Frame>| !python_only || frame.kind == FrameKind::Python;
        // Inlined functions make it deeper than the walk was; the tree would leave out the innermost.
        let depth = if python_only { stack.iter().filter(shown).count() } else { stack.len() };
        let outer = depth.saturating_sub(MAX_DEPTH - 1);
        if outer > 0 {
            self.cut += 1;
            gap = gap.or(Some(self.gaps.deep(sample)));
        }
        if python_only || gap.is_some() {
            self.shown.clear();
            self.shown.extend(gap.cloned());
            self.shown.extend(stack.iter().filter(shown).skip(outer).cloned());
            stack = &self.shown;
        }
        self.collecting.grow(sample.key, stack, sample.weight, elsewhere);
    }

    fn finish(&mut self, finished: Finished) {
        let builder = self.collecting.take(finished.key);
        self.finished += 1;
        self.conclude(finished, builder);
    }

    /// Goes on with the requests whose process is decided upon by now.
    fn settle(&mut self) {
        if self.undecided.is_empty() {
            return;
        }
        let targets = &self.targets;
        let decided = |pid| !matches!(targets.decision(pid), Decision::Undecided);
        for (finished, builder) in self.undecided.take(decided, Instant::now()) {
            self.conclude(finished, builder);
        }
    }

    /// A request and its samples, on their way out if the process is one of ours.
    fn conclude(&mut self, mut finished: Finished, builder: Option<Builder>) {
        let service = match self.targets.decision(finished.pid) {
            Decision::Selected(info) => {
                finished.attributed &= info.attribution.works;
                info.service.clone()
            }
            Decision::Rejected => {
                self.filtered += 1;
                return;
            }
            // Nobody looks at the processes of a recording.
            Decision::Undecided if self.recorded => Arc::from("unknown"),
            Decision::Undecided => {
                self.undecided.hold((finished, builder), Instant::now());
                return;
            }
        };
        let builder = builder.filter(|builder| finished.attributed && builder.samples() > 0);
        let streaming = finished.exchange.streaming;
        let mut record = self.record(finished, builder.as_ref(), service);
        if !self.settings.routes.is_empty()
            && !record.route.as_deref().is_some_and(|route| self.settings.routes.matches(route))
        {
            self.filtered += 1;
            return;
        }
        let keep = u128::from(record.duration_ns) >= self.settings.min_duration.as_nanos();
        // A request that could have been hit by a sample and was not used no CPU time that is worth a sample.
        let sampled = builder.as_ref().map_or(0, Builder::sampled_ns);
        let sampled_cpu_ns = (record.attribution != Attribution::None).then_some(sampled);
        if builder.is_some() && !keep {
            record.note.get_or_insert_with(|| TOO_SHORT.to_owned());
        }
        let profile = builder.filter(|_| keep).map(|builder| Arc::new(builder.finish(record.duration_ns)));
        record.profile = profile.is_some();
        if streaming {
            self.metrics.observe_stream(&record);
        } else {
            self.metrics.observe(&record);
        }
        if let Some(observer) = &mut self.observer {
            observer(&record, profile.as_ref());
        }
        if let Some(files) = self.files.as_ref().filter(|_| keep) {
            // A request without samples has its file too: all of its time is `[unsampled]`.
            let empty = || Arc::new(Builder::default().finish(record.duration_ns));
            files.write(record.clone(), profile.clone().unwrap_or_else(empty));
        }
        if let Some(store) = &self.store {
            // What does not fit is counted there.
            store.try_send(Entry {
                sampled_cpu_ns,
                profile: profile.as_ref().map(|profile| profile.encode()),
                record,
            });
        }
    }

    fn record(&mut self, finished: Finished, builder: Option<&Builder>, service: Arc<str>) -> RequestRecord {
        let Finished { key, pid, boundary, exchange, attributed, by_context, tail_samples, lost } = finished;
        let (method, path, trace_id) = match &exchange.head {
            Some(head) => (
                Some(head.method.as_str().to_owned()),
                Some(head.path.to_string()),
                head.trace_id.as_ref().map(ToString::to_string),
            ),
            None => (None, None, None),
        };
        let route = path.as_deref().map(|path| self.router.route(&service, path).to_string());
        let start = exchange.start as i64 + self.naming.epoch;
        RequestRecord {
            id: self.naming.id(start, key),
            pid,
            tid: exchange.tid,
            service: service.to_string(),
            method,
            path,
            route,
            status: exchange.status,
            start,
            duration_ns: exchange.end.saturating_sub(exchange.start),
            ttfb_ns: exchange.first_out.map(|first| first.saturating_sub(exchange.start)),
            request_bytes: exchange.request_bytes,
            response_bytes: exchange.response_bytes,
            // Exact times come from the scheduler, which is not followed yet.
            on_cpu_ns: None,
            runqueue_ns: None,
            off_cpu_ns: None,
            samples: builder.map_or(0, Builder::samples),
            tail_samples,
            lost_events: lost,
            boundary,
            attribution: match (attributed, by_context) {
                (false, _) => Attribution::None,
                (true, false) => Attribution::Thread,
                (true, true) => Attribution::Context,
            },
            outcome: exchange.outcome,
            note: exchange
                .note
                .map(str::to_owned)
                .or_else(|| exchange.streaming.then(|| "streaming".to_owned())),
            trace_id,
            profile: false,
        }
    }
}

/// Frames that stand for the outermost ones where these are missing, or their callees would seem to be roots. The kernel
/// side counts such stacks.
struct Gaps {
    deep_python: Arc<Frame>,
    deep_native: Arc<Frame>,
    unreadable: Arc<Frame>,
}

impl Default for Gaps {
    fn default() -> Self {
        let frame = |name: &str, kind| {
            Arc::new(Frame { name: name.into(), file: "".into(), line: 0, first_line: 0, kind })
        };
        let deep = format!("[stack deeper than {} frames]", USER_FRAMES_MAX);
        Self {
            deep_python: frame(&deep, FrameKind::Python),
            deep_native: frame(&deep, FrameKind::Native),
            unreadable: frame("[Python frames unreadable]", FrameKind::Python),
        }
    }
}

impl Gaps {
    /// Of the kind of what is missing, so that views show it that leave other kinds out.
    fn of(&self, sample: &RawSample) -> Option<&Arc<Frame>> {
        if sample.flags & flags::TRUNCATED != 0 {
            Some(self.deep(sample))
        } else if sample.flags & flags::PYTHON_FAULT != 0 {
            Some(&self.unreadable)
        } else {
            None
        }
    }

    fn deep(&self, sample: &RawSample) -> &Arc<Frame> {
        let python = sample.user.iter().any(|raw| raw.kind() == FRAME_PYTHON);
        if python { &self.deep_python } else { &self.deep_native }
    }
}

#[cfg(test)]
mod tests;
