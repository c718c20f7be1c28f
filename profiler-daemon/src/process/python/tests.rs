//! Oracles: `offsetof` in CPython's headers, glibc's own code shapes, and live interpreters.

mod live;
mod offsets;

use super::*;
use crate::interpreters::{Interpreter, VERSIONS, of_version};
use crate::skip::skip;
use profiler_common::{CODE_INTERNAL, NO_FIELD, OWNER_INTERPRETER, RawFrame};
use profiler_ebpf::memory::{Block, Fault};
use profiler_ebpf::python::{Scratch, current_frame, holders_frame, step};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

/// Runs a test function on every build of every version: a test for each version, so that one that is missing is told.
macro_rules! on_each_version {
    ($test:ident) => {
        mod $test {
            fn check(name: &str, version: &'static str) {
                crate::process::python::tests::on_version(name, version, super::$test);
            }
            crate::interpreters::each_version!(check);
        }
    };
}
pub(crate) use on_each_version;

/// `test` says why it could not judge a build.
pub(crate) fn on_version(name: &str, version: &'static str, test: fn(&Interpreter) -> Result<(), String>) {
    let builds = match of_version(version) {
        Ok(builds) => builds,
        Err(reason) => return skip(name, reason),
    };
    let outcomes: Vec<_> = builds
        .iter()
        .map(|build| {
            eprintln!("on {}", build.name());
            test(build)
        })
        .collect();
    let judged = outcomes.iter().any(Result::is_ok);
    let reasons = outcomes.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("; ");
    if !judged {
        skip(name, reasons);
    } else if !reasons.is_empty() {
        println!("{name}: not judged: {reasons}");
    }
}

fn version_of(interpreter: &Interpreter) -> Version {
    let (major, minor) = interpreter.version.split_once('.').unwrap();
    Version { major: major.parse().unwrap(), minor: minor.parse().unwrap() }
}

/// An interpreter that ran a script and waits for its input to close.
pub(crate) struct Python {
    child: Child,
    /// What the script printed, until the line `ready`.
    pub(crate) output: Vec<String>,
}

impl Python {
    pub(crate) fn start(interpreter: &Interpreter, script: &str) -> Self {
        let mut command = interpreter.command();
        // Not isolated: a program that embeds one is told by the environment where its library is.
        command.args(["-s", "-c", script]);
        Self::spawn(command)
    }

    /// Any program that runs such a script.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if line == "ready" {
                break;
            }
            output.push(line);
        }
        wait_until_blocked(child.id());
        Self { child, output }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets the script read a line.
    pub(crate) fn go_on(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    pub(crate) fn wait_until_blocked(&self) {
        wait_until_blocked(self.pid());
    }

    /// Lets the script end.
    pub(crate) fn finish(&mut self) {
        if let Some(mut input) = self.child.stdin.take() {
            let _ = input.write_all(b"\n");
        }
        let _ = self.child.wait();
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Until every thread sleeps: the script's last word is followed by a blocking read.
fn wait_until_blocked(pid: u32) {
    let asleep = || {
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().all(|task| {
            let stat = std::fs::read(task.path().join("stat")).unwrap_or_default();
            let state = memchr::memrchr(b')', &stat).and_then(|n| stat.get(n + 2));
            assert_ne!(state, Some(&b'Z'), "it ended");
            state.is_none_or(|&state| state == b'S')
        })
    };
    while !asleep() {
        std::thread::yield_now();
    }
}

/// A process's memory as the kernel side's walker sees it.
pub(crate) struct Walked(pub(crate) ProcessMemory);

impl profiler_ebpf::memory::Memory for Walked {
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault> {
        let mut bytes = vec![0; size as usize];
        assert!(bytes.len() <= N);
        self.0.read(address, &mut bytes).map_err(|_| Fault)?;
        // SAFETY: both have `size` bytes, by the assertion.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), block.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

/// The kernel side's walk, over process memory: frames, and after which of them a native one comes. `thread` is the
/// thread pointer, which is what `threading.get_ident()` returns.
pub(crate) fn walk_segments(target: &PythonTarget, memory: ProcessMemory, thread: u64) -> Vec<Vec<RawFrame>> {
    let (memory, entry) = (Walked(memory), entry(target));
    let newest = current_frame(&memory, &entry, thread).unwrap();
    walk_from(&memory, &entry, newest)
}

fn entry(target: &PythonTarget) -> Target {
    let mut entry = Target::default();
    target.fill(&mut entry);
    entry
}

fn walk_from(memory: &Walked, entry: &Target, newest: u64) -> Vec<Vec<RawFrame>> {
    let mut scratch = Scratch::new();
    let mut frame = newest;
    let mut segments = vec![Vec::new()];
    for _ in 0..1000 {
        if frame == 0 {
            break;
        }
        let step = step(memory, None, &entry.python, frame, &mut scratch).unwrap();
        if !step.shim {
            segments.last_mut().unwrap().push(step.frame);
        }
        if step.entry {
            segments.push(Vec::new());
        }
        frame = step.previous;
    }
    assert_eq!(segments.pop(), Some(Vec::new()), "the outermost frame was entered from C");
    segments
}

pub(crate) fn walk(target: &PythonTarget, memory: &ProcessMemory, thread: u64) -> Vec<RawFrame> {
    walk_segments(target, *memory, thread).concat()
}

#[test]
fn the_first_block_is_read_off_the_code() {
    // glibc 2.34 and later: mov %edi,%eax; add $0x31,%rax; shl $4,%rax; add %fs:0x10,%rax; mov 8(%rax),%rdx
    let recent = [
        0x83, 0xff, 0x1f, 0x77, 0x3b, 0x89, 0xf8, 0x48, 0x83, 0xc0, 0x31, 0x48, 0xc1, 0xe0, 0x04, 0x64, 0x48,
        0x03, 0x04, 0x25, 0x10, 0, 0, 0, 0x48, 0x8b, 0x50, 0x08,
    ];
    assert_eq!(thread_data::first_block(&recent), Ok(0x310));
    // glibc 2.31: lea 0x31(%rdi),%eax; shl $4,%rax; mov %fs:0x10,%rdx; add %rdx,%rax; mov 8(%rax),%r8
    let older = [
        0x83, 0xff, 0x1f, 0x77, 0x3b, 0x8d, 0x47, 0x31, 0x48, 0xc1, 0xe0, 0x04, 0x64, 0x48, 0x8b, 0x14, 0x25,
        0x10, 0, 0, 0, 0x48, 0x01, 0xd0, 0x4c, 0x8b, 0x40, 0x08,
    ];
    assert_eq!(thread_data::first_block(&older), Ok(0x310));
    // Another factor, no thread pointer, nothing at all: refused, not guessed.
    let mut other = recent;
    other[14] = 3;
    assert!(thread_data::first_block(&other).is_err());
    assert!(thread_data::first_block(&recent[..15]).is_err());
    assert!(thread_data::first_block(&[]).is_err());
    assert!(thread_data::first_block(&[0xac]).is_err()); // lods
    assert!(thread_data::first_block(&[0xff; 16]).is_err());
}

proptest::proptest! {
    #[test]
    fn any_code_is_evaluated(code in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..128)) {
        let _ = thread_data::first_block(&code);
    }
}

#[test]
fn versions_are_told_by_number_and_by_name() {
    assert_eq!(parse_hex_version(0x030b_07f0), (Version { major: 3, minor: 11 }, 7));
    let v = |minor| Some(Version { major: 3, minor });
    assert_eq!(version_from_name("libpython3.9.so.1.0"), v(9));
    assert_eq!(version_from_name("python3.10"), v(10));
    assert_eq!(version_from_name("libpython3.7m.so"), v(7));
    assert_eq!(version_from_name("python3"), None);
    assert_eq!(version_from_name("pythonista"), None);
    let maps = Maps::parse(
        b"1000-2000 r-xp 00000000 08:01 7 /usr/bin/uwsgi\n\
          3000-4000 r-xp 00000000 08:01 8 /usr/lib/python3.10/lib-dynload/_json.cpython-310-x86_64-linux-gnu.so\n",
    );
    assert_eq!(version_from_extensions(&maps), v(10));
    assert_eq!(version_from_extensions(&Maps::default()), None);
}

#[test]
fn this_process_is_no_python() {
    let maps = Maps::read(std::process::id()).unwrap();
    assert!(matches!(detect(std::process::id(), &maps), Ok(None)));
}

#[test]
fn versions_that_have_no_test_are_not_claimed() {
    let claimed: Vec<String> =
        (layout::OLDEST.minor..=layout::NEWEST.minor).map(|n| format!("3.{n}")).collect();
    assert_eq!(claimed, VERSIONS);
}

/// Debian has no build of any of these, and no version after the newest.
#[test]
fn what_is_not_supported_says_so() {
    let located = |version, words: &[(usize, u64)]| {
        let mut bytes = [0; debug_offsets::SIZE];
        for (n, word) in words {
            bytes[n * 8..n * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        Located {
            version,
            release: format!("{version}.1"),
            runtime: 0,
            interpreter_loop: InterpreterLoop { hot: 0..0, cold: None, found: true },
            code_type: None,
            frame_type: None,
            context_type: None,
            context_copy: None,
            debug_offsets: DebugOffsets::parse(&bytes),
        }
    };
    let memory = crate::process::memory::testing::FakeMemory::default();
    let cookie = (0, u64::from_le_bytes(*b"xdebugpy"));
    let (newest, next) = (layout::NEWEST, Version { major: 3, minor: layout::NEWEST.minor + 1 });
    let error = |located: Located| located.layout(&memory).unwrap_err().to_string();
    assert_eq!(error(located(next, &[])), "Python 3.15 is not supported; 3.8 to 3.14 are");
    assert_eq!(
        error(located(newest, &[cookie, (1, 0x030e_01f0), (2, 1)])),
        "Python 3.14.1 without the GIL (free-threaded) is not supported"
    );
    for words in [[(34, 100), (26, 0)], [(34, 0), (26, 1 << 16)]] {
        let said: Vec<_> = [cookie, (1, 0x030e_01f0)].into_iter().chain(words).collect();
        let error = error(located(newest, &said));
        assert!(error.starts_with("this build of Python lays out its structures"), "{error}");
    }
}
