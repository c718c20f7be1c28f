//! Whole stacks, over live processes. Oracles: the loader, `/proc/kallsyms`, the interpreter.

mod changes;
mod debug_info;

use super::names::Resolved;
use super::*;
use crate::interpreters::Interpreter;
use crate::process::elf::ElfFile;
use crate::process::identity;
use crate::process::maps::Maps;
use crate::process::memory::{Memory, ProcessMemory};
use crate::process::python::detect;
use crate::process::python::tests::{Python, on_each_version, walk};
use crate::skip::skip;
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use profiler_common::{FRAME_NATIVE_LEAF, FRAME_NATIVE_RETURN};
use std::rc::Rc;

fn me() -> ProcessKey {
    identity::key(std::process::id()).unwrap()
}

fn leaf(address: u64) -> RawFrame {
    RawFrame::new(FRAME_NATIVE_LEAF, address, 0, 0)
}

fn caller(address: u64) -> RawFrame {
    RawFrame::new(FRAME_NATIVE_CALLER, address, 0, 0)
}

fn python(code: u64) -> RawFrame {
    RawFrame::new(FRAME_PYTHON, code, 0, 0)
}

fn resolve(symbolizer: &mut Symbolizer, key: ProcessKey, user: &[RawFrame]) -> (Vec<Arc<Frame>>, Outcome) {
    let (stack, outcome) = symbolizer.resolve(key, &[], user);
    (stack.to_vec(), outcome)
}

fn names(stack: &[Arc<Frame>]) -> Vec<&str> {
    stack.iter().map(|f| &*f.name).collect()
}

fn count(symbolizer: &Symbolizer, kind: FrameKind, reason: Reason) -> u64 {
    symbolizer.counters().filter(|c| (c.0, c.1) == (kind, reason)).map(|c| c.2).sum()
}

#[inline(never)]
fn called_function(n: u64) -> u64 {
    std::hint::black_box(n) + 1
}

#[inline(never)]
fn calling_function(n: u64) -> u64 {
    called_function(n) + called_function(n + 1)
}

/// The first return address in a function, found by decoding it.
fn return_address(function: fn(u64) -> u64) -> u64 {
    let start = function as usize as u64;
    let mut code = [0; 128];
    ProcessMemory::new(std::process::id()).read(start, &mut code).unwrap();
    let mut decoder = Decoder::with_ip(64, &code, start, DecoderOptions::NONE);
    decoder.iter().find(|i| i.flow_control() == FlowControl::Call).unwrap().next_ip()
}

#[test]
fn native_frames_have_names_files_and_lines() {
    std::hint::black_box(calling_function(1));
    let mut symbolizer = Symbolizer::default();
    let user = [leaf(called_function as *const () as u64), caller(return_address(calling_function))];
    let (stack, outcome) = resolve(&mut symbolizer, me(), &user);
    assert_eq!(outcome, Outcome::default());
    let found = names(&stack);
    assert!(found.len() == 2 && found[0].ends_with("::calling_function"), "{found:?}");
    assert!(found[1].ends_with("::called_function"), "{found:?}");
    for frame in &stack {
        assert!(
            frame.file.ends_with("symbolize/tests.rs") && frame.line > 0 && frame.kind == FrameKind::Native
        );
    }
    // Equal stacks are the same frames.
    let (again, _) = resolve(&mut symbolizer, me(), &user);
    assert!(stack.iter().zip(&again).all(|(a, b)| Arc::ptr_eq(a, b)));
}

/// What was found for one process serves the others that map the same file.
#[test]
fn processes_share_what_their_files_say() {
    let mut symbolizer = Symbolizer::default();
    // SAFETY: a NUL-terminated name.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"qsort".as_ptr()) } as u64;
    let (ours, _) = resolve(&mut symbolizer, me(), &[leaf(address)]);
    let maps = Maps::read(std::process::id()).unwrap();
    let here = maps.lookup(address).unwrap();
    let child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let place = || {
        let theirs = Maps::read(child.id()).ok()?;
        theirs.iter().find(|m| m.path == here.path && m.offset == here.offset).map(|m| m.start)
    };
    let began = std::time::Instant::now();
    let start = loop {
        if let Some(start) = place() {
            break start;
        }
        assert!(began.elapsed().as_secs() < 60, "`sleep` maps no C library");
        std::thread::yield_now();
    };
    let key = identity::key(child.id()).unwrap();
    let (theirs, _) = resolve(&mut symbolizer, key, &[leaf(address - here.start + start)]);
    assert!(ours.len() == 1 && Arc::ptr_eq(&ours[0], &theirs[0]), "{ours:?} {theirs:?}");
    assert_eq!(symbolizer.names.asked(), 1, "the file was asked once");
    let mut child = child;
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn libc_names_are_those_of_the_loader() {
    let mut symbolizer = Symbolizer::default();
    let maps = Maps::read(std::process::id()).unwrap();
    for name in [c"qsort", c"strtoul", c"getenv", c"pthread_create"] {
        // SAFETY: a NUL-terminated name.
        let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) } as u64;
        let (stack, outcome) = resolve(&mut symbolizer, me(), &[leaf(address + 1)]);
        assert_eq!((stack.len(), outcome.unresolved), (1, 0));
        // Debug information, where it is installed, has internal names: `__GI___qsort_r`.
        let found = stack[0].name.trim_start_matches('_');
        assert!(found.starts_with(name.to_str().unwrap()), "{:?}", stack[0]);
        let module = maps.lookup(address).unwrap().file_name();
        assert!(stack[0].line > 0 || *stack[0].file == *module, "{:?}", stack[0]);
    }
}

#[test]
fn wrong_guesses_cut_the_native_chain_and_no_more() {
    let mut symbolizer = Symbolizer::default();
    let good = caller(return_address(calling_function));
    let no_call = caller(calling_function as *const () as u64 + 1);
    let data = caller(&raw const symbolizer as u64);
    let nothing = caller(0x10);
    for bad in [no_call, data, nothing] {
        let user = [leaf(called_function as *const () as u64), good, bad, good, good];
        let (stack, outcome) = resolve(&mut symbolizer, me(), &user);
        assert_eq!((stack.len(), outcome), (2, Outcome { unresolved: 0, cut: 3 }));
        // A Python frame is no guess: what is native below it starts anew.
        let python = RawFrame::new(FRAME_PYTHON, 0x10, 0, 0);
        let (stack, outcome) = resolve(&mut symbolizer, me(), &[good, bad, good, python, good]);
        assert_eq!((stack.len(), outcome), (3, Outcome { unresolved: 1, cut: 2 }));
        assert_eq!(&*stack[1].name, "<python code 0x10: no_interpreter>");
    }
    assert_eq!(count(&symbolizer, FrameKind::Native, Reason::NoCallSite), 2);
    assert_eq!(count(&symbolizer, FrameKind::Native, Reason::Unmapped), 4);
    assert_eq!(count(&symbolizer, FrameKind::Python, Reason::NoInterpreter), 3);
}

#[test]
fn frames_without_a_name_say_so() {
    let mut symbolizer = Symbolizer::default();
    let (stack, outcome) = resolve(&mut symbolizer, me(), &[leaf(0x10)]);
    assert_eq!((names(&stack), outcome.unresolved), (vec!["[unmapped]"], 1));

    // Code made at run time.
    // SAFETY: a fresh private mapping of one page.
    let page = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if page == libc::MAP_FAILED {
        skip("frames_without_a_name_say_so", "no mapping is both writable and executable here");
        return;
    }
    // SAFETY: within the page: call *%rax, twenty bytes in.
    unsafe { page.cast::<u8>().add(20).copy_from([0xff, 0xd0].as_ptr(), 2) };
    let code = page as u64;
    // The map was read a moment ago; another look is not due yet, and a new symbolizer has none.
    let mut symbolizer = Symbolizer::default();
    let (stack, outcome) = resolve(&mut symbolizer, me(), &[leaf(code + 16), caller(code + 22)]);
    assert_eq!((names(&stack), outcome.unresolved), (vec!["[anon]+0x15", "[anon]+0x10"], 2));
    let (stack, outcome) = resolve(&mut symbolizer, me(), &[leaf(code + 16), caller(code + 40)]);
    assert_eq!((stack.len(), outcome), (1, Outcome { unresolved: 1, cut: 1 }));
    // SAFETY: the page mapped above, which nothing refers to any more.
    unsafe { libc::munmap(page, 4096) };
}

#[test]
fn kernel_frames_come_last() {
    let text = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    let find = |name: &str| {
        let line = text.lines().find(|l| l.ends_with(name))?;
        u64::from_str_radix(line.split(' ').next()?, 16).ok().filter(|&address| address != 0)
    };
    let mut symbolizer = Symbolizer::default();
    let user = [leaf(called_function as *const () as u64)];
    let (Some(inner), Some(outer)) = (find(" T schedule"), find(" T wake_up_process")) else {
        skip("kernel_frames_come_last", "kernel addresses are hidden");
        let (out, _) = symbolizer.resolve(me(), &[0xffff_ffff_8100_0000], &user);
        assert_eq!(names(out)[1], "[kernel]");
        return;
    };
    let (out, outcome) = symbolizer.resolve(me(), &[inner, outer + 5, 0x42], &user);
    assert_eq!(names(out)[1..], ["[kernel]", "wake_up_process", "schedule"]);
    assert!(out[1..].iter().all(|f| f.kind == FrameKind::Kernel));
    assert_eq!(outcome, Outcome { unresolved: 1, cut: 0 });
    assert_eq!(count(&symbolizer, FrameKind::Kernel, Reason::NoKernelSymbol), 1);
}

const SCRIPT: &str = "import sys, threading
def inner():
    print(threading.get_ident(), flush=True)
    print('ready', flush=True)
    sys.stdin.readline()
def outer():
    inner()
outer()
";

fn python_stacks_outlive_their_process(interpreter: &Interpreter) -> Result<(), String> {
    let mut python = Python::start(interpreter, SCRIPT);
    let key = identity::key(python.pid()).unwrap();
    let target = detect(key.pid, &Maps::read(key.pid).unwrap()).unwrap().unwrap();
    let memory = ProcessMemory::new(key.pid);
    let mut user = walk(&target, &memory, python.output[0].parse().unwrap());
    // Where the kernel side was told that the loop is.
    user.insert(0, leaf(target.interpreter_loop.hot.start + 4));

    let mut symbolizer = Symbolizer::default();
    let (stack, outcome) = resolve(&mut symbolizer, key, &user);
    assert_eq!((names(&stack), outcome), (vec!["<module>", "outer", "inner"], Outcome::default()));
    let lines: Vec<_> = stack.iter().map(|f| (f.line, f.first_line, &*f.file)).collect();
    assert_eq!(lines, [(8, 1, "<string>"), (7, 6, "<string>"), (5, 2, "<string>")]);
    // Alone, the loop is all there is to show.
    let (stack_of_loop, _) = resolve(&mut symbolizer, key, &user[..1]);
    assert!(stack_of_loop[0].name.starts_with("_PyEval_EvalFrameDefault"));

    if let Some(cold) = target.interpreter_loop.cold {
        let (stack, outcome) = resolve(&mut symbolizer, key, &[leaf(cold.start + 4), user[1]]);
        assert_eq!((names(&stack), outcome), (vec!["inner"], Outcome::default()));
    }

    // In whatever order stacks follow each other, each is what it would be alone. (`user` is the loop, then three
    // Python frames.)
    let [inside, inner, outer, module] = user[..] else { panic!("four frames: {user:?}") };
    let start = RawFrame::new(FRAME_PYTHON, inner.address, 0, inner.check);
    let (wild, unmapped) = (RawFrame::new(FRAME_PYTHON, 0x10, 0, 0), caller(0x10));
    let stacks: [&[RawFrame]; 12] = [
        &[inside, inner, outer, module],
        &[start, outer, module],
        &[inner, outer, module],
        &[outer, module],
        &[inner, unmapped, outer, module],
        &[inner, outer, module, unmapped],
        &[start, outer, module, unmapped],
        &[wild, outer, module],
        &[start, wild, module],
        &[inside, unmapped, outer, module],
        &[module],
        &[],
    ];
    for first in stacks {
        for second in stacks {
            resolve(&mut symbolizer, key, first);
            let (after, outcome) = resolve(&mut symbolizer, key, second);
            let (alone, expected) = resolve(&mut Symbolizer::default(), key, second);
            assert_eq!((names(&after), outcome), (names(&alone), expected), "{first:?} {second:?}");
            let lines = |stack: &[Arc<Frame>]| stack.iter().map(|f| f.line).collect::<Vec<_>>();
            assert_eq!(lines(&after), lines(&alone));
        }
    }

    // Something else than what the kernel side saw.
    let mut other = user[1];
    other.check ^= 1;
    let (reused, _) = resolve(&mut symbolizer, key, &[other]);
    assert_eq!(*reused[0].name, *format!("<python code {:#x}: reused>", other.address));

    let child = ProcessKey { pid: i32::MAX as u32, start_time: 0 };
    symbolizer.forked(key, child);
    // A parent that was never sampled is asked at the fork: its child needs no looking for an interpreter.
    let mut fresh = Symbolizer::default();
    fresh.forked(key, child);
    python.finish();
    let unknown = RawFrame::new(FRAME_PYTHON, 0x1234, 0, 0);
    assert_eq!(names(&resolve(&mut fresh, child, &[unknown]).0), ["<python code 0x1234: gone>"]);
    for key in [key, child] {
        let (again, outcome) = resolve(&mut symbolizer, key, &user);
        assert_eq!(outcome, Outcome::default());
        assert!(stack.iter().zip(&again).all(|(a, b)| Arc::ptr_eq(a, b)));
        // Another instruction of a known code object.
        let start = RawFrame::new(FRAME_PYTHON, user[1].address, 0, user[1].check);
        let first = if target.version.minor < 11 { 3 } else { 2 };
        assert_eq!(resolve(&mut symbolizer, key, &[start]).0[0].line, first);
        // An unknown one of a process that is gone.
        let unknown = RawFrame::new(FRAME_PYTHON, 0x1234, 0, 0);
        let (stack, outcome) = resolve(&mut symbolizer, key, &[unknown]);
        assert_eq!((names(&stack), outcome.unresolved), (vec!["<python code 0x1234: gone>"], 1));
    }
    symbolizer.exited(key);
    let (stack, _) = resolve(&mut symbolizer, key, &user[1..2]);
    assert!(stack[0].name.starts_with("<python code"));
    Ok(())
}
on_each_version!(python_stacks_outlive_their_process);

#[test]
fn where_native_frames_were_left_out_a_frame_says_so() {
    let mut symbolizer = Symbolizer::default();
    let left_out = RawFrame::new(profiler_common::FRAME_LEFT_OUT, 0, 0, 0);
    let function: fn(u64) -> u64 = called_function;
    let inside = leaf(function as usize as u64);
    let (stack, outcome) = resolve(&mut symbolizer, me(), &[inside, caller(0x10), left_out, python(0x1234)]);
    assert_eq!(names(&stack)[..2], ["<python code 0x1234: no_interpreter>", "[native frames left out]"]);
    assert_eq!((stack.len(), stack[1].kind), (3, FrameKind::Native));
    assert_eq!(outcome, Outcome { unresolved: 2, cut: 1 });
    assert_eq!(count(&symbolizer, FrameKind::Native, Reason::LeftOut), 1);
}

/// The record that says so may be lost.
fn a_program_that_replaced_an_interpreter_is_not_asked_for_code_objects(
    interpreter: &Interpreter,
) -> Result<(), String> {
    const REPLACED: &str = "
import os, sys
print('ready', flush=True)
sys.stdin.readline()
os.execv('/bin/cat', ['cat'])
";
    let mut process = Python::start(interpreter, REPLACED);
    let key = identity::key(process.pid()).unwrap();
    let mut symbolizer = Symbolizer::default();
    symbolizer.target(key);
    let unknown = python(0x1234);
    assert_eq!(names(&resolve(&mut symbolizer, key, &[unknown]).0), ["<python code 0x1234: fault>"]);
    let exe = std::path::PathBuf::from(format!("/proc/{}/exe", key.pid));
    let before = std::fs::read_link(&exe).unwrap();
    process.go_on();
    while std::fs::read_link(&exe).unwrap() == before {
        std::thread::yield_now();
    }
    // Past the first instructions of the new program, so that its map is complete.
    process.wait_until_blocked();
    symbolizer.processes.get_mut(&key).unwrap().looked(std::time::Duration::from_secs(60));
    let name = "<python code 0x1234: no_interpreter>";
    assert_eq!(names(&resolve(&mut symbolizer, key, &[unknown]).0), [name]);
    assert_eq!(names(&resolve(&mut Symbolizer::default(), key, &[unknown]).0), [name]);
    Ok(())
}
on_each_version!(a_program_that_replaced_an_interpreter_is_not_asked_for_code_objects);

#[test]
fn a_pid_that_was_reused_is_not_asked() {
    // Our own pid, and a start time that is not ours: a process that ended before.
    let earlier = ProcessKey { start_time: me().start_time + 1, ..me() };
    let mut symbolizer = Symbolizer::default();
    let (stack, _) = resolve(&mut symbolizer, earlier, &[leaf(called_function as *const () as u64)]);
    assert_eq!(names(&stack), ["[unmapped]"]);
}

#[test]
fn the_number_of_processes_is_bounded() {
    let mut symbolizer = Symbolizer::default();
    for n in 0..2 * PROCESSES_MAX as u32 {
        let key = ProcessKey { pid: i32::MAX as u32 - n, start_time: 0 };
        resolve(&mut symbolizer, key, &[leaf(0x10)]);
    }
    assert_eq!(symbolizer.processes.len(), PROCESSES_MAX);
    let newest = ProcessKey { pid: i32::MAX as u32 - 2 * PROCESSES_MAX as u32 + 1, start_time: 0 };
    assert!(symbolizer.processes.contains_key(&newest));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(12))]
    /// Addresses near something real and far from it, of any kind: every raw frame is shown or counted as cut.
    #[test]
    fn no_frame_disappears_uncounted(
        raws in proptest::collection::vec((0u32..16, 0u64..3, proptest::prelude::any::<u16>()), 0..40),
    ) {
        let bases = [called_function as *const () as u64, libc::recv as *const () as u64, u64::MAX - 0x8000];
        let user: Vec<RawFrame> = raws
            .iter()
            .map(|&(kind, base, offset)| RawFrame::new(kind, bases[base as usize].wrapping_add(offset.into()), 0, 0))
            .collect();
        let mut symbolizer = Symbolizer::default();
        let (stack, outcome) = resolve(&mut symbolizer, me(), &user);
        assert!(stack.len() + outcome.cut as usize >= user.len());
        let (again, same) = resolve(&mut symbolizer, me(), &user);
        assert_eq!((names(&stack), outcome), (names(&again), same));
    }
}

#[test]
fn the_fattest_process_makes_room() {
    let mut symbolizer = Symbolizer::default();
    let resolved = Rc::new(Resolved { frames: Box::default(), kind: ResolvedKind::Named });
    let small = ProcessKey { pid: 1, start_time: 1 };
    // Sampled longest ago.
    symbolizer.put_back(small, Process::new(small));
    for pid in 2..80 {
        let key = ProcessKey { pid, start_time: 1 };
        let mut process = Process::new(key);
        process.used = pid.into();
        for n in 0..16_000 {
            process.remember(leaf(n), resolved.clone());
        }
        symbolizer.put_back(key, process);
        assert!(symbolizer.size() <= BYTES_MAX + AUDIT_BYTES);
    }
    assert!(symbolizer.size() > BYTES_MAX / 2);
    assert!(symbolizer.processes.contains_key(&small));
}

/// A process that makes code in memory, and a list of its names late.
const GENERATING: &str = "
import ctypes, mmap, os, sys
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(address, flush=True)
print('ready', flush=True)
for line in sys.stdin:
    with open('/tmp/perf-%d.map' % os.getpid(), 'a') as names:
        names.write(line)
    print('written', flush=True)
";

#[test]
fn code_made_at_run_time_is_named_by_its_maker() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::Stdio;
    const TEST: &str = "code_made_at_run_time_is_named_by_its_maker";
    let build = match crate::interpreters::of_version("3.11") {
        Ok(builds) => builds[0].clone(),
        Err(reason) => return skip(TEST, reason),
    };
    let mut child = build
        .command()
        .args(["-I", "-c", GENERATING])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut read = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    let code: u64 = read().parse().unwrap();
    assert_eq!(read(), "ready");
    let key = identity::key(child.id()).unwrap();
    let list = format!("perf-{}.map", child.id());
    let mut symbolizer = Symbolizer::default();
    let user = [leaf(code + 0x10), RawFrame::new(FRAME_NATIVE_RETURN, code + 0x80, 0, 0)];
    let (stack, outcome) = resolve(&mut symbolizer, key, &user);
    // The page may lie beside others of its kind.
    let start = Maps::read(key.pid).unwrap().lookup(code).unwrap().start;
    let unnamed = |offset| format!("[anon]+{:#x}", code + offset - start);
    let (inside, outside) = (unnamed(0x10), unnamed(0x7f));
    assert_eq!((names(&stack), outcome.unresolved), (vec![&*outside, &*inside], 2));

    // Later lines are seen without an address that was not, and hold against earlier ones.
    let steps = [
        (format!("{:x} 40 inner\n", code), vec![&*outside, "inner"]),
        (format!("{:x} 40 outer\n", code + 0x40), vec!["outer", "inner"]),
        (format!("{:x} 20 replaced\n", code), vec!["outer", "replaced"]),
    ];
    for (line, expected) in steps {
        input.write_all(line.as_bytes()).unwrap();
        assert_eq!(read(), "written");
        let began = std::time::Instant::now();
        loop {
            let (stack, outcome) = resolve(&mut symbolizer, key, &user);
            if names(&stack) == expected {
                let anonymous = expected.iter().filter(|name| name.starts_with('[')).count();
                assert_eq!(outcome.unresolved as usize, anonymous);
                assert_eq!(&*stack[1].file, list);
                break;
            }
            assert!(began.elapsed() < std::time::Duration::from_secs(60), "{expected:?}: {stack:?}");
            std::thread::yield_now();
        }
    }
    drop(input);
    child.wait().unwrap();
    std::fs::remove_file(std::path::Path::new("/tmp").join(list)).unwrap();
    // Nobody can be asked any more; what was told holds.
    assert_eq!(names(&resolve(&mut symbolizer, key, &user).0), ["outer", "replaced"]);
}

#[test]
fn the_kernel_part_of_a_process_has_names() {
    // SAFETY: asks for a number.
    let start = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    if start == 0 {
        skip("the_kernel_part_of_a_process_has_names", "there is no vDSO here");
        return;
    }
    // The oracle: the loader finds the function by its own means.
    // SAFETY: NUL-terminated names of something that is loaded already.
    let function = unsafe {
        let vdso = libc::dlopen(c"linux-vdso.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        assert!(!vdso.is_null());
        libc::dlsym(vdso, c"__vdso_clock_gettime".as_ptr())
    } as u64;
    let (stack, outcome) = resolve(&mut Symbolizer::default(), me(), &[leaf(function)]);
    assert_eq!(outcome, Outcome::default());
    // One function under two names.
    assert!(["__vdso_clock_gettime", "clock_gettime"].contains(&&*stack[0].name), "{stack:?}");
    assert_eq!(&*stack[0].file, "[vdso]");
}
