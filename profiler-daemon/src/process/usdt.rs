//! Probes that a program declares (USDT): where they are, what switches them on, and where their arguments lie.
//!
//! In: an ELF file. Out: its probes. Each is a note in `.note.stapsdt` (SystemTap's `sys/sdt.h`: three addresses, then
//! provider, name and arguments, each up to a zero byte). The notes are not loaded, so that tools which move a program's
//! addresses (prelink) leave them as they were; `.stapsdt.base` is loaded, each note says where it was, and the difference
//! is how far everything moved.
//!
//! An argument is a word such as `-4@112(%rsp)`: its size, negative if it is signed, and the operand as the assembler has
//! it, because the compiler put it there for the assembler.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use super::elf::{ElfError, ElfFile};

/// One probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub provider: String,
    pub name: String,
    /// Virtual address of the instruction: a `nop`.
    pub address: u64,
    /// Virtual address of a 16-bit counter of whoever listens. While it is 0 the program may skip the probe, and what its
    /// arguments cost.
    pub semaphore: Option<u64>,
    /// In their order; what cannot be read says so, and the others can be.
    pub arguments: Vec<Result<Argument, Unsupported>>,
}

const SECTION: &[u8] = b".note.stapsdt";
const BASE: &[u8] = b".stapsdt.base";
const OWNER: &[u8] = b"stapsdt\0";
/// `NT_STAPSDT`.
const TYPE: u32 = 3;
/// QEMU has some 5,000 probes in 800 KB of notes; nobody has more.
const SECTION_MAX: u64 = 4 << 20;
const PROBES_MAX: usize = 16_384;
/// `sys/sdt.h` takes twelve.
const ARGUMENTS_MAX: usize = 12;

/// The probes of a file, in the order of its notes. A file without any has none; a note that is damaged ends them.
pub fn probes(elf: &ElfFile) -> Result<Vec<Probe>, ElfError> {
    let Some((_, place)) = elf.section(SECTION) else { return Ok(Vec::new()) };
    let size = place.end.saturating_sub(place.start);
    if size > SECTION_MAX {
        return Err(ElfError::Format("more notes than any program has"));
    }
    let mut bytes = vec![0; size as usize];
    elf.file().read_exact_at(&mut bytes, place.start)?;
    Ok(parse(&bytes, elf.section(BASE).map(|(address, _)| address)))
}

/// The notes of a section. `base`: where `.stapsdt.base` lies, if the file has it.
pub fn parse(bytes: &[u8], base: Option<u64>) -> Vec<Probe> {
    let mut found = Vec::new();
    let mut rest = bytes;
    while found.len() < PROBES_MAX
        && let Some((owner, kind, description)) = note(&mut rest)
    {
        if owner == OWNER
            && kind == TYPE
            && let Some(probe) = probe(description, base)
        {
            found.push(probe);
        }
    }
    found
}

/// Takes one note off: `Elf64_Nhdr`, then owner and description, each filled up to a multiple of four.
fn note<'b>(rest: &mut &'b [u8]) -> Option<(&'b [u8], u32, &'b [u8])> {
    let number = |at: usize| Some(u32::from_le_bytes(*rest.get(at..)?.first_chunk()?));
    let (owner, description, kind) = (number(0)? as usize, number(4)? as usize, number(8)?);
    let body = rest.get(12..)?;
    let begin = owner.checked_next_multiple_of(4)?;
    let end = begin.checked_add(description)?;
    let found = (body.get(..owner)?, kind, body.get(begin..end)?);
    // The last one may not be filled up.
    *rest = body.get(end.checked_next_multiple_of(4)?..).unwrap_or_default();
    Some(found)
}

fn probe(description: &[u8], base: Option<u64>) -> Option<Probe> {
    let number = |at: usize| Some(u64::from_le_bytes(*description.get(at..)?.first_chunk()?));
    let (address, then, semaphore) = (number(0)?, number(8)?, number(16)?);
    // 0 is what links without `.stapsdt.base` have.
    let moved = base.filter(|_| then != 0).map_or(0, |now| now.wrapping_sub(then));
    let mut words = description.get(24..)?.split(|byte| *byte == 0);
    let mut word = || Some(str::from_utf8(words.next()?).ok()?.to_owned());
    let (provider, name, arguments) = (word()?, word()?, word()?);
    if provider.is_empty() || name.is_empty() {
        return None;
    }
    Some(Probe {
        provider,
        name,
        address: address.wrapping_add(moved),
        semaphore: (semaphore != 0).then(|| semaphore.wrapping_add(moved)),
        arguments: arguments.split_ascii_whitespace().take(ARGUMENTS_MAX).map(str::parse).collect(),
    })
}

/// Where an argument lies when the probe is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    pub signed: bool,
    pub place: Place,
}

/// Registers by their numbers in DWARF (System V ABI for x86-64, figure 3.36).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Constant(i64),
    Register(u8),
    /// Memory at `base + index × scale + offset`.
    Memory {
        base: Option<u8>,
        index: Option<(u8, u8)>,
        offset: i64,
    },
}

/// An argument that cannot be read: in a vector register, by a symbol's name, or nothing that an assembler would take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an argument that is not understood: {0:?}")]
pub struct Unsupported(pub String);

/// An operand is some tens of bytes; of what is no operand so much is kept.
const SHOWN: usize = 64;

impl FromStr for Argument {
    type Err = Unsupported;

    fn from_str(word: &str) -> Result<Self, Unsupported> {
        argument(word).ok_or_else(|| Unsupported(word.chars().take(SHOWN).collect()))
    }
}

fn argument(word: &str) -> Option<Argument> {
    let (size, operand) = word.split_once('@')?;
    let (signed, size) = match size.strip_prefix('-') {
        Some(size) => (true, size),
        None => (false, size),
    };
    let size = match size {
        "1" => 1,
        "2" => 2,
        "4" => 4,
        "8" => 8,
        _ => return None,
    };
    Some(Argument { size, signed, place: place(operand)? })
}

fn place(operand: &str) -> Option<Place> {
    if let Some(number) = operand.strip_prefix('$') {
        return Some(Place::Constant(number_of(number)?));
    }
    let Some((offset, registers)) = operand.split_once('(') else {
        return Some(match operand.strip_prefix('%') {
            Some(name) => Place::Register(register(name)?.0),
            // A fixed address.
            None => Place::Memory { base: None, index: None, offset: number_of(operand)? },
        });
    };
    let offset = if offset.is_empty() { 0 } else { number_of(offset)? };
    let mut parts = registers.strip_suffix(')')?.split(',');
    let base = match parts.next()? {
        "" => None,
        name => Some(address_register(name)?),
    };
    let index = match parts.next() {
        None => None,
        Some(name) => {
            let scale = match parts.next() {
                None | Some("1") => 1,
                Some("2") => 2,
                Some("4") => 4,
                Some("8") => 8,
                Some(_) => return None,
            };
            Some((address_register(name)?, scale))
        }
    };
    if parts.next().is_some() || (base.is_none() && index.is_none()) {
        return None;
    }
    Some(Place::Memory { base, index, offset })
}

fn number_of(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (digits, radix) = match digits.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (digits, 10),
    };
    // Neither a second sign nor an empty number is one.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    // Compilers write what does not fit as they would store it.
    let value = u64::from_str_radix(digits, radix).ok()? as i64;
    Some(if negative { value.wrapping_neg() } else { value })
}

/// A register that an address is made of is a whole one.
fn address_register(name: &str) -> Option<u8> {
    match register(name.strip_prefix('%')?)? {
        (number, true) => Some(number),
        _ => None,
    }
}

const NAMES: [&str; 8] = ["ax", "dx", "cx", "bx", "si", "di", "bp", "sp"];

/// The number of a general register by any of its names, and whether that means all of it. `%ah` and its like mean no
/// low part.
fn register(name: &str) -> Option<(u8, bool)> {
    if let Some(high) = name.strip_prefix('r')
        && let Some(number) =
            high.trim_end_matches(['d', 'w', 'b']).parse::<u8>().ok().filter(|n| (8..16).contains(n))
    {
        let suffix = high.len() - number.to_string().len();
        return (suffix <= 1).then_some((number, suffix == 0));
    }
    let plain = |wanted: &str| NAMES.iter().position(|name| *name == wanted).map(|at| at as u8);
    if let Some(number) = plain(name) {
        return Some((number, false));
    }
    if let Some(number) = name.strip_prefix('r').and_then(plain) {
        return Some((number, true));
    }
    if let Some(number) = name.strip_prefix('e').and_then(plain) {
        return Some((number, false));
    }
    // `%al`, `%sil`.
    let stem = name.strip_suffix('l')?;
    let number = NAMES.iter().position(|name| *name == stem || name.strip_suffix('x') == Some(stem))?;
    Some((number as u8, false))
}

impl fmt::Display for Argument {
    /// As the assembler has it, with whole registers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |number: u8| match NAMES.get(usize::from(number)) {
            Some(name) => format!("%r{name}"),
            None => format!("%r{number}"),
        };
        write!(f, "{}{}@", if self.signed { "-" } else { "" }, self.size)?;
        match self.place {
            Place::Constant(value) => write!(f, "${value}"),
            Place::Register(number) => f.write_str(&name(number)),
            Place::Memory { base, index, offset } => {
                write!(f, "{offset}")?;
                let base = base.map(name).unwrap_or_default();
                match index {
                    Some((index, scale)) => write!(f, "({base},{},{scale})", name(index)),
                    None if base.is_empty() => Ok(()),
                    None => write!(f, "({base})"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
