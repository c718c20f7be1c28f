//! Where CPython says that a code object or a context dies, and that a context is copied.
//!
//! In: a process. Out: an instruction near the entry of its `code_dealloc`, which is found by the pointer in the type of
//! code objects (stripped builds do not name it). Whoever has put a probe there knows for how long it may believe what
//! it has read of a code object. The same of contexts, and where the exported `PyContext_CopyCurrent` begins.

use super::{PythonError, elf_error, locate, open_elf};
use crate::process::elf::{ElfError, ElfFile};
use crate::process::maps::{Mapping, Maps, in_user_space};
use crate::process::memory::{Memory, ProcessMemory};
use crate::process::sites::{self, Reason};

/// `PyTypeObject.tp_dealloc` (Include/cpython/object.h): the same in 3.8 to 3.14.
pub(super) const TP_DEALLOC: u64 = 48;

/// In the path of its extension, which is called `loop`.
const UVLOOP: &str = "/uvloop/";
/// An extension of gevent's.
pub const GEVENT: &str = "_gevent_cgreenlet.";

/// Why it is not seen when code objects or contexts die.
#[derive(Debug, thiserror::Error)]
pub enum NoSite {
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error("the process runs no interpreter whose types of code objects and contexts are exported")]
    NoType,
    #[error("gevent is loaded, and its greenlets share contexts: its requests have no samples")]
    Greenlets,
    #[error("what frees code objects or contexts lies in no file that the process maps")]
    NoFile,
    #[error("its file lies on a file system in user space, which could make the kernel wait")]
    UserSpace,
    #[error("the function that frees code objects or contexts: {0}")]
    Site(#[from] Reason),
}

/// Where a probe belongs.
#[derive(Debug)]
pub struct ProbeSite {
    pub elf: ElfFile,
    /// In the file.
    pub offset: u64,
    /// In the process.
    pub address: u64,
}

/// Where code objects of a process die.
pub fn code_death(pid: u32) -> Result<ProbeSite, NoSite> {
    let maps = Maps::read(pid).map_err(|_| NoSite::NoType)?;
    let kind = locate(pid, &maps)?.and_then(|found| found.code_type).ok_or(NoSite::NoType)?;
    freeing(pid, &maps, kind)
}

/// Where contexts of a process begin and end.
#[derive(Debug)]
pub struct ContextSites {
    /// The first instruction of what copies the current one, for a probe at its return.
    pub copy: ProbeSite,
    pub death: ProbeSite,
    /// uvloop is loaded, which receives before it enters a context.
    pub reads_first: bool,
}

/// See [`ContextSites::reads_first`]; an error where contexts tell nothing.
pub fn reads_first(maps: &Maps) -> Result<bool, NoSite> {
    let code = || maps.iter().filter(|m| m.executable);
    if code().any(|m| m.file_name().starts_with(GEVENT)) {
        return Err(NoSite::Greenlets);
    }
    Ok(code().any(|m| m.path.to_string_lossy().contains(UVLOOP)))
}

/// Finds them.
pub fn contexts(pid: u32) -> Result<ContextSites, NoSite> {
    let maps = Maps::read(pid).map_err(|_| NoSite::NoType)?;
    let reads_first = reads_first(&maps)?;
    let found = locate(pid, &maps)?.ok_or(NoSite::NoType)?;
    let (kind, copy) = found.context_type.zip(found.context_copy).ok_or(NoSite::NoType)?;
    let (elf, vaddr) = file_of(pid, &maps, copy)?;
    let offset = elf.offset_of(vaddr).ok_or(NoSite::NoFile)?;
    let copy = ProbeSite { elf, offset, address: copy };
    Ok(ContextSites { copy, death: freeing(pid, &maps, kind)?, reads_first })
}

/// Near the entry of what frees objects of this type.
fn freeing(pid: u32, maps: &Maps, kind: u64) -> Result<ProbeSite, NoSite> {
    let memory = ProcessMemory::new(pid);
    let function = memory.read_u64(kind.wrapping_add(TP_DEALLOC)).map_err(PythonError::from)?;
    let (elf, vaddr) = file_of(pid, maps, function)?;
    let offset = sites::entry_site_at(&elf, vaddr)?;
    let into = offset.wrapping_sub(elf.offset_of(vaddr).ok_or(NoSite::NoFile)?);
    Ok(ProbeSite { elf, offset, address: function.wrapping_add(into) })
}

/// The file that a function is in, and its address there.
fn file_of(pid: u32, maps: &Maps, function: u64) -> Result<(ElfFile, u64), NoSite> {
    let holds = |m: &&Mapping| (m.start..m.end).contains(&function);
    let mapping = maps.iter().find(holds).filter(|m| m.executable && m.is_file()).ok_or(NoSite::NoFile)?;
    let elf = open_elf(pid, mapping)?;
    if in_user_space(elf.file()) {
        return Err(NoSite::UserSpace);
    }
    let bias = elf.bias(mapping).ok_or_else(|| elf_error(mapping, ElfError::Format("unmapped segment")))?;
    Ok((elf, function.wrapping_sub(bias)))
}
