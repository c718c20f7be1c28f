//! Finding `.eh_frame` in a file.
//!
//! In: an ELF file. Out: the section's bytes and its address, by the table of sections, or, where a file was stripped of
//! that, by the index that the program headers point to (`.eh_frame_hdr`), which says where the section begins.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use gimli::{BaseAddresses, EhFrameHdr, LittleEndian};

use crate::process::elf::ElfFile;

/// The largest known (browsers, statically linked databases) are some 40 MiB.
const BYTES_MAX: u64 = 64 << 20;
/// The index's beginning: version, three encodings, two values of at most eight bytes each.
const INDEX_HEAD: u64 = 20;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it has no .eh_frame")]
    Missing,
    #[error("its .eh_frame has more than {BYTES_MAX} bytes")]
    TooLarge,
}

/// An `.eh_frame` section.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Section {
    pub address: u64,
    pub bytes: Vec<u8>,
}

impl Section {
    pub fn of(elf: &ElfFile) -> Result<Self, SectionError> {
        let named = elf.section(b".eh_frame").filter(|(_, place)| !place.is_empty());
        let (address, place) = match named.or_else(|| by_index(elf)) {
            Some(found) => found,
            None => return Err(SectionError::Missing),
        };
        // Sizes come from the file: nothing is allocated that it does not have.
        if place.end > elf.id().size {
            return Err(SectionError::Missing);
        }
        let size = place.end - place.start;
        if size > BYTES_MAX {
            return Err(SectionError::TooLarge);
        }
        let mut bytes = vec![0; size as usize];
        elf.file().read_exact_at(&mut bytes, place.start)?;
        Ok(Self { address, bytes })
    }
}

/// The index does not say where the section ends: there is a mark at its end, so it is read as far as its segment goes.
fn by_index(elf: &ElfFile) -> Option<(u64, Range<u64>)> {
    let (at, size) = elf.unwind_header()?;
    let mut head = vec![0; size.min(INDEX_HEAD) as usize];
    elf.read_vaddr(at, &mut head).ok()?;
    let bases = BaseAddresses::default().set_eh_frame_hdr(at);
    let index = EhFrameHdr::new(&head, LittleEndian).parse(&bases, 8).ok()?;
    let address = index.eh_frame_ptr().direct().ok()?;
    let load = elf.loads().iter().find(|l| address.checked_sub(l.vaddr).is_some_and(|n| n < l.file_size))?;
    let end = load.offset.checked_add(load.file_size)?.min(elf.id().size);
    let start = load.offset.checked_add(address - load.vaddr)?;
    let end = end.min(start.saturating_add(BYTES_MAX));
    (start < end).then_some((address, start..end))
}
