//! Words and numbers for a person at a terminal: aligned tables, durations with a unit, nothing that the terminal obeys.

use serde_json::Value;

/// A field as a cell: unknown is a dash.
pub fn text(row: &Value, name: &str) -> String {
    match row.get(name) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => printable(text),
        Some(other) => printable(&other.to_string()),
    }
}

/// A duration in nanoseconds as a cell: unknown is a dash.
pub fn duration(ns: Option<&Value>) -> String {
    ns.and_then(Value::as_f64).map_or_else(|| "-".to_owned(), nanoseconds)
}

/// Nanoseconds for people, always with a unit and one decimal place.
pub fn nanoseconds(ns: f64) -> String {
    match ns {
        1e9.. => format!("{:.1} s", ns / 1e9),
        1e6.. => format!("{:.1} ms", ns / 1e6),
        _ => format!("{:.1} µs", ns / 1e3),
    }
}

/// Without what a terminal would obey, or what reorders the text around it.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let hidden = c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}');
            let escaped = hidden.then(|| c.escape_default());
            escaped.into_iter().flatten().chain((!hidden).then_some(c))
        })
        .collect()
}

/// Longer cells are cut in the middle of nowhere: a path of 1,024 bytes would make every line that long.
const MAX_CELL: usize = 60;

/// Rows under headers, aligned: columns whose every cell begins with a digit or is unknown to the right, others to
/// the left. Cells have to be printable already.
pub fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let cut = |cell: &str| match cell.char_indices().nth(MAX_CELL) {
        None => cell.to_owned(),
        Some((end, _)) => format!("{}…", cell[..end].trim_end()),
    };
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| cut(cell)).collect()).collect();
    let columns: Vec<(usize, bool)> = headers
        .iter()
        .enumerate()
        .map(|(i, header)| {
            let cells = || rows.iter().filter_map(|row| row.get(i));
            let width = cells().map(|c| c.chars().count()).max().unwrap_or(0).max(header.chars().count());
            let number = |c: &str| c == "-" || c.starts_with(|c: char| c.is_ascii_digit());
            let right = !rows.is_empty() && cells().all(|c| number(c)) && !is_id(header);
            (width, right)
        })
        .collect();
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&columns).map(|(cell, (width, right))| {
            if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        let text = padded.collect::<Vec<_>>().join("  ");
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut headers.iter().copied());
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// These begin with digits, but are names.
fn is_id(header: &str) -> bool {
    matches!(header, "id" | "start")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows =
            [["/", "7", "1.5 ms"], ["/orders/é", "12345", "-"]].map(|row| row.map(str::to_owned).to_vec());
        let expected = "\
route      count     p50
/              7  1.5 ms
/orders/é  12345       -
";
        assert_eq!(table(&["route", "count", "p50"], &rows), expected);
        assert_eq!(table(&["a", "b"], &[]), "a  b\n");
    }

    #[test]
    fn nothing_reaches_the_terminal_that_it_would_obey() {
        assert_eq!(printable("a\u{1b}[31m\r\n\u{7f}\u{9b}"), "a\\u{1b}[31m\\r\\n\\u{7f}\\u{9b}");
        assert_eq!(printable("x\u{202e}y"), "x\\u{202e}y");
        assert_eq!(printable("größe ✓ \\"), "größe ✓ \\");
    }
}
