//! Maps that change while stacks are resolved, and what is remembered of them.

use super::*;

/// A file's code, mapped into this process the way the loader would, but run by nobody.
pub(super) struct MappedCode {
    address: *mut libc::c_void,
    length: usize,
    /// Virtual address of its first byte.
    vaddr: u64,
}

impl MappedCode {
    /// `at`: in place of what is mapped there.
    pub(super) fn of(path: &std::path::Path, at: Option<*mut libc::c_void>) -> Self {
        use std::os::fd::AsRawFd;
        let elf = ElfFile::parse(std::fs::File::open(path).unwrap()).unwrap();
        let load = *elf.loads().iter().find(|load| load.executable).unwrap();
        let length = 16 * 4096;
        let (place, fixed) = at.map_or((std::ptr::null_mut(), 0), |place| (place, libc::MAP_FIXED));
        // SAFETY: a fresh mapping, or one in place of an earlier one of the same length, which nobody refers to.
        let address = unsafe {
            libc::mmap(
                place,
                length,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | fixed,
                elf.file().as_raw_fd(),
                (load.offset & !4095) as libc::off_t,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Self { address, length, vaddr: load.vaddr & !4095 }
    }
}

impl Drop for MappedCode {
    fn drop(&mut self) {
        // SAFETY: what `of` mapped; nobody refers to it.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

/// The first function of a library whose code lies in the mapped part.
pub(super) fn function_in(path: &std::path::Path, code: &MappedCode, names: &[&str]) -> RawFrame {
    let elf = ElfFile::parse(std::fs::File::open(path).unwrap()).unwrap();
    let found = elf.symbols(names).unwrap();
    let range = code.vaddr..code.vaddr + code.length as u64;
    let symbol = found.values().find(|s| range.contains(&s.value)).expect("one of them in the first pages");
    leaf(code.address as u64 + symbol.value - code.vaddr)
}

pub(super) fn library(name: &str) -> std::path::PathBuf {
    let maps = Maps::read(std::process::id()).unwrap();
    maps.iter().find(|m| m.file_name().starts_with(name)).unwrap().path.to_path_buf()
}

/// Functions at the beginning of glibc's code.
pub(super) const EARLY: [&str; 6] =
    ["abort", "gnu_get_libc_version", "iconv_open", "iconv", "setlocale", "abs"];

#[test]
fn a_library_in_the_place_of_another_gets_its_own_names() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old.so"), dir.path().join("new.so"));
    for copy in [&old, &new] {
        std::fs::copy(library("libc.so"), copy).unwrap();
    }
    let first = MappedCode::of(&old, None);
    let frame = function_in(&old, &first, &EARLY);
    let untouched = leaf(called_function as *const () as u64);
    let mut symbolizer = Symbolizer::default();
    let file = |symbolizer: &mut Symbolizer| {
        let (stack, _) = resolve(symbolizer, me(), &[frame, untouched]);
        assert!(stack[0].name.ends_with("::called_function"));
        stack[1].file.to_string()
    };
    assert_eq!(file(&mut symbolizer), "old.so");
    let second = MappedCode::of(&new, Some(first.address));
    let began = std::time::Instant::now();
    while file(&mut symbolizer) != "new.so" {
        assert!(began.elapsed() < std::time::Duration::from_secs(60), "the map is not read again");
        std::thread::yield_now();
    }
    std::mem::forget(second);
}

/// A symbolizer that knows these Python frames of this process, which runs no interpreter that could be asked.
fn knowing(codes: &[u64]) -> Symbolizer {
    let mut symbolizer = Symbolizer::default();
    let mut process = Process::new(me());
    for code in codes {
        let name = format!("python {code:#x}");
        let frame = Frame {
            name: name.into(),
            file: "/app.py".into(),
            line: *code as u32,
            first_line: 1,
            kind: FrameKind::Python,
        };
        let resolved = Resolved { frames: [Arc::new(frame)].into(), kind: ResolvedKind::Named };
        process.remember(python(*code), Rc::new(resolved));
    }
    symbolizer.put_back(me(), process);
    symbolizer
}

/// As an extension that is loaded within a call: the frames around it are those of the stack before.
#[test]
fn a_library_that_appears_inside_known_python_frames_has_its_names() {
    let mut symbolizer = knowing(&[1, 2]);
    let around = |inside: RawFrame| [inside, python(2), python(1)];
    resolve(&mut symbolizer, me(), &around(leaf(called_function as *const () as u64)));
    let path = library("libc.so");
    let code = MappedCode::of(&path, None);
    let user = around(function_in(&path, &code, &EARLY));
    symbolizer.processes.get_mut(&me()).unwrap().looked(std::time::Duration::from_millis(500));
    let (stack, outcome) = resolve(&mut symbolizer, me(), &user);
    let (expected, alone) = resolve(&mut knowing(&[1, 2]), me(), &user);
    assert_eq!((names(&stack), outcome), (names(&expected), alone));
    assert_eq!((names(&stack)[..2].to_vec(), stack.len()), (vec!["python 0x1", "python 0x2"], 3));
    assert_eq!(outcome, Outcome::default());
}

/// Places in this process where files come and go. What is not mapped is reserved, so that nobody else gets it.
struct Places {
    files: [*mut libc::c_void; 3],
    /// Code without a file.
    code: *mut libc::c_void,
}

const PLACE: usize = 16 * 4096;

impl Places {
    fn new() -> Self {
        let nothing = |()| Self::reserve(std::ptr::null_mut(), 0, libc::PROT_NONE);
        let code = Self::reserve(std::ptr::null_mut(), 0, libc::PROT_READ | libc::PROT_EXEC);
        Self { files: [(); 3].map(nothing), code }
    }

    fn reserve(place: *mut libc::c_void, fixed: i32, protection: i32) -> *mut libc::c_void {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        // SAFETY: a fresh mapping, or one in place of an earlier one of the same length, which nobody refers to.
        let address = unsafe { libc::mmap(place, PLACE, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        address
    }

    fn map(&self, place: usize, file: Option<&std::path::Path>) {
        match file {
            Some(path) => std::mem::forget(MappedCode::of(path, Some(self.files[place]))),
            None => _ = Self::reserve(self.files[place], libc::MAP_FIXED, libc::PROT_NONE),
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        for address in self.files.into_iter().chain([self.code]) {
            // SAFETY: what `new` mapped; nobody refers to it.
            unsafe { libc::munmap(address, PLACE) };
        }
    }
}

/// Where a function begins and where a call in it returns to, from the start of the mapped code.
fn offsets(path: &std::path::Path) -> (u64, u64) {
    let code = MappedCode::of(path, None);
    let start = function_in(path, &code, &EARLY).address;
    let length = code.address as u64 + PLACE as u64 - start;
    let mut bytes = vec![0; length as usize];
    ProcessMemory::new(std::process::id()).read(start, &mut bytes).unwrap();
    let mut decoder = Decoder::with_ip(64, &bytes, start, DecoderOptions::NONE);
    let call = decoder.iter().find(|i| i.flow_control() == FlowControl::Call).unwrap();
    (start - code.address as u64, call.next_ip() - code.address as u64)
}

/// What happens to a process between two samples, by numbers: a place, the file that it gets, and whether it is an
/// unknown address that makes the map be read again; then stacks: how many of the outermost frames are those of all, and
/// the others.
type Change = (usize, usize, bool, Vec<(usize, Vec<usize>)>);

const DISTINCT: usize = 16;

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    #[test]
    fn stacks_that_follow_each_other_while_the_map_changes_are_what_each_would_be_alone(
        outer in proptest::collection::vec(0..DISTINCT, 8),
        changes in proptest::collection::vec(
            (0usize..3, 0usize..3, proptest::prelude::any::<bool>(),
                proptest::collection::vec((0usize..9, proptest::collection::vec(0..DISTINCT, 0..4)), 1..4)),
            2..8,
        ),
    ) {
        one_after_the_other(&outer, &changes);
    }
}

fn one_after_the_other(outer: &[usize], changes: &[Change]) {
    const KNOWN: [u64; 3] = [1, 2, 3];
    let dir = tempfile::tempdir().unwrap();
    let files = ["a.so", "b.so"].map(|name| dir.path().join(name));
    for copy in &files {
        std::fs::copy(library("libc.so"), copy).unwrap();
    }
    let (function, returned) = offsets(&files[0]);
    let places = Places::new();
    let at = |place: usize, offset: u64| places.files[place] as u64 + offset;
    let here = [
        leaf(called_function as *const () as u64),
        caller(return_address(calling_function)),
        caller(calling_function as *const () as u64 + 1),
        caller(0x10),
        leaf(places.code as u64 + 16),
    ];
    // Python frames twice, as stacks have many.
    let mut frames = [KNOWN.map(python), KNOWN.map(python)].concat();
    frames.extend((0..3).map(|place| leaf(at(place, function))));
    frames.extend((0..2).map(|place| caller(at(place, returned))));
    frames.extend(here);
    assert_eq!(frames.len(), DISTINCT);

    let counters = |symbolizer: &Symbolizer| -> std::collections::BTreeMap<_, _> {
        symbolizer.counters().map(|(kind, reason, count)| ((kind, reason), count)).collect()
    };
    let mut symbolizer = knowing(&KNOWN);
    let mut mapped = [false; 3];
    for (place, file, unknown, stacks) in changes {
        // Only what comes where nothing was is found by the unknown address.
        let found = *unknown && *file < 2 && !mapped[*place];
        places.map(*place, files.get(*file).map(std::path::PathBuf::as_path));
        mapped[*place] = *file < 2;
        let ago = std::time::Duration::from_millis(if found { 500 } else { 60_000 });
        symbolizer.processes.get_mut(&me()).unwrap().looked(ago);
        for (n, (same, inner)) in stacks.iter().enumerate() {
            let numbers = inner.iter().chain(&outer[outer.len() - same..]);
            let mut user: Vec<RawFrame> = numbers.map(|n| frames[*n]).collect();
            if found && n == 0 {
                user.insert(0, leaf(at(*place, function)));
            }
            let before = counters(&symbolizer);
            let (after, outcome) = resolve(&mut symbolizer, me(), &user);
            let mut fresh = knowing(&KNOWN);
            let (alone, expected) = resolve(&mut fresh, me(), &user);
            let described = |stack: &[Arc<Frame>]| {
                stack.iter().map(|f| (f.name.to_string(), f.file.to_string(), f.line)).collect::<Vec<_>>()
            };
            assert_eq!((described(&after), outcome), (described(&alone), expected), "{user:x?}");
            let mut counted = counters(&symbolizer);
            for (reason, count) in before {
                *counted.get_mut(&reason).unwrap() -= count;
            }
            counted.retain(|_, count| *count > 0);
            assert_eq!(counted, counters(&fresh), "{user:x?}");
        }
    }
}

#[test]
fn all_frames_of_a_stack_are_named_by_one_map() {
    let dir = tempfile::tempdir().unwrap();
    let files = ["a.so", "b.so"].map(|name| dir.path().join(name));
    for copy in &files {
        std::fs::copy(library("libc.so"), copy).unwrap();
    }
    let (function, _) = offsets(&files[0]);
    let places = Places::new();
    let [replaced, new] = [0, 1].map(|place| leaf(places.files[place] as u64 + function));
    let around = |inside| [inside, python(2), replaced, python(1)];
    let found = |symbolizer: &mut Symbolizer, user: &[RawFrame]| -> Vec<String> {
        resolve(symbolizer, me(), user).0.iter().map(|frame| frame.file.to_string()).collect()
    };
    let mut symbolizer = knowing(&[1, 2]);
    places.map(0, Some(&files[0]));
    let known = around(leaf(called_function as *const () as u64));
    // Once for the map, and once more for what the next stack shares with it.
    found(&mut symbolizer, &known);
    let before = found(&mut symbolizer, &known);
    assert_eq!(before[..3], ["/app.py", "a.so", "/app.py"]);
    places.map(0, Some(&files[1]));
    places.map(1, Some(&files[0]));
    // Only the unknown address makes it look again.
    symbolizer.processes.get_mut(&me()).unwrap().looked(std::time::Duration::from_millis(500));
    assert_eq!(found(&mut symbolizer, &around(new)), ["/app.py", "b.so", "/app.py", "a.so"]);
}

/// What stacks of code without frame pointers look like: none is worth less to the next for its wrong guesses.
#[test]
fn a_stack_with_wrong_guesses_is_remembered_up_to_what_may_change() {
    let mut symbolizer = knowing(&[1, 2, 3]);
    let wrong = caller(0x10);
    let mut remembered = |user: &[RawFrame]| {
        resolve(&mut symbolizer, me(), user);
        symbolizer.processes[&me()].recent.remembered()
    };
    let inside = leaf(called_function as *const () as u64);
    assert_eq!(remembered(&[inside, wrong, python(2), wrong, wrong, python(1), wrong]), 7);
    // Nobody knows yet what is at an address that was not guessed.
    assert_eq!(remembered(&[inside, python(3), leaf(0x10), wrong, python(1), wrong]), 3);
    assert_eq!(remembered(&[python(3), python(1), wrong]), 3);
    assert_eq!(remembered(&[leaf(0x10)]), 0);
}
