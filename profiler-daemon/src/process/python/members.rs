//! What an interpreter says of its own layout, in any version: the fields that its types make visible to Python code.
//!
//! A type that is written in C lists them in `tp_members`, each with its name and its offset. In: the address of such a
//! type. Out: a [`Layout`] corrected by what it lists. A process may forge this; the result is checked like any other.

use profiler_common::ENTRY_EVERY;

use super::layout::Layout;
use crate::process::memory::Memory;

/// `PyTypeObject.tp_members`: the same in 3.8 to 3.14.
const TP_MEMBERS: u64 = 240;
/// `struct PyMemberDef { const char *name; int type; Py_ssize_t offset; int flags; const char *doc; }`
const MEMBER: usize = 40;
const MEMBER_OFFSET: usize = 16;
/// Code objects list 16 to 19.
const MEMBERS_MAX: usize = 32;
/// The longest name that is looked for has 18.
const NAME_MAX: usize = 24;

/// The fields that a type lists, as far as they can be read.
fn members(memory: &impl Memory, kind: u64) -> Vec<(String, u16)> {
    let mut found = Vec::new();
    let Ok(table) = memory.read_u64(kind.wrapping_add(TP_MEMBERS)) else { return found };
    for n in 0..MEMBERS_MAX {
        let mut entry = [0; MEMBER];
        if memory.read(table.wrapping_add((n * MEMBER) as u64), &mut entry).is_err() {
            break;
        }
        let word = |at: usize| entry[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if word(0) == 0 {
            break;
        }
        let mut name = [0; NAME_MAX];
        if memory.read(word(0), &mut name).is_err() {
            continue;
        }
        let end = memchr::memchr(0, &name).unwrap_or(NAME_MAX);
        if let Ok(offset) = u16::try_from(word(MEMBER_OFFSET)) {
            found.push((String::from_utf8_lossy(&name[..end]).into_owned(), offset));
        }
    }
    found
}

/// Corrects what concerns code objects by `PyCode_Type`.
pub(super) fn apply_code(memory: &impl Memory, code_type: u64, layout: &mut Layout) {
    let (walk, code) = (&mut layout.walk, &mut layout.code);
    let listed = members(memory, code_type);
    let qualified = listed.iter().any(|(name, _)| name == "co_qualname");
    for (name, offset) in listed {
        match name.as_str() {
            "co_argcount" => walk.code_argcount = offset,
            "co_kwonlyargcount" => walk.code_kwonly = offset,
            "co_flags" => walk.code_flags = offset,
            "co_firstlineno" => walk.code_firstline = offset,
            "co_filename" => code.filename = offset,
            "co_name" if !qualified => code.name = offset,
            "co_qualname" => code.name = offset,
            "co_lnotab" | "co_linetable" => code.lines = offset,
            _ => {}
        }
    }
}

/// Corrects what concerns frames by `PyFrame_Type`, where frames are objects of it.
pub(super) fn apply_frame(memory: &impl Memory, frame_type: u64, layout: &mut Layout) {
    let walk = &mut layout.walk;
    if walk.entry_mode != ENTRY_EVERY {
        return;
    }
    for (name, offset) in members(memory, frame_type) {
        match name.as_str() {
            "f_back" => walk.frame_previous = offset,
            "f_code" => walk.frame_code = offset,
            "f_lasti" => walk.frame_instr = offset,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::memory::testing::FakeMemory;
    use crate::process::python::Version;
    use crate::process::python::layout::layout;

    fn types(listed: &[(&str, u64)]) -> FakeMemory {
        let (kind, table, names) = (0x1000u64, 0x2000u64, 0x8000u64);
        let mut of_type = vec![0; 248];
        of_type[240..].copy_from_slice(&table.to_le_bytes());
        let mut entries = Vec::new();
        let mut text = Vec::new();
        for (name, offset) in listed {
            entries.extend((names + text.len() as u64).to_le_bytes());
            entries.extend(6u64.to_le_bytes());
            entries.extend(offset.to_le_bytes());
            entries.extend([0; 16]);
            text.extend(name.as_bytes());
            text.push(0);
        }
        entries.extend([0; 40]);
        text.extend([0; NAME_MAX]);
        FakeMemory(vec![(kind, of_type), (table, entries), (names, text)])
    }

    #[test]
    fn listed_fields_go_before_the_table() {
        let table = layout(Version { major: 3, minor: 9 }).unwrap();
        let mut changed = table;
        let listed = [
            ("co_argcount", 32),
            ("co_name", 128),
            ("co_lnotab", 136),
            ("co_zombie", 1),
            ("co_flags", 1 << 20),
        ];
        apply_code(&types(&listed), 0x1000, &mut changed);
        let mut wanted = table;
        (wanted.walk.code_argcount, wanted.code.name, wanted.code.lines) = (32, 128, 136);
        assert_eq!(changed, wanted);

        apply_frame(&types(&[("f_lasti", 120), ("f_back", 40)]), 0x1000, &mut changed);
        (wanted.walk.frame_instr, wanted.walk.frame_previous) = (120, 40);
        assert_eq!(changed, wanted);
        // From 3.11 on, frames of that type are not what is walked.
        let newer = layout(Version { major: 3, minor: 12 }).unwrap();
        let mut same = newer;
        apply_frame(&types(&[("f_lasti", 120), ("f_back", 40)]), 0x1000, &mut same);
        assert_eq!(same, newer);
    }

    #[test]
    fn qualified_names_are_preferred_in_any_order() {
        for listed in [[("co_name", 120), ("co_qualname", 144)], [("co_qualname", 144), ("co_name", 120)]] {
            let mut changed = layout(Version { major: 3, minor: 12 }).unwrap();
            apply_code(&types(&listed), 0x1000, &mut changed);
            assert_eq!(changed.code.name, 144);
        }
    }

    #[test]
    fn what_cannot_be_read_changes_nothing() {
        let table = layout(Version { major: 3, minor: 11 }).unwrap();
        let mut same = table;
        apply_code(&types(&[]), 0x1000, &mut same);
        apply_code(&types(&[("co_name", 1)]), 0x9999, &mut same);
        // A table without an end.
        let endless = FakeMemory(vec![(0x1000, vec![0x10; 4096])]);
        apply_code(&endless, 0x1000, &mut same);
        assert_eq!(same, table);
    }
}
