//! A real process with a stack of known shape: our walk of it finds what the C library's own unwinder found, frame by
//! frame, and with a piece of memory missing it finds as much as there is.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use profiler_common::unwind::end;
use profiler_ebpf::memory::{self, Fault};
use profiler_ebpf::native::Walker;

use super::kept::Kept;
use crate::process::maps::Maps;
use crate::process::memory::{Memory, ProcessMemory};
use crate::skip::skip;
use crate::unwind::spaces::Spaces;

/// The process's memory, without what lies from some address on.
struct Cut {
    memory: ProcessMemory,
    from: u64,
}

impl memory::Memory for Cut {
    fn fill<const N: usize>(
        &self,
        address: u64,
        size: u32,
        block: &mut memory::Block<N>,
    ) -> Result<(), Fault> {
        if address + u64::from(size) > self.from {
            return Err(Fault);
        }
        // SAFETY: `size` is at most N.
        let bytes = unsafe { std::slice::from_raw_parts_mut(block.as_mut_ptr(), size as usize) };
        self.memory.read(address, bytes).map_err(|_| Fault)
    }
}

struct Stopped {
    child: Child,
    /// What `backtrace` said, and where the function is that asked it.
    said: Vec<u64>,
    deepest: u64,
    /// The thread that stopped.
    tid: i32,
    pc: u64,
    registers: [u64; 16],
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(line: &str) -> u64 {
    u64::from_str_radix(line.trim().trim_start_matches("0x"), 16).expect("an address")
}

fn run(program: &Path, depth: u32, how: &str) -> Stopped {
    let mut child = Command::new(program)
        .args([&depth.to_string(), how])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let mut lines = || lines.next().expect("a line").expect("text");
    let (mut said, mut deepest) = (Vec::new(), 0);
    loop {
        let line = lines();
        if line == "end" {
            break;
        } else if let Some(rest) = line.strip_prefix("deepest ") {
            deepest = address(rest);
        } else {
            said.push(address(&line));
        }
    }
    let mut status = 0;
    // SAFETY: plain system calls with pointers to locals that outlive them. The traced thread is a child's, and we are
    // its tracer's thread: it was started by this one.
    let (tid, regs) = unsafe {
        let tid = libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD);
        assert!(tid > 0 && libc::WIFSTOPPED(status), "{tid} {status:#x}");
        let mut regs: libc::user_regs_struct = std::mem::zeroed();
        let got = libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &mut regs);
        assert_eq!(got, 0, "{}", std::io::Error::last_os_error());
        (tid, regs)
    };
    let registers = [
        regs.rax, regs.rdx, regs.rcx, regs.rbx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    Stopped { child, said, deepest, tid, pc: regs.rip, registers }
}

/// Frames, leaf first, and how the walk ended.
fn walk(stopped: &Stopped, kept: &Kept, from: u64) -> (Vec<u64>, u8) {
    let memory = Cut { memory: ProcessMemory::new(stopped.child.id()), from };
    let mut walker = Box::new(Walker::new());
    walker.begin(stopped.pc, stopped.registers, kept.spaces[&stopped.child.id()]);
    let mut frames = Vec::new();
    loop {
        frames.push(walker.pc);
        assert!(frames.len() < 600, "no end");
        if let Err(end) = walker.step(&memory, kept) {
            return (frames, end);
        }
        assert_eq!(walker.guessed, 0, "a guess, at {:#x}", walker.pc);
    }
}

fn build(folder: &Path, flags: &[&str]) -> Option<std::path::PathBuf> {
    let program = folder.join("nested");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/unwind/tests/nested.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-pthread"]).args(flags);
    let built = compiler.arg("-o").arg(&program).arg(source).status();
    built.ok().filter(|status| status.success()).map(|_| program)
}

fn check(test: &str, flags: &[&str], depth: u32, how: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(program) = build(folder.path(), flags) else { return skip(test, "no C compiler") };
    let stopped = run(&program, depth, how);
    let mut kept = Kept::default();
    let mut spaces = Spaces::new(&mut kept);
    spaces.follow(stopped.child.id());
    assert_eq!(spaces.counts.failed + spaces.counts.full, 0, "{:?}", spaces.counts);
    drop(spaces);

    let (frames, how_ended) = walk(&stopped, &kept, u64::MAX);
    assert_eq!(how_ended, end::COMPLETE, "{frames:x?}");
    // Both are in the function that asked, at two places of it; from its caller on they see the same.
    let maps = Maps::read(stopped.child.id()).expect("its map");
    let inside = |pc: u64| pc > stopped.deepest && pc - stopped.deepest < 0x400;
    let ours = frames.iter().position(|pc| inside(*pc)).expect("the function in our stack");
    let theirs = stopped.said.iter().position(|pc| inside(*pc)).expect("the function in theirs");
    assert!(frames.iter().all(|pc| maps.lookup(*pc).is_some_and(|m| m.executable)));
    assert_eq!(frames[ours + 1..], stopped.said[theirs + 1..], "tid {}", stopped.tid);
    // Two frames for each level, and at least the handler, its trampoline, the callback, qsort and main.
    assert!(frames.len() > 2 * depth as usize + 5, "{}", frames.len());

    // Without the memory from some place on, the frames before it are the same, and it is said that there were more.
    let sp = stopped.registers[7];
    let mut shorter = 0;
    for cut in [8, 64, 1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16] {
        let (part, ended) = walk(&stopped, &kept, sp.saturating_add(cut));
        if part.len() < frames.len() {
            shorter += 1;
            assert_eq!(ended, end::FAULT);
        }
        assert_eq!(part[..], frames[..part.len()]);
    }
    assert!(shorter > 3, "{shorter}");
}

#[test]
fn a_stack_without_frame_pointers_is_walked_to_its_end() {
    check("a_stack_without_frame_pointers_is_walked_to_its_end", &[], 40, "");
}

#[test]
fn a_static_program_is_walked_to_its_end() {
    check("a_static_program_is_walked_to_its_end", &["-static"], 20, "");
}

#[test]
fn a_program_without_an_index_is_walked_to_its_end() {
    let test = "a_program_without_an_index_is_walked_to_its_end";
    check(test, &["-static", "-Wl,--no-eh-frame-hdr"], 20, "");
}

#[test]
fn a_handler_on_a_stack_of_its_own_is_walked_through() {
    check("a_handler_on_a_stack_of_its_own_is_walked_through", &[], 20, "stack");
}

#[test]
fn a_deep_stack_is_walked_to_its_end() {
    check("a_deep_stack_is_walked_to_its_end", &[], 120, "");
}
