//! The one thread that writes.
//!
//! In: entries from a bounded queue. Out: transactions of many rows each, since a transaction costs more than the rows
//! in it. A batch is closed by its size or its age, whichever comes first. When the disk refuses, the batch is counted
//! as dropped and a small write is tried again every second, so that the store recovers without help.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, TrySendError, bounded};
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use zstd::bulk::Compressor;

use super::counters::{Counters, DropReason};
use super::filter::RequestId;
use super::retention::Retention;
use super::{Config, OpenError, row};
use crate::health::{self, Pulse};
use crate::record::RequestRecord;

/// Entries that wait for the writer, about 4 MB without their profiles: several seconds of a busy host.
const QUEUE: usize = 8_192;
/// Encoded profiles that wait for the writer, bytes in total. Past it, records are queued without theirs.
const QUEUE_PROFILE_BYTES: usize = 64 << 20;
/// How long the last batches may take.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Larger than any profile of a request that a person could read; bounds what a reader has to hold.
pub(super) const MAX_PROFILE_BYTES: usize = 16 << 20;
/// Rows of a transaction: beyond this it gets no cheaper per row.
const BATCH: usize = 512;
/// Encoded profiles of a transaction, bytes: bounds by how much one transaction can overshoot the store's size.
const BATCH_PROFILE_BYTES: usize = 4 << 20;
/// How long a record may wait for company before it can be read.
const BATCH_AGE: Duration = Duration::from_millis(100);
/// How often an idle writer looks at age, size and health.
const TICK: Duration = Duration::from_secs(1);
/// Fast and small enough: profiles are trees of repeated short numbers and names.
const ZSTD_LEVEL: i32 = 1;

/// What the pipeline hands over for one request.
#[derive(Clone, Debug)]
pub struct Entry {
    /// `record.profile` is set by the store, from what is stored in the end.
    pub record: RequestRecord,
    /// CPU time that the samples stand for, ns: 0 when no sample hit it, `None` when samples could not be attributed.
    pub sampled_cpu_ns: Option<u64>,
    /// [`crate::profile::Profile::encode`]'s bytes.
    pub profile: Option<Vec<u8>>,
}

enum Message {
    Entry(Box<Entry>),
    Flush(crossbeam_channel::Sender<()>),
    Stop,
}

/// The pipeline's end of the queue. Never blocks.
#[derive(Clone)]
pub struct Sender {
    queue: crossbeam_channel::Sender<Message>,
    counters: Arc<Counters>,
    queued_bytes: Arc<AtomicUsize>,
    max_profile_bytes: usize,
}

impl Sender {
    /// Queues an entry. `false`: it is dropped, and counted.
    pub fn try_send(&self, mut entry: Entry) -> bool {
        let mut bytes = entry.profile.as_ref().map_or(0, Vec::len);
        if bytes > self.max_profile_bytes {
            self.counters.drop_one(DropReason::ProfileTooLarge);
            (entry.profile, bytes) = (None, 0);
        } else if self.queued_bytes.fetch_add(bytes, Relaxed) + bytes > QUEUE_PROFILE_BYTES {
            self.queued_bytes.fetch_sub(bytes, Relaxed);
            self.counters.drop_one(DropReason::ProfileQueueFull);
            (entry.profile, bytes) = (None, 0);
        }
        let reason = match self.queue.try_send(Message::Entry(Box::new(entry))) {
            Ok(()) => return true,
            Err(TrySendError::Full(_)) => DropReason::QueueFull,
            Err(TrySendError::Disconnected(_)) => DropReason::Closed,
        };
        self.queued_bytes.fetch_sub(bytes, Relaxed);
        self.counters.drop_one(reason);
        false
    }
}

/// The thread and the way to it.
pub(super) struct Writer {
    sender: Sender,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(
        connection: Connection,
        path: PathBuf,
        quarantined: u64,
        config: &Config,
        counters: Arc<Counters>,
        pulse: Pulse,
    ) -> Result<Self, OpenError> {
        let (queue, receiver) = bounded(QUEUE);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let retention = Retention::new(path.clone(), quarantined, config, Arc::clone(&counters));
        retention
            .configure(&connection)
            .map_err(|source| OpenError::Database { path: path.clone(), source })?;
        let worker = Worker {
            connection,
            retention,
            counters: Arc::clone(&counters),
            queued_bytes: Arc::clone(&queued_bytes),
            batch: Vec::with_capacity(BATCH),
            batch_bytes: 0,
            max_batch_bytes: usize::try_from(config.max_bytes / 16)
                .map_or(BATCH_PROFILE_BYTES, |share| share.min(BATCH_PROFILE_BYTES)),
            behind: false,
            pause: None,
            pulse,
            compressor: Compressor::new(ZSTD_LEVEL)
                .map_err(|source| OpenError::Io { path: path.clone(), source })?,
        };
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || worker.run(&receiver))
            .map_err(|source| OpenError::Io { path, source })?;
        // A profile that is most of a small store would only push everything else out.
        let share = usize::try_from(config.max_bytes / 8).unwrap_or(usize::MAX);
        let max_profile_bytes = share.min(MAX_PROFILE_BYTES);
        Ok(Self { sender: Sender { queue, counters, queued_bytes, max_profile_bytes }, thread: Some(thread) })
    }

    pub(super) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    pub(super) fn flush(&self) {
        let (done, wait) = bounded(1);
        if self.sender.queue.send(Message::Flush(done)).is_ok() {
            // Fails only if the thread has ended, and then there is nothing to wait for.
            let _ = wait.recv();
        }
    }

    pub(super) fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        // A full queue in front of a disk that hangs takes no more. Fails also if the thread has ended already.
        let _ = self.sender.queue.send_timeout(Message::Stop, STOP_LIMIT);
        if let Some(thread) = self.thread.take() {
            health::join("store-writer", thread, STOP_LIMIT);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.join();
        }
    }
}

struct Worker {
    connection: Connection,
    retention: Retention,
    counters: Arc<Counters>,
    queued_bytes: Arc<AtomicUsize>,
    batch: Vec<Entry>,
    batch_bytes: usize,
    max_batch_bytes: usize,
    /// There is more to delete than one round does.
    behind: bool,
    /// Set while degraded.
    pause: Option<Pause>,
    pulse: Pulse,
    compressor: Compressor<'static>,
}

/// The disk refused; it is left alone for a while.
#[derive(Clone, Copy)]
struct Pause {
    until: Instant,
    reason: DropReason,
}

/// The next message. What a batch waits for is not waited for one by one: to be woken for each would cost more than
/// what is then done with it.
fn next(
    queue: &Receiver<Message>,
    batch_until: Option<Instant>,
    wake: Instant,
) -> Result<Message, RecvTimeoutError> {
    let Some(until) = batch_until else { return queue.recv_deadline(wake) };
    if queue.is_empty() {
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }
    queue.try_recv().map_err(|nothing| match nothing {
        TryRecvError::Empty => RecvTimeoutError::Timeout,
        TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
    })
}

/// What became of a batch that was committed.
#[derive(Default)]
struct Written {
    rows: u64,
    invalid: u64,
    duplicates: u64,
}

impl Worker {
    fn run(mut self, queue: &Receiver<Message>) {
        let _alive = self.pulse.alive();
        // An old file may be too large for new bounds before the first request comes.
        self.tend();
        let mut tend_at = Instant::now() + TICK;
        let mut batch_until = None;
        loop {
            self.pulse.beat();
            let wake = batch_until.unwrap_or(tend_at).min(tend_at);
            match next(queue, batch_until, wake) {
                Ok(Message::Entry(entry)) => {
                    let bytes = entry.profile.as_ref().map_or(0, Vec::len);
                    self.queued_bytes.fetch_sub(bytes, Relaxed);
                    self.batch_bytes += bytes;
                    self.batch.push(*entry);
                    batch_until.get_or_insert_with(|| Instant::now() + BATCH_AGE);
                }
                Ok(Message::Flush(done)) => {
                    self.pause = None;
                    self.write();
                    batch_until = None;
                    self.tend();
                    while self.behind && self.pause.is_none() {
                        self.tend();
                    }
                    // The one who asked may have gone.
                    let _ = done.send(());
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => {
                    self.write();
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            let mut wrote = false;
            let full = self.batch.len() >= BATCH || self.batch_bytes >= self.max_batch_bytes;
            if full || (batch_until.is_some_and(|until| until <= now) && queue.is_empty()) {
                self.write();
                batch_until = None;
                wrote = true;
            }
            // What is much to delete is deleted bit by bit: between two batches, and while nothing waits.
            if tend_at <= now && (wrote || !self.behind || queue.is_empty()) {
                self.tend();
            }
            tend_at = if self.behind && self.pause.is_none() {
                now
            } else if tend_at <= now {
                Instant::now() + TICK
            } else {
                tend_at
            };
        }
    }

    /// Writes the batch, or counts it as dropped.
    fn write(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let result = match self.pause {
            Some(pause) => Err(pause.reason),
            None => self.transaction(&batch).map_err(|e| self.failed(&e)),
        };
        match result {
            Ok(Written { rows, invalid, duplicates }) => {
                self.counters.written.fetch_add(rows, Relaxed);
                self.counters.drop_many(DropReason::InvalidId, invalid);
                self.counters.drop_many(DropReason::Duplicate, duplicates);
                self.recovered();
                match self.retention.after_batch(&mut self.connection) {
                    Ok(more) => self.behind |= more,
                    Err(e) => {
                        self.failed(&e);
                    }
                }
            }
            Err(reason) => self.counters.drop_many(reason, batch.len() as u64),
        }
        self.batch = batch;
        self.batch.clear();
        self.batch_bytes = 0;
    }

    /// Nothing is counted before the commit: a batch that fails is counted as a whole.
    fn transaction(&mut self, batch: &[Entry]) -> rusqlite::Result<Written> {
        let mut written = Written::default();
        let tx = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut requests = tx.prepare_cached(&insert_sql())?;
            let mut profiles = tx.prepare_cached("INSERT INTO profiles (raw_bytes, data) VALUES (?, ?)")?;
            for entry in batch {
                let Ok(id) = entry.record.id.parse::<RequestId>() else {
                    written.invalid += 1;
                    continue;
                };
                let profile = match &entry.profile {
                    None => None,
                    Some(raw) => {
                        let data = self
                            .compressor
                            .compress(raw)
                            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
                        Some(profiles.insert(rusqlite::params![raw.len() as i64, data])?)
                    }
                };
                if row::insert(&mut requests, &entry.record, id, entry.sampled_cpu_ns, profile)? {
                    written.rows += 1;
                } else {
                    written.duplicates += 1;
                    tx.execute("DELETE FROM profiles WHERE seq = ?", [profile])?;
                }
            }
        }
        tx.commit()?;
        Ok(written)
    }

    /// Enforces age and size, and while degraded finds out whether writing works again.
    fn tend(&mut self) {
        if self.pause.is_some_and(|pause| Instant::now() < pause.until) {
            return;
        }
        let result = match self.counters.degraded() {
            Some(_) => self.connection.execute("UPDATE heartbeat SET beat = beat + 1", []).map(drop),
            None => Ok(()),
        };
        match result.and_then(|()| self.retention.round(&mut self.connection)) {
            Ok(more) => {
                self.behind = more;
                self.recovered();
            }
            Err(e) => {
                self.failed(&e);
            }
        }
    }

    fn recovered(&mut self) {
        self.pause = None;
        if self.counters.set_degraded(None) {
            tracing::info!("the store can be written again");
        }
    }

    fn failed(&mut self, error: &rusqlite::Error) -> DropReason {
        let reason = classify(error);
        self.pause = Some(Pause { until: Instant::now() + TICK, reason });
        if self.counters.set_degraded(Some(format!("{}: {error}", reason.name()))) {
            tracing::error!("the store cannot be written, requests are dropped until it can: {error}");
        }
        reason
    }
}

/// A record that comes twice (a replayed stream into an old store) replaces nothing and stops nothing.
fn insert_sql() -> String {
    let marks = vec!["?"; row::COLUMN_COUNT].join(", ");
    format!("INSERT OR IGNORE INTO requests ({}) VALUES ({marks})", row::COLUMNS)
}

fn classify(error: &rusqlite::Error) -> DropReason {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => DropReason::DiskFull,
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            DropReason::ReadOnly
        }
        Some(ErrorCode::SystemIoFailure) => DropReason::Io,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => DropReason::Corrupt,
        _ => DropReason::Other,
    }
}
