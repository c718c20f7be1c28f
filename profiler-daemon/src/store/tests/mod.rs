//! The store as its users see it: through [`Store`], [`Sender`] and [`Reader`] on a real directory.

mod bounds;
mod faults;
mod kill;
mod open;
mod read;

use std::path::Path;

use super::*;
use crate::record::{Attribution, Boundary, OffCpu, Outcome, RequestRecord};

/// 2026-01-01T00:00:00Z.
const NEW_YEAR: i64 = 1_767_225_600_000_000_000;

fn id(n: u64) -> String {
    format!("{n:024x}")
}

/// Request number `n`, which started `n` ns after `epoch`; nothing about it is unknown.
fn record(epoch: i64, n: u64) -> RequestRecord {
    RequestRecord {
        id: id(n),
        pid: 100,
        tid: 101,
        service: "shop".into(),
        method: Some("GET".into()),
        path: Some(format!("/orders/{n}")),
        route: Some("/orders/{id}".into()),
        status: Some(200),
        start: epoch + n as i64,
        duration_ns: 1_000 + n,
        ttfb_ns: Some(900),
        request_bytes: 350,
        response_bytes: 12_000,
        on_cpu_ns: Some(600),
        runqueue_ns: Some(100),
        off_cpu_ns: Some(OffCpu { network: 1, disk: 2, lock: 3, gil: 4, sleep: 5, other: 6 }),
        samples: 7,
        tail_samples: 1,
        lost_events: 2,
        boundary: Boundary::Uprobe,
        attribution: Attribution::Thread,
        outcome: Outcome::Complete,
        note: Some("a remark".into()),
        trace_id: Some("0af7651916cd43dd8448eb211c80319c".into()),
        profile: false,
    }
}

fn entry(record: RequestRecord) -> Entry {
    Entry { record, sampled_cpu_ns: Some(5), profile: None }
}

/// Never forgets because of age, so that fixed times can be used.
fn config(dir: &Path) -> Config {
    Config { max_age: Duration::MAX, ..Config::new(dir) }
}

/// Longer than any answer of a test takes.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap()
}

fn ids(page: &Page) -> Vec<u64> {
    page.records.iter().map(|r| u64::from_str_radix(&r.id, 16).unwrap()).collect()
}
