//! A disk that is full: what is there stays, what is lost is counted, and the store recovers by itself.

use std::fs;
use std::process::Command;

use super::*;

/// A small file system of its own, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size},mode=0700");
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        status.is_ok_and(|s| s.success()).then(|| Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, so that a failed test's open files do not hide its message.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_degrades_the_store_until_there_is_space() {
    let Some(disk) = SmallDisk::mount("4m") else {
        crate::skip::skip(
            "a_full_disk_degrades_the_store_until_there_is_space",
            "mounting a file system needs root",
        );
        return;
    };
    let dir = disk.0.path();
    let store = Store::open(&config(dir)).unwrap();
    for n in 0..100 {
        assert!(store.sender().try_send(entry(record(NEW_YEAR, n))));
    }
    store.flush();
    assert_eq!(store.counters().written(), 100);

    // Takes what is left, to the last byte.
    let filler = dir.join("filler");
    assert!(fs::write(&filler, vec![0; 8 << 20]).is_err());
    let sent = 2_000_u64;
    for n in 1_000..1_000 + sent {
        // Some would be refused anyway; whatever becomes of their batch, each is counted once.
        let id = if n.is_multiple_of(10) { "../x".to_owned() } else { id(n) };
        assert!(store.sender().try_send(entry(RequestRecord { id, ..record(NEW_YEAR, n) })));
    }
    store.flush();
    let counters = store.counters();
    let why = counters.degraded().expect("nothing more can be written");
    assert!(why.starts_with("disk_full"), "{why}");
    let lost = counters.dropped(DropReason::DiskFull);
    assert!(lost > 0);
    assert_eq!(counters.written() + lost + counters.dropped(DropReason::InvalidId), 100 + sent);
    // What was written can still be read.
    let reader = store.reader();
    assert_eq!(reader.get(id(99).parse().unwrap()).unwrap(), Some(record(NEW_YEAR, 99)));

    fs::remove_file(&filler).unwrap();
    store.flush();
    assert_eq!(counters.degraded(), None);
    assert!(store.sender().try_send(entry(record(NEW_YEAR, 9_999))));
    store.flush();
    assert!(reader.get(id(9_999).parse().unwrap()).unwrap().is_some());
    assert_eq!(counters.dropped(DropReason::DiskFull), lost);
    let written = counters.written();
    store.close();
    let db = rusqlite::Connection::open(dir.join("reqprof.db")).unwrap();
    let check: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(check, "ok");
    let rows: i64 = db.query_row("SELECT count(*) FROM requests", [], |r| r.get(0)).unwrap();
    assert_eq!(rows, written as i64);
}
