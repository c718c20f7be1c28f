//! Where CPython says that a code object dies.
//!
//! In: a process. Out: an instruction near the entry of its `code_dealloc`, which is found by the pointer in the type of
//! code objects (stripped builds do not name it). Whoever has put a probe there knows for how long it may believe what
//! it has read of a code object.

use super::{PythonError, elf_error, locate, open_elf};
use crate::process::elf::{ElfError, ElfFile};
use crate::process::maps::{Mapping, Maps, in_user_space};
use crate::process::memory::{Memory, ProcessMemory};
use crate::process::sites::{self, Reason};

/// `PyTypeObject.tp_dealloc` (Include/cpython/object.h): the same in 3.8 to 3.14.
const TP_DEALLOC: u64 = 48;

/// Why it is not seen when code objects die.
#[derive(Debug, thiserror::Error)]
pub enum NoDeaths {
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error("the process runs no interpreter whose type of code objects is exported")]
    NoType,
    #[error("what frees code objects lies in no file that the process maps")]
    NoFile,
    #[error("its file lies on a file system in user space, which could make the kernel wait")]
    UserSpace,
    #[error("the function that frees code objects: {0}")]
    Site(#[from] Reason),
}

/// Where a probe belongs.
#[derive(Debug)]
pub struct DeathSite {
    pub elf: ElfFile,
    /// In the file.
    pub offset: u64,
    /// In the process.
    pub address: u64,
}

/// Finds the place in a process.
pub fn death_site(pid: u32) -> Result<DeathSite, NoDeaths> {
    let maps = Maps::read(pid).map_err(|_| NoDeaths::NoType)?;
    let kind = locate(pid, &maps)?.and_then(|found| found.code_type).ok_or(NoDeaths::NoType)?;
    let memory = ProcessMemory::new(pid);
    let function = memory.read_u64(kind.wrapping_add(TP_DEALLOC)).map_err(PythonError::from)?;
    let holds = |m: &&Mapping| (m.start..m.end).contains(&function);
    let mapping = maps.iter().find(holds).filter(|m| m.executable && m.is_file()).ok_or(NoDeaths::NoFile)?;
    let elf = open_elf(pid, mapping)?;
    if in_user_space(elf.file()) {
        return Err(NoDeaths::UserSpace);
    }
    let bias = elf.bias(mapping).ok_or_else(|| elf_error(mapping, ElfError::Format("unmapped segment")))?;
    let vaddr = function.wrapping_sub(bias);
    let offset = sites::entry_site_at(&elf, vaddr)?;
    let into = offset.wrapping_sub(elf.offset_of(vaddr).ok_or(NoDeaths::NoFile)?);
    Ok(DeathSite { elf, offset, address: function.wrapping_add(into) })
}
