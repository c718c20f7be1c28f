//! CPython in a process: where it is, and what the kernel side needs to walk its frames.
//!
//! In: a pid, its maps and its memory. Out: a [`PythonTarget`], whose fields go into the target's entry of the BPF
//! map as they are.
//!
//! Frames are found through the thread-specific slot (`autoTSSkey`) in which CPython keeps each thread's state,
//! because CPython's own "current thread state" is NULL while a thread does not hold the GIL. Offsets into
//! CPython's structures differ from version to version: [`layout`] is the table, and a test compares it with
//! `offsetof` in the installed headers.

mod cold;

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use profiler_common::{ENTRY_FLAG, PythonOffsets, Target, target_flags};

use super::elf::{ElfError, ElfFile};
use super::identity::via;
use super::maps::{Mapping, Maps, OpenError, open};
use super::memory::{Memory, ProcessMemory, ReadError};
use super::patience::Unanswered;

/// `major.minor` of an interpreter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    pub major: u8,
    pub minor: u8,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What differs between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `autoTSSkey` in `_PyRuntime`.
    pub tss: u64,
    /// What the kernel side walks by.
    pub walk: PythonOffsets,
    /// What the symbolizer reads code objects by.
    pub code: CodeLayout,
}

/// Offsets into a code object and the objects it points to, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeLayout {
    pub argcount: u16,
    pub kwonly: u16,
    pub flags: u16,
    pub firstline: u16,
    pub filename: u16,
    pub qualname: u16,
    pub linetable: u16,
    /// Bytes that hold every field above.
    pub size: u16,
    /// `ob_size` of a `bytes` object, and its data.
    pub bytes_size: u16,
    pub bytes_data: u16,
    /// `length` and `state` of a string, and where the characters of a compact one begin: ASCII, and others.
    pub text_length: u16,
    pub text_state: u16,
    pub text_ascii: u16,
    pub text_compact: u16,
}

/// The layout of a version, if it is supported.
pub fn layout(version: Version) -> Option<&'static Layout> {
    match (version.major, version.minor) {
        (3, 11) => Some(&PYTHON_3_11),
        _ => None,
    }
}

/// Source: the headers of 3.11.7 (`cpython/pystate.h`, `internal/pycore_frame.h`, `cpython/code.h`,
/// `cpython/unicodeobject.h`, `internal/pycore_runtime.h`), the same for every 3.11: layouts are frozen with a
/// minor version.
static PYTHON_3_11: Layout = Layout {
    tss: 592,
    walk: PythonOffsets {
        tstate_cframe: 56,
        current_frame: 8,
        frame_code: 32,
        frame_previous: 48,
        frame_instr: 56,
        frame_entry: 68,
        code_argcount: 56,
        code_kwonly: 64,
        code_flags: 48,
        code_firstline: 72,
        code_bytecode: 184,
        entry_mode: ENTRY_FLAG,
        entry_value: 0,
    },
    code: CodeLayout {
        argcount: 56,
        kwonly: 64,
        flags: 48,
        firstline: 72,
        filename: 112,
        qualname: 128,
        linetable: 136,
        size: 144,
        bytes_size: 16,
        bytes_data: 32,
        text_length: 16,
        text_state: 32,
        text_ascii: 48,
        text_compact: 72,
    },
};

/// An interpreter in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PythonTarget {
    pub version: Version,
    /// The full version, as in `3.11.7`.
    pub release: String,
    /// Address of `_PyRuntime`.
    pub runtime: u64,
    /// The interpreter loop in the process.
    pub interpreter_loop: Range<u64>,
    /// The part of the loop that the compiler moved elsewhere.
    pub interpreter_cold: Option<Range<u64>>,
    pub tss_key: u32,
    pub tss_block: u32,
    pub offsets: PythonOffsets,
}

impl PythonTarget {
    /// Puts what was found into a target's entry, with its flag.
    pub fn fill(&self, target: &mut Target) {
        target.flags |= target_flags::PYTHON;
        target.tss_key = self.tss_key;
        target.tss_block = self.tss_block;
        target.loop_start = self.interpreter_loop.start;
        target.loop_end = self.interpreter_loop.end;
        let cold = self.interpreter_cold.clone().unwrap_or_default();
        (target.cold_start, target.cold_end) = (cold.start, cold.end);
        target.python = self.offsets;
    }
}

/// Why a process's Python frames cannot be walked.
#[derive(Debug, thiserror::Error)]
pub enum PythonError {
    #[error("Python {version} is not supported yet")]
    Unsupported { version: Version },
    #[error("the interpreter's key is not created yet (it is starting)")]
    NotStarted,
    #[error("the interpreter's key is {0}; only keys below 32 are in the block that can be read")]
    Key(u32),
    #[error("the layout of thread-specific data in this C library is not understood ({0})")]
    ThreadData(&'static str),
    #[error("{path}: {source}")]
    Elf { path: String, source: ElfError },
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
    #[error("the interpreter's memory: {0}")]
    Memory(#[from] ReadError),
}

const RUNTIME: &str = "_PyRuntime";
const LOOP: &str = "_PyEval_EvalFrameDefault";
const VERSION: &str = "Py_Version";

/// The loop's code is 40 to 85 KiB in every build seen.
const LOOP_MAX: u64 = 1 << 20;

/// Keys from here on live in second-level blocks (glibc, `PTHREAD_KEY_2NDLEVEL_SIZE`).
const FIRST_BLOCK_KEYS: u32 = 32;

/// An interpreter's code in a process, before anything in its memory was read. Fields as in [`PythonTarget`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    pub version: Version,
    pub release: String,
    pub runtime: u64,
    pub interpreter_loop: Range<u64>,
    pub interpreter_cold: Option<Range<u64>>,
}

/// Looks for an interpreter. `Ok(None)`: the process is no Python.
pub fn detect(pid: u32, maps: &Maps) -> Result<Option<PythonTarget>, PythonError> {
    let Some(located) = locate(pid, maps)? else { return Ok(None) };
    let Located { version, release, runtime, interpreter_loop, interpreter_cold } = located;
    let layout = layout(version).ok_or(PythonError::Unsupported { version })?;
    Ok(Some(PythonTarget {
        version,
        release,
        runtime,
        interpreter_loop,
        interpreter_cold,
        tss_key: read_key(&ProcessMemory::new(pid), runtime, layout)?,
        tss_block: thread_data_block(pid, maps)?,
        offsets: layout.walk,
    }))
}

/// Like [`detect`], for any version, from the files alone.
pub fn locate(pid: u32, maps: &Maps) -> Result<Option<Located>, PythonError> {
    for mapping in candidates(pid, maps) {
        let elf = open_elf(pid, mapping)?;
        let found = elf.symbols(&[RUNTIME, LOOP, VERSION]).map_err(|source| elf_error(mapping, source))?;
        let (Some(runtime), Some(code)) = (found.get(RUNTIME), found.get(LOOP)) else { continue };
        let bias =
            elf.bias(mapping).ok_or_else(|| elf_error(mapping, ElfError::Format("unmapped segment")))?;
        let (version, release) = match found.get(VERSION) {
            Some(symbol) => {
                let mut bytes = [0; 4];
                elf.read_vaddr(symbol.value, &mut bytes).map_err(|source| elf_error(mapping, source))?;
                let (version, micro) = parse_hex_version(u32::from_le_bytes(bytes));
                (version, format!("{version}.{micro}"))
            }
            // Before 3.11 only the name tells.
            None => match version_from_name(&mapping.file_name()) {
                Some(version) => (version, version.to_string()),
                None => continue,
            },
        };
        let start = code.value.wrapping_add(bias);
        let mut bytes = vec![0; code.size.min(LOOP_MAX) as usize];
        elf.read_vaddr(code.value, &mut bytes).map_err(|source| elf_error(mapping, source))?;
        let interpreter_cold = cold::cold_part(&elf, code.value, &bytes)
            .map(|part| part.start.wrapping_add(bias)..part.end.wrapping_add(bias));
        return Ok(Some(Located {
            version,
            release,
            runtime: runtime.value.wrapping_add(bias),
            interpreter_loop: start..start.wrapping_add(code.size),
            interpreter_cold,
        }));
    }
    Ok(None)
}

/// Mappings of files that may hold an interpreter, libraries first: a program that uses one exports its symbols
/// too. Of each file only the executable mapping counts.
fn candidates(pid: u32, maps: &Maps) -> Vec<&Mapping> {
    let exe = std::fs::read_link(format!("/proc/{}/exe", via(pid))).unwrap_or_default();
    let rank = |m: &&Mapping| {
        let name = m.file_name();
        if name.starts_with("libpython") {
            0
        } else if name.starts_with("python") {
            1
        } else if *m.path == *exe {
            2
        } else {
            3
        }
    };
    let mut found: Vec<_> = maps.iter().filter(|m| m.executable && m.is_file() && rank(m) < 3).collect();
    found.sort_by_key(rank);
    found.dedup_by_key(|m| m.inode);
    found
}

fn open_elf(pid: u32, mapping: &Mapping) -> Result<ElfFile, PythonError> {
    ElfFile::parse(open(pid, mapping)?).map_err(|source| elf_error(mapping, source))
}

fn elf_error(mapping: &Mapping, source: ElfError) -> PythonError {
    PythonError::Elf { path: mapping.path.to_string_lossy().into_owned(), source }
}

/// `PY_VERSION_HEX`: major, minor, micro, then level and serial.
fn parse_hex_version(hex: u32) -> (Version, u8) {
    let [_, micro, minor, major] = hex.to_le_bytes();
    (Version { major, minor }, micro)
}

/// `libpython3.9.so.1.0`, `python3.9`, `libpython3.7m.so`.
fn version_from_name(name: &str) -> Option<Version> {
    let rest = name.trim_start_matches("lib").strip_prefix("python")?;
    let (major, rest) = rest.split_once('.')?;
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    Some(Version { major: major.parse().ok()?, minor: rest[..digits].parse().ok()? })
}

/// `Py_tss_t`: an `int` that is not 0 once the key exists, then the key.
fn read_key(memory: &impl Memory, runtime: u64, layout: &Layout) -> Result<u32, PythonError> {
    let address = runtime.wrapping_add(layout.tss);
    if memory.read_u32(address)? == 0 {
        return Err(PythonError::NotStarted);
    }
    let key = memory.read_u32(address.wrapping_add(4))?;
    if key < FIRST_BLOCK_KEYS { Ok(key) } else { Err(PythonError::Key(key)) }
}

/// Finds glibc in the maps (before 2.34 the function is in libpthread) and reads the offset off its code.
fn thread_data_block(pid: u32, maps: &Maps) -> Result<u32, PythonError> {
    let defines = |m: &&Mapping| m.is_glibc() || m.file_name().starts_with("libpthread");
    for mapping in maps.iter().filter(|m| m.executable && m.is_file()).filter(defines) {
        let elf = open_elf(pid, mapping)?;
        let name = "pthread_getspecific";
        let found = elf.symbols(&[name]).map_err(|source| elf_error(mapping, source))?;
        let Some(symbol) = found.get(name) else { continue };
        // The way to the first block is at its start.
        let mut code = vec![0; symbol.size.min(128) as usize];
        elf.read_vaddr(symbol.value, &mut code).map_err(|source| elf_error(mapping, source))?;
        return first_block(&code).map_err(PythonError::ThreadData);
    }
    Err(PythonError::ThreadData("no glibc"))
}

/// A register's value as far as it is understood: `tp` times the thread pointer, plus `key` times the function's
/// argument, plus a constant.
#[derive(Clone, Copy, Default)]
struct Linear {
    tp: bool,
    key: u64,
    constant: u64,
}

/// Reads the offset of `specific_1stblock` off the code of `pthread_getspecific`.
///
/// A slot is `{ uintptr_t seq; void *data }`, and the function's first load of `data` is from
/// `thread pointer + block + key * 16 + 8`: everything up to that load is evaluated symbolically.
fn first_block(code: &[u8]) -> Result<u32, &'static str> {
    let mut registers: [Option<Linear>; 16] = [None; 16];
    let argument = Some(Linear { tp: false, key: 1, constant: 0 });
    registers[Register::RDI.number()] = argument;
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            break;
        }
        // The jump that leaves for second-level keys is not taken.
        if instruction.flow_control() == FlowControl::ConditionalBranch
            || matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Endbr64 | Mnemonic::Nop)
        {
            continue;
        }
        if instruction.flow_control() != FlowControl::Next || instruction.op0_kind() != OpKind::Register {
            break;
        }
        let target = instruction.op0_register().full_register();
        if !target.is_gpr64() {
            break;
        }
        if let Some(address) = data_load(&instruction, &registers) {
            let block = address.constant.checked_sub(8).ok_or("negative offset")?;
            return u32::try_from(block).map_err(|_| "offset too large");
        }
        registers[target.number()] = evaluate(&instruction, &registers);
    }
    Err("no load from the first block")
}

/// The address of a load, if it is that of a slot's data.
fn data_load(instruction: &Instruction, registers: &[Option<Linear>; 16]) -> Option<Linear> {
    let loads = instruction.mnemonic() == Mnemonic::Mov && instruction.op1_kind() == OpKind::Memory;
    if !loads || instruction.segment_prefix() != Register::None {
        return None;
    }
    effective_address(instruction, registers).filter(|a| a.tp && a.key == 16)
}

fn evaluate(instruction: &Instruction, registers: &[Option<Linear>; 16]) -> Option<Linear> {
    let get = |register: Register| registers.get(register.full_register().number()).copied().flatten();
    let old = get(instruction.op0_register());
    // Offset 0x10 of the thread control block holds the thread pointer itself.
    let thread_pointer = instruction.op1_kind() == OpKind::Memory
        && instruction.memory_segment() == Register::FS
        && instruction.memory_base() == Register::None
        && instruction.memory_index() == Register::None
        && instruction.memory_displacement64() == 0x10;
    let operand = match instruction.op1_kind() {
        OpKind::Register if instruction.op1_register().is_gpr() => get(instruction.op1_register()),
        OpKind::Memory if thread_pointer => Some(Linear { tp: true, key: 0, constant: 0 }),
        OpKind::Memory => None,
        OpKind::Register => None,
        // Not every other kind is an immediate: string instructions have operands of their own.
        _ => instruction.try_immediate(1).ok().map(|constant| Linear { tp: false, key: 0, constant }),
    };
    match instruction.mnemonic() {
        Mnemonic::Mov => operand,
        Mnemonic::Lea => effective_address(instruction, registers),
        Mnemonic::Add => {
            let (a, b) = (old?, operand?);
            Some(Linear {
                tp: a.tp ^ b.tp,
                key: a.key.checked_add(b.key)?,
                constant: a.constant.wrapping_add(b.constant),
            })
            .filter(|_| !(a.tp && b.tp))
        }
        Mnemonic::Shl => {
            let (a, n) = (old?, u32::try_from(operand?.constant).ok()?);
            (!a.tp && n < 16).then(|| Linear { tp: false, key: a.key << n, constant: a.constant << n })
        }
        _ => None,
    }
}

fn effective_address(instruction: &Instruction, registers: &[Option<Linear>; 16]) -> Option<Linear> {
    let base = instruction.memory_base();
    if !base.is_gpr() || instruction.memory_index() != Register::None {
        return None;
    }
    let base = registers[base.full_register().number()]?;
    let constant = base.constant.wrapping_add(instruction.memory_displacement64());
    Some(Linear { constant, ..base })
}

#[cfg(test)]
pub(crate) mod tests;
