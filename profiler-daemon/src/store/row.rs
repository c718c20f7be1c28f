//! A request record as a row, both ways.
//!
//! One list of columns serves writing and reading, and the record is taken apart field by field, so that a field added
//! to it does not compile until it has a place here.

use rusqlite::types::Type;
use rusqlite::{Row, Statement};

use super::filter::{RequestId, clamp};
use crate::record::{Attribution, Boundary, OffCpu, Outcome, RequestRecord};

/// All columns, in the order of [`bind`] and [`read`].
pub(super) const COLUMNS: &str = "start, id, pid, tid, service, method, path, route, status, duration_ns, ttfb_ns, \
    request_bytes, response_bytes, on_cpu_ns, runqueue_ns, off_network, off_disk, off_lock, off_gil, off_sleep, \
    off_other, samples, tail_samples, lost_events, boundary, attribution, outcome, note, trace_id, sampled_cpu_ns, \
    profile";
pub(super) const COLUMN_COUNT: usize = 31;

/// Binds all columns of a record and runs the statement. `false`: a record with this id is there already.
pub(super) fn insert(
    statement: &mut Statement<'_>,
    record: &RequestRecord,
    id: RequestId,
    sampled_cpu_ns: Option<u64>,
    profile: Option<i64>,
) -> rusqlite::Result<bool> {
    let RequestRecord {
        id: _,
        pid,
        tid,
        service,
        method,
        path,
        route,
        status,
        start,
        duration_ns,
        ttfb_ns,
        request_bytes,
        response_bytes,
        on_cpu_ns,
        runqueue_ns,
        off_cpu_ns,
        samples,
        tail_samples,
        lost_events,
        boundary,
        attribution,
        outcome,
        note,
        trace_id,
        profile: _,
    } = record;
    let off = |part: fn(&OffCpu) -> u64| off_cpu_ns.as_ref().map(part).map(clamp);
    let rows = statement.execute(rusqlite::params![
        start,
        &id.0[..],
        pid,
        tid,
        service,
        method,
        path,
        route,
        status,
        clamp(*duration_ns),
        ttfb_ns.map(clamp),
        clamp(*request_bytes),
        clamp(*response_bytes),
        on_cpu_ns.map(clamp),
        runqueue_ns.map(clamp),
        off(|o| o.network),
        off(|o| o.disk),
        off(|o| o.lock),
        off(|o| o.gil),
        off(|o| o.sleep),
        off(|o| o.other),
        clamp(*samples),
        clamp(*tail_samples),
        clamp(*lost_events),
        boundary.name(),
        attribution.name(),
        outcome.name(),
        note,
        trace_id,
        sampled_cpu_ns.map(clamp),
        profile,
    ])?;
    Ok(rows == 1)
}

/// The record in a row of [`COLUMNS`].
pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<RequestRecord> {
    let off_cpu_ns = match row.get::<_, Option<i64>>(15)? {
        None => None,
        Some(network) => Some(OffCpu {
            network: unsigned(network),
            disk: natural(row, 16)?,
            lock: natural(row, 17)?,
            gil: natural(row, 18)?,
            sleep: natural(row, 19)?,
            other: natural(row, 20)?,
        }),
    };
    Ok(RequestRecord {
        start: row.get(0)?,
        id: RequestId(row.get(1)?).to_string(),
        pid: row.get(2)?,
        tid: row.get(3)?,
        service: row.get(4)?,
        method: row.get(5)?,
        path: row.get(6)?,
        route: row.get(7)?,
        status: row.get(8)?,
        duration_ns: natural(row, 9)?,
        ttfb_ns: row.get::<_, Option<i64>>(10)?.map(unsigned),
        request_bytes: natural(row, 11)?,
        response_bytes: natural(row, 12)?,
        on_cpu_ns: row.get::<_, Option<i64>>(13)?.map(unsigned),
        runqueue_ns: row.get::<_, Option<i64>>(14)?.map(unsigned),
        off_cpu_ns,
        samples: natural(row, 21)?,
        tail_samples: natural(row, 22)?,
        lost_events: natural(row, 23)?,
        boundary: named(row, 24, Boundary::from_name)?,
        attribution: named(row, 25, Attribution::from_name)?,
        outcome: named(row, 26, Outcome::from_name)?,
        note: row.get(27)?,
        trace_id: row.get(28)?,
        profile: row.get::<_, Option<i64>>(30)?.is_some(),
    })
}

fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// An integer column that is never negative.
pub(super) fn natural(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get(column).map(unsigned)
}

pub(super) fn named<T>(row: &Row<'_>, column: usize, parse: fn(&str) -> Option<T>) -> rusqlite::Result<T> {
    let name: String = row.get(column)?;
    parse(&name).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, format!("unknown name {name:?}").into())
    })
}
