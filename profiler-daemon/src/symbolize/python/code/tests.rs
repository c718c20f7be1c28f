//! Forged objects in made-up memory, and the objects of live interpreters.

use super::*;
use crate::interpreters::Interpreter;
use crate::process::maps::Maps;
use crate::process::memory::ProcessMemory;
use crate::process::memory::testing::FakeMemory;
use crate::process::python::layout::layout;
use crate::process::python::tests::{Python, on_each_version, walk};
use crate::process::python::{Version, detect, locate};

fn layout_311() -> Layout {
    layout(Version { major: 3, minor: 11 }).unwrap()
}

const KIND: u64 = 0x5000;
const CODE: u64 = 0x1000;
const NAME: u64 = 0x2000;
const FILE: u64 = 0x3000;
const TABLE: u64 = 0x4000;

/// A `str` as 3.11 lays it out.
fn text(kind: u8, ascii: bool, length: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; if ascii { 48 } else { 72 }];
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    bytes[32] = kind << 2 | 1 << 5 | u8::from(ascii) << 6 | 1 << 7;
    bytes.extend(data);
    bytes
}

fn table(data: &[u8], size: u64) -> Vec<u8> {
    let mut bytes = vec![0; 32];
    bytes[16..24].copy_from_slice(&size.to_le_bytes());
    bytes.extend(data);
    bytes
}

fn object(name: Vec<u8>, file: Vec<u8>, lines: Vec<u8>) -> FakeMemory {
    let mut code = vec![0; 192];
    code[..8].copy_from_slice(&1u64.to_le_bytes());
    code[8..16].copy_from_slice(&KIND.to_le_bytes());
    code[48..52].copy_from_slice(&3u32.to_le_bytes());
    code[56..60].copy_from_slice(&2u32.to_le_bytes());
    code[64..68].copy_from_slice(&1u32.to_le_bytes());
    code[72..76].copy_from_slice(&40u32.to_le_bytes());
    code[112..120].copy_from_slice(&FILE.to_le_bytes());
    code[128..136].copy_from_slice(&NAME.to_le_bytes());
    code[136..144].copy_from_slice(&TABLE.to_le_bytes());
    FakeMemory(vec![(CODE, code), (NAME, name), (FILE, file), (TABLE, lines)])
}

fn check() -> u32 {
    code_check(2, 1, 3, 40)
}

fn read(memory: &FakeMemory) -> Result<Code, CodeError> {
    Code::read(memory, &layout_311(), Some(KIND), CODE, check())
}

#[test]
fn every_kind_of_text_is_read() {
    let lines = || table(&[0x80 | 11 << 3, 0, 0], 3);
    let latin = text(1, false, 3, &[b'c', 0xe9, b'x']);
    let wide = text(2, false, 2, &[0xac, 0x20, 0x00, 0xdc]); // € and a lone surrogate
    let widest = text(4, false, 1, &[0x40, 0xf6, 0x01, 0]);
    for (name, wanted) in [(latin, "céx"), (wide, "€\u{fffd}"), (widest, "🙀")] {
        let code = read(&object(name, text(1, true, 4, b"a.py"), lines())).unwrap();
        assert_eq!((&*code.name, &*code.filename, code.first_line), (wanted, "a.py", 40));
        assert_eq!((code.line(0), code.line(2), code.line(0x0fff_fffe)), (41, 41, 40));
    }
}

#[test]
fn forged_objects_are_refused_or_cut() {
    let good = || text(1, true, 1, b"f");
    let lines = || table(&[], 0);
    assert!(read(&object(good(), good(), lines())).is_ok());

    let memory = object(good(), good(), lines());
    let read_at = |address, check| Code::read(&memory, &layout_311(), Some(KIND), address, check);
    assert_eq!(read_at(CODE, check() ^ 1), Err(CodeError::Reused));
    assert_eq!(read_at(0x9000, check()), Err(CodeError::Memory(ReadError::Fault)));

    let negative = text(1, true, u64::MAX, b"f");
    let odd_kind = text(3, false, 1, b"fff");
    let mut legacy = good();
    legacy[32] &= !(1 << 5);
    for name in [negative, odd_kind, legacy] {
        assert_eq!(read(&object(name, good(), lines())), Err(CodeError::Damaged));
    }
    // A length beyond what is mapped.
    assert_eq!(
        read(&object(text(1, true, 9, b"f"), good(), lines())),
        Err(CodeError::Memory(ReadError::Fault))
    );
    // A length beyond what is read.
    let long = read(&object(text(1, true, 1 << 40, &[b'a'; 2000]), good(), lines())).unwrap();
    assert!(long.name.len() <= 512);
    for size in [1 << 40, u64::MAX, LINETABLE_MAX as u64 + 1] {
        assert_eq!(read(&object(good(), good(), table(&[], size))), Err(CodeError::Damaged));
    }
    let rude = read(&object(text(1, true, 4, b"a\n\x1bb"), good(), lines())).unwrap();
    assert_eq!(&*rude.name, "a\u{fffd}\u{fffd}b");
}

/// Whatever else is as it was.
#[test]
fn what_is_dead_has_no_name() {
    let text = || text(1, true, 1, b"f");
    // Free lists of pymalloc (the last one, and others), of malloc, objects of another type.
    let (last, pymalloc, malloc) = ((0, KIND), (0x7f12_3456_7890, KIND), (0x1e3_f012, 0x5a5a_1234_9876_0001));
    for (references, kind) in [last, pymalloc, malloc, (1, KIND + 8)] {
        let mut memory = object(text(), text(), table(&[], 0));
        memory.0[0].1[..16].copy_from_slice(&[references, kind].map(u64::to_le_bytes).concat());
        assert_eq!(read(&memory), Err(CodeError::Reused), "{references:#x} {kind:#x}");
    }
    // Immortal ones of 3.11, 3.12 and 3.14.
    for references in [999_999_999, 0xffff_ffff, 0x0004_0000_c000_0000] {
        let mut memory = object(text(), text(), table(&[], 0));
        memory.0[0].1[..8].copy_from_slice(&u64::to_le_bytes(references));
        assert!(read(&memory).is_ok(), "{references:#x}");
    }
}

/// Oracle: the interpreter, which says where its code objects are and lets some of them die. Small ones lie in its own
/// allocator's memory, large ones in malloc's.
fn code_that_died_has_no_name(interpreter: &Interpreter) -> Result<(), String> {
    let script = "
import sys
made = [compile('def made(a): return a' + '; a += 1' * n, f'made{n}.py', 'exec') for n in (0, 900)]
died = [compile('def died(a): return a' + '; a += 1' * n, f'died{n}.py', 'exec') for n in (0, 900)]
inner = lambda all: all + [code.co_consts[0] for code in all]
for name, all in ('made', inner(made)), ('died', inner(died)):
    for c in all:
        print(name, id(c), c.co_argcount, c.co_kwonlyargcount, c.co_flags, c.co_firstlineno)
del died, all, c
print('ready', flush=True)
sys.stdin.readline()
";
    let python = Python::start(interpreter, script);
    let located = locate(python.pid(), &Maps::read(python.pid()).unwrap()).unwrap().unwrap();
    let memory = ProcessMemory::new(python.pid());
    let layout = located.layout(&memory).unwrap();
    assert!(located.code_type.is_some());
    assert_eq!(python.output.len(), 8);
    for line in &python.output {
        let (name, numbers) = line.split_once(' ').unwrap();
        let numbers: Vec<u64> = numbers.split(' ').map(|word| word.parse().unwrap()).collect();
        let [address, rest @ ..] = numbers.as_slice() else { panic!("{line}") };
        let fields: Vec<u32> = rest.iter().map(|number| *number as u32).collect();
        let check = code_check(fields[0], fields[1], fields[2], fields[3]);
        let code = Code::read(&memory, &layout, located.code_type, *address, check);
        match name {
            "made" => assert!(code.unwrap().filename.starts_with("made"), "{line}"),
            _ => assert!(matches!(code, Err(CodeError::Reused | CodeError::Memory(_))), "{line}: {code:?}"),
        }
    }
    Ok(())
}
on_each_version!(code_that_died_has_no_name);

/// Oracle: what CPython itself says about the blocked thread (`f_lineno`), asked by another thread once the first is
/// inside its blocking `read` system call.
fn frames_have_the_right_names_and_lines(interpreter: &Interpreter) -> Result<(), String> {
    let script = "
import sys, threading, json
class Täst:
    def inner(self, a, *, b=1):
        (a,
         sys.stdin.
         readline(),
         b)
def outer(f):
    x = [f(n)
         for n in (1,)]
    return x
def watch(main):
    me = f'/proc/self/task/{main.native_id}/syscall'
    while not open(me).read().startswith('0 0x0 '):
        pass
    frames, f = [], sys._current_frames()[main.ident]
    while f:
        c = f.f_code
        frames.append([getattr(c, 'co_qualname', c.co_name), c.co_filename, c.co_firstlineno, f.f_lineno])
        f = f.f_back
    print(main.ident, json.dumps(frames), flush=True)
    print('ready', flush=True)
threading.Thread(target=watch, args=(threading.main_thread(),)).start()
outer(
    lambda n:
        Täst().inner(n))
";
    let python = Python::start(interpreter, script);
    let maps = Maps::read(python.pid()).unwrap();
    let target = detect(python.pid(), &maps).unwrap().unwrap();
    let (thread, frames) = python.output[0].split_once(' ').unwrap();
    let wanted: Vec<(String, String, u32, u32)> = serde_json::from_str(frames).unwrap();
    let memory = ProcessMemory::new(python.pid());
    let located = locate(python.pid(), &maps).unwrap().unwrap();
    let layout = located.layout(&memory).unwrap();
    let walked = walk(&target, &memory, thread.parse().unwrap());
    let found: Vec<(String, String, u32, u32)> = walked
        .iter()
        .map(|f| {
            let code = Code::read(&memory, &layout, located.code_type, f.address, f.check).unwrap();
            (code.name.to_string(), code.filename.to_string(), code.first_line, code.line(f.lasti()))
        })
        .collect();
    assert_eq!(found, wanted);
    // From 3.12 on a list comprehension is no function.
    let count = if target.version.minor < 12 { 5 } else { 4 };
    let name = if target.version.minor < 11 { "inner" } else { "Täst.inner" };
    assert_eq!((found.len(), found[0].0.as_str()), (count, name));
    Ok(())
}
on_each_version!(frames_have_the_right_names_and_lines);
