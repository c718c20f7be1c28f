//! CPython in a process: where it is, and what the kernel side needs to walk its frames.
//!
//! In: a pid, its maps and its memory. Out: a [`PythonTarget`], whose fields go into the target's entry of the BPF
//! map as they are.
//!
//! Frames are found through the thread-specific slot (`autoTSSkey`) in which CPython keeps each thread's state,
//! because CPython's own "current thread state" is NULL while a thread does not hold the GIL ([`thread_data`]). Offsets
//! into CPython's structures differ from version to version. What an interpreter says of itself is believed before our
//! own table ([`layout`]): first its debug offsets ([`debug_offsets`]), then the fields that its types list
//! ([`members`]).

mod cold;
mod deaths;
mod debug_offsets;
mod interpreter_loop;
pub mod layout;
mod members;
mod thread_data;

use profiler_common::{PythonOffsets, Target, target_flags};

use super::elf::{ElfError, ElfFile};
use super::identity::via;
use super::maps::{Mapping, Maps, OpenError, open};
use super::memory::{Memory, ProcessMemory, ReadError};
use super::patience::Unanswered;
pub use deaths::{ContextSites, GEVENT, NoSite, ProbeSite, code_death, contexts, reads_first};
pub use debug_offsets::DebugOffsets;
pub use interpreter_loop::InterpreterLoop;
pub(crate) use interpreter_loop::TAIL_CALL_PREFIX;
pub use layout::Layout;

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

/// An interpreter in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PythonTarget {
    pub version: Version,
    /// The full version, as in `3.11.7`.
    pub release: String,
    /// Address of `_PyRuntime`.
    pub runtime: u64,
    /// The interpreter loop in the process.
    pub interpreter_loop: InterpreterLoop,
    pub tss_key: u32,
    pub tss_block: u32,
    /// See [`Target::current`].
    pub current: u64,
    pub offsets: PythonOffsets,
}

impl PythonTarget {
    /// Puts what was found into a target's entry, with its flag.
    pub fn fill(&self, target: &mut Target) {
        target.flags |= target_flags::PYTHON;
        target.tss_key = self.tss_key;
        target.tss_block = self.tss_block;
        target.current = self.current;
        let InterpreterLoop { hot, cold, .. } = &self.interpreter_loop;
        (target.loop_start, target.loop_end) = (hot.start, hot.end);
        let cold = cold.clone().unwrap_or_default();
        (target.cold_start, target.cold_end) = (cold.start, cold.end);
        target.python = self.offsets;
    }
}

/// Why a process's Python frames cannot be walked.
#[derive(Debug, thiserror::Error)]
pub enum PythonError {
    #[error("Python {version} is not supported; {} to {} are", layout::OLDEST, layout::NEWEST)]
    Unsupported { version: Version },
    #[error("Python {release} without the GIL (free-threaded) is not supported")]
    FreeThreaded { release: String },
    #[error("this build of Python lays out its structures in a way that is not understood: {0}")]
    Layout(&'static str),
    #[error("the interpreter's key is not created yet (it is starting)")]
    NotStarted,
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
const CODE_TYPE: &str = "PyCode_Type";
const FRAME_TYPE: &str = "PyFrame_Type";
const CONTEXT_TYPE: &str = "PyContext_Type";
const CONTEXT_COPY: &str = "PyContext_CopyCurrent";

/// An interpreter's code in a process, before anything in its memory was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    pub version: Version,
    pub release: String,
    pub runtime: u64,
    pub interpreter_loop: InterpreterLoop,
    /// Addresses of its types of code objects and of frames.
    pub code_type: Option<u64>,
    frame_type: Option<u64>,
    context_type: Option<u64>,
    /// `PyContext_CopyCurrent`.
    context_copy: Option<u64>,
    debug_offsets: Option<DebugOffsets>,
}

impl Located {
    /// Where this interpreter keeps what.
    pub fn layout(&self, memory: &impl Memory) -> Result<Layout, PythonError> {
        if self.debug_offsets.as_ref().is_some_and(DebugOffsets::free_threaded) {
            return Err(PythonError::FreeThreaded { release: self.release.clone() });
        }
        let version = self.version;
        let mut layout = layout::layout(version).ok_or(PythonError::Unsupported { version })?;
        if let Some(kind) = self.code_type {
            members::apply_code(memory, kind, &mut layout);
        }
        if let Some(kind) = self.frame_type {
            members::apply_frame(memory, kind, &mut layout);
        }
        if let Some(said) = &self.debug_offsets {
            said.apply(&mut layout).ok_or(PythonError::Layout("its debug offsets are absurd"))?;
        }
        if layout.can_be_walked() { Ok(layout) } else { Err(PythonError::Layout("fields are too far apart")) }
    }
}

/// Looks for an interpreter. `Ok(None)`: the process is no Python.
pub fn detect(pid: u32, maps: &Maps) -> Result<Option<PythonTarget>, PythonError> {
    let Some(located) = locate(pid, maps)? else { return Ok(None) };
    let memory = ProcessMemory::new(pid);
    let layout = located.layout(&memory)?;
    let Located { version, release, runtime, interpreter_loop, .. } = located;
    Ok(Some(PythonTarget {
        version,
        release,
        runtime,
        interpreter_loop,
        tss_key: thread_data::read_key(&memory, runtime.wrapping_add(layout.tss))?,
        tss_block: thread_data::thread_data_block(pid, maps)?,
        current: layout.current.map_or(0, |at| runtime.wrapping_add(at)),
        offsets: layout.walk,
    }))
}

/// Like [`detect`], for any version, from the files alone.
pub fn locate(pid: u32, maps: &Maps) -> Result<Option<Located>, PythonError> {
    for mapping in candidates(pid, maps) {
        let elf = open_elf(pid, mapping)?;
        let names = [RUNTIME, LOOP, VERSION, CODE_TYPE, FRAME_TYPE, CONTEXT_TYPE, CONTEXT_COPY];
        let found = elf.symbols(&names).map_err(|source| elf_error(mapping, source))?;
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
            // Before 3.11 only names tell.
            None => match version_from_name(&mapping.file_name()).or_else(|| version_from_extensions(maps)) {
                Some(version) => (version, version.to_string()),
                None => continue,
            },
        };
        let interpreter_loop =
            InterpreterLoop::find(&elf, *code).map_err(|source| elf_error(mapping, source))?.moved(bias);
        let mut start = [0; debug_offsets::SIZE];
        let debug_offsets =
            elf.read_vaddr(runtime.value, &mut start).ok().and_then(|()| DebugOffsets::parse(&start));
        let address = |name: &str| Some(found.get(name)?.value.wrapping_add(bias));
        return Ok(Some(Located {
            version,
            release,
            runtime: runtime.value.wrapping_add(bias),
            interpreter_loop,
            code_type: address(CODE_TYPE),
            frame_type: address(FRAME_TYPE),
            context_type: address(CONTEXT_TYPE),
            context_copy: address(CONTEXT_COPY),
            debug_offsets,
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

/// The version that extension modules were built for: `_json.cpython-310-x86_64-linux-gnu.so`. A program that has an
/// old interpreter linked into it has no name that tells.
fn version_from_extensions(maps: &Maps) -> Option<Version> {
    maps.iter().find_map(|mapping| {
        let name = mapping.file_name();
        let (_, tag) = name.split_once(".cpython-3")?;
        let digits = tag.len() - tag.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        Some(Version { major: 3, minor: tag[..digits].parse().ok()? })
    })
}

#[cfg(test)]
pub(crate) mod tests;
