//! What an interpreter says of its own layout, from 3.13 on.
//!
//! `_PyRuntime` begins with `_Py_DebugOffsets`: a cookie, the version, and offsets of fields that debuggers need, each a
//! word. In: those words, from the file, where they are initialised. Out: a [`Layout`] corrected by them. Which word is
//! which differs between minor versions; what it lacks (the key, flags, keyword arguments) stays as it was.

use super::Version;
use super::layout::Layout;

const COOKIE: &[u8; 8] = b"xdebugpy";
/// Words that are looked at.
const WORDS: usize = 81;
/// Bytes to read from `_PyRuntime`.
pub(super) const SIZE: usize = WORDS * 8;

/// The structure's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugOffsets(Box<[u64]>);

/// Which word holds what (`Include/internal/pycore_runtime.h` of 3.13, `pycore_debug_offsets.h` of 3.14).
struct Words {
    current_frame: usize,
    frame_previous: usize,
    frame_executable: usize,
    frame_instr: usize,
    frame_owner: usize,
    filename: usize,
    qualname: usize,
    linetable: usize,
    firstline: usize,
    argcount: usize,
    bytecode: usize,
    bytes_size: usize,
    bytes_data: usize,
    text_state: usize,
    text_length: usize,
    text_ascii: usize,
}

const WORDS_3_13: Words = Words {
    current_frame: 23,
    frame_previous: 29,
    frame_executable: 30,
    frame_instr: 31,
    frame_owner: 33,
    filename: 35,
    qualname: 37,
    linetable: 38,
    firstline: 39,
    argcount: 40,
    bytecode: 43,
    bytes_size: 65,
    bytes_data: 66,
    text_state: 68,
    text_length: 69,
    text_ascii: 70,
};

const WORDS_3_14: Words = Words {
    current_frame: 26,
    frame_previous: 32,
    frame_executable: 33,
    frame_instr: 34,
    frame_owner: 36,
    filename: 40,
    qualname: 42,
    linetable: 43,
    firstline: 44,
    argcount: 45,
    bytecode: 48,
    bytes_size: 75,
    bytes_data: 76,
    text_state: 78,
    text_length: 79,
    text_ascii: 80,
};

/// `PyCompactUnicodeObject` has two words more than `PyASCIIObject`: `utf8_length` and `utf8`.
const COMPACT_BESIDES: u16 = 16;

/// A release candidate or a release: structures are frozen from there on.
const LEVEL_CANDIDATE: u8 = 0xc;

impl DebugOffsets {
    /// `None`: this is another structure, as up to 3.12.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let words: Box<[u64]> =
            bytes.as_chunks::<8>().0.iter().take(WORDS).map(|word| u64::from_le_bytes(*word)).collect();
        (words.len() == WORDS && bytes.starts_with(COOKIE)).then_some(Self(words))
    }

    pub(super) fn free_threaded(&self) -> bool {
        self.0[2] != 0
    }

    /// Puts what it says into a layout of its version. `None`: it says what cannot be.
    pub(super) fn apply(&self, layout: &mut Layout) -> Option<()> {
        // `PY_VERSION_HEX`: major, minor, micro, then level and serial.
        let [level, _, minor, major] = u32::try_from(self.0[1]).ok()?.to_le_bytes();
        let words = match (Version { major, minor }, level >> 4 >= LEVEL_CANDIDATE) {
            (Version { major: 3, minor: 13 }, true) => WORDS_3_13,
            (Version { major: 3, minor: 14 }, true) => WORDS_3_14,
            // What a snapshot of a version in the making lists is not known.
            _ => return Some(()),
        };
        let at = |word: usize| self.0.get(word).and_then(|&offset| u16::try_from(offset).ok());
        let (walk, code) = (&mut layout.walk, &mut layout.code);
        walk.current_frame = at(words.current_frame)?;
        walk.frame_previous = at(words.frame_previous)?;
        walk.frame_code = at(words.frame_executable)?;
        walk.frame_instr = at(words.frame_instr)?;
        walk.frame_entry = at(words.frame_owner)?;
        walk.code_argcount = at(words.argcount)?;
        walk.code_firstline = at(words.firstline)?;
        walk.code_bytecode = at(words.bytecode)?;
        code.filename = at(words.filename)?;
        code.name = at(words.qualname)?;
        code.lines = at(words.linetable)?;
        code.bytes_size = at(words.bytes_size)?;
        code.bytes_data = at(words.bytes_data)?;
        code.text_state = at(words.text_state)?;
        code.text_length = at(words.text_length)?;
        code.text_ascii = at(words.text_ascii)?;
        code.text_compact = code.text_ascii.checked_add(COMPACT_BESIDES)?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::python::layout::layout;

    fn words(version: u32) -> Vec<u64> {
        let mut words = vec![0; WORDS];
        words[0] = u64::from_le_bytes(*COOKIE);
        words[1] = version.into();
        words
    }

    fn parse(words: &[u64]) -> Option<DebugOffsets> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        DebugOffsets::parse(&bytes)
    }

    #[test]
    fn only_the_structure_itself_is_taken_for_it() {
        let mut good = words(0x030d_00f0);
        assert!(parse(&good).is_some_and(|said| !said.free_threaded()));
        assert_eq!(parse(&good[..WORDS - 1]), None);
        good[2] = 1;
        assert!(parse(&good).is_some_and(|said| said.free_threaded()));
        good[0] ^= 1;
        assert_eq!(parse(&good), None);
        assert_eq!(DebugOffsets::parse(&[]), None);
    }

    #[test]
    fn what_it_says_goes_before_the_table() {
        let version = Version { major: 3, minor: 14 };
        let table = layout(version).unwrap();
        let mut said = words(0x030e_01f0);
        for (n, word) in said.iter_mut().enumerate().skip(3) {
            *word = n as u64;
        }
        let mut changed = table;
        parse(&said).unwrap().apply(&mut changed).unwrap();
        assert_eq!((changed.walk.current_frame, changed.walk.frame_entry), (26, 36));
        assert_eq!((changed.code.filename, changed.code.text_compact), (40, 96));
        assert_eq!((changed.walk.code_kwonly, changed.tss), (table.walk.code_kwonly, table.tss));

        // Offsets that no structure has.
        for word in [26, 48, 80] {
            let mut absurd = said.clone();
            absurd[word] = 1 << 16;
            assert_eq!(parse(&absurd).unwrap().apply(&mut changed.clone()), None);
        }
        // A version in the making has a layout of its own.
        said[1] = 0x030e_00a1;
        let mut same = table;
        parse(&said).unwrap().apply(&mut same).unwrap();
        assert_eq!(same, table);
    }
}
