//! Tables are shared by contents, make room for each other, and processes that forked share their mappings.

use std::fs::File;
use std::time::{Duration, Instant};

use profiler_common::unwind::{Mapping, RULE_NONE, RULE_STOP, Space, mapping_mark};
use profiler_ebpf::native::rule_number;

use super::kept::Kept;
use crate::process::elf::FileId;
use crate::process::maps::Maps;
use crate::unwind::cache::{Cache, NoTable, Place, Read};
use crate::unwind::spaces::Spaces;

fn libc() -> File {
    let maps = Maps::read(std::process::id()).expect("our own map");
    let mapping = maps.iter().find(|m| m.is_glibc()).expect("a C library");
    File::open(&mapping.path).expect("the C library")
}

fn id(inode: u64) -> FileId {
    FileId { dev: 1, inode, size: 3, mtime: 4 }
}

/// Whether a place leads to the rules of some function of this program.
fn leads_to(kept: &Kept, place: Place, address: u64) -> bool {
    let mapping = Mapping {
        base: place.base,
        root: place.root,
        mark: mapping_mark(place.levels, 0),
        ..Mapping::default()
    };
    let number = rule_number(kept, &mapping, address);
    number != RULE_NONE && number != RULE_STOP
}

#[test]
fn equal_files_share_a_table() {
    let mut kept = Kept::default();
    let mut sink = &mut kept;
    let mut cache = Cache::default();
    let first = cache.add(id(1), Read::of(libc()).expect("readable"), &mut sink);
    let usage = cache.usage();
    let second = cache.add(id(2), Read::of(libc()).expect("readable"), &mut sink);
    assert_eq!((first.table, usage), (second.table, cache.usage()));
    assert_eq!((usage.tables, usage.built), (1, 1));
    assert!(usage.bytes > usage.rows * 4 && usage.bytes < usage.rows * 5, "{usage:?}");
    assert_eq!(cache.known(id(2)).map(|known| known.table), Some(second.table));
    assert!(cache.known(id(3)).is_none());
    let none = cache.refuse(id(3), NoTable::Damaged);
    assert_eq!(cache.known(id(3)).map(|known| known.table), Some(none.table));
}

#[test]
fn what_is_not_used_makes_room_and_what_is_used_does_not() {
    let mut kept = Kept::default();
    let mut sink = &mut kept;
    let blocks = {
        let mut cache = Cache::default();
        cache.add(id(1), Read::of(libc()).expect("readable"), &mut sink);
        cache.usage().bytes / 512
    };
    // Room for the C library's, and not for the loader's besides.
    let mut cache = Cache::with_room(blocks as u32 + 1);
    let library = cache.add(id(1), Read::of(libc()).expect("readable"), &mut sink).table.expect("room");
    let place = cache.take(library).expect("it is there");
    let loader = || File::open("/lib64/ld-linux-x86-64.so.2").expect("the loader");
    let mut add =
        |cache: &mut Cache| cache.add(id(2), Read::of(loader()).expect("readable"), &mut sink).table;
    assert_eq!(add(&mut cache), Err(NoTable::Full));
    assert!(cache.known(id(2)).is_none(), "room may be found another time");
    assert_eq!(cache.take(library), Some(place), "it is used");

    cache.give_back(library);
    cache.give_back(library);
    let began = Instant::now();
    let found = loop {
        match add(&mut cache) {
            Ok(found) => break found,
            Err(reason) => assert_eq!(reason, NoTable::Full),
        }
        assert!(began.elapsed() < Duration::from_secs(60), "no room");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(cache.known(id(1)).is_none(), "it was evicted");
    assert_eq!(cache.usage().evicted, 1);
    let place = cache.take(found).expect("it is there");
    // Its numbers are those that the other had.
    let elf = crate::process::elf::ElfFile::parse(loader()).expect("an ELF file");
    let symbols = elf.symbols(&["_dl_catch_exception", "__tls_get_addr"]).expect("symbols");
    assert!(!symbols.is_empty());
    for symbol in symbols.values() {
        assert!(leads_to(&kept, place, symbol.value));
    }
}

#[test]
fn a_process_has_all_its_code_and_a_forked_one_the_same() {
    // A copy of this program and a copy of that: other tests map code here while this one runs.
    // SAFETY: both call nothing but what is safe after a fork.
    let mother = unsafe { libc::fork() };
    if mother == 0 {
        // SAFETY: as above.
        unsafe { libc::fork() };
        loop {
            // SAFETY: no memory is involved.
            unsafe { libc::pause() };
        }
    }
    let mother = u32::try_from(mother).expect("a child");
    let children = format!("/proc/{mother}/task/{mother}/children");
    let child: u32 = loop {
        if let Ok(pid) = std::fs::read_to_string(&children).expect("a list").trim().parse() {
            break pid;
        }
        std::thread::yield_now();
    };
    let mut kept = Kept::default();
    let mut spaces = Spaces::new(&mut kept);
    spaces.follow(mother);
    let looks = spaces.counts.looks;
    spaces.forked(mother, child);
    assert_eq!((spaces.counts.looks, spaces.processes()), (looks, 2), "{:?}", spaces.counts);
    // It maps no code since, so it goes on sharing when its own map is looked at.
    assert!(!spaces.follow(child));
    assert_eq!(spaces.counts.without.get(&NoTable::Damaged), None);
    spaces.ended(mother);
    // SAFETY: no memory is involved; both are ours, and ours to wait for is the first.
    unsafe {
        libc::kill(child as i32, libc::SIGKILL);
        libc::kill(mother as i32, libc::SIGKILL);
        libc::waitpid(mother as i32, std::ptr::null_mut(), 0);
    }
    let used = spaces.cache.usage();
    assert!(used.tables >= 3, "ourselves, the C library, the vDSO: {used:?}");
    drop(spaces);

    let Space { first, count, .. } = kept.spaces[&child];
    assert!(!kept.spaces.contains_key(&mother));
    let mappings = &kept.mappings[first as usize..(first + count) as usize];
    assert!(mappings.windows(2).all(|pair| pair[0].end <= pair[1].start));
    let here = a_process_has_all_its_code_and_a_forked_one_the_same as *const () as u64;
    let code = mappings.iter().find(|m| m.start <= here && here < m.end).expect("our own code");
    assert!(code.levels() > 0);
    assert_ne!(rule_number(&kept, code, here), RULE_NONE);
    // The vDSO's code is known too.
    let maps = Maps::read(std::process::id()).expect("our own map");
    let vdso = maps.iter().find(|m| m.path.as_os_str() == "[vdso]").expect("a vDSO");
    let vdso = mappings.iter().find(|m| m.start == vdso.start).expect("in the list");
    assert!(vdso.levels() > 0);
}

#[test]
fn who_is_gone_is_forgotten() {
    let mut kept = Kept::default();
    let mut spaces = Spaces::new(&mut kept);
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("a process");
    spaces.follow(child.id());
    assert_eq!(spaces.processes(), 1);
    child.kill().expect("ours");
    child.wait().expect("ours");
    spaces.tidy();
    assert_eq!(spaces.processes(), 0);
    spaces.unknown(child.id());
    assert_eq!(spaces.processes(), 0);
    drop(spaces);
    assert!(kept.spaces.is_empty());
}

#[test]
fn a_look_that_came_to_nothing_is_not_taken_again_at_once() {
    let own = std::process::id();
    let mut kept = Kept { broken: true, ..Kept::default() };
    let mut spaces = Spaces::new(&mut kept);
    spaces.follow(own);
    assert_eq!((spaces.counts.looks, spaces.counts.failed, spaces.processes()), (1, 1, 0));
    assert!(!spaces.unknown(own));
    assert_eq!(spaces.counts.looks, 1);
    for wait in [1, 2, 4, 8, 16] {
        spaces.looked(own, Duration::from_millis(100 * wait));
        assert!(spaces.unknown(own), "{wait}");
    }
    // 3.2 s must have passed: some of them may on a machine that is busy.
    spaces.looked(own, Duration::from_millis(200));
    assert!(!spaces.unknown(own));
    assert_eq!((spaces.counts.looks, spaces.counts.failed, spaces.processes()), (6, 6, 0));
    spaces.ended(own);
}

#[test]
fn a_library_that_takes_anothers_place_is_noticed() {
    let own = std::process::id();
    let file = libc();
    let size = 1 << 16;
    // SAFETY: a new mapping, which nothing else knows; the descriptor is open.
    let place = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            0,
        )
    };
    assert_ne!(place, libc::MAP_FAILED);
    let mut kept = Kept::default();
    let mut spaces = Spaces::new(&mut kept);
    assert!(spaces.follow(own));
    let own_file = File::open("/proc/self/exe").expect("ourselves");
    // SAFETY: it takes the place of the mapping above, which nothing else knows.
    let other = unsafe {
        libc::mmap(
            place,
            size,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            std::os::fd::AsRawFd::as_raw_fd(&own_file),
            0,
        )
    };
    assert_eq!(other, place);
    spaces.tidy();
    assert_eq!(spaces.counts.looks, 1, "it is soon enough later");
    spaces.looked(own, Duration::from_secs(11));
    spaces.tidy();
    assert_eq!((spaces.counts.looks, spaces.counts.unknown), (2, 0));
    let tables = spaces.cache.usage().tables;
    drop(spaces);
    let Space { first, count, .. } = kept.spaces[&own];
    let mappings = &kept.mappings[first as usize..(first + count) as usize];
    let mapping = mappings.iter().find(|m| m.start == place as u64).expect("it is in the list");
    let here = a_library_that_takes_anothers_place_is_noticed as *const () as u64;
    let code = mappings.iter().find(|m| m.start <= here && here < m.end).expect("our own code");
    assert!(tables > 0 && code.levels() > 0);
    assert_eq!((mapping.root, mapping.levels()), (code.root, code.levels()), "it has this program's table");
    // SAFETY: the mapping above; no pointer into it is left.
    assert_eq!(unsafe { libc::munmap(place, size) }, 0);
}
