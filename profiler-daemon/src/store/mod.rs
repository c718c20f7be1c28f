//! The store: finished requests and their profiles, kept on disk, bounded, safe against `kill -9`.
//!
//! In: [`Entry`]s from the pipeline, through [`Sender::try_send`], which never blocks. Out: [`Reader`], which answers
//! what the HTTP API asks. Between them one writer thread and one SQLite file in WAL mode: readers never wait for the
//! writer, and a transaction is on disk whole or not at all, whatever kills the process.
//!
//! What is lost is counted by reason in [`Counters`]; a disk that is full or broken makes the store *degraded*
//! ([`Counters::degraded`]) until a write succeeds again, which the writer tries by itself.

mod counters;
mod directory;
mod filter;
mod reader;
mod retention;
mod row;
mod schema;
#[cfg(test)]
mod tests;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use counters::{Counters, DropReason};
pub use filter::{BadCursor, Filter, InvalidId, RequestId, Sort, StatusFilter};
pub use reader::{Deadline, MAX_ROWS, Merged, Page, ReadError, Reader, RouteStats};
pub use writer::{Entry, Sender};

use crate::health::Health;

/// The size a store may have when nothing else is configured: about a week of a busy host's requests with their profiles.
pub const DEFAULT_MAX_BYTES: u64 = 512 << 20;
/// The age at which requests are forgotten when nothing else is configured.
pub const DEFAULT_MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Below this a store could not hold its write-ahead log and a useful number of requests.
pub const MIN_BYTES: u64 = 1 << 20;

/// Where the store is and how much it may keep.
#[derive(Clone, Debug)]
pub struct Config {
    /// The state directory. Created with mode 0700 if it does not exist.
    pub dir: PathBuf,
    /// Bytes on disk, write-ahead log and quarantined files included; the oldest requests go first. At least [`MIN_BYTES`].
    pub max_bytes: u64,
    /// Requests that started longer ago are deleted.
    pub max_age: Duration,
}

impl Config {
    /// The default bounds.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), max_bytes: DEFAULT_MAX_BYTES, max_age: DEFAULT_MAX_AGE }
    }
}

/// Why the store could not be opened. Each message ends with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("state directory {path}: {source}; name another one with --store")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("state directory {0} is a symbolic link; name the directory that it points to with --store")]
    Symlink(PathBuf),
    #[error("{0} is not a directory; name a directory with --store")]
    NotADirectory(PathBuf),
    #[error(
        "state directory {path} belongs to uid {owner}, not to uid {us} or root; \
         chown it or name another one with --store"
    )]
    Owner { path: PathBuf, owner: u32, us: u32 },
    #[error(
        "state directory {path} has mode {mode:04o}: others may write to it; \
         run `chmod go-w {path}` or name another one with --store"
    )]
    Writable { path: PathBuf, mode: u32 },
    #[error(
        "state directory {path}: its parent {parent} belongs to uid {owner}, who could put another directory in its \
         place; name one elsewhere with --store"
    )]
    ParentOwner { path: PathBuf, parent: PathBuf, owner: u32 },
    #[error(
        "state directory {path}: its parent {parent} has mode {mode:04o}, so others could put another directory in its \
         place; run `chmod go-w {parent}` or name one elsewhere with --store"
    )]
    ParentWritable { path: PathBuf, parent: PathBuf, mode: u32 },
    #[error("{0} is not a regular file; remove it or name another directory with --store")]
    Planted(PathBuf),
    #[error(
        "state directory {path} is in use by another reqprof ({holder}); \
         stop that one or name another directory with --store"
    )]
    Locked { path: PathBuf, holder: String },
    #[error("a store of {given} bytes is too small; allow at least {MIN_BYTES} bytes")]
    TooSmall { given: u64 },
    #[error("store {path}: {source}; free space or name another directory with --store")]
    Database { path: PathBuf, source: rusqlite::Error },
}

/// An open store: the writer thread, the lock on the directory and a way to read.
pub struct Store {
    writer: writer::Writer,
    reader: Reader,
    counters: Arc<Counters>,
    warnings: Vec<String>,
    health: Health,
    // Held for its lock: a second daemon must not open the directory before the writer has ended.
    _lock: directory::Lock,
}

impl Store {
    /// Opens or creates the store. A file that cannot be used is renamed and named in [`Self::warnings`].
    pub fn open(config: &Config) -> Result<Self, OpenError> {
        if config.max_bytes < MIN_BYTES {
            return Err(OpenError::TooSmall { given: config.max_bytes });
        }
        let (dir, lock) = directory::claim(&config.dir)?;
        let schema::Opened { connection, path, quarantined, warnings } =
            schema::open(&dir, config.max_bytes)?;
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let counters = Arc::new(Counters::default());
        let health = Health::default();
        let reader = Reader::open(&path, Arc::clone(&counters))
            .map_err(|source| OpenError::Database { path: path.clone(), source })?;
        let writer = writer::Writer::start(
            connection,
            path,
            quarantined,
            config,
            Arc::clone(&counters),
            health.stage("store-writer"),
        )?;
        Ok(Self { writer, reader, counters, warnings, health, _lock: lock })
    }

    /// Where the pipeline puts finished requests.
    pub fn sender(&self) -> Sender {
        self.writer.sender()
    }

    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// How the writer does; other stages join it here.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// What was found on opening that a person should know, for instance a quarantined file.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns once everything sent before is on disk or counted as dropped and the bounds are enforced.
    pub fn flush(&self) {
        self.writer.flush();
    }

    /// Writes what is queued and ends the writer thread.
    pub fn close(self) {
        self.writer.stop();
    }
}
