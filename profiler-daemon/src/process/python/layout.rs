//! Where CPython keeps what, in each version that we know.
//!
//! In: a version. Out: the offsets that frames are walked by and code objects are read by. Sources are each version's
//! own headers (`pystate.h`, `frameobject.h` up to 3.10, then `pycore_frame.h` and `pycore_interpframe_structs.h`,
//! `code.h`, `unicodeobject.h`, `pycore_runtime.h`); a test compares the table with `offsetof` where headers are
//! installed. Layouts are frozen with a minor version. What an interpreter says of itself goes before the table:
//! [`super::debug_offsets`], [`super::members`].

use profiler_common::{
    CODE_READ, ENTRY_EVERY, ENTRY_FLAG, ENTRY_OWNER, FRAME_HEAD, FRAME_OBJECT_HEAD, NO_FIELD, PythonOffsets,
};

use super::Version;

/// `PyObject.ob_refcnt` and `ob_type` (Include/object.h): the same in 3.8 to 3.14, unless built without the GIL.
pub const OBJECT_REFERENCES: u16 = 0;
pub const OBJECT_TYPE: u16 = 8;

/// What differs between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `autoTSSkey` in `_PyRuntime`.
    pub tss: u64,
    /// `gilstate.tstate_current` in `_PyRuntime`, where it is of use. Up to 3.9 nothing tells which thread a state is used by;
    /// from 3.12 on the slot above follows a thread from one interpreter to another (`bind_gilstate_tstate` in
    /// Python/pystate.c), and this is not there any more.
    pub current: Option<u64>,
    /// What the kernel side walks by.
    pub walk: PythonOffsets,
    /// What the symbolizer reads code objects by, besides.
    pub code: CodeLayout,
}

/// Offsets into a code object and the objects it points to, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeLayout {
    pub filename: u16,
    /// `co_qualname` from 3.11 on, `co_name` before.
    pub name: u16,
    /// The line table, and how it is written.
    pub lines: u16,
    pub line_format: LineFormat,
    /// `ob_size` of a `bytes` object, and its data.
    pub bytes_size: u16,
    pub bytes_data: u16,
    /// `length` and `state` of a string, and where the characters of a compact one begin: ASCII, and others.
    pub text_length: u16,
    pub text_state: u16,
    pub text_ascii: u16,
    pub text_compact: u16,
}

impl Layout {
    /// Whether every field lies in what the kernel side reads, and where the compiler would have put it.
    pub(super) fn can_be_walked(&self) -> bool {
        let walk = &self.walk;
        let objects = walk.entry_mode == ENTRY_EVERY;
        let head = if objects { FRAME_OBJECT_HEAD } else { FRAME_HEAD };
        let instruction = if objects { 4 } else { 8 };
        let fields = [(walk.frame_code, 8), (walk.frame_previous, 8), (walk.frame_instr, instruction)];
        let mark = (!objects).then_some((walk.frame_entry, 1));
        let in_head =
            |(at, size): (u16, u64)| u64::from(at) + size <= head && u64::from(at).is_multiple_of(size);
        let from = walk.code_from();
        let in_code = |at: u16| {
            at.is_multiple_of(4) && at >= from && at.saturating_add(4) <= from.saturating_add(CODE_READ)
        };
        fields.into_iter().chain(mark).all(in_head)
            && [walk.code_argcount, walk.code_kwonly, walk.code_flags, walk.code_firstline]
                .into_iter()
                .all(in_code)
    }
}

/// How a version writes line tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LineFormat {
    /// `co_lnotab`, up to 3.9.
    Lnotab,
    /// `co_linetable` of 3.10.
    Ranges,
    /// `co_linetable` from 3.11 on.
    Locations,
}

/// The newest version there is a layout of, and the oldest.
pub const NEWEST: Version = Version { major: 3, minor: 14 };
pub const OLDEST: Version = Version { major: 3, minor: 8 };

/// The layout of a version, if it is supported.
pub fn layout(version: Version) -> Option<Layout> {
    Some(match (version.major, version.minor) {
        (3, 8) => PYTHON_3_8,
        (3, 9) => PYTHON_3_9,
        (3, 10) => PYTHON_3_10,
        (3, 11) => PYTHON_3_11,
        (3, 12) => PYTHON_3_12,
        (3, 13) => PYTHON_3_13,
        (3, 14) => PYTHON_3_14,
        _ => return None,
    })
}

const PYTHON_3_8: Layout = Layout {
    tss: 1392,
    current: None,
    walk: PythonOffsets {
        tstate_cframe: NO_FIELD,
        current_frame: 24,
        frame_code: 32,
        frame_previous: 24,
        frame_instr: 104,
        frame_entry: NO_FIELD,
        code_argcount: 16,
        code_kwonly: 24,
        code_flags: 36,
        code_firstline: 40,
        code_bytecode: NO_FIELD,
        entry_mode: ENTRY_EVERY,
        lasti_unit: 1,
        tstate_context: 240,
        reserved: [0; 3],
    },
    code: CodeLayout {
        filename: 104,
        name: 112,
        lines: 120,
        line_format: LineFormat::Lnotab,
        bytes_size: 16,
        bytes_data: 32,
        text_length: 16,
        text_state: 32,
        text_ascii: 48,
        text_compact: 72,
    },
};

const PYTHON_3_9: Layout = Layout { tss: 584, ..PYTHON_3_8 };

const PYTHON_3_10: Layout = Layout {
    // `f_lasti` counts code units of two bytes.
    walk: PythonOffsets { frame_instr: 96, lasti_unit: 2, tstate_cframe: 48, ..PYTHON_3_9.walk },
    current: Some(568),
    code: CodeLayout { line_format: LineFormat::Ranges, ..PYTHON_3_9.code },
    ..PYTHON_3_9
};

const PYTHON_3_11: Layout = Layout {
    tss: 592,
    current: Some(576),
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
        lasti_unit: 0,
        tstate_context: 224,
        reserved: [0; 3],
    },
    code: CodeLayout {
        filename: 112,
        name: 128,
        lines: 136,
        line_format: LineFormat::Locations,
        ..PYTHON_3_10.code
    },
};

const PYTHON_3_12: Layout = Layout {
    tss: 1544,
    current: None,
    walk: PythonOffsets {
        current_frame: 0,
        frame_code: 0,
        frame_previous: 8,
        frame_entry: 70,
        code_argcount: 52,
        code_kwonly: 60,
        code_firstline: 68,
        code_bytecode: 192,
        entry_mode: ENTRY_OWNER,
        tstate_context: 208,
        ..PYTHON_3_11.walk
    },
    code: CodeLayout { text_ascii: 40, text_compact: 56, ..PYTHON_3_11.code },
};

const PYTHON_3_13: Layout = Layout {
    tss: 2160,
    walk: PythonOffsets {
        tstate_cframe: NO_FIELD,
        current_frame: 72,
        code_bytecode: 200,
        ..PYTHON_3_12.walk
    },
    ..PYTHON_3_12
};

const PYTHON_3_14: Layout = Layout {
    tss: 2336,
    walk: PythonOffsets { frame_entry: 74, code_bytecode: 208, ..PYTHON_3_13.walk },
    ..PYTHON_3_13
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_is_within_what_is_read() {
        let mut versions = 0;
        for minor in OLDEST.minor..=NEWEST.minor {
            let known = layout(Version { major: 3, minor }).unwrap();
            assert!(known.can_be_walked(), "3.{minor}");
            versions += 1;
            for walk in [
                PythonOffsets { frame_instr: 110, ..known.walk },
                PythonOffsets { frame_previous: u16::MAX, ..known.walk },
                PythonOffsets { code_kwonly: 8, ..known.walk },
                PythonOffsets { code_flags: 77, ..known.walk },
                PythonOffsets { frame_code: known.walk.frame_code + 4, ..known.walk },
                PythonOffsets { code_firstline: known.walk.code_firstline + 2, ..known.walk },
            ] {
                assert!(!Layout { walk, ..known }.can_be_walked(), "{walk:?}");
            }
        }
        assert_eq!(versions, 7);
        assert_eq!(layout(Version { major: 3, minor: 7 }), None);
        assert_eq!(layout(Version { major: 3, minor: 15 }), None);
    }
}
