//! The line table of a code object (`co_linetable`, CPython 3.11 and later; `Objects/locations.md`).
//!
//! In: the table's bytes, which a target may have forged, and the code's first line. Out: which line an
//! instruction belongs to. Total on any bytes: nothing panics, nothing loops.

/// A run of instructions of one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte of the byte code it covers.
    pub start: u32,
    /// The byte after the last.
    pub end: u32,
    /// `None`: the compiler made these instructions up, or the table makes no sense here.
    pub line: Option<u32>,
}

/// Iterates over a table.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    rest: &'a [u8],
    offset: u32,
    /// The running line; only differences are stored.
    line: i64,
}

impl<'a> Entries<'a> {
    pub fn new(table: &'a [u8], first_line: u32) -> Self {
        Self { rest: table, offset: 0, line: first_line.into() }
    }
}

/// Location codes from here on; those below are short forms on the same line.
const ONE_LINE_0: u8 = 10;
const ONE_LINE_2: u8 = 12;
const NO_COLUMNS: u8 = 13;
const LONG: u8 = 14;
const NO_LOCATION: u8 = 15;

impl Iterator for Entries<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        // 1, four bits of code, three bits of length - 1 in code units of two bytes.
        let (&head, rest) = self.rest.split_first()?;
        let (code, units) = ((head >> 3) & 15, u32::from(head & 7) + 1);
        let delta = match code {
            ONE_LINE_0..=ONE_LINE_2 => i64::from(code - ONE_LINE_0),
            NO_COLUMNS | LONG => signed_varint(rest),
            _ => 0,
        };
        // Only an entry's first byte has its high bit set.
        let next = rest.iter().position(|b| b & 0x80 != 0).unwrap_or(rest.len());
        self.rest = &rest[next..];
        self.line += delta;
        let start = self.offset;
        self.offset = start.checked_add(units * 2)?;
        let line = if code == NO_LOCATION { None } else { u32::try_from(self.line).ok() };
        Some(Entry { start, end: self.offset, line })
    }
}

/// Six bits per byte, lowest first; bit 6 says that more follow. The lowest bit of the number is its sign.
fn signed_varint(bytes: &[u8]) -> i64 {
    let mut value = 0u32;
    for (n, byte) in bytes.iter().enumerate() {
        // CPython reads into 32 bits; what is shifted out there is lost here too.
        let shift = 6 * n as u32;
        value |= u32::from(byte & 63).checked_shl(shift).unwrap_or(0);
        if byte & 64 == 0 || shift >= 30 {
            break;
        }
    }
    let magnitude = i64::from(value >> 1);
    if value & 1 == 1 { -magnitude } else { magnitude }
}

/// The line of the instruction at `offset` bytes into the byte code. Instructions without a line of their own
/// belong to the line before them, because that is what the thread is working on; before any line that is the
/// first line of the function.
pub fn line_at(table: &[u8], first_line: u32, offset: u32) -> u32 {
    let mut line = first_line;
    for entry in Entries::new(table, first_line) {
        line = entry.line.unwrap_or(line);
        if offset < entry.end {
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::python::tests::interpreters;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn an_example_by_hand() {
        // Short form, 1 unit; one line down, 2 units; no location, 1 unit; no columns, +3 lines (0b110), 1 unit;
        // long form, -2 lines (0b101), 1 unit.
        let table = [
            0x80,
            0x12, //
            0x80 | 11 << 3 | 1,
            4,
            8,              //
            0x80 | 15 << 3, //
            0x80 | 13 << 3,
            6, //
            0x80 | 14 << 3,
            5,
            0,
            1,
            1,
        ];
        let lines: Vec<_> = Entries::new(&table, 10).map(|e| (e.start, e.end, e.line)).collect();
        let wanted =
            [(0, 2, Some(10)), (2, 6, Some(11)), (6, 8, None), (8, 10, Some(14)), (10, 12, Some(12))];
        assert_eq!(lines, wanted);
        let at: Vec<_> = (0..14).step_by(2).map(|offset| line_at(&table, 10, offset)).collect();
        assert_eq!(at, [10, 11, 11, 11, 14, 12, 12]);
        assert_eq!(line_at(&[], 7, 0), 7);
    }

    /// Oracle: the interpreter's own `co_lines()`, for every instruction of a part of the standard library.
    #[test]
    fn agrees_with_co_lines_everywhere() {
        let script = r#"
import importlib.util, json, sys, types
names = ["argparse", "ast", "asyncio.base_events", "collections", "dataclasses", "datetime", "email.message",
         "http.client", "inspect", "json.decoder", "logging", "pathlib", "pickle", "subprocess", "tarfile",
         "typing", "urllib.parse", "zipfile"]
todo, out = [], []
for name in names:
    path = importlib.util.find_spec(name).origin
    todo.append(compile(open(path, encoding="utf-8").read(), path, "exec"))
while todo:
    code = todo.pop()
    todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    out.append((code.co_linetable.hex(), code.co_firstlineno, list(code.co_lines()), len(code.co_code)))
json.dump(out, sys.stdout)
"#;
        for interpreter in interpreters("agrees_with_co_lines_everywhere") {
            let output = Command::new(&interpreter).args(["-I", "-c", script]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            type Line = (u32, u32, Option<u32>);
            let codes: Vec<(String, u32, Vec<Line>, u32)> = serde_json::from_slice(&output.stdout).unwrap();
            let mut compared = 0;
            for (hex, first_line, lines, length) in codes {
                let table: Vec<u8> = (0..hex.len())
                    .step_by(2)
                    .map(|n| u8::from_str_radix(&hex[n..n + 2], 16).unwrap())
                    .collect();
                let theirs: Vec<Option<u32>> =
                    lines.iter().flat_map(|l| std::iter::repeat_n(l.2, (l.1 - l.0) as usize)).collect();
                let ours: Vec<Option<u32>> = Entries::new(&table, first_line)
                    .flat_map(|e| std::iter::repeat_n(e.line, (e.end - e.start) as usize))
                    .collect();
                assert_eq!(ours, theirs);
                assert_eq!(ours.len(), length as usize);
                compared += length / 2;
                // Looking each one up is quadratic: all of a function, a part of a long module.
                let step = if length < 300 { 2 } else { 46 };
                let mut running = first_line;
                let runs = theirs.iter().map(|line| {
                    running = line.unwrap_or(running);
                    running
                });
                for (offset, line) in runs.enumerate().step_by(step) {
                    assert_eq!(line_at(&table, first_line, offset as u32), line);
                }
            }
            eprintln!("{}: {compared} instructions", interpreter.display());
            assert!(compared > 100_000);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_their_end(
            table in proptest::collection::vec(any::<u8>(), 0..400), first: u32, offset: u32,
        ) {
            let mut end = 0;
            for entry in Entries::new(&table, first) {
                prop_assert_eq!(entry.start, end);
                prop_assert!(entry.end > end && entry.end - entry.start <= 16);
                end = entry.end;
            }
            let _ = line_at(&table, first, offset);
        }
    }
}
