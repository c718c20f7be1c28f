//! Names, inlined functions and lines, wherever the debug information lies. Oracle: binutils' `addr2line`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::changes::{EARLY, MappedCode, function_in, library};
use super::*;

/// Functions that the compiler inlines into each other, with mangled names of every kind: namespaces, templates, operators,
/// lambdas. It says where they are and waits.
const SOURCE: &str = r#"
#include <cstdio>
#include <cstdint>
#include <unistd.h>

namespace shop {
template <typename T> struct Basket {
    T sum;
    inline __attribute__((always_inline)) T taxed(T rate) const {
        return sum * rate + (sum ^ rate);
    }
    inline __attribute__((always_inline)) Basket operator+(T more) const {
        return Basket{taxed(more) + more};
    }
};
__attribute__((noinline)) uint64_t checkout(volatile uint64_t *items, int count) {
    Basket<uint64_t> basket{1};
    auto discount = [](uint64_t price) __attribute__((noinline)) { return price / 3 + 1; };
    for (int n = 0; n < count; n++)
        basket = basket + discount(items[n]);
    return basket.sum;
}
}

int main() {
    volatile uint64_t items[4] = {1, 2, 3, 4};
    uint64_t sum = shop::checkout(items, 4);
    std::printf("%p %llu\n", (void *)&shop::checkout, (unsigned long long)sum);
    std::fflush(stdout);
    pause();
}
"#;

/// A place where only root can put anything: what names debug information is followed only there.
fn folder() -> Option<tempfile::TempDir> {
    tempfile::tempdir_in("/run").ok()
}

fn run(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn compiled(folder: &Path) -> Option<PathBuf> {
    let (source, program) = (folder.join("shop.cc"), folder.join("shop"));
    fs::write(&source, SOURCE).expect("a file");
    // A build ID of its own for each run: what is found by it must be this file's.
    let id = format!("-Wl,--build-id=0x{:016x}{:016x}", std::process::id(), folder.as_os_str().len());
    run(Command::new("c++").args(["-O2", "-g", &id, "-o"]).arg(&program).arg(&source))?;
    Some(program)
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs it, and says where its function is: in memory, and in the file.
fn started(program: &Path) -> (Running, u64, u64) {
    let mut child = Command::new(program).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    let output = child.stdout.take().expect("an output");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).expect("a line");
    let address =
        line.split_whitespace().next().and_then(|word| word.strip_prefix("0x")).expect("an address");
    let address = u64::from_str_radix(address, 16).expect("a number");
    let maps = Maps::read(child.id()).expect("its map");
    let mapping = maps.lookup(address).expect("its code").clone();
    let elf = ElfFile::parse(fs::File::open(program).expect("a file")).expect("an ELF file");
    let bias = elf.bias(&mapping).expect("a segment");
    (Running(child), address, address - bias)
}

/// What `addr2line` says of an address of a file: functions with their lines, the outermost first.
fn oracle(program: &Path, at: u64) -> Vec<(String, u32)> {
    let mut ask = Command::new("addr2line");
    ask.args(["-i", "-f", "-C", "-e"]).arg(program).arg(format!("{at:#x}"));
    let text = run(&mut ask).expect("binutils");
    let lines: Vec<&str> = text.lines().collect();
    let mut found: Vec<(String, u32)> = lines
        .chunks(2)
        .map(|pair| {
            let line = pair[1].rsplit_once(':').and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            (pair[0].to_owned(), line.unwrap_or(0))
        })
        .collect();
    found.reverse();
    found
}

/// The name without what tools spell differently: arguments, return type, and template arguments' types (`unsigned long`).
fn bare(name: &str) -> String {
    let mut depth = 0;
    let mut text = String::new();
    for letter in name.replace("{lambda(unsigned long)#1}::operator()", "lambda").chars() {
        match letter {
            '<' | '(' => depth += 1,
            '>' | ')' => depth -= 1,
            _ if depth == 0 => text.push(letter),
            _ => {}
        }
    }
    text.trim().trim_end_matches(" const").rsplit([':', ' ']).next().unwrap_or_default().to_owned()
}

/// Resolves every byte of the function in the running program and compares it with what the oracle says of `known`, the
/// program with all its debug information. How many had inlined functions.
fn compare(program: &Path, known: &Path) -> usize {
    let (running, address, at) = started(program);
    let key = identity::key(running.0.id()).expect("it runs");
    let mut symbolizer = Symbolizer::default();
    let mut inlined = 0;
    for offset in 0..0x40 {
        let expected = oracle(known, at + offset);
        if !expected[0].0.contains("checkout") {
            break;
        }
        let (stack, outcome) = resolve(&mut symbolizer, key, &[leaf(address + offset)]);
        assert_eq!(outcome, Outcome::default());
        let found: Vec<(String, u32)> = stack.iter().map(|frame| (bare(&frame.name), frame.line)).collect();
        let wanted: Vec<(String, u32)> = expected.iter().map(|(name, line)| (bare(name), *line)).collect();
        assert_eq!(found, wanted, "at {offset:#x}: {:?} and {expected:?}", names(&stack));
        assert!(stack[0].name.starts_with("shop::checkout"), "{:?}", stack[0].name);
        assert!(stack.iter().all(|frame| frame.file.ends_with("shop.cc")), "{stack:?}");
        inlined += usize::from(found.len() > 1);
    }
    inlined
}

/// Each test has its own program, with its debug information in the file.
fn prepared(test: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let Some(folder) = folder() else {
        skip(test, "only root may write to /run");
        return None;
    };
    let Some(program) = compiled(folder.path()) else {
        skip(test, "no C++ compiler");
        return None;
    };
    Some((folder, program))
}

#[test]
fn functions_that_the_compiler_inlined_are_shown_in_their_order() {
    let Some((_folder, program)) = prepared("functions_that_the_compiler_inlined_are_shown_in_their_order")
    else {
        return;
    };
    assert!(compare(&program, &program) > 10);
}

/// Takes the debug information out of a copy and says where it is.
fn stripped(program: &Path, debug: &Path) -> PathBuf {
    let copy = program.with_file_name("stripped");
    fs::copy(program, &copy).expect("a copy");
    run(Command::new("objcopy").arg("--only-keep-debug").arg(program).arg(debug)).expect("binutils");
    run(Command::new("strip").arg(&copy)).expect("binutils");
    let mut link = Command::new("objcopy");
    run(link.arg(format!("--add-gnu-debuglink={}", debug.display())).arg(&copy)).expect("binutils");
    copy
}

#[test]
fn debug_information_beside_the_program_is_found() {
    let Some((folder, program)) = prepared("debug_information_beside_the_program_is_found") else { return };
    let copy = stripped(&program, &folder.path().join("shop.debug"));
    assert!(compare(&copy, &program) > 10);
}

#[test]
fn debug_information_in_the_folder_of_build_ids_is_found() {
    let test = "debug_information_in_the_folder_of_build_ids_is_found";
    let Some((folder, program)) = prepared(test) else { return };
    let debug = folder.path().join("elsewhere.debug");
    let copy = stripped(&program, &debug);
    let notes = run(Command::new("readelf").arg("-n").arg(&program)).expect("binutils");
    let id =
        notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: ")).expect("a build ID").to_owned();
    let place = Path::new("/usr/lib/debug/.build-id").join(&id[..2]);
    let existed = place.is_dir();
    if fs::create_dir_all(&place).is_err() {
        return skip(test, "only root may write to /usr/lib/debug");
    }
    let file = place.join(format!("{}.debug", &id[2..]));
    fs::rename(&debug, &file)
        .or_else(|_| fs::copy(&debug, &file).and_then(|_| fs::remove_file(&debug)))
        .expect("moved");
    let found = std::panic::catch_unwind(|| compare(&copy, &program));
    fs::remove_file(&file).expect("ours");
    if !existed {
        let _ = fs::remove_dir(&place);
    }
    assert!(found.expect("equal") > 10);
}

/// Without any, the name of the nearest symbol there is, or the place: never nothing.
#[test]
fn code_without_symbols_is_shown_by_its_place() {
    let Some((_folder, program)) = prepared("code_without_symbols_is_shown_by_its_place") else { return };
    let bare = program.with_file_name("bare");
    run(Command::new("strip").arg("-o").arg(&bare).arg(&program)).expect("binutils");
    let (running, address, at) = started(&bare);
    let key = identity::key(running.0.id()).expect("it runs");
    let mut symbolizer = Symbolizer::default();
    let (stack, outcome) = resolve(&mut symbolizer, key, &[leaf(address)]);
    assert_eq!((names(&stack), outcome.unresolved), (vec![format!("bare+{at:#x}").as_str()], 1));
    assert_eq!(count(&symbolizer, FrameKind::Native, Reason::NoSymbol), 1);
}

#[test]
fn where_a_file_says_its_debug_information_lies_nothing_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (path, fifo) = (dir.path().join("lib.so"), dir.path().join("f"));
    let mut bytes = std::fs::read(library("libc.so")).unwrap();
    let Some(end) = memchr::memmem::rfind(&bytes, b".debug\0") else {
        crate::skip::skip(
            "where_a_file_says_its_debug_information_lies_nothing_is_opened",
            "this C library names no file with debug information",
        );
        return;
    };
    // The name in `.gnu_debuglink`: the rest of a build id.
    let start = end - 38;
    assert!(bytes[start..end].iter().all(u8::is_ascii_hexdigit));
    let name = fifo.to_str().unwrap();
    bytes[start..end + 6].fill(0);
    bytes[start..start + name.len()].copy_from_slice(name.as_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let c = std::ffi::CString::new(name).unwrap();
    // SAFETY: a NUL-terminated path.
    assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);
    let code = MappedCode::of(&path, None);
    let frame = function_in(&path, &code, &EARLY);
    let (told, names_of) = std::sync::mpsc::channel();
    // A symbolizer that opens the FIFO never returns.
    std::thread::spawn(move || {
        let (stack, outcome) = resolve(&mut Symbolizer::default(), me(), &[frame]);
        let _ = told.send((stack[0].name.to_string(), outcome));
    });
    let (name, outcome) =
        names_of.recv_timeout(std::time::Duration::from_secs(60)).expect("it does not wait for the FIFO");
    assert_eq!(outcome, Outcome::default());
    assert!(!name.starts_with('<') && !name.contains('+'), "{name}");
}
