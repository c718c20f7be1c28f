//! The line table of a code object.
//!
//! In: the table's bytes, which a target may have forged, how its version writes it, and the code's first line. Out:
//! which line an instruction belongs to. Total on any bytes: nothing panics, nothing loops.

pub mod locations;
pub mod pairs;

use crate::process::python::layout::LineFormat;

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

/// The line of the instruction at `offset` bytes into the byte code. Instructions without a line of their own
/// belong to the line before them, because that is what the thread is working on; before any line that is the
/// first line of the function.
pub fn line_at(format: LineFormat, table: &[u8], first_line: u32, offset: u32) -> u32 {
    match format {
        LineFormat::Lnotab => running(pairs::Lnotab::new(table, first_line), first_line, offset),
        LineFormat::Ranges => running(pairs::Ranges::new(table, first_line), first_line, offset),
        LineFormat::Locations => running(locations::Entries::new(table, first_line), first_line, offset),
    }
}

fn running(entries: impl Iterator<Item = Entry>, first_line: u32, offset: u32) -> u32 {
    let mut line = first_line;
    for entry in entries {
        // 3.10 writes a large difference as several, of which the first cover nothing.
        if entry.end > entry.start {
            line = entry.line.unwrap_or(line);
        }
        if offset < entry.end {
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests;
