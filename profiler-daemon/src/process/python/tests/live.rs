//! Live interpreters: in a program of their own, in somebody else's, and several in one process.

use super::*;

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
        // Nothing tells whose state it is, so nothing but the slot is asked.
        assert_eq!(layout::layout(version_of(interpreter)).unwrap().current, None);
        return Ok(());
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
