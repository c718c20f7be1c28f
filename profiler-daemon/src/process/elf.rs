//! What is asked of an ELF file: segments, symbols by name, bytes.
//!
//! In: an open regular file that a target may own, truncate or rewrite at any time. Out: plain values. Everything
//! is read with `pread` into bounded buffers, never through a mapping: a mapping of a file that is truncated
//! meanwhile ends in SIGBUS. Only 64-bit little-endian files are understood, as are the machines we run on.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use object::LittleEndian as LE;
use object::elf::{self, FileHeader64};
use object::read::ReadRef;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, SectionTable, Sym};

use super::maps::Mapping;

/// What one parse may read in total. The largest symbol tables known (browsers, node) are about 40 MiB.
const PARSE_BUDGET: u64 = 128 << 20;
/// Names are compared whole; one as long as this is not one that anyone asks for.
const STRING_MAX: u64 = 4096;
/// Programs have 4 to 10 loadable segments.
const LOADS_MAX: usize = 128;
/// Page size that mappings are rounded to. A larger page only makes the rounding coarser on both sides.
const PAGE: u64 = 4096;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("not a 64-bit little-endian ELF file, or malformed: {0}")]
    Format(&'static str),
    #[error("needs more than {PARSE_BUDGET} bytes to parse")]
    TooLarge,
}

/// Tells one state of one file from another: a rewritten file is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    pub dev: u64,
    pub inode: u64,
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub mtime: i128,
}

impl FileId {
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        let mtime = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        Ok(Self { dev: meta.dev(), inode: meta.ino(), size: meta.len(), mtime })
    }
}

/// A loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub vaddr: u64,
    pub offset: u64,
    /// Bytes that come from the file.
    pub file_size: u64,
    pub executable: bool,
}

/// A defined symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol {
    pub value: u64,
    pub size: u64,
}

/// An ELF file, its headers read.
#[derive(Debug)]
pub struct ElfFile {
    file: File,
    id: FileId,
    loads: Vec<Load>,
    /// Virtual address and size of `.eh_frame_hdr`.
    unwind: Option<(u64, u64)>,
    interpreted: bool,
}

impl ElfFile {
    pub fn parse(file: File) -> Result<Self, ElfError> {
        let id = FileId::of(&file)?;
        let reader = Reader::new(&file, id.size);
        let headers = Headers::read(&reader).map_err(|e| reader.explain(e))?;
        let Headers { loads, unwind, interpreted } = headers;
        drop(reader);
        Ok(Self { file, id, loads, unwind, interpreted })
    }

    pub fn id(&self) -> FileId {
        self.id
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether a program is started by a dynamic linker, and not by itself.
    pub fn interpreted(&self) -> bool {
        self.interpreted
    }

    pub fn loads(&self) -> &[Load] {
        &self.loads
    }

    /// The file offset of a virtual address that comes from the file.
    pub fn offset_of(&self, vaddr: u64) -> Option<u64> {
        let load = self.loads.iter().find(|l| vaddr.checked_sub(l.vaddr).is_some_and(|n| n < l.file_size))?;
        load.offset.checked_add(vaddr - load.vaddr)
    }

    /// The virtual address of a file offset, in an executable segment by preference (segments may overlap in the
    /// file where they share a page).
    pub fn vaddr_of(&self, offset: u64) -> Option<u64> {
        let holds = |l: &&Load| offset.checked_sub(l.offset).is_some_and(|n| n < l.file_size);
        let load = self.loads.iter().filter(holds).max_by_key(|l| l.executable)?;
        load.vaddr.checked_add(offset - load.offset)
    }

    /// What to add to a virtual address of this file to get the address in a process that maps it like this.
    pub fn bias(&self, mapping: &Mapping) -> Option<u64> {
        bias(&self.loads, mapping)
    }

    /// Reads bytes at a virtual address, as the file has them.
    pub fn read_vaddr(&self, vaddr: u64, buf: &mut [u8]) -> Result<(), ElfError> {
        let offset = self.offset_of(vaddr).ok_or(ElfError::Format("no such address"))?;
        Ok(self.file.read_exact_at(buf, offset)?)
    }

    /// Finds defined symbols by name; the dynamic table is asked first, the full one only for what is missing
    /// there. Names that are in neither are not in the result.
    pub fn symbols(&self, names: &[&str]) -> Result<HashMap<String, Symbol>, ElfError> {
        let reader = Reader::new(&self.file, self.id.size);
        find_symbols(&reader, names).map_err(|e| reader.explain(e))
    }

    /// From the first to the last byte of all functions whose names begin so, by the full table; `None`: there are none.
    pub fn symbol_span(&self, prefix: &str) -> Result<Option<Range<u64>>, ElfError> {
        let reader = Reader::new(&self.file, self.id.size);
        find_span(&reader, prefix.as_bytes()).map_err(|e| reader.explain(e))
    }

    /// The piece of code that the unwind tables describe as one (a function, or its cold part) around an address.
    ///
    /// Only the encodings that GNU and LLVM linkers write are understood: a sorted table of (start, description),
    /// 4 bytes each, relative to the table's own address (Linux Standard Base, `.eh_frame_hdr`).
    pub fn unwind_range(&self, vaddr: u64) -> Option<Range<u64>> {
        let (base, size) = self.unwind?;
        let mut head = [0; 12];
        self.read_vaddr(base, &mut head).ok()?;
        if head[..4] != [1, 0x1b, 0x03, 0x3b] {
            return None;
        }
        let relative = |bytes: &[u8]| {
            let offset = i32::from_le_bytes(bytes.try_into().ok()?);
            Some(base.wrapping_add_signed(offset.into()))
        };
        let entry = |n: u64| {
            let mut bytes = [0; 8];
            self.read_vaddr(base.checked_add(12 + n * 8)?, &mut bytes).ok()?;
            Some((relative(&bytes[..4])?, relative(&bytes[4..])?))
        };
        // The last entry that starts at or before the address.
        let count = u64::from(u32::from_le_bytes(head[8..].try_into().ok()?));
        let (mut low, mut high) = (0, count.min(size / 8));
        while low < high {
            let middle = low.midpoint(high);
            if entry(middle)?.0 <= vaddr { low = middle + 1 } else { high = middle }
        }
        let (start, description) = entry(low.checked_sub(1)?)?;
        // length, CIE, start (relative to itself), size
        let mut bytes = [0; 16];
        self.read_vaddr(description, &mut bytes).ok()?;
        let field = |n: usize| u32::from_le_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
        // This agrees only if the encoding is the one assumed.
        let begin = description.wrapping_add(8).wrapping_add_signed((field(8) as i32).into());
        let end = start.checked_add(field(12).into())?;
        (begin == start && vaddr < end).then_some(start..end)
    }

    /// Where a section lies: its address and its bytes in the file. `None` where the file has no such section, or its
    /// table of sections is missing or damaged.
    pub fn section(&self, name: &[u8]) -> Option<(u64, Range<u64>)> {
        let reader = Reader::new(&self.file, self.id.size);
        find_section(&reader, name).ok().flatten()
    }

    /// Virtual address and size of the index of the unwind tables (`.eh_frame_hdr`), by the program headers.
    pub fn unwind_header(&self) -> Option<(u64, u64)> {
        self.unwind
    }

    /// Whether it names another file that its debug information, or a part of it, is in. What is too damaged to say
    /// so does not say that it does not.
    pub fn names_another(&self) -> bool {
        let reader = Reader::new(&self.file, self.id.size);
        has_section(&reader, &[b".gnu_debuglink", b".gnu_debugaltlink", b".debug_sup"]).unwrap_or(true)
    }

    /// Whether decompressing this file's debug sections stays below `max` bytes, by what their headers promise
    /// (which is what a reader will allocate).
    pub fn debug_fits(&self, max: u64) -> bool {
        let reader = Reader::new(&self.file, self.id.size);
        compressed_total(&reader).is_ok_and(|total| total <= max)
    }
}

/// [`ElfFile::bias`], of a file of which only the segments are left.
pub fn bias(loads: &[Load], mapping: &Mapping) -> Option<u64> {
    // The kernel and the loader map whole pages, so a mapping may start before its segment does.
    let holds = |l: &&Load| {
        let end = l.offset.saturating_add(l.file_size);
        mapping.offset >= l.offset & !(PAGE - 1) && mapping.offset < end
    };
    let load = loads.iter().filter(holds).max_by_key(|l| l.executable == mapping.executable)?;
    let vaddr = load.vaddr.wrapping_sub(load.offset).wrapping_add(mapping.offset);
    Some(mapping.start.wrapping_sub(vaddr))
}

struct Headers {
    loads: Vec<Load>,
    unwind: Option<(u64, u64)>,
    interpreted: bool,
}

impl Headers {
    fn read(reader: &Reader<'_>) -> object::read::Result<Self> {
        let header = FileHeader64::<LE>::parse(reader)?;
        let endian = header.endian()?;
        let segments = header.program_headers(endian, reader)?;
        let mut loads = Vec::new();
        let mut unwind = None;
        let mut interpreted = false;
        for segment in segments {
            let kind = segment.p_type(endian);
            if kind == elf::PT_LOAD && loads.len() < LOADS_MAX {
                loads.push(Load {
                    vaddr: segment.p_vaddr(endian),
                    offset: segment.p_offset(endian),
                    file_size: segment.p_filesz(endian),
                    executable: segment.p_flags(endian).0 & elf::PF_X.0 != 0,
                });
            }
            interpreted |= kind == elf::PT_INTERP;
            if kind == elf::PT_GNU_EH_FRAME {
                unwind = Some((segment.p_vaddr(endian), segment.p_memsz(endian)));
            }
        }
        Ok(Self { loads, unwind, interpreted })
    }
}

fn find_symbols(reader: &Reader<'_>, names: &[&str]) -> object::read::Result<HashMap<String, Symbol>> {
    let header = FileHeader64::<LE>::parse(reader)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, reader)?;
    let mut found = HashMap::new();
    for table in [elf::SHT_DYNSYM, elf::SHT_SYMTAB] {
        if found.len() < names.len() {
            scan_table(reader, &sections, table, names, &mut found)?;
        }
    }
    Ok(found)
}

fn find_span(reader: &Reader<'_>, prefix: &[u8]) -> object::read::Result<Option<Range<u64>>> {
    let header = FileHeader64::<LE>::parse(reader)?;
    let sections = header.sections(header.endian()?, reader)?;
    let table = sections.symbols(LE, reader, elf::SHT_SYMTAB)?;
    if table.is_empty() {
        return Ok(None);
    }
    let strings = sections.section(table.string_section())?.data(LE, reader)?;
    let mut span: Option<Range<u64>> = None;
    for symbol in table.iter().filter(|symbol| symbol.st_type() == elf::STT_FUNC) {
        let name = strings.get(symbol.st_name(LE) as usize..);
        if symbol.st_shndx(LE) != elf::SHN_UNDEF && name.is_some_and(|name| name.starts_with(prefix)) {
            let start = symbol.st_value(LE);
            let end = start.saturating_add(symbol.st_size(LE));
            span = Some(span.map_or(start..end, |span| span.start.min(start)..span.end.max(end)));
        }
    }
    Ok(span)
}

fn scan_table<'a, 'f>(
    reader: &'a Reader<'f>,
    sections: &SectionTable<'a, FileHeader64<LE>, &'a Reader<'f>>,
    kind: elf::SectionType,
    names: &[&str],
    found: &mut HashMap<String, Symbol>,
) -> object::read::Result<()> {
    let table = sections.symbols(LE, reader, kind)?;
    if table.is_empty() {
        return Ok(());
    }
    let strings = sections.section(table.string_section())?.data(LE, reader)?;
    for symbol in table.iter() {
        if symbol.st_shndx(LE) == elf::SHN_UNDEF || symbol.st_value(LE) == 0 {
            continue;
        }
        let Some(rest) = strings.get(symbol.st_name(LE) as usize..) else { continue };
        for &name in names {
            let matches = rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0));
            if matches && !found.contains_key(name) {
                let symbol = Symbol { value: symbol.st_value(LE), size: symbol.st_size(LE) };
                found.insert(name.to_owned(), symbol);
            }
        }
    }
    Ok(())
}

fn has_section(reader: &Reader<'_>, names: &[&[u8]]) -> object::read::Result<bool> {
    let header = FileHeader64::<LE>::parse(reader)?;
    let sections = header.sections(LE, reader)?;
    for section in sections.iter() {
        if names.contains(&sections.section_name(LE, section)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn find_section(reader: &Reader<'_>, name: &[u8]) -> object::read::Result<Option<(u64, Range<u64>)>> {
    let header = FileHeader64::<LE>::parse(reader)?;
    let sections = header.sections(LE, reader)?;
    for section in sections.iter() {
        if sections.section_name(LE, section)? == name {
            let place = section.file_range(LE).map(|(offset, size)| offset..offset.saturating_add(size));
            return Ok(place.map(|place| (section.sh_addr(LE), place)));
        }
    }
    Ok(None)
}

fn compressed_total(reader: &Reader<'_>) -> object::read::Result<u64> {
    let header = FileHeader64::<LE>::parse(reader)?;
    let sections = header.sections(LE, reader)?;
    let mut total = 0u64;
    for section in sections.iter() {
        if let Some((compression, ..)) = section.compression(LE, reader)? {
            total = total.saturating_add(compression.ch_size.get(LE));
        }
    }
    Ok(total)
}

/// Bounded random access for the parser, which wants references that outlive each call: everything read is kept
/// until the parse is over.
struct Reader<'f> {
    file: &'f File,
    size: u64,
    left: Cell<u64>,
    exhausted: Cell<bool>,
    pieces: RefCell<Vec<Box<[u8]>>>,
}

impl<'f> Reader<'f> {
    fn new(file: &'f File, size: u64) -> Self {
        let (left, exhausted) = (Cell::new(PARSE_BUDGET), Cell::new(false));
        Self { file, size, left, exhausted, pieces: RefCell::default() }
    }

    fn explain(&self, error: object::read::Error) -> ElfError {
        if self.exhausted.get() {
            return ElfError::TooLarge;
        }
        // The parser's messages are static text; it only offers them by formatting.
        tracing::debug!(%error, "malformed ELF file");
        ElfError::Format("damaged headers")
    }

    fn read(&self, offset: u64, size: u64) -> Option<Box<[u8]>> {
        // Checked before anything is allocated: sizes come from the file.
        if offset.checked_add(size)? > self.size {
            return None;
        }
        let Some(left) = self.left.get().checked_sub(size) else {
            self.exhausted.set(true);
            return None;
        };
        self.left.set(left);
        let mut bytes = vec![0; usize::try_from(size).ok()?].into_boxed_slice();
        self.file.read_exact_at(&mut bytes, offset).ok()?;
        Some(bytes)
    }

    fn keep(&self, bytes: Box<[u8]>) -> &[u8] {
        let kept: *const [u8] = &*bytes;
        self.pieces.borrow_mut().push(bytes);
        // SAFETY: the bytes are on the heap, owned by `pieces`, which only ever grows and lives as long as `self`;
        // moving the box into the vector does not move them, and nobody writes to them any more.
        unsafe { &*kept }
    }
}

impl<'a> ReadRef<'a> for &'a Reader<'_> {
    fn len(self) -> Result<u64, ()> {
        Ok(self.size)
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size == 0 {
            return Ok(&[]);
        }
        self.read(offset, size).map(|bytes| self.keep(bytes)).ok_or(())
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        let size = range.end.checked_sub(range.start).ok_or(())?.min(STRING_MAX);
        let bytes = self.read(range.start, size).ok_or(())?;
        let end = memchr::memchr(delimiter, &bytes).ok_or(())?;
        Ok(&self.keep(bytes)[..end])
    }
}

#[cfg(test)]
mod tests;
