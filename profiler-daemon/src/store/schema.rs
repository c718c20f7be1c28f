//! The database file: its tables, its version, and what happens to a file that is not one of ours.
//!
//! A damaged file, or one of another version, is renamed to `reqprof.db.corrupt-<time>` and named in a warning; a fresh
//! one takes its place. Profiles are observations, not the users' data: starting empty beats not starting.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::OpenError;
use super::directory::private_file;

/// Raised with every change of [`TABLES`].
const VERSION: i64 = 2;
const FILE: &str = "reqprof.db";
/// Quarantined files that are kept, if all of them are no more than half of what the store may have.
const KEPT_QUARANTINED: usize = 3;
/// The pages that the writer keeps in memory, KiB: the hot ends of the trees and their upper levels.
const WRITER_CACHE_KIB: i64 = 24 << 10;

/// `requests` is clustered by start, so that the newest are read and the oldest deleted in one place. Ids are 12 bytes
/// and in the order of starts as well. `profile` is the row of `profiles`.
///
/// There is deliberately no index by duration, service or route: its insertions would be scattered, each dirtying a
/// page of its own, which
/// cost four fifths of the writer's rate at a million rows; a scan of a million rows takes a fraction of a second.
const TABLES: &str = "
CREATE TABLE requests (
    start INTEGER NOT NULL, id BLOB NOT NULL, pid INTEGER NOT NULL, tid INTEGER NOT NULL, service TEXT NOT NULL,
    method TEXT, path TEXT, route TEXT, status INTEGER, duration_ns INTEGER NOT NULL,
    ttfb_ns INTEGER, request_bytes INTEGER NOT NULL, response_bytes INTEGER NOT NULL, on_cpu_ns INTEGER,
    runqueue_ns INTEGER, off_network INTEGER, off_disk INTEGER, off_lock INTEGER, off_gil INTEGER, off_sleep INTEGER,
    off_other INTEGER, samples INTEGER NOT NULL, tail_samples INTEGER NOT NULL, lost_events INTEGER NOT NULL,
    boundary TEXT NOT NULL, attribution TEXT NOT NULL, outcome TEXT NOT NULL, note TEXT, trace_id TEXT,
    sampled_cpu_ns INTEGER, profile INTEGER,
    PRIMARY KEY (start, id)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX requests_id ON requests (id);
CREATE TABLE profiles (
    seq INTEGER PRIMARY KEY, raw_bytes INTEGER NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE TABLE heartbeat (beat INTEGER NOT NULL) STRICT;
INSERT INTO heartbeat VALUES (0);
";

/// How long the writer waits for a lock that only another program, such as a person with `sqlite3`, can hold.
pub(super) const BUSY: Duration = Duration::from_secs(5);

pub(super) struct Opened {
    pub connection: Connection,
    pub path: PathBuf,
    /// Bytes of the quarantined files.
    pub quarantined: u64,
    pub warnings: Vec<String>,
}

/// Opens the database in a directory that is ours and locked.
pub(super) fn open(dir: &Path, max_bytes: u64) -> Result<Opened, OpenError> {
    let path = dir.join(FILE);
    let io = |source| OpenError::Io { path: path.clone(), source };
    let room = max_bytes / 2;
    let mut warnings = Vec::new();
    let problem = match try_open(&path)? {
        Attempt::Ok(connection) => {
            let quarantined = forget_old_quarantines(dir, room).map_err(io)?;
            return Ok(Opened { connection, path, quarantined, warnings });
        }
        Attempt::Unusable(problem) => problem,
    };
    let moved = quarantine(dir).map_err(io)?;
    let quarantined = forget_old_quarantines(dir, room).map_err(io)?;
    let fate = if moved.exists() {
        format!("moved to {}", moved.display())
    } else {
        "deleted, because it is more than half of what the store may have".to_owned()
    };
    warnings.push(format!(
        "the store {} could not be used ({problem}); it was {fate} and a new one was started",
        path.display(),
    ));
    match try_open(&path)? {
        Attempt::Ok(connection) => Ok(Opened { connection, path, quarantined, warnings }),
        Attempt::Unusable(problem) => Err(OpenError::Io {
            path,
            source: std::io::Error::other(format!("a new store is unusable: {problem}")),
        }),
    }
}

enum Attempt {
    Ok(Connection),
    /// The file is there, but it is not a store of this version.
    Unusable(String),
}

fn try_open(path: &Path) -> Result<Attempt, OpenError> {
    for suffix in ["-wal", "-shm", "-journal"] {
        let file = with_suffix(path, suffix);
        if file.symlink_metadata().is_ok_and(|m| !m.is_file()) {
            return Err(OpenError::Planted(file));
        }
    }
    // SQLite gives its other files the mode of this one.
    drop(private_file(path)?);
    match prepare(path) {
        Ok(Ok(connection)) => Ok(Attempt::Ok(connection)),
        Ok(Err(problem)) => Ok(Attempt::Unusable(problem)),
        Err(e) => match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
                Ok(Attempt::Unusable(e.to_string()))
            }
            _ => Err(OpenError::Database { path: path.to_path_buf(), source: e }),
        },
    }
}

/// The inner error says why the file is not a store of ours.
fn prepare(path: &Path) -> rusqlite::Result<Result<Connection, String>> {
    let mut connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW,
    )?;
    connection.busy_timeout(BUSY)?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |r| r.get(0))?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))?;
    let fresh = version == 0 && tables == 0;
    if !fresh && version != VERSION {
        return Ok(Err(format!("its version is {version}, this program uses version {VERSION}")));
    }
    if fresh {
        // Takes effect only before the first table: lets the file shrink when rows are deleted.
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    if fresh {
        let tx = connection.transaction()?;
        tx.execute_batch(TABLES)?;
        tx.pragma_update(None, "user_version", VERSION)?;
        tx.commit()?;
        return Ok(Ok(connection));
    }
    let damage: Option<String> = connection
        .query_row("PRAGMA quick_check(1)", [], |r| r.get(0))
        .optional()?
        .filter(|text| text != "ok");
    Ok(match damage {
        Some(text) => Err(text),
        None => Ok(connection),
    })
}

fn quarantine(dir: &Path) -> std::io::Result<PathBuf> {
    let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.9fZ").to_string();
    let path = dir.join(FILE);
    let target = dir.join(format!("{FILE}.corrupt-{stamp}"));
    std::fs::rename(&path, &target)?;
    for suffix in ["-wal", "-shm"] {
        match std::fs::rename(with_suffix(&path, suffix), with_suffix(&target, suffix)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(target)
}

/// Keeps the newest that fit; returns their bytes.
fn forget_old_quarantines(dir: &Path, room: u64) -> std::io::Result<u64> {
    let prefix = format!("{FILE}.corrupt-");
    let mut stamps = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        if let Some(stamp) = name.to_str().and_then(|n| n.strip_prefix(&prefix))
            && !stamp.contains("Z-")
        {
            stamps.push(stamp.to_owned());
        }
    }
    stamps.sort_unstable_by(|a, b| b.cmp(a));
    let mut kept = 0;
    for (newer, stamp) in stamps.iter().enumerate() {
        let file = dir.join(format!("{prefix}{stamp}"));
        let parts = ["-wal", "-shm", ""].map(|suffix| with_suffix(&file, suffix));
        let bytes: u64 = parts.iter().filter_map(|part| part.symlink_metadata().ok()).map(|m| m.len()).sum();
        if newer < KEPT_QUARANTINED && kept + bytes <= room {
            kept += bytes;
            continue;
        }
        for part in parts {
            match std::fs::remove_file(part) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    Ok(kept)
}

/// `reqprof.db` and `-wal` make `reqprof.db-wal`.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}
