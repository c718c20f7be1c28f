//! Size, age, queue: nothing grows without limit, and what is lost is counted exactly.

use std::fs;
use std::time::Instant;

use super::*;

fn on_disk(dir: &Path) -> u64 {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum()
}

/// Bytes that do not compress: xorshift.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    std::iter::repeat_with(|| next().to_le_bytes()).flatten().take(len).collect()
}

#[test]
fn the_oldest_go_when_the_store_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let max_bytes = 2 << 20;
    let store = Store::open(&Config { max_bytes, ..config(dir.path()) }).unwrap();
    // 20 MB of profiles, and rows without one between them.
    for n in 0..2_000 {
        let profile = (n % 2 == 0).then(|| noise(20_000, n));
        assert!(store.sender().try_send(Entry { profile, ..entry(record(NEW_YEAR, n)) }));
        if n % 100 == 99 {
            store.flush();
            assert!(on_disk(dir.path()) <= max_bytes, "{} bytes after {n}", on_disk(dir.path()));
        }
    }
    let counters = store.counters();
    assert!(counters.bytes() <= max_bytes && counters.bytes() > max_bytes / 3, "{}", counters.bytes());
    assert_eq!(counters.written(), 2_000);
    let page = store.reader().list(&Filter::default(), Sort::Oldest, 1_000, None).unwrap();
    let kept = ids(&page);
    // What is left is the newest, without a gap.
    assert_eq!(kept, (2_000 - kept.len() as u64..2_000).collect::<Vec<_>>());
    assert_eq!(counters.deleted() + kept.len() as u64, 2_000);
    store.close();
    let db = rusqlite::Connection::open(dir.path().join("reqprof.db")).unwrap();
    let orphans: i64 = db
        .query_row(
            "SELECT count(*) FROM profiles WHERE seq NOT IN (SELECT profile FROM requests WHERE profile NOT NULL)",
            [],
            |r| r.get(0),
        )
        .unwrap();
    assert_eq!(orphans, 0);
}

#[test]
fn a_smaller_limit_shrinks_an_old_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    for n in 0..300 {
        let entry = Entry { profile: Some(noise(20_000, n)), ..entry(record(NEW_YEAR, n)) };
        assert!(store.sender().try_send(entry));
    }
    store.close();
    assert!(on_disk(dir.path()) > 5 << 20);
    let store = Store::open(&Config { max_bytes: MIN_BYTES, ..config(dir.path()) }).unwrap();
    store.flush();
    assert!(on_disk(dir.path()) <= MIN_BYTES, "{}", on_disk(dir.path()));
    let newest = store.reader().list(&Filter::default(), Sort::Newest, 1, None).unwrap();
    assert_eq!(ids(&newest), [299]);
}

#[test]
fn requests_that_are_too_old_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let hour = 3_600_000_000_000;
    let store =
        Store::open(&Config { max_age: Duration::from_secs(2 * 3_600), ..config(dir.path()) }).unwrap();
    // More than one round of deletions.
    for n in 0..2_500 {
        assert!(store.sender().try_send(entry(record(now() - 3 * hour, n))));
    }
    for n in 5_000..5_010 {
        assert!(store.sender().try_send(entry(record(now() - hour, n))));
    }
    store.flush();
    let page = store.reader().list(&Filter::default(), Sort::Oldest, 1_000, None).unwrap();
    assert_eq!(ids(&page), (5_000..5_010).collect::<Vec<_>>());
    assert_eq!(store.counters().deleted(), 2_500);
}

#[test]
fn a_full_queue_drops_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    // The writer waits for this lock with a batch in its hands.
    let other = rusqlite::Connection::open(dir.path().join("reqprof.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let sender = store.sender();
    let sent = 10_000;
    let accepted = (0..sent).filter(|n| sender.try_send(entry(record(NEW_YEAR, *n)))).count() as u64;
    other.execute_batch("COMMIT").unwrap();
    store.flush();
    let counters = store.counters();
    // The queue holds 8,192 and the writer at most one batch of 512.
    assert!((8_192..=8_192 + 512).contains(&accepted), "{accepted}");
    assert_eq!(counters.dropped(DropReason::QueueFull), sent - accepted);
    assert_eq!(counters.written(), accepted);
}

#[test]
fn profiles_that_are_too_large_are_left_out_and_their_requests_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    let huge = Entry { profile: Some(vec![0; (16 << 20) + 1]), ..entry(record(NEW_YEAR, 1)) };
    assert!(store.sender().try_send(huge));
    store.flush();
    assert_eq!(store.counters().dropped(DropReason::ProfileTooLarge), 1);
    assert!(!store.reader().get(id(1).parse().unwrap()).unwrap().unwrap().profile);
}

#[test]
fn a_record_that_comes_twice_is_kept_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    for profile in [None, Some(vec![1, 2, 3])] {
        assert!(store.sender().try_send(Entry { profile, ..entry(record(NEW_YEAR, 1)) }));
    }
    let bad = RequestRecord { id: "../x".into(), ..record(NEW_YEAR, 2) };
    assert!(store.sender().try_send(entry(bad)));
    store.flush();
    let counters = store.counters();
    assert_eq!(counters.written(), 1);
    assert_eq!(counters.dropped(DropReason::Duplicate), 1);
    assert_eq!(counters.dropped(DropReason::InvalidId), 1);
    let sender = store.sender();
    store.close();
    assert!(!sender.try_send(entry(record(NEW_YEAR, 3))));
    assert_eq!(counters.dropped(DropReason::Closed), 1);
    let db = rusqlite::Connection::open(dir.path().join("reqprof.db")).unwrap();
    let profiles: i64 = db.query_row("SELECT count(*) FROM profiles", [], |r| r.get(0)).unwrap();
    assert_eq!(profiles, 0);
}

/// Prints records per second; run by hand, since a figure that depends on the machine is no assertion.
#[test]
#[ignore = "a measurement"]
fn measure_the_rate() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    let total = 1_000_000_u64;
    let records: Vec<_> = (0..1_000).map(|n| record(NEW_YEAR, n)).collect();
    let sender = store.sender();
    let begin = Instant::now();
    for n in 0..total {
        let template = &records[(n % 1_000) as usize];
        // Durations as scattered as real ones.
        let duration_ns = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 34;
        let mut next =
            entry(RequestRecord { id: id(n), start: NEW_YEAR + n as i64, duration_ns, ..template.clone() });
        while !sender.try_send(next.clone()) {
            std::thread::yield_now();
            next.record.tid += 1;
        }
    }
    store.flush();
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{:.0} records/s, {:.0} bytes each",
        total as f64 / seconds,
        store.counters().bytes() as f64 / total as f64
    );
    let begin = Instant::now();
    store.reader().routes(&Filter::default(), soon()).unwrap();
    println!("routes over {total}: {:.2} s", begin.elapsed().as_secs_f64());
    let begin = Instant::now();
    store
        .reader()
        .list(&Filter { route: Some("/none".into()), ..Filter::default() }, Sort::Newest, 100, None)
        .unwrap();
    println!("a filter without a match: {:.2} s", begin.elapsed().as_secs_f64());
    let begin = Instant::now();
    store.reader().list(&Filter::default(), Sort::Slowest, 100, None).unwrap();
    println!("the slowest: {:.2} s", begin.elapsed().as_secs_f64());
    store.close();
    let begin = Instant::now();
    Store::open(&config(dir.path())).unwrap();
    println!("opening: {:.2} s", begin.elapsed().as_secs_f64());
}
