//! Forged files, in a directory that stands for a process's root.

use super::*;
use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{chown, symlink};
use std::path::PathBuf;

struct Root {
    dir: tempfile::TempDir,
    handle: OwnedFd,
}

fn me() -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::geteuid() }
}

impl Root {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tmp")).unwrap();
        let handle = open_path(dir.path().to_str().unwrap()).unwrap();
        Self { dir, handle }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("tmp/perf-7.map")
    }

    fn look(&self, last: Option<Position>) -> io::Result<Option<Look>> {
        read(&self.handle, 7, me(), last, None)
    }
}

/// The map that a file of this text makes.
fn map(text: impl AsRef<[u8]>) -> PerfMap {
    let root = Root::new();
    fs::write(root.file(), text).unwrap();
    let mut map = PerfMap::default();
    map.add(root.look(None).unwrap().unwrap());
    map
}

fn name(map: &PerfMap, address: u64) -> Option<&str> {
    map.lookup(address).map(|(name, _)| name)
}

#[test]
fn functions_are_found_by_their_bounds() {
    let map = map("1000 10 first\n0x2000 0x20 LazyCompile:~f /srv/a b.js:1\n1010 8 second\n");
    let expected = [
        (0xfff, None),
        (0x1000, Some("first")),
        (0x100f, Some("first")),
        (0x1010, Some("second")),
        (0x1017, Some("second")),
        (0x1018, None),
        (0x201f, Some("LazyCompile:~f /srv/a b.js:1")),
        (0x2020, None),
        (0, None),
        (u64::MAX, None),
    ];
    for (address, expected) in expected {
        assert_eq!(name(&map, address), expected, "{address:#x}");
    }
    assert_eq!(map.lookup(0x1000), Some(("first", "perf-7.map")));
}

#[test]
fn of_lines_that_overlap_the_later_one_holds() {
    let map = map("1000 100 a\n1080 100 b\n1010 10 c\n2000 10 d\n1ff0 1000 e\n3000 10 f\n3000 10 g\n");
    let expected = [
        (0x1000, Some("a")),
        (0x1010, Some("c")),
        // What is left of a function behind the one that took part of its room is nobody's.
        (0x1020, None),
        (0x1080, Some("b")),
        (0x2000, Some("e")),
        (0x3000, Some("g")),
    ];
    for (address, expected) in expected {
        assert_eq!(name(&map, address), expected, "{address:#x}");
    }
    // b, a, c, e, g.
    assert_eq!(map.functions.len(), 5);
    assert_eq!(map.size(), 5 * (ENTRY_COST + 1));
}

#[test]
fn nonsense_is_skipped() {
    let long = format!("5000 10 {}\n", "x".repeat(LINE_MAX));
    let text = format!(
        "\n \nx y z\n1000\n1000 10\n1000 10 \n1000 0 empty\nffffffffffffffff 2 wraps\n-1 5 negative\n\
         10000000000000000 1 huge\n1000 ffffffffffffffff wraps\n{long}6000 10 \u{e9}t\u{e9}\n"
    );
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(b"7000 10 \xff\xfe\n\0\0\0\n8000 10 half");
    let map = map(bytes);
    let names: Vec<&str> = map.functions.values().map(|(_, name)| &**name).collect();
    assert_eq!(names, ["\u{e9}t\u{e9}", "\u{fffd}\u{fffd}"]);
}

#[test]
fn the_memory_is_bounded() {
    let name = "n".repeat(200);
    let text: String = (0..30_000u64).map(|n| format!("{:x} 10 {name}\n", n * 16)).collect();
    assert!(text.len() > BYTES_MAX && text.len() > LOOK_BYTES);
    let root = Root::new();
    fs::write(root.file(), &text).unwrap();
    let mut map = PerfMap::default();
    let mut looks = 0;
    loop {
        let look = root.look(map.position()).unwrap().unwrap();
        assert!(look.bytes.len() <= LOOK_BYTES);
        if look.bytes.is_empty() {
            break;
        }
        map.add(look);
        looks += 1;
    }
    assert_eq!(looks, text.len().div_ceil(LOOK_BYTES));
    assert!(map.size() <= BYTES_MAX && map.size() > BYTES_MAX - 1024, "{}", map.size());
}

#[test]
fn what_was_read_is_not_read_again() {
    let root = Root::new();
    fs::write(root.file(), "1000 10 a\n2000 1").unwrap();
    let mut map = PerfMap::default();
    assert!(map.add(root.look(None).unwrap().unwrap()));
    let mut file = OpenOptions::new().append(true).open(root.file()).unwrap();
    file.write_all(b"0 b\n").unwrap();
    let look = root.look(map.position()).unwrap().unwrap();
    assert_eq!((&*look.bytes, look.continues), (&b"2000 10 b\n"[..], true));
    assert!(map.add(look));
    assert_eq!((name(&map, 0x1000), name(&map, 0x2000)), (Some("a"), Some("b")));
    let look = root.look(map.position()).unwrap().unwrap();
    assert!(look.bytes.is_empty() && !map.add(look));

    // A shorter file is another, as is one in its place; a child keeps what its parent had.
    let child = map.fork();
    file.set_len(0).unwrap();
    file.write_all(b"3000 10 c\n").unwrap();
    assert!(map.add(root.look(map.position()).unwrap().unwrap()));
    assert_eq!((name(&map, 0x1000), name(&map, 0x3000)), (None, Some("c")));
    let mut child = child;
    child.add(root.look(child.position()).unwrap().unwrap());
    assert_eq!((name(&child, 0x1000), name(&child, 0x3000)), (Some("a"), Some("c")));
}

#[test]
fn only_a_file_of_the_process_itself_is_read() {
    let line = "1000 10 secret\n";
    // A link, to a file that would do.
    let root = Root::new();
    fs::write(root.dir.path().join("tmp/other"), line).unwrap();
    symlink("other", root.file()).unwrap();
    assert_eq!(root.look(None).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    // A link on the way.
    let root = Root::new();
    fs::rename(root.dir.path().join("tmp"), root.dir.path().join("real")).unwrap();
    symlink("real", root.dir.path().join("tmp")).unwrap();
    fs::write(root.file(), line).unwrap();
    assert_eq!(root.look(None).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    // A second name of a file.
    let root = Root::new();
    fs::write(root.dir.path().join("tmp/other"), line).unwrap();
    fs::hard_link(root.dir.path().join("tmp/other"), root.file()).unwrap();
    assert_eq!(root.look(None).unwrap(), None);
    // A pipe, which nobody writes to, and a directory.
    let root = Root::new();
    let path = CString::new(root.file().to_str().unwrap()).unwrap();
    // SAFETY: a NUL-terminated path.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    assert_eq!(root.look(None).unwrap(), None);
    fs::remove_file(root.file()).unwrap();
    fs::create_dir(root.file()).unwrap();
    assert_eq!(root.look(None).unwrap(), None);
    // Older than the process.
    let root = Root::new();
    fs::write(root.file(), line).unwrap();
    let old = SystemTime::now() - Duration::from_secs(3600);
    File::options().write(true).open(root.file()).unwrap().set_modified(old).unwrap();
    let aged = |seconds| read(&root.handle, 7, me(), None, Some(Duration::from_secs(seconds))).unwrap();
    assert!(aged(60).is_none() && aged(7200).is_some());
    // Somebody else's.
    if me() != 0 {
        crate::skip::skip("only_a_file_of_the_process_itself_is_read", "only root can give files away");
        return;
    }
    chown(root.file(), Some(1234), None).unwrap();
    let of = |user| read(&root.handle, 7, user, None, None).unwrap();
    assert!(of(1234).is_some() && of(0).is_none() && of(1235).is_none());
    chown(root.file(), Some(0), None).unwrap();
    assert!(of(1234).is_some());
}

#[test]
fn an_absurd_size_costs_one_look() {
    let root = Root::new();
    // Sparse: a terabyte of nothing.
    File::create(root.file()).unwrap().set_len(1 << 40).unwrap();
    let look = root.look(None).unwrap().unwrap();
    assert_eq!(look.bytes.len(), LOOK_BYTES);
    let mut map = PerfMap::default();
    assert!(!map.add(look));
    assert_eq!(map.size(), 0);
}
