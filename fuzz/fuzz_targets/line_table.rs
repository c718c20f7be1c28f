//! Any bytes as the line table of a code object of each format: it has a line for every instruction, and comes to an end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_fuzz::process::python::layout::LineFormat;
use profiler_fuzz::symbolize::linetable::line_at;

fuzz_target!(|bytes: &[u8]| {
    let Some((head, table)) = bytes.split_first_chunk::<9>() else { return };
    let format = match head[0] % 3 {
        0 => LineFormat::Lnotab,
        1 => LineFormat::Ranges,
        _ => LineFormat::Locations,
    };
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    // As the daemon does: the first line is the code object's own.
    let (first_line, offset) = (number(1), number(5));
    let line = line_at(format, table, first_line, offset);
    assert_eq!(line, line_at(format, table, first_line, offset));
    if table.is_empty() {
        assert_eq!(line, first_line);
    }
});
