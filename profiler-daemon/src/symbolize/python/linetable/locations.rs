//! `co_linetable` from 3.11 on (`Objects/locations.md`, later `InternalDocs/code_objects.md`).
//!
//! Entries of a head byte, then more for columns that nobody needs here; lines are differences from entry to entry.

use super::Entry;

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
