//! Which directories and files are accepted, and what happens to the others.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use super::*;

fn refusal(dir: &Path) -> String {
    match Store::open(&config(dir)) {
        Ok(_) => panic!("{} was accepted", dir.display()),
        Err(e) => e.to_string(),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn what_we_create_is_ours_alone() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/b");
    let store = Store::open(&config(&state)).unwrap();
    assert!(store.sender().try_send(entry(record(NEW_YEAR, 1))));
    store.flush();
    assert_eq!(mode(&state), 0o700);
    for file in fs::read_dir(&state).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_directory_that_others_may_write_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    for bad in [0o770, 0o702, 0o777] {
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(bad)).unwrap();
        let text = refusal(dir.path());
        assert!(text.contains(&format!("mode {bad:04o}")) && text.contains("chmod go-w"), "{text}");
    }
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    Store::open(&config(dir.path())).unwrap();
}

#[test]
fn a_directory_of_someone_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    if chown(dir.path(), Some(65_534), None).is_err() {
        crate::skip::skip("a_directory_of_someone_else_is_refused", "giving a directory away needs root");
        return;
    }
    assert!(refusal(dir.path()).contains("belongs to uid 65534"));
}

#[test]
fn links_and_other_files_in_place_of_ours_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    fs::create_dir(&real).unwrap();
    let link = dir.path().join("link");
    symlink(&real, &link).unwrap();
    assert!(refusal(&link).contains("symbolic link"));

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(refusal(&file).contains("not a directory"));

    let victim = dir.path().join("victim");
    for name in ["lock", "reqprof.db", "reqprof.db-wal"] {
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, real.join(name)).unwrap();
        assert!(refusal(&real).contains("not a regular file"), "{name}");
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        fs::remove_file(real.join(name)).unwrap();
    }
}

#[test]
fn a_second_daemon_is_told_who_holds_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(&config(dir.path())).unwrap();
    assert!(refusal(dir.path()).contains(&format!("another reqprof (pid {})", std::process::id())));
    first.close();
    Store::open(&config(dir.path())).unwrap();
}

#[test]
fn too_small_a_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let result = Store::open(&Config { max_bytes: MIN_BYTES - 1, ..config(dir.path()) });
    assert!(matches!(result, Err(OpenError::TooSmall { .. })));
}

fn quarantined(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.to_str().unwrap().contains("reqprof.db.corrupt-"));
    all
}

/// Damages the store in `dir`, then expects it moved aside, untouched, with a fresh one that works in its place.
fn expect_quarantine(dir: &Path, reason: &str) {
    let damaged = fs::read(dir.join("reqprof.db")).unwrap();
    let store = Store::open(&config(dir)).unwrap();
    let moved = quarantined(dir);
    assert_eq!(moved.len(), 1, "{moved:?}");
    assert_eq!(fs::read(&moved[0]).unwrap(), damaged);
    let warning = &store.warnings()[0];
    assert!(warning.contains(moved[0].to_str().unwrap()) && warning.contains(reason), "{warning}");
    assert!(store.sender().try_send(entry(record(NEW_YEAR, 8))));
    store.flush();
    assert_eq!(ids(&store.reader().list(&Filter::default(), Sort::Newest, 9, None).unwrap()), [8]);
}

#[test]
fn a_file_that_is_no_database_is_quarantined() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("reqprof.db"), vec![b'x'; 10_000]).unwrap();
    expect_quarantine(dir.path(), "not a database");
}

#[test]
fn a_file_of_another_version_is_quarantined() {
    let dir = tempfile::tempdir().unwrap();
    let other = rusqlite::Connection::open(dir.path().join("reqprof.db")).unwrap();
    other.execute_batch("CREATE TABLE t (x); PRAGMA user_version = 99;").unwrap();
    drop(other);
    expect_quarantine(dir.path(), "version is 99");
}

#[test]
fn a_damaged_page_is_found_on_opening() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    for n in 0..2_000 {
        assert!(store.sender().try_send(entry(record(NEW_YEAR, n))));
    }
    store.close();
    let path = dir.path().join("reqprof.db");
    let mut bytes = fs::read(&path).unwrap();
    // A page in the middle, beyond those of the schema.
    let middle = bytes.len() / 4096 / 2 * 4096;
    bytes[middle..middle + 4096].fill(0x5a);
    fs::write(&path, bytes).unwrap();
    expect_quarantine(dir.path(), "");
}

#[test]
fn quarantined_files_do_not_pile_up() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..6 {
        fs::write(dir.path().join("reqprof.db"), "not a database, whatever it says").unwrap();
        for suffix in ["reqprof.db-wal", "reqprof.db-shm"] {
            let _ = fs::remove_file(dir.path().join(suffix));
        }
        Store::open(&config(dir.path())).unwrap().close();
    }
    assert_eq!(quarantined(dir.path()).len(), 3);
}

#[test]
fn quarantined_files_count_in_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let broken = |bytes: usize| fs::write(dir.path().join("reqprof.db"), vec![b'x'; bytes]).unwrap();
    let config = Config { max_bytes: 2 << 20, ..config(dir.path()) };
    let reopen = |bytes: usize| {
        broken(bytes);
        for suffix in ["reqprof.db-wal", "reqprof.db-shm"] {
            let _ = fs::remove_file(dir.path().join(suffix));
        }
        let store = Store::open(&config).unwrap();
        store.flush();
        (store.warnings()[0].clone(), store.counters().bytes())
    };
    let (warning, bytes) = reopen(600 << 10);
    assert!(warning.contains("moved to") && bytes > 600 << 10, "{warning}, {bytes}");
    // Both together are more than half: the older goes.
    reopen(500 << 10);
    let sizes: Vec<u64> = quarantined(dir.path()).iter().map(|p| p.metadata().unwrap().len()).collect();
    assert_eq!(sizes, [500 << 10]);
    let (warning, bytes) = reopen(1_100 << 10);
    assert!(warning.contains("deleted") && bytes < 1 << 20, "{warning}, {bytes}");
}

#[test]
fn a_parent_in_which_others_could_swap_the_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let parent = dir.path().join("parent");
    fs::create_dir(&parent).unwrap();
    let set = |mode| fs::set_permissions(&parent, fs::Permissions::from_mode(mode)).unwrap();
    set(0o777);
    let message = refusal(&parent.join("state"));
    assert!(message.contains("chmod go-w") && message.contains("0777"), "{message}");
    set(0o1777);
    Store::open(&config(&parent.join("state"))).unwrap().close();
    set(0o755);
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } == 0 {
        std::os::unix::fs::chown(&parent, Some(12_345), None).unwrap();
        let message = refusal(&parent.join("state"));
        assert!(message.contains("belongs to uid 12345"), "{message}");
    }
}
