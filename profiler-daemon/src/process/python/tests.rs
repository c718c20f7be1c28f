//! Oracles: `offsetof` in CPython's headers, glibc's own code shapes, and live interpreters.

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
            use crate::process::python::tests::on_version;

            #[test]
            fn python_3_8() {
                on_version(concat!(stringify!($test), "::python_3_8"), "3.8", super::$test);
            }
            #[test]
            fn python_3_9() {
                on_version(concat!(stringify!($test), "::python_3_9"), "3.9", super::$test);
            }
            #[test]
            fn python_3_10() {
                on_version(concat!(stringify!($test), "::python_3_10"), "3.10", super::$test);
            }
            #[test]
            fn python_3_11() {
                on_version(concat!(stringify!($test), "::python_3_11"), "3.11", super::$test);
            }
            #[test]
            fn python_3_12() {
                on_version(concat!(stringify!($test), "::python_3_12"), "3.12", super::$test);
            }
            #[test]
            fn python_3_13() {
                on_version(concat!(stringify!($test), "::python_3_13"), "3.13", super::$test);
            }
            #[test]
            fn python_3_14() {
                on_version(concat!(stringify!($test), "::python_3_14"), "3.14", super::$test);
            }
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
        let step = step(memory, &entry.python, frame, &mut scratch).unwrap();
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

/// What `offsetof` says, by name.
const OFFSETS: &str = r#"
#define Py_BUILD_CORE 1
#include <Python.h>
#include <stddef.h>
#include <stdio.h>
#if PY_VERSION_HEX < 0x030b0000
#include <frameobject.h>
#include <internal/pycore_pystate.h>
#else
#include <internal/pycore_frame.h>
#endif
#if PY_VERSION_HEX >= 0x03090000
#include <internal/pycore_runtime.h>
#endif
#if PY_VERSION_HEX >= 0x030e0000
#include <internal/pycore_interpframe.h>
#endif
#define O(name, type, field) printf(name " %zu\n", offsetof(type, field))
int main(void) {
#if PY_VERSION_HEX < 0x030c0000
    O("tss", _PyRuntimeState, gilstate.autoTSSkey);
#if PY_VERSION_HEX >= 0x030a0000
    O("current", _PyRuntimeState, gilstate.tstate_current);
    O("tstate_stack", PyThreadState, cframe);
#endif
#else
    O("tss", _PyRuntimeState, autoTSSkey);
#endif
    O("key", Py_tss_t, _key);
#if PY_VERSION_HEX < 0x030b0000
    O("current_frame", PyThreadState, frame);
    O("frame_code", PyFrameObject, f_code);
    O("frame_previous", PyFrameObject, f_back);
    O("frame_instr", PyFrameObject, f_lasti);
#else
    O("frame_previous", _PyInterpreterFrame, previous);
    O("code_bytecode", PyCodeObject, co_code_adaptive);
#if PY_VERSION_HEX < 0x030d0000
    O("tstate_cframe", PyThreadState, cframe);
    O("current_frame", _PyCFrame, current_frame);
    O("frame_code", _PyInterpreterFrame, f_code);
    O("frame_instr", _PyInterpreterFrame, prev_instr);
#else
    O("current_frame", PyThreadState, current_frame);
    O("frame_code", _PyInterpreterFrame, f_executable);
    O("frame_instr", _PyInterpreterFrame, instr_ptr);
    O("debug_offsets", _PyRuntimeState, debug_offsets);
#endif
#if PY_VERSION_HEX < 0x030c0000
    O("frame_entry", _PyInterpreterFrame, is_entry);
#else
    O("frame_entry", _PyInterpreterFrame, owner);
#if PY_VERSION_HEX < 0x030e0000
    printf("owner %d\n", FRAME_OWNED_BY_CSTACK);
#else
    printf("owner %d\n", FRAME_OWNED_BY_INTERPRETER);
#endif
#endif
#endif
#ifdef CO_NO_MONITORING_EVENTS
    printf("internal %d\n", CO_NO_MONITORING_EVENTS);
#endif
    O("code_argcount", PyCodeObject, co_argcount);
    O("code_kwonly", PyCodeObject, co_kwonlyargcount);
    O("code_flags", PyCodeObject, co_flags);
    O("code_firstline", PyCodeObject, co_firstlineno);
    O("filename", PyCodeObject, co_filename);
#if PY_VERSION_HEX < 0x030b0000
    O("name", PyCodeObject, co_name);
#else
    O("name", PyCodeObject, co_qualname);
#endif
#if PY_VERSION_HEX < 0x030a0000
    O("lines", PyCodeObject, co_lnotab);
#else
    O("lines", PyCodeObject, co_linetable);
#endif
    O("bytes_size", PyVarObject, ob_size);
    O("bytes_data", PyBytesObject, ob_sval);
    O("text_length", PyASCIIObject, length);
    O("text_state", PyASCIIObject, state);
    printf("text_ascii %zu\ntext_compact %zu\n", sizeof(PyASCIIObject), sizeof(PyCompactUnicodeObject));
    O("tp_members", PyTypeObject, tp_members);
}
"#;

/// The table, by the same names.
fn named(layout: &Layout) -> BTreeMap<&'static str, u64> {
    let (w, c) = (&layout.walk, &layout.code);
    let fields = [
        ("tstate_cframe", w.tstate_cframe),
        ("current_frame", w.current_frame),
        ("frame_code", w.frame_code),
        ("frame_previous", w.frame_previous),
        ("frame_instr", w.frame_instr),
        ("frame_entry", w.frame_entry),
        ("code_argcount", w.code_argcount),
        ("code_kwonly", w.code_kwonly),
        ("code_flags", w.code_flags),
        ("code_firstline", w.code_firstline),
        ("code_bytecode", w.code_bytecode),
        ("tstate_stack", w.tstate_stack),
        ("filename", c.filename),
        ("name", c.name),
        ("lines", c.lines),
        ("bytes_size", c.bytes_size),
        ("bytes_data", c.bytes_data),
        ("text_length", c.text_length),
        ("text_state", c.text_state),
        ("text_ascii", c.text_ascii),
        ("text_compact", c.text_compact),
    ];
    let mut named: BTreeMap<_, _> =
        fields.into_iter().filter(|(_, at)| *at != NO_FIELD).map(|(name, at)| (name, at.into())).collect();
    named.insert("tss", layout.tss);
    named.extend(layout.current.map(|at| ("current", at)));
    named.insert("key", 4);
    named.insert("tp_members", 240);
    named
}

/// Oracle: the compiler, with the version's own headers. Both the table and what the interpreter says of itself.
fn offsets_agree_with_the_headers(interpreter: &Interpreter) -> Result<(), String> {
    if interpreter.headers.is_empty() {
        return Err(format!("{} has no headers", interpreter.name()));
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("o.c"), dir.path().join("o"));
    std::fs::write(&source, OFFSETS).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(interpreter.headers.iter().map(|folder| format!("-I{}", folder.display())));
    let built = compiler.arg("-w").arg("-o").arg(&binary).arg(&source).output();
    let built = built.map_err(|error| format!("no C compiler: {error}"))?;
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(&binary).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut theirs: BTreeMap<&str, u64> = text
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, at)| (name, at.parse().unwrap()))
        .collect();
    let version = version_of(interpreter);
    assert_eq!(theirs.remove("owner"), (version.minor >= 12).then_some(OWNER_INTERPRETER.into()));
    assert_eq!(theirs.remove("debug_offsets"), (version.minor >= 13).then_some(0));
    let internal = theirs.remove("internal");
    assert!(internal.is_none_or(|bit| bit == u64::from(CODE_INTERNAL)), "{internal:?}");
    let table = layout::layout(version).unwrap();
    assert_eq!(named(&table), theirs);

    // From nothing that is right in the table, the interpreter's own account gives back what it lists.
    let python = Python::start(interpreter, "print('ready', flush=True); import sys; sys.stdin.readline()");
    let located = locate(python.pid(), &Maps::read(python.pid()).unwrap()).unwrap().unwrap();
    let memory = ProcessMemory::new(python.pid());
    assert_eq!(located.layout(&memory).unwrap(), table);
    let mut said = table;
    let (walk, code) = (&mut said.walk, &mut said.code);
    for field in
        [&mut walk.code_argcount, &mut walk.code_kwonly, &mut walk.code_flags, &mut walk.code_firstline]
    {
        *field = 0;
    }
    (code.filename, code.name, code.lines) = (0, 0, 0);
    if version.minor < 10 {
        (walk.frame_code, walk.frame_previous, walk.frame_instr) = (0, 0, 0);
    }
    members::apply_code(&memory, located.code_type.unwrap(), &mut said);
    members::apply_frame(&memory, located.frame_type.unwrap(), &mut said);
    assert_eq!(said, table, "by members");
    if version.minor >= 13 {
        let mut said = table;
        let (walk, code) = (&mut said.walk, &mut said.code);
        (walk.current_frame, walk.frame_code, walk.frame_previous, walk.frame_instr) = (1, 1, 1, 1);
        (walk.frame_entry, walk.code_argcount, walk.code_firstline, walk.code_bytecode) = (1, 1, 1, 1);
        (code.filename, code.name, code.lines, code.bytes_size, code.bytes_data) = (1, 1, 1, 1, 1);
        (code.text_length, code.text_state, code.text_ascii, code.text_compact) = (1, 1, 1, 1);
        located.debug_offsets.as_ref().unwrap().apply(&mut said).unwrap();
        assert_eq!(said, table, "by debug offsets");
    }
    Ok(())
}
on_each_version!(offsets_agree_with_the_headers);

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

/// Oracle: the interpreter's own chain of frames, and where it goes through C: a call from `sorted`, `map` or a
/// generator's `next` enters the loop anew, and so does every call up to 3.10.
fn frames_are_reached_through_the_key(interpreter: &Interpreter) -> Result<(), String> {
    let script = "
import sys, threading
def inner(n):
    print(threading.get_ident(), [id(f.f_code) for f in chain()], flush=True)
    print('ready', flush=True)
    sys.stdin.readline()
def chain():
    f = sys._getframe(1)
    while f:
        yield f
        f = f.f_back
class Made:
    def __init__(self, go):
        if go:
            deep(20)
def deep(n):
    return deep(n - 1) if n else sorted([1], key=inner)
def make(go):
    return Made(go)
def values(go):
    yield make(go)
def outer(go):
    for value in values(go):
        pass
# Called so often that calls of Python functions are specialised.
for n in range(100):
    outer(False)
outer(True)
";
    let python = Python::start(interpreter, script);
    let maps = Maps::read(python.pid()).unwrap();
    let target = detect(python.pid(), &maps).unwrap().expect("an interpreter");
    assert_eq!(target.version, version_of(interpreter));
    let code = &target.interpreter_loop;
    let size = |part: &std::ops::Range<u64>| part.end - part.start;
    assert!(code.found && size(&code.hot) + code.cold.as_ref().map_or(0, size) > 20_000, "{code:x?}");
    assert!(maps.lookup(code.hot.start).unwrap().executable);
    if let Some(cold) = &code.cold {
        assert!(maps.lookup(cold.start).unwrap().executable && size(cold) > 1000);
        assert!(!code.hot.contains(&cold.start));
    }
    eprintln!("{}: loop {code:x?}", interpreter.name());
    let (thread, codes) = python.output[0].split_once(' ').unwrap();
    // Left out: the generator, whose own frame was there when it ran.
    let codes: Vec<u64> = codes.trim_matches(['[', ']']).split(", ").map(|n| n.parse().unwrap()).collect();
    let memory = ProcessMemory::new(python.pid());
    let segments = walk_segments(&target, memory, thread.parse().unwrap());
    let walked: Vec<u64> = segments.iter().flatten().map(|frame| frame.address).collect();
    // Up to 3.11 the list that made the output was a function of its own; `inner` and below still run.
    let frames = 1 + 21 + 1 + 1 + 1 + 1 + 1;
    assert_eq!(walked, codes[codes.len() - frames..]);
    let sizes: Vec<usize> = segments.iter().map(Vec::len).collect();
    let expected = match target.version.minor {
        // One call of the loop for each.
        ..=10 => vec![1; frames],
        // `sorted` calls `inner`; a class calls its `__init__`; `for` calls a generator.
        11 => vec![1, 22, 2, 2],
        // `for` resumes a generator without C.
        12 => vec![1, 22, 4],
        // So does a class its `__init__`.
        _ => vec![1, 26],
    };
    assert_eq!(sizes, expected);
    Ok(())
}
on_each_version!(frames_are_reached_through_the_key);

/// In a program that has the interpreter in it, whose key is in a block of its own.
fn embedded_interpreters_are_walked(interpreter: &Interpreter) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let without = || format!("{} has no shared library with headers", interpreter.name());
    let embedding = interpreter.embedded(folder.path()).ok_or_else(without)??;
    let python = Python::start(&embedding, "print('ready', flush=True); import sys; sys.stdin.readline()");
    let target = detect(python.pid(), &Maps::read(python.pid()).unwrap()).unwrap().unwrap();
    assert!(target.tss_key >= 32, "{target:?}");
    drop(python);
    frames_are_reached_through_the_key(&embedding)
}
on_each_version!(embedded_interpreters_are_walked);

fn signal(pid: u32, signal: i32) {
    // SAFETY: no memory is involved, and the process is a child that nobody has waited for.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// As in the third field of `/proc/PID/stat`.
fn state(pid: u32) -> u8 {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap();
    stat[memchr::memrchr(b')', &stat).unwrap() + 2]
}

/// Of a process that is stopped: `/proc/PID/syscall` ends with stack pointer and program counter.
fn stack_pointer(pid: u32) -> u64 {
    let said = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
    let word = said.split_whitespace().rev().nth(1).unwrap_or_else(|| panic!("{said}"));
    u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()
}

/// A child that does not end by itself, also where the test fails.
struct Endless(Child);

impl Drop for Endless {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A thread that runs in another interpreter of its process, as under uWSGI with two applications, and holds the GIL.
fn frames_in_another_interpreter_are_reached(interpreter: &Interpreter) -> Result<(), String> {
    if version_of(interpreter).minor < 10 {
        return Err("nothing tells whose state it is".to_owned());
    }
    let script = r#"
import threading
try:
    import _interpreters as interpreters
except ImportError:
    try:
        import _xxsubinterpreters as interpreters
    except ImportError:
        raise SystemExit(print("none\nready", flush=True))
print(threading.get_ident(), flush=True)
run = getattr(interpreters, "exec", None) or interpreters.run_string
def outside():
    run(interpreters.create(), """if True:
        def spin():
            while True:
                pass
        def within():
            spin()
        print([id(f.__code__) for f in (spin, within)], "\\nready", flush=True)
        within()
""")
outside()
"#;
    let mut command = interpreter.command();
    command.args(["-s", "-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Endless(command.spawn().unwrap());
    let lines = BufReader::new(child.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said: Vec<String> = lines.take_while(|line| !line.starts_with("ready")).collect();
    if said == ["none"] {
        return Err(format!("{} has no module for that", interpreter.name()));
    }
    assert_eq!(said.len(), 2, "{said:?}");
    let pid = child.0.id();
    let thread = said[0].parse().unwrap();
    let codes: Vec<u64> =
        said[1].trim().trim_matches(['[', ']']).split(", ").map(|code| code.parse().unwrap()).collect();
    let target = detect(pid, &Maps::read(pid).unwrap()).unwrap().unwrap();
    // It has yet to call the function that never returns, and what it does meanwhile is not to be looked at.
    let began = std::time::Instant::now();
    let found = loop {
        signal(pid, libc::SIGSTOP);
        while state(pid) != b'T' {
            std::thread::yield_now();
        }
        let (memory, entry) = (Walked(ProcessMemory::new(pid)), entry(&target));
        // It spins in the loop itself, whose stack frame the stack pointer is the beginning of.
        let newest = match entry.current {
            0 => current_frame(&memory, &entry, thread).unwrap(),
            _ => holders_frame(&memory, &entry, stack_pointer(pid)),
        };
        let walked: Vec<u64> =
            walk_from(&memory, &entry, newest).iter().flatten().map(|frame| frame.address).collect();
        if walked.get(1) == Some(&codes[1]) || began.elapsed().as_secs() >= 10 {
            break walked;
        }
        signal(pid, libc::SIGCONT);
    };
    assert_eq!(found.get(..2), Some(&codes[..]), "{}", interpreter.name());
    Ok(())
}
on_each_version!(frames_in_another_interpreter_are_reached);

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
