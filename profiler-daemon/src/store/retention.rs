//! What makes the store forget: the oldest requests go when they are too old or the file is too large.
//!
//! Work is done in small transactions between the writer's batches, in step with what comes in, so that the queue
//! does not overflow meanwhile. Freed pages are reused first; what lies above the limit is given back to the file
//! system.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use super::Config;
use super::counters::Counters;
use super::filter::clamp;
use super::schema::{self, with_suffix};

/// Rows deleted in one transaction: about 10 ms of work.
const DELETE_ROWS: usize = 1_024;
/// Pages moved to shorten the file at a time, 8 MB: some 20 ms of work.
const VACUUM_PAGES: u64 = 2_048;
/// What a request takes without its profile, its place in the index included. An underestimate costs one more round.
const ROW_BYTES: u64 = 300;
/// The write-ahead log is moved into the file when it has this size, at most: fewer, longer syncs.
const MAX_LOG_BYTES: u64 = 8 << 20;

/// The log's index, in memory shared with the readers.
const SHARED_BYTES: u64 = 64 << 10;

pub(super) struct Retention {
    path: PathBuf,
    /// Bytes of the files beside it that could not be used.
    quarantined: u64,
    max_age: Duration,
    max_bytes: u64,
    /// For the database file alone.
    max_file_bytes: u64,
    log_bytes: u64,
    /// Bytes that were in use when last looked.
    used: u64,
    counters: Arc<Counters>,
}

impl Retention {
    pub(super) fn new(path: PathBuf, quarantined: u64, config: &Config, counters: Arc<Counters>) -> Self {
        let log_bytes = (config.max_bytes / 8).min(MAX_LOG_BYTES);
        // A transaction that begins when the log is almost due adds to it, so the log is given twice its size.
        let max_file_bytes = config.max_bytes.saturating_sub(2 * log_bytes + SHARED_BYTES + quarantined);
        let (max_age, max_bytes) = (config.max_age, config.max_bytes);
        Self { path, quarantined, max_age, max_bytes, max_file_bytes, log_bytes, used: 0, counters }
    }

    pub(super) fn configure(&self, connection: &Connection) -> rusqlite::Result<()> {
        let pages = self.log_bytes / page_size(connection)?;
        connection.pragma_update(None, "wal_autocheckpoint", clamp(pages))?;
        connection.pragma_update(None, "journal_size_limit", clamp(self.log_bytes))
    }

    /// Takes back what a batch has added, if the store is full: what comes in never makes it larger. Cheap when there
    /// is nothing to do. `true`: there is more to delete, which [`Self::round`] does bit by bit.
    pub(super) fn after_batch(&mut self, connection: &mut Connection) -> rusqlite::Result<bool> {
        let before = self.used;
        loop {
            let over = self.shrink(connection)?;
            if !over || self.used <= before {
                return Ok(over);
            }
        }
    }

    /// One step towards the bounds of age and size, short enough that the queue does not overflow meanwhile. `true`:
    /// it was not the last one.
    pub(super) fn round(&mut self, connection: &mut Connection) -> rusqlite::Result<bool> {
        let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        let age = i64::try_from(self.max_age.as_nanos()).unwrap_or(i64::MAX);
        let too_old = self.delete_oldest(connection, Until::Start(now.saturating_sub(age)))?;
        if too_old == DELETE_ROWS as u64 {
            return Ok(true);
        }
        self.shrink(connection)
    }

    /// One step towards the size. `true`: there is more to do.
    fn shrink(&mut self, connection: &mut Connection) -> rusqlite::Result<bool> {
        let page = page_size(connection)?;
        // Rows are deleted a little before the file is at its limit, or every batch would have to move pages.
        let target = self.max_file_bytes / 32 * 31;
        let used = self.measure(connection, page)?;
        if used > target && self.delete_oldest(connection, Until::Bytes(used - target))? > 0 {
            return Ok(self.measure(connection, page)? > target || self.give_back(connection, page)?);
        }
        self.give_back(connection, page)
    }

    /// Bytes of the pages that hold something.
    fn measure(&mut self, connection: &Connection, page: u64) -> rusqlite::Result<u64> {
        let pages: u64 = pragma(connection, "page_count")?;
        let free: u64 = pragma(connection, "freelist_count")?;
        self.used = pages.saturating_sub(free) * page;
        Ok(self.used)
    }

    /// Shortens the file by some of its free pages, where it is above its limit. `true`: there are more.
    fn give_back(&self, connection: &Connection, page: u64) -> rusqlite::Result<bool> {
        let pages: u64 = pragma(connection, "page_count")?;
        let free: u64 = pragma(connection, "freelist_count")?;
        let excess = pages.saturating_sub(self.max_file_bytes / page).min(free);
        if excess > 0 {
            let some = excess.min(VACUUM_PAGES);
            // Steps once per freed page.
            let mut statement = connection.prepare(&format!("PRAGMA incremental_vacuum({some})"))?;
            let mut rows = statement.query([])?;
            while rows.next()?.is_some() {}
        }
        if self.bytes() > self.max_bytes {
            // Freed pages are still in the file, and in the log, until the log is moved.
            truncate_log(connection)?;
        }
        self.counters.bytes.store(self.bytes(), Relaxed);
        Ok(excess > VACUUM_PAGES)
    }

    /// Deletes the oldest requests until the condition is met, but no more than [`DELETE_ROWS`].
    fn delete_oldest(&self, connection: &mut Connection, until: Until) -> rusqlite::Result<u64> {
        // The transaction holds no write lock until it is known that something goes.
        let tx = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
        let Some((start, id)) = last_to_go(&tx, until)? else { return Ok(0) };
        tx.prepare_cached(
            "DELETE FROM profiles WHERE seq IN \
             (SELECT profile FROM requests WHERE (start, id) <= (?, ?) AND profile IS NOT NULL)",
        )?
        .execute(rusqlite::params![start, id])?;
        let rows = tx
            .prepare_cached("DELETE FROM requests WHERE (start, id) <= (?, ?)")?
            .execute(rusqlite::params![start, id])? as u64;
        tx.commit()?;
        self.counters.deleted.fetch_add(rows, Relaxed);
        Ok(rows)
    }

    fn bytes(&self) -> u64 {
        let size = |suffix| with_suffix(&self.path, suffix).metadata().map_or(0, |meta| meta.len());
        size("") + size("-wal") + size("-shm") + self.quarantined
    }
}

/// When enough is deleted.
#[derive(Clone, Copy)]
enum Until {
    /// About this much space is free.
    Bytes(u64),
    /// Only requests that started then or later are left.
    Start(i64),
}

/// The keys of the youngest request that has to go.
fn last_to_go(connection: &Connection, until: Until) -> rusqlite::Result<Option<(i64, [u8; 12])>> {
    let mut statement = connection.prepare_cached(
        "SELECT r.start, r.id, coalesce(length(p.data), 0) FROM requests r \
         LEFT JOIN profiles p ON p.seq = r.profile ORDER BY r.start, r.id LIMIT ?",
    )?;
    let mut rows = statement.query([DELETE_ROWS as i64])?;
    let mut last = None;
    let mut freed = 0;
    while let Some(row) = rows.next()? {
        let start: i64 = row.get(0)?;
        match until {
            Until::Start(first_kept) if start >= first_kept => break,
            Until::Bytes(wanted) if freed >= wanted => break,
            _ => {}
        }
        freed += ROW_BYTES + super::row::natural(row, 2)?;
        last = Some((start, row.get(1)?));
    }
    Ok(last)
}

/// Moves the log into the file and empties it, unless a reader still needs it; then the next batch tries again.
fn truncate_log(connection: &Connection) -> rusqlite::Result<()> {
    // Waiting for readers is what the writer must not do.
    connection.busy_timeout(Duration::ZERO)?;
    let result = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    connection.busy_timeout(schema::BUSY)?;
    result
}

fn page_size(connection: &Connection) -> rusqlite::Result<u64> {
    pragma(connection, "page_size")
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<u64> {
    connection.pragma_query_value(None, name, |row| super::row::natural(row, 0))
}
