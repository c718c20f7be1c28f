//! Tables by hand, and of the standard library of every version. Oracle: the interpreter's own account.

use super::*;
use crate::interpreters::Interpreter;
use crate::process::python::tests::on_each_version;
use proptest::prelude::*;

#[test]
fn an_example_of_each_format_by_hand() {
    // Short form, 1 unit; one line down, 2 units; no location, 1 unit; no columns, +3 lines (0b110), 1 unit;
    // long form, -2 lines (0b101), 1 unit.
    let table =
        [0x80, 0x12, 0x80 | 11 << 3 | 1, 4, 8, 0x80 | 15 << 3, 0x80 | 13 << 3, 6, 0x80 | 14 << 3, 5, 0, 1, 1];
    let lines: Vec<_> = locations::Entries::new(&table, 10).map(|e| (e.start, e.end, e.line)).collect();
    let wanted = [(0, 2, Some(10)), (2, 6, Some(11)), (6, 8, None), (8, 10, Some(14)), (10, 12, Some(12))];
    assert_eq!(lines, wanted);
    let at = |format, table: &[u8], offsets: std::ops::Range<u32>| -> Vec<u32> {
        offsets.step_by(2).map(|offset| line_at(format, table, 10, offset)).collect()
    };
    assert_eq!(at(LineFormat::Locations, &table, 0..14), [10, 11, 11, 11, 14, 12, 12]);

    // 6 bytes on the first line, 2 of the next, 4 without a line, then 200 lines down in two steps, and 3 up.
    let table = [6, 0, 2, 1, 4, 0x80, 0, 127, 2, 73, 2, 0xfd];
    let lines: Vec<_> = pairs::Ranges::new(&table, 10).map(|e| (e.start, e.end, e.line)).collect();
    let wanted = [
        (0, 6, Some(10)),
        (6, 8, Some(11)),
        (8, 12, None),
        (12, 12, Some(138)),
        (12, 14, Some(211)),
        (14, 16, Some(208)),
    ];
    assert_eq!(lines, wanted);
    assert_eq!(at(LineFormat::Ranges, &table, 0..18), [10, 10, 10, 11, 11, 11, 211, 208, 208]);

    // The next line at 6; at 8, 200 lines down in two steps; 300 bytes on, 3 up.
    let table = [6, 1, 2, 127, 0, 73, 255, 0, 45, 0xfd];
    assert_eq!(at(LineFormat::Lnotab, &table, 0..12), [10, 10, 10, 11, 211, 211]);
    assert_eq!(at(LineFormat::Lnotab, &table, 304..312), [211, 211, 208, 208]);
    for format in [LineFormat::Lnotab, LineFormat::Ranges, LineFormat::Locations] {
        assert_eq!(line_at(format, &[], 7, 0), 7);
    }
}

const SCRIPT: &str = r#"
import dis, importlib.util, json, sys, types
names = ["argparse", "ast", "asyncio.base_events", "collections", "dataclasses", "datetime", "email.message",
         "http.client", "inspect", "json.decoder", "logging", "pathlib", "pickle", "subprocess", "tarfile",
         "typing", "urllib.parse", "zipfile"]

# The byte code that every line begins at, up to the next (3.8, 3.9); from 3.10 on as co_lines says.
def lines(code):
    if hasattr(code, "co_lines"):
        return list(code.co_lines())
    starts = list(dis.findlinestarts(code))
    ends = [start for start, _ in starts[1:]] + [len(code.co_code)]
    return [(start, end, line) for (start, line), end in zip(starts, ends)]

todo, out = [], []
for name in names:
    path = importlib.util.find_spec(name).origin
    todo.append(compile(open(path, encoding="utf-8").read(), path, "exec"))
while todo:
    code = todo.pop()
    todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    table = code.co_linetable if hasattr(code, "co_lines") else code.co_lnotab
    out.append((table.hex(), code.co_firstlineno, lines(code), len(code.co_code)))
json.dump(out, sys.stdout)
"#;

fn agrees_with_the_interpreter_everywhere(interpreter: &Interpreter) -> Result<(), String> {
    let format = match interpreter.version {
        "3.8" | "3.9" => LineFormat::Lnotab,
        "3.10" => LineFormat::Ranges,
        _ => LineFormat::Locations,
    };
    let output = interpreter.command().args(["-I", "-c", SCRIPT]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    type Line = (u32, u32, Option<u32>);
    let codes: Vec<(String, u32, Vec<Line>, u32)> = serde_json::from_slice(&output.stdout).unwrap();
    let (mut compared, mut without) = (0, 0);
    for (hex, first_line, lines, length) in codes {
        let table: Vec<u8> =
            (0..hex.len()).step_by(2).map(|n| u8::from_str_radix(&hex[n..n + 2], 16).unwrap()).collect();
        let theirs: Vec<Option<u32>> =
            lines.iter().flat_map(|l| std::iter::repeat_n(l.2, (l.1 - l.0) as usize)).collect();
        assert_eq!(theirs.len(), length as usize);
        // Instructions without a line of their own belong to the line before them.
        let mut running = first_line;
        for (offset, line) in theirs.iter().enumerate().step_by(2) {
            running = line.unwrap_or(running);
            without += u32::from(line.is_none());
            compared += 1;
            assert_eq!(line_at(format, &table, first_line, offset as u32), running, "{offset} in {hex}");
        }
        if format != LineFormat::Lnotab {
            let all = |entries: &mut dyn Iterator<Item = Entry>| -> Vec<Option<u32>> {
                entries.flat_map(|e| std::iter::repeat_n(e.line, (e.end - e.start) as usize)).collect()
            };
            let ours = match format {
                LineFormat::Ranges => all(&mut pairs::Ranges::new(&table, first_line)),
                _ => all(&mut locations::Entries::new(&table, first_line)),
            };
            assert_eq!(ours, theirs);
        }
    }
    eprintln!("{}: {compared} instructions, {without} without a line", interpreter.name());
    assert!(compared > 50_000);
    Ok(())
}
on_each_version!(agrees_with_the_interpreter_everywhere);

proptest! {
    #[test]
    fn any_bytes_are_read_to_their_end(
        table in proptest::collection::vec(any::<u8>(), 0..400), first: u32, offset: u32,
    ) {
        let mut end = 0;
        for entry in locations::Entries::new(&table, first) {
            prop_assert_eq!(entry.start, end);
            prop_assert!(entry.end > end && entry.end - entry.start <= 16);
            end = entry.end;
        }
        let (mut end, mut count) = (0, 0);
        for entry in pairs::Ranges::new(&table, first).chain(pairs::Lnotab::new(&table, first).take(table.len() / 2)) {
            prop_assert!(entry.start == end || entry.start == 0);
            prop_assert!(entry.end >= entry.start && entry.end - entry.start <= 255);
            (end, count) = (entry.end, count + 1);
        }
        prop_assert_eq!(count, table.len() / 2 * 2);
        for format in [LineFormat::Lnotab, LineFormat::Ranges, LineFormat::Locations] {
            let _ = line_at(format, &table, first, offset);
        }
    }
}
