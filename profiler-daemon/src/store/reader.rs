//! Reading what is stored: lists, single requests, profiles, and sums over routes.
//!
//! Readers have connections of their own, so they see a consistent state and never wait for the writer. Every answer
//! is bounded: in rows, in merged profiles, in distinct routes.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rusqlite::types::{Type, Value};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params_from_iter};
use rustc_hash::FxHashMap;
use serde::Serialize;

use super::counters::Counters;
use super::filter::{BadCursor, Cursor, Filter, RequestId, Sort};
use super::row::{self, named, natural};
use super::writer::MAX_PROFILE_BYTES;
use crate::percentile::nearest_rank;
use crate::profile::{DecodeError, Merger, Profile};
use crate::record::{Attribution, OffCpu, Outcome, RequestRecord, is_error};

/// Queries that run at the same time; a query keeps one core busy.
const CONNECTIONS: usize = 4;
/// How long a query waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);
/// Profiles in a merged profile: decoding them takes a second or two, and more would not change the picture.
pub(super) const MAX_MERGED: usize = 2_000;
/// Rows of one page of a list.
pub const MAX_ROWS: usize = 1_000;
/// Distinct routes in an answer; requests of others are summed up as `_OTHER`.
const MAX_ROUTES: usize = 10_000;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("too many queries at once")]
    Busy,
    #[error("the answer took too long; ask for fewer requests, for instance with a shorter `since`")]
    Deadline,
    #[error(transparent)]
    BadCursor(#[from] BadCursor),
    #[error("the store cannot be read: {0}")]
    Database(#[from] rusqlite::Error),
    #[error("the stored profile cannot be unpacked: {0}")]
    Unpack(#[from] std::io::Error),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// One page of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    pub records: Vec<RequestRecord>,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
}

/// The profiles of many requests in one. Short requests have often no sample, and without them the profile would tell
/// of the long ones only: their number and durations are in it too, down to the oldest request whose profile is.
#[derive(Clone, Debug)]
pub struct Merged {
    /// Of [`Self::merged`] and [`Self::without_samples`] requests.
    pub profile: Profile,
    /// Requests whose profiles are in it.
    pub merged: u64,
    /// Requests that were sampled, but no sample hit them.
    pub without_samples: u64,
    /// Profiles that could not be read.
    pub unreadable: u64,
    /// Older requests matched too, but the number of merged profiles is bounded.
    pub truncated: bool,
}

/// What the stored requests of one route of one service add up to. Percentiles are of the nearest rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RouteStats {
    pub service: String,
    /// `None`: those whose request line was not seen.
    pub route: Option<String>,
    pub count: u64,
    /// See [`is_error`].
    pub errors: u64,
    pub p50_ns: u64,
    pub p95_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    /// Sum of the durations.
    pub total_ns: u64,
    /// Sums over the requests for which it is known; `None` when it is for none.
    pub on_cpu_ns: Option<u64>,
    pub off_cpu_ns: Option<OffCpu>,
    /// CPU time that the samples stand for; `None` when nothing was sampled.
    pub sampled_cpu_ns: Option<u64>,
    pub samples: u64,
    /// Requests with a stored profile.
    pub profiles: u64,
}

/// A way to read. Clones share a few connections.
#[derive(Clone)]
pub struct Reader {
    pool: Arc<Pool>,
    counters: Arc<Counters>,
}

struct Pool {
    free: Receiver<Connection>,
    back: Sender<Connection>,
}

/// A connection that returns to the pool when dropped.
struct Borrowed<'a> {
    connection: Option<Connection>,
    pool: &'a Pool,
}

impl Deref for Borrowed<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection.as_ref().expect("taken only by drop")
    }
}

impl DerefMut for Borrowed<'_> {
    fn deref_mut(&mut self) -> &mut Connection {
        self.connection.as_mut().expect("taken only by drop")
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Never full: the channel has room for every connection there is.
            let _ = self.pool.back.try_send(connection);
        }
    }
}

impl Reader {
    pub(super) fn open(path: &Path, counters: Arc<Counters>) -> rusqlite::Result<Self> {
        let (back, free) = bounded(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            let connection = Connection::open_with_flags(
                path,
                OpenFlags::SQLITE_OPEN_READ_ONLY
                    | OpenFlags::SQLITE_OPEN_NO_MUTEX
                    | OpenFlags::SQLITE_OPEN_NOFOLLOW,
            )?;
            connection.busy_timeout(PATIENCE)?;
            connection.pragma_update(None, "trusted_schema", false)?;
            // Cannot fail: the channel was made for this many.
            let _ = back.try_send(connection);
        }
        Ok(Self { pool: Arc::new(Pool { free, back }), counters })
    }

    /// The store's totals and its state.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    fn borrow(&self) -> Result<Borrowed<'_>, ReadError> {
        let connection = self.pool.free.recv_timeout(PATIENCE).map_err(|_| ReadError::Busy)?;
        Ok(Borrowed { connection: Some(connection), pool: &self.pool })
    }

    /// One page of matching requests; `limit` is at most 1,000 rows.
    pub fn list(
        &self,
        filter: &Filter,
        sort: Sort,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<Page, ReadError> {
        let limit = limit.min(MAX_ROWS);
        let (mut sql, mut values) = filter.sql();
        let (keys, marks) =
            if sort.by_duration() { ("duration_ns, start, id", "?, ?, ?") } else { ("start, id", "?, ?") };
        if let Some(text) = cursor {
            let Cursor { duration_ns, start, id } = Cursor::decode(text, sort)?;
            let beyond = if sort.descending() { "<" } else { ">" };
            sql.push_str(&format!(" AND ({keys}) {beyond} ({marks})"));
            if sort.by_duration() {
                values.push(Value::Integer(duration_ns));
            }
            values.extend([Value::Integer(start), Value::Blob(id.0.to_vec())]);
        }
        let order = if sort.descending() { keys.replace(',', " DESC,") + " DESC" } else { keys.to_owned() };
        // One row more than asked for tells whether there is a next page.
        let sql = format!(
            "SELECT {} FROM requests WHERE {sql} ORDER BY {order} LIMIT {}",
            row::COLUMNS,
            limit.saturating_add(1)
        );
        let connection = self.borrow()?;
        let mut statement = connection.prepare_cached(&sql)?;
        let mut records = statement
            .query_map(params_from_iter(values), row::read)?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        let more = records.len() > limit;
        records.truncate(limit);
        let next = records.last().filter(|_| more).and_then(|last| {
            let id = last.id.parse().ok()?;
            let duration_ns = super::filter::clamp(last.duration_ns);
            Some(Cursor { duration_ns, start: last.start, id }.encode(sort))
        });
        Ok(Page { records, next })
    }

    /// One request; `None`: there is none of this id.
    pub fn get(&self, id: RequestId) -> Result<Option<RequestRecord>, ReadError> {
        let connection = self.borrow()?;
        let mut statement =
            connection.prepare_cached(&format!("SELECT {} FROM requests WHERE id = ?", row::COLUMNS))?;
        Ok(statement.query_row([&id.0[..]], row::read).optional()?)
    }

    /// The profile of one request; `None`: there is no such request or it has no profile.
    pub fn profile(&self, id: RequestId) -> Result<Option<Profile>, ReadError> {
        let packed = {
            let connection = self.borrow()?;
            let mut statement = connection.prepare_cached(
                "SELECT p.raw_bytes, p.data FROM requests r JOIN profiles p ON p.seq = r.profile WHERE r.id = ?",
            )?;
            statement.query_row([&id.0[..]], Packed::read).optional()?
        };
        packed.map(|packed| packed.unpack()).transpose()
    }

    /// The profiles of the newest matching requests, added up.
    ///
    /// Every profile is read on its own: one long query would keep the write-ahead log from being emptied for as long
    /// as the profiles are unpacked.
    pub fn merged(&self, filter: &Filter, until: Deadline) -> Result<Merged, ReadError> {
        let Selected { keys, truncated, unsampled } = self.select(filter)?;
        let mut all = Merged {
            profile: Profile::default(),
            merged: 0,
            without_samples: unsampled.requests,
            unreadable: 0,
            truncated,
        };
        let mut merger = Merger::default();
        for key in keys {
            until.check()?;
            // Deleted meanwhile, because of its age or the store's size: as if it had not been there.
            let Some(packed) = self.packed(key)? else { continue };
            match packed.unpack() {
                Ok(profile) => {
                    merger.add(&profile);
                    all.merged += 1;
                }
                Err(e) => {
                    all.unreadable += 1;
                    tracing::debug!("a stored profile was left out of a merged one: {e}");
                }
            }
        }
        merger.add_unsampled(unsampled.requests, unsampled.duration_ns);
        all.profile = merger.finish();
        Ok(all)
    }

    /// What a merged profile is made of, in one consistent and short look.
    fn select(&self, filter: &Filter) -> Result<Selected, ReadError> {
        let (condition, values) = filter.sql();
        let mut connection = self.borrow()?;
        let look = connection.transaction()?;
        let mut keys = look
            .prepare_cached(&format!(
                "SELECT start, id FROM requests WHERE {condition} AND profile IS NOT NULL \
                 ORDER BY start DESC, id DESC LIMIT {}",
                MAX_MERGED + 1
            ))?
            .query_map(params_from_iter(&values), |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<Vec<Key>>>()?;
        let truncated = keys.len() > MAX_MERGED;
        keys.truncate(MAX_MERGED);
        // Only what lies in the same time as the profiles may be added to them.
        let (from, mut values) = match keys.last().filter(|_| truncated) {
            Some((start, id)) => (
                " AND (start, id) >= (?, ?)",
                [values, vec![Value::Integer(*start), Value::Blob(id.to_vec())]].concat(),
            ),
            None => ("", values),
        };
        values.push(Value::Text(Attribution::None.name().to_owned()));
        let unsampled = look
            .prepare_cached(&format!(
                "SELECT count(*), coalesce(sum(duration_ns), 0) FROM requests \
                 WHERE {condition}{from} AND attribution != ? AND samples = 0 AND profile IS NULL"
            ))?
            .query_row(params_from_iter(&values), |row| {
                Ok(Unsampled { requests: natural(row, 0)?, duration_ns: natural(row, 1)? })
            })?;
        Ok(Selected { keys, truncated, unsampled })
    }

    /// `None`: it has been deleted.
    fn packed(&self, (start, id): Key) -> Result<Option<Packed>, ReadError> {
        let connection = self.borrow()?;
        let mut statement = connection.prepare_cached(
            "SELECT p.raw_bytes, p.data FROM requests r JOIN profiles p ON p.seq = r.profile \
             WHERE r.start = ? AND r.id = ?",
        )?;
        Ok(statement.query_row(rusqlite::params![start, id], Packed::read).optional()?)
    }

    /// Sums over the matching requests, by service and route, the largest total time first.
    pub fn routes(&self, filter: &Filter, until: Deadline) -> Result<Vec<RouteStats>, ReadError> {
        let (condition, values) = filter.sql();
        let sql = format!(
            "SELECT service, route, status, duration_ns, on_cpu_ns, off_network, off_disk, off_lock, off_gil, \
             off_sleep, off_other, sampled_cpu_ns, samples, profile, outcome FROM requests WHERE {condition}"
        );
        let connection = self.borrow()?;
        let mut statement = connection.prepare_cached(&sql)?;
        let mut rows = statement.query(params_from_iter(values))?;
        // By service, then route: looked up without copying the names of every row.
        // A route that is not known is empty there, which no route is.
        let mut index: FxHashMap<String, FxHashMap<String, usize>> = FxHashMap::default();
        let mut sums: Vec<RouteSum> = Vec::new();
        while let Some(row) = rows.next()? {
            until.check()?;
            let (service, route) =
                (borrowed(row, 0)?.unwrap_or_default(), borrowed(row, 1)?.unwrap_or_default());
            let known = index.get(service).and_then(|routes| routes.get(route)).copied();
            let at = known.unwrap_or_else(|| {
                let full = sums.len() >= MAX_ROUTES;
                let (service, route) = if full { ("_OTHER", "_OTHER") } else { (service, route) };
                let routes = index.entry(service.to_owned()).or_default();
                *routes.entry(route.to_owned()).or_insert_with(|| {
                    sums.push(RouteSum::new(service, Some(route).filter(|route| !route.is_empty())));
                    sums.len() - 1
                })
            });
            sums[at].add(row)?;
        }
        let mut stats: Vec<RouteStats> = sums.into_iter().map(RouteSum::finish).collect();
        stats.sort_by(|a, b| {
            b.total_ns.cmp(&a.total_ns).then_with(|| (&a.service, &a.route).cmp(&(&b.service, &b.route)))
        });
        Ok(stats)
    }
}

/// A request in the order of the table.
type Key = (i64, [u8; 12]);

/// What a merged profile is made of.
struct Selected {
    /// Requests with a profile, the newest first.
    keys: Vec<Key>,
    /// There are older ones.
    truncated: bool,
    unsampled: Unsampled,
}

/// Requests that no sample hit.
struct Unsampled {
    requests: u64,
    duration_ns: u64,
}

/// When an answer is no longer waited for: work for nobody would only keep others waiting.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    pub fn after(time: Duration) -> Self {
        Self(Instant::now() + time)
    }

    fn check(self) -> Result<(), ReadError> {
        if Instant::now() < self.0 { Ok(()) } else { Err(ReadError::Deadline) }
    }
}

/// A profile as it is stored.
struct Packed {
    raw_bytes: u64,
    data: Vec<u8>,
}

impl Packed {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self { raw_bytes: natural(row, 0)?, data: row.get(1)? })
    }

    fn unpack(&self) -> Result<Profile, ReadError> {
        // The size comes from a file that may be damaged, so it is not trusted beyond what the writer lets in.
        let capacity = usize::try_from(self.raw_bytes).unwrap_or(usize::MAX).min(MAX_PROFILE_BYTES);
        Ok(Profile::decode(&zstd::bulk::decompress(&self.data, capacity)?)?)
    }
}

/// [`RouteStats`] while rows still come in.
struct RouteSum {
    stats: RouteStats,
    /// All of them, for exact percentiles: 8 bytes where the row has some 200 on disk.
    durations: Vec<u64>,
}

impl RouteSum {
    fn new(service: &str, route: Option<&str>) -> Self {
        let stats = RouteStats {
            service: service.to_owned(),
            route: route.map(str::to_owned),
            count: 0,
            errors: 0,
            p50_ns: 0,
            p95_ns: 0,
            p99_ns: 0,
            max_ns: 0,
            total_ns: 0,
            on_cpu_ns: None,
            off_cpu_ns: None,
            sampled_cpu_ns: None,
            samples: 0,
            profiles: 0,
        };
        Self { stats, durations: Vec::new() }
    }

    fn add(&mut self, row: &Row<'_>) -> rusqlite::Result<()> {
        let s = &mut self.stats;
        let duration = natural(row, 3)?;
        self.durations.push(duration);
        s.count += 1;
        s.errors += u64::from(is_error(row.get(2)?, named(row, 14, Outcome::from_name)?));
        s.total_ns = s.total_ns.saturating_add(duration);
        s.max_ns = s.max_ns.max(duration);
        add_known(&mut s.on_cpu_ns, row, 4)?;
        if row.get::<_, Option<i64>>(5)?.is_some() {
            let off = s.off_cpu_ns.get_or_insert_default();
            let parts = [
                &mut off.network,
                &mut off.disk,
                &mut off.lock,
                &mut off.gil,
                &mut off.sleep,
                &mut off.other,
            ];
            for (column, part) in (5..).zip(parts) {
                *part = part.saturating_add(natural(row, column)?);
            }
        }
        add_known(&mut s.sampled_cpu_ns, row, 11)?;
        s.samples = s.samples.saturating_add(natural(row, 12)?);
        s.profiles += u64::from(row.get::<_, Option<i64>>(13)?.is_some());
        Ok(())
    }

    fn finish(mut self) -> RouteStats {
        self.durations.sort_unstable();
        let rank = |percent| nearest_rank(&self.durations, percent);
        let (p50, p95, p99) = (rank(50), rank(95), rank(99));
        (self.stats.p50_ns, self.stats.p95_ns, self.stats.p99_ns) = (p50, p95, p99);
        self.stats
    }
}

/// A text column without copying it; `None` where it is null.
fn borrowed<'a>(row: &'a Row<'_>, column: usize) -> rusqlite::Result<Option<&'a str>> {
    let text = row.get_ref(column)?.as_str_or_null();
    text.map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
}

fn add_known(sum: &mut Option<u64>, row: &Row<'_>, column: usize) -> rusqlite::Result<()> {
    if row.get::<_, Option<i64>>(column)?.is_some() {
        *sum = Some(sum.unwrap_or(0).saturating_add(natural(row, column)?));
    }
    Ok(())
}
