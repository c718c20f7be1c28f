//! What the store did and lost, as numbers that can be read at any time from any thread.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a record, or the profile of a record, is not in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The queue to the writer was full: requests end faster than the disk takes them.
    QueueFull,
    /// The record was queued without its profile, because the queued profiles had reached their byte limit.
    ProfileQueueFull,
    /// The record is stored without its profile, which was larger than the limit.
    ProfileTooLarge,
    /// The id is not 24 lower-case hexadecimal digits.
    InvalidId,
    /// A record with this id is stored already.
    Duplicate,
    /// No space left on the device, or the quota is exhausted.
    DiskFull,
    /// The file system does not take writes.
    ReadOnly,
    /// The device reported an error.
    Io,
    /// The file is damaged; it is quarantined at the next start.
    Corrupt,
    /// Any other refusal of SQLite.
    Other,
    /// The store was closed.
    Closed,
}

impl DropReason {
    pub const ALL: [Self; 11] = [
        Self::QueueFull,
        Self::ProfileQueueFull,
        Self::ProfileTooLarge,
        Self::InvalidId,
        Self::Duplicate,
        Self::DiskFull,
        Self::ReadOnly,
        Self::Io,
        Self::Corrupt,
        Self::Other,
        Self::Closed,
    ];

    /// The name used as a label and in the status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::ProfileQueueFull => "profile_queue_full",
            Self::ProfileTooLarge => "profile_too_large",
            Self::InvalidId => "invalid_id",
            Self::Duplicate => "duplicate",
            Self::DiskFull => "disk_full",
            Self::ReadOnly => "read_only",
            Self::Io => "io_error",
            Self::Corrupt => "corrupt",
            Self::Other => "sqlite",
            Self::Closed => "closed",
        }
    }
}

/// Totals since the store was opened.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) written: AtomicU64,
    pub(super) deleted: AtomicU64,
    pub(super) bytes: AtomicU64,
    dropped: [AtomicU64; DropReason::ALL.len()],
    degraded: Mutex<Option<String>>,
}

impl Counters {
    /// Records written.
    pub fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    /// Records deleted because of their age or the store's size.
    pub fn deleted(&self) -> u64 {
        self.deleted.load(Relaxed)
    }

    /// Bytes on disk, write-ahead log included.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize].load(Relaxed)
    }

    /// Why nothing can be written at the moment; `None` when all is well.
    pub fn degraded(&self) -> Option<String> {
        self.degraded.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(super) fn drop_one(&self, reason: DropReason) {
        self.drop_many(reason, 1);
    }

    pub(super) fn drop_many(&self, reason: DropReason, n: u64) {
        self.dropped[reason as usize].fetch_add(n, Relaxed);
    }

    /// Returns whether the state changed, so that each change is logged once.
    pub(super) fn set_degraded(&self, why: Option<String>) -> bool {
        let mut state = self.degraded.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let changed = state.is_some() != why.is_some();
        *state = why;
        changed
    }
}
