//! Oracles: `offsetof` in CPython's headers, glibc's own code shapes, and live interpreters.

use super::*;
use crate::skip::skip;
use profiler_common::{FRAME_PYTHON, RawFrame, code_check};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Python 3.11 builds of this machine: a distribution's (static, stripped) and pyenv's (shared). None: the test that asks
/// is skipped.
pub(crate) fn interpreters(test: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/usr/bin/python3.11")];
    if let Some(home) = std::env::var_os("HOME") {
        let versions = PathBuf::from(home).join(".pyenv/versions");
        if let Ok(entries) = std::fs::read_dir(versions) {
            let of_311 =
                |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("3.11."));
            found
                .extend(entries.flatten().map(|e| e.path()).filter(of_311).map(|p| p.join("bin/python3.11")));
        }
    }
    found.retain(|p| p.exists());
    if found.is_empty() {
        skip(test, "neither /usr/bin nor pyenv has a CPython 3.11");
    }
    found
}

/// An interpreter that ran a script and waits for its input to close.
pub(crate) struct Python {
    child: Child,
    /// What the script printed, until the line `ready`.
    pub(crate) output: Vec<String>,
}

impl Python {
    pub(crate) fn start(interpreter: &std::path::Path, script: &str) -> Self {
        let mut child = Command::new(interpreter)
            .args(["-I", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
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
            memchr::memrchr(b')', &stat).and_then(|n| stat.get(n + 2)).is_none_or(|&state| state == b'S')
        })
    };
    while !asleep() {
        std::thread::yield_now();
    }
}

/// The walk as the kernel side does it, over process memory. `thread` is the thread pointer, which is what
/// `threading.get_ident()` returns.
pub(crate) fn walk(target: &PythonTarget, memory: &impl Memory, thread: u64) -> Vec<RawFrame> {
    let o = &target.offsets;
    let at = |base: u64, offset: u16| base + u64::from(offset);
    let slot = thread + u64::from(target.tss_block) + u64::from(target.tss_key) * 16;
    let state = memory.read_u64(slot + 8).unwrap();
    let cframe = memory.read_u64(at(state, o.tstate_cframe)).unwrap();
    let mut frame = memory.read_u64(at(cframe, o.current_frame)).unwrap();
    let mut frames = Vec::new();
    while frame != 0 && frames.len() < 256 {
        let code = memory.read_u64(at(frame, o.frame_code)).unwrap();
        let instr = memory.read_u64(at(frame, o.frame_instr)).unwrap();
        let lasti = instr.wrapping_sub(at(code, o.code_bytecode));
        let field = |offset| memory.read_u32(at(code, offset)).unwrap();
        let check = code_check(
            field(o.code_argcount),
            field(o.code_kwonly),
            field(o.code_flags),
            field(o.code_firstline),
        );
        frames.push(RawFrame::new(FRAME_PYTHON, code, lasti as u32, check));
        frame = memory.read_u64(at(frame, o.frame_previous)).unwrap();
    }
    frames
}

#[test]
fn offsets_agree_with_the_headers() {
    const TEST: &str = "offsets_agree_with_the_headers";
    let program = r#"
#define Py_BUILD_CORE 1
#include <Python.h>
#include <stddef.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_runtime.h>
#define O(t, f) printf("%zu ", offsetof(t, f))
int main(void) {
    O(_PyRuntimeState, gilstate.autoTSSkey);
    O(PyThreadState, cframe); O(_PyCFrame, current_frame);
    O(_PyInterpreterFrame, f_code); O(_PyInterpreterFrame, previous);
    O(_PyInterpreterFrame, prev_instr); O(_PyInterpreterFrame, is_entry);
    O(PyCodeObject, co_argcount); O(PyCodeObject, co_kwonlyargcount); O(PyCodeObject, co_flags);
    O(PyCodeObject, co_firstlineno); O(PyCodeObject, co_code_adaptive);
    O(PyCodeObject, co_filename); O(PyCodeObject, co_qualname); O(PyCodeObject, co_linetable);
    O(PyVarObject, ob_size); O(PyBytesObject, ob_sval);
    O(PyASCIIObject, length); O(PyASCIIObject, state);
    printf("%zu %zu %zu\n", sizeof(PyASCIIObject), sizeof(PyCompactUnicodeObject), offsetof(Py_tss_t, _key));
}
"#;
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("o.c"), dir.path().join("o"));
    std::fs::write(&source, program).unwrap();
    let (mut compared, mut without_headers) = (0, Vec::new());
    for interpreter in interpreters(TEST) {
        let query = "import sysconfig; print(sysconfig.get_path('include'))";
        let output = Command::new(&interpreter).args(["-I", "-c", query]).output().unwrap();
        let include = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        if !include.join("internal/pycore_frame.h").exists() {
            without_headers.push(interpreter.display().to_string());
            continue;
        }
        let built = Command::new("cc").arg("-I").arg(&include).arg("-o").arg(&binary).arg(&source).output();
        let Ok(built) = built else {
            skip(TEST, "no C compiler (cc)");
            return;
        };
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let output = Command::new(&binary).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let found: Vec<u64> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
        let l = layout(Version { major: 3, minor: 11 }).unwrap();
        let (w, c) = (&l.walk, &l.code);
        let ours = [
            w.tstate_cframe,
            w.current_frame,
            w.frame_code,
            w.frame_previous,
            w.frame_instr,
            w.frame_entry,
            w.code_argcount,
            w.code_kwonly,
            w.code_flags,
            w.code_firstline,
            w.code_bytecode,
            c.filename,
            c.qualname,
            c.linetable,
            c.bytes_size,
            c.bytes_data,
            c.text_length,
            c.text_state,
            c.text_ascii,
            c.text_compact,
        ];
        let ours: Vec<u64> =
            std::iter::once(l.tss).chain(ours.into_iter().map(u64::from)).chain(std::iter::once(4)).collect();
        assert_eq!(ours, found, "{}", interpreter.display());
        assert_eq!(
            (c.argcount, c.kwonly, c.flags, c.firstline, c.size),
            (w.code_argcount, w.code_kwonly, w.code_flags, w.code_firstline, c.linetable + 8)
        );
        compared += 1;
    }
    if compared == 0 && !without_headers.is_empty() {
        skip(TEST, format!("no headers (Debian's python3.11-dev) for {}", without_headers.join(", ")));
    }
}

#[test]
fn the_first_block_is_read_off_the_code() {
    // glibc 2.34 and later: mov %edi,%eax; add $0x31,%rax; shl $4,%rax; add %fs:0x10,%rax; mov 8(%rax),%rdx
    let recent = [
        0x83, 0xff, 0x1f, 0x77, 0x3b, 0x89, 0xf8, 0x48, 0x83, 0xc0, 0x31, 0x48, 0xc1, 0xe0, 0x04, 0x64, 0x48,
        0x03, 0x04, 0x25, 0x10, 0, 0, 0, 0x48, 0x8b, 0x50, 0x08,
    ];
    assert_eq!(first_block(&recent), Ok(0x310));
    // glibc 2.31: lea 0x31(%rdi),%eax; shl $4,%rax; mov %fs:0x10,%rdx; add %rdx,%rax; mov 8(%rax),%r8
    let older = [
        0x83, 0xff, 0x1f, 0x77, 0x3b, 0x8d, 0x47, 0x31, 0x48, 0xc1, 0xe0, 0x04, 0x64, 0x48, 0x8b, 0x14, 0x25,
        0x10, 0, 0, 0, 0x48, 0x01, 0xd0, 0x4c, 0x8b, 0x40, 0x08,
    ];
    assert_eq!(first_block(&older), Ok(0x310));
    // Another factor, no thread pointer, nothing at all: refused, not guessed.
    let mut other = recent;
    other[14] = 3;
    assert!(first_block(&other).is_err());
    assert!(first_block(&recent[..15]).is_err());
    assert!(first_block(&[]).is_err());
    assert!(first_block(&[0xac]).is_err()); // lods
    assert!(first_block(&[0xff; 16]).is_err());
}

proptest::proptest! {
    #[test]
    fn any_code_is_evaluated(code in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..128)) {
        let _ = first_block(&code);
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
}

#[test]
fn this_process_is_no_python() {
    let maps = Maps::read(std::process::id()).unwrap();
    assert!(matches!(detect(std::process::id(), &maps), Ok(None)));
}

#[test]
fn frames_of_live_interpreters_are_reached_through_the_key() {
    let script = "
import sys, threading
def inner():
    print(threading.get_ident(), [id(f.f_code) for f in chain()], flush=True)
    print('ready', flush=True)
    sys.stdin.readline()
def chain():
    f = sys._getframe(1)
    while f:
        yield f
        f = f.f_back
def outer():
    inner()
outer()
";
    for interpreter in interpreters("frames_of_live_interpreters_are_reached_through_the_key") {
        let python = Python::start(&interpreter, script);
        let maps = Maps::read(python.pid()).unwrap();
        let target = detect(python.pid(), &maps).unwrap().expect("an interpreter");
        assert_eq!(target.version, Version { major: 3, minor: 11 });
        assert!(target.interpreter_loop.end - target.interpreter_loop.start > 20_000);
        assert!(maps.lookup(target.interpreter_loop.start).unwrap().executable);
        if let Some(cold) = &target.interpreter_cold {
            assert!(maps.lookup(cold.start).unwrap().executable && cold.end - cold.start > 1000);
            assert!(!target.interpreter_loop.contains(&cold.start));
        }
        eprintln!("{}: cold part {:x?}", interpreter.display(), target.interpreter_cold);
        let (thread, codes) = python.output[0].split_once(' ').unwrap();
        // The generator's own frame was there when it ran: it is the first but one listed.
        let codes: Vec<u64> =
            codes.trim_matches(['[', ']']).split(", ").map(|n| n.parse().unwrap()).collect();
        let frames = walk(&target, &ProcessMemory::new(python.pid()), thread.parse().unwrap());
        let walked: Vec<u64> = frames.iter().map(|f| f.address).collect();
        // The list comprehension that made the output has returned; `inner` and below still run.
        assert_eq!(walked, codes[codes.len() - 3..], "{}", interpreter.display());
    }
}

#[test]
fn other_versions_say_so() {
    let mut found = vec![PathBuf::from("/usr/bin/python3")];
    if let Some(home) = std::env::var_os("HOME")
        && let Ok(entries) = std::fs::read_dir(PathBuf::from(home).join(".pyenv/versions"))
    {
        found.extend(entries.flatten().map(|entry| entry.path().join("bin/python3")));
    }
    let mut asked = 0;
    for interpreter in found {
        let query = "import sys; print('%d.%d' % sys.version_info[:2])";
        let Ok(output) = Command::new(&interpreter).args(["-I", "-c", query]).output() else { continue };
        let version = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        if !["3.9", "3.10", "3.12", "3.13"].contains(&version.as_str()) {
            continue;
        }
        let script = "import sys; print('ready', flush=True); sys.stdin.readline()";
        let python = Python::start(&interpreter, script);
        let error = detect(python.pid(), &Maps::read(python.pid()).unwrap()).unwrap_err();
        assert!(
            matches!(error, PythonError::Unsupported { version: v } if v.to_string() == version),
            "{error}"
        );
        asked += 1;
    }
    if asked == 0 {
        skip(
            "other_versions_say_so",
            "neither /usr/bin nor pyenv has a CPython of another version than 3.11",
        );
    }
}
