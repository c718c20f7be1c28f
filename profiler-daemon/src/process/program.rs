//! What the file says that a process runs: whether it makes system calls by itself, and Go's version.
//!
//! In: the program's ELF file. Out: [`Program`].

use std::fs::File;

use super::elf::{ElfError, ElfFile};
use super::identity::via;

/// A program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// A dynamic linker starts it. What it then maps tells the rest.
    pub linked: bool,
    /// Made by Go's compiler, with its version (`1.22.4`) where the file says it. Such programs make their system calls
    /// by themselves, also where they map a C library.
    pub go: Option<Option<String>>,
}

/// Go's build information: its section, and what that begins with (cmd/go, debug/buildinfo).
const BUILD_INFO: &[u8] = b".go.buildinfo";
const MAGIC: &[u8; 14] = b"\xff Go buildinf:";
/// Bit of the byte at 15: strings follow in place (Go 1.18 and later).
const INLINE: u8 = 2;
/// Where the first of these strings is, the version: its length, then its bytes.
const VERSION: usize = 32;
const VERSION_MAX: usize = 64;

/// The program of a process, which may never answer: a file can be anywhere.
pub fn read(pid: u32) -> Result<Program, ElfError> {
    of(&ElfFile::parse(File::open(format!("/proc/{}/exe", via(pid)))?)?)
}

fn of(elf: &ElfFile) -> Result<Program, ElfError> {
    let go = elf.section(BUILD_INFO).map(|(address, _)| {
        let mut bytes = [0; VERSION + 1 + VERSION_MAX];
        // It lies in a section of data, behind which there is more.
        elf.read_vaddr(address, &mut bytes).ok().and_then(|()| version(&bytes))
    });
    Ok(Program { linked: elf.interpreted(), go })
}

fn version(bytes: &[u8; VERSION + 1 + VERSION_MAX]) -> Option<String> {
    if !bytes.starts_with(MAGIC) || bytes[15] & INLINE == 0 {
        return None;
    }
    // A length below 128 is one byte.
    let length = usize::from(bytes[VERSION]);
    let text = bytes.get(VERSION + 1..VERSION + 1 + length)?;
    // Behind it may stand experiments that it was built with.
    let version = std::str::from_utf8(text).ok()?.split(' ').next()?.strip_prefix("go")?;
    Some(version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(flags: u8, text: &[u8]) -> [u8; VERSION + 1 + VERSION_MAX] {
        let mut bytes = [0; VERSION + 1 + VERSION_MAX];
        bytes[..14].copy_from_slice(MAGIC);
        (bytes[14], bytes[15], bytes[VERSION]) = (8, flags, text.len() as u8);
        let shown = text.len().min(VERSION_MAX);
        bytes[VERSION + 1..VERSION + 1 + shown].copy_from_slice(&text[..shown]);
        bytes
    }

    #[test]
    fn go_says_its_version() {
        assert_eq!(version(&info(INLINE, b"go1.19.8")).as_deref(), Some("1.19.8"));
        assert_eq!(version(&info(INLINE, b"go1.26.1 X:nocoverageredesign")).as_deref(), Some("1.26.1"));
        assert_eq!(version(&info(0, b"go1.17")), None, "pointers to strings");
        assert_eq!(version(&info(INLINE, &[b'g'; 200])), None);
        assert_eq!(version(&info(INLINE, b"devel +abc")), None);
        assert_eq!(version(&[0; VERSION + 1 + VERSION_MAX]), None);
    }

    #[test]
    fn tests_are_linked_programs_and_not_gos() {
        assert_eq!(read(std::process::id()).unwrap(), Program { linked: true, go: None });
    }
}
