//! Code objects, read from a process's memory.
//!
//! In: the address of a code object and the checksum the kernel side took when it saw the frame. Out: the
//! function's name, file, first line and line table. The process runs on meanwhile and may free the object, which leaves
//! nearly all of it as it was, while the strings it led to are other strings already: so it has to be alive, and the same,
//! before and after everything else is read.

use std::sync::Arc;

use profiler_common::code_check;

use super::linetable::line_at;
use crate::process::memory::{Memory, ReadError};
use crate::process::python::Layout;
use crate::process::python::layout::{CodeLayout, LineFormat, OBJECT_REFERENCES, OBJECT_TYPE};
use crate::symbolize::text::clean;

/// What does not change during a code object's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    pub check: u32,
    /// `co_qualname` where the version has it, else `co_name`.
    pub name: Arc<str>,
    pub filename: Arc<str>,
    pub first_line: u32,
    line_format: LineFormat,
    lines: Box<[u8]>,
}

/// Why a code object could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    #[error(transparent)]
    Memory(#[from] ReadError),
    /// It is dead: another object, or none, lies at the address by now.
    #[error("reused")]
    Reused,
    #[error("damaged")]
    Damaged,
}

/// Characters of a name that are read; more are shown of none.
const TEXT_MAX: usize = 1024;
/// The longest line tables of generated code are some tens of KiB.
const LINETABLE_MAX: usize = 256 * 1024;
/// Bytes of a code object that hold every field above, in all versions.
const HEAD_MAX: usize = 256;
/// From here on an offset is a negative number in 28 bits.
const NEGATIVE: u32 = 1 << 27;

impl Code {
    /// Reads the code object at `address` if its checksum is `check` and it is alive. `kind`: the address of its type, if
    /// that is known.
    pub fn read(
        memory: &impl Memory,
        layout: &Layout,
        kind: Option<u64>,
        address: u64,
        check: u32,
    ) -> Result<Self, CodeError> {
        let head = Head::read(memory, layout, kind, address)?;
        if head.check() != check {
            return Err(CodeError::Reused);
        }
        let name = read_text(memory, &layout.code, head.name)?;
        let filename = read_text(memory, &layout.code, head.filename)?;
        let lines = read_bytes(memory, &layout.code, head.lines)?;
        if Head::read(memory, layout, kind, address)? != head {
            return Err(CodeError::Reused);
        }
        let line_format = layout.code.line_format;
        Ok(Self { check, name, filename, first_line: head.first_line, line_format, lines })
    }

    /// The line being executed, from the byte offset of the frame's instruction.
    ///
    /// That is the instruction being executed, or (up to 3.12) the last cache entry of one that is in a call; both are
    /// covered by the instruction's own entry in the table. Before a frame's first instruction it lies one code unit
    /// before the byte code.
    pub fn line(&self, lasti: u32) -> u32 {
        if lasti >= NEGATIVE {
            self.first_line
        } else {
            line_at(self.line_format, &self.lines, self.first_line, lasti)
        }
    }

    /// Bytes it occupies, about.
    pub fn size(&self) -> usize {
        size_of::<Self>() + self.lines.len() + self.name.len() + self.filename.len()
    }
}

/// Whether an object has references, by the first word of it (Include/object.h): a count in 32 bits, of which 3.14 uses the
/// upper 16 for flags and all versions give immortal objects a value of their own. Allocators put their lists of free memory
/// there: 0, or (glibc since 2.32 in disguise) the address of the next block, which lies above 4 GiB. Where it does not
/// (malloc in a program at a fixed address) glibc since 2.29 has a word of its own where the type was; an older one's dead
/// are not told from the living there.
fn is_alive(references: u64) -> bool {
    references as u32 != 0 && (references >> 32) as u16 == 0
}

/// The fields that matter, in one read.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Head {
    argcount: u32,
    kwonly: u32,
    flags: u32,
    first_line: u32,
    filename: u64,
    name: u64,
    lines: u64,
}

impl Head {
    fn read(
        memory: &impl Memory,
        layout: &Layout,
        kind: Option<u64>,
        address: u64,
    ) -> Result<Self, CodeError> {
        let Layout { walk, code, .. } = layout;
        let mut bytes = [0; HEAD_MAX];
        let last = code.filename.max(code.name).max(code.lines);
        let bytes = bytes.get_mut(..usize::from(last) + 8).ok_or(CodeError::Damaged)?;
        memory.read(address, bytes)?;
        let int = |at: u16| field::<4>(bytes, at.into()).map(u32::from_le_bytes);
        let pointer = |at: u16| field::<8>(bytes, at.into()).map(u64::from_le_bytes);
        let is_code = kind.is_none_or(|kind| pointer(OBJECT_TYPE) == Ok(kind));
        if !is_code || !is_alive(pointer(OBJECT_REFERENCES)?) {
            return Err(CodeError::Reused);
        }
        Ok(Self {
            argcount: int(walk.code_argcount)?,
            kwonly: int(walk.code_kwonly)?,
            flags: int(walk.code_flags)?,
            first_line: int(walk.code_firstline)?,
            filename: pointer(code.filename)?,
            name: pointer(code.name)?,
            lines: pointer(code.lines)?,
        })
    }

    fn check(&self) -> u32 {
        code_check(self.argcount, self.kwonly, self.flags, self.first_line)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], CodeError> {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or(CodeError::Damaged)
}

/// Reads a `str`: one of the compact forms, which are all that a compiler makes.
fn read_text(memory: &impl Memory, layout: &CodeLayout, address: u64) -> Result<Arc<str>, CodeError> {
    let mut head = [0; 64];
    let head = head.get_mut(..usize::from(layout.text_state) + 4).ok_or(CodeError::Damaged)?;
    memory.read(address, head)?;
    let length = u64::from_le_bytes(field(head, layout.text_length.into())?);
    let state = u32::from_le_bytes(field(head, layout.text_state.into())?);
    // struct { interned: 2; kind: 3; compact: 1; ascii: 1; ready: 1; }
    let (kind, compact, ascii) = ((state >> 2 & 7) as usize, state >> 5 & 1 == 1, state >> 6 & 1 == 1);
    if !compact || !matches!(kind, 1 | 2 | 4) || length > i64::MAX as u64 {
        return Err(CodeError::Damaged);
    }
    let count = usize::try_from(length).unwrap_or(usize::MAX).min(TEXT_MAX);
    let mut bytes = vec![0; count * kind];
    let data = if ascii { layout.text_ascii } else { layout.text_compact };
    memory.read(address.wrapping_add(data.into()), &mut bytes)?;
    // Lone surrogates (file names that are not UTF-8) become replacement characters.
    let text: String = bytes
        .chunks_exact(kind)
        .map(|unit| {
            let mut wide = [0; 4];
            wide[..kind].copy_from_slice(unit);
            char::from_u32(u32::from_le_bytes(wide)).unwrap_or(char::REPLACEMENT_CHARACTER)
        })
        .collect();
    Ok(clean(&text).into())
}

fn read_bytes(memory: &impl Memory, layout: &CodeLayout, address: u64) -> Result<Box<[u8]>, CodeError> {
    let size = memory.read_u64(address.wrapping_add(layout.bytes_size.into()))?;
    let size = usize::try_from(size).ok().filter(|&n| n <= LINETABLE_MAX).ok_or(CodeError::Damaged)?;
    let mut bytes = vec![0; size].into_boxed_slice();
    memory.read(address.wrapping_add(layout.bytes_data.into()), &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
