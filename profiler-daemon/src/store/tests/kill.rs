//! `kill -9` while writing: every record that was reported as stored is there, whole, and nothing is half there.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::*;

const DIR: &str = "REQPROF_TEST_STORE";
const FIRST: &str = "REQPROF_TEST_FIRST";
const PROFILE_BYTES: usize = 3_000;

#[test]
#[ignore = "the process that the next test kills"]
fn child_that_writes_until_it_is_killed() {
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let store = Store::open(&config(&dir)).unwrap();
    for n in first.. {
        let profile = Some(vec![n as u8; PROFILE_BYTES]);
        if !store.sender().try_send(Entry { profile, ..entry(record(NEW_YEAR, n)) }) {
            std::thread::yield_now();
        }
        if n % 700 == 699 {
            store.flush();
            println!("stored {}", store.counters().written());
        }
    }
}

#[test]
fn kill_9_leaves_whole_records_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut promised = 0;
    for round in 0..4_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::kill::child_that_writes_until_it_is_killed"])
            .args(["--ignored", "--nocapture"])
            .env(DIR, dir.path())
            .env(FIRST, (round * 1_000_000_000).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let stored = lines
            .map_while(Result::ok)
            .filter_map(|line| line.split_once("stored ")?.1.parse::<u64>().ok())
            .nth(round as usize)
            .expect("the child writes");
        child.kill().unwrap();
        child.wait().unwrap();
        promised += stored;

        let db = rusqlite::Connection::open(dir.path().join("reqprof.db")).unwrap();
        let check: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(check, "ok");
        let mut all = db
            .prepare(
                "SELECT r.id, p.raw_bytes, p.data FROM requests r LEFT JOIN profiles p ON p.seq = r.profile",
            )
            .unwrap();
        let mut rows = all.query([]).unwrap();
        let mut count = 0;
        while let Some(row) = rows.next().unwrap() {
            let id: [u8; 12] = row.get(0).unwrap();
            let raw: i64 = row.get(1).unwrap();
            let packed: Vec<u8> = row.get(2).unwrap();
            assert_eq!(zstd::bulk::decompress(&packed, raw as usize).unwrap(), vec![id[11]; PROFILE_BYTES]);
            count += 1;
        }
        assert!(count >= promised, "{count} of {promised}");
        let profiles: i64 = db.query_row("SELECT count(*) FROM profiles", [], |r| r.get(0)).unwrap();
        assert_eq!(profiles as u64, count);
        // The next round must add to what is there, not to a fresh file.
        promised = count;
    }
    let store = Store::open(&config(dir.path())).unwrap();
    assert!(store.warnings().is_empty());
}
