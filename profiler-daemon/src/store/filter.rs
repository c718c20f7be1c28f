//! Which requests are meant, in which order, and from where on: the questions that readers ask, checked.

use std::fmt;
use std::str::FromStr;

use rusqlite::types::Value;

/// The id of a request: 12 bytes, written as 24 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) [u8; 12]);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a request id: 24 lower-case hexadecimal digits")]
pub struct InvalidId;

impl FromStr for RequestId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        unhex(text).map(Self).ok_or(InvalidId)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A response status, or a whole class of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusFilter {
    Exactly(u16),
    /// `Class(5)` is 500 to 599.
    Class(u16),
}

impl FromStr for StatusFilter {
    type Err = ();

    /// `404` or `5xx`.
    fn from_str(text: &str) -> Result<Self, ()> {
        if let Some(class) = text.strip_suffix("xx") {
            return match class.parse() {
                Ok(class @ 1..=9) => Ok(Self::Class(class)),
                _ => Err(()),
            };
        }
        match text.parse() {
            Ok(status @ 100..=999) => Ok(Self::Exactly(status)),
            _ => Err(()),
        }
    }
}

/// Conditions that a request must all meet; the default is met by every request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub service: Option<String>,
    pub route: Option<String>,
    pub method: Option<String>,
    pub status: Option<StatusFilter>,
    pub pid: Option<u32>,
    /// Inclusive, ns.
    pub min_duration: Option<u64>,
    /// Inclusive, ns.
    pub max_duration: Option<u64>,
    /// Earliest start, inclusive, ns since the epoch.
    pub since: Option<i64>,
    /// Latest start, exclusive, ns since the epoch.
    pub until: Option<i64>,
}

impl Filter {
    /// The conditions as SQL joined with ` AND `, and their values. Never empty.
    pub(super) fn sql(&self) -> (String, Vec<Value>) {
        let mut sql = String::from("1");
        let mut values = Vec::new();
        let mut add = |condition: &str, value: Value| {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(value);
        };
        for (column, text) in [("service", &self.service), ("route", &self.route), ("method", &self.method)] {
            if let Some(text) = text {
                add(&format!("{column} = ?"), Value::Text(text.clone()));
            }
        }
        match self.status {
            Some(StatusFilter::Exactly(status)) => add("status = ?", Value::Integer(status.into())),
            Some(StatusFilter::Class(class)) => add("status / 100 = ?", Value::Integer(class.into())),
            None => {}
        }
        if let Some(pid) = self.pid {
            add("pid = ?", Value::Integer(pid.into()));
        }
        if let Some(ns) = self.min_duration {
            add("duration_ns >= ?", Value::Integer(clamp(ns)));
        }
        if let Some(ns) = self.max_duration {
            add("duration_ns <= ?", Value::Integer(clamp(ns)));
        }
        if let Some(ns) = self.since {
            add("start >= ?", Value::Integer(ns));
        }
        if let Some(ns) = self.until {
            add("start < ?", Value::Integer(ns));
        }
        (sql, values)
    }
}

/// SQLite's integers are signed; 292 years are as good as for ever.
pub(super) fn clamp(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The order of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// `-start`
    #[default]
    Newest,
    /// `start`
    Oldest,
    /// `-duration`
    Slowest,
    /// `duration`
    Fastest,
}

impl Sort {
    /// The names that [`FromStr`] knows.
    pub const NAMES: [&str; 4] = ["-start", "start", "-duration", "duration"];
    const ALL: [Self; 4] = [Self::Newest, Self::Oldest, Self::Slowest, Self::Fastest];

    pub(super) fn by_duration(self) -> bool {
        matches!(self, Self::Slowest | Self::Fastest)
    }

    pub(super) fn descending(self) -> bool {
        matches!(self, Self::Newest | Self::Slowest)
    }
}

impl FromStr for Sort {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::NAMES.iter().position(|n| *n == name).map(|i| Self::ALL[i]).ok_or(())
    }
}

/// A place in a list that a reader can come back to: the sort keys of the last row that it saw. Since rows are found
/// by their keys and not counted, what is inserted meanwhile neither repeats nor hides a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    pub duration_ns: i64,
    pub start: i64,
    pub id: RequestId,
}

/// The text is not a cursor of this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cursor is not one that this list with this sort order has returned")]
pub struct BadCursor;

/// Version and sort order, duration, start, id.
const CURSOR_BYTES: usize = 1 + 8 + 8 + 12;

impl Cursor {
    pub(super) fn encode(self, sort: Sort) -> String {
        let mut bytes = [0; CURSOR_BYTES];
        bytes[0] = Self::tag(sort);
        bytes[1..9].copy_from_slice(&self.duration_ns.to_be_bytes());
        bytes[9..17].copy_from_slice(&self.start.to_be_bytes());
        bytes[17..].copy_from_slice(&self.id.0);
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(super) fn decode(text: &str, sort: Sort) -> Result<Self, BadCursor> {
        let bytes: [u8; CURSOR_BYTES] = unhex(text).ok_or(BadCursor)?;
        let (tag, rest) = bytes.split_first().ok_or(BadCursor)?;
        let (duration, rest) = rest.split_first_chunk().ok_or(BadCursor)?;
        let (start, rest) = rest.split_first_chunk().ok_or(BadCursor)?;
        let id = rest.first_chunk().ok_or(BadCursor)?;
        if *tag != Self::tag(sort) {
            return Err(BadCursor);
        }
        Ok(Self {
            duration_ns: i64::from_be_bytes(*duration),
            start: i64::from_be_bytes(*start),
            id: RequestId(*id),
        })
    }

    /// 0x10: the first version.
    fn tag(sort: Sort) -> u8 {
        0x10 | sort as u8
    }
}

/// Exactly `N` bytes as lower-case hexadecimal digits.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_24_lower_case_digits_and_nothing_else() {
        let id: RequestId = "0123456789abcdef00ff10a0".parse().unwrap();
        assert_eq!(id.0, [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x00, 0xff, 0x10, 0xa0]);
        assert_eq!(id.to_string(), "0123456789abcdef00ff10a0");
        for bad in [
            "",
            "../x",
            "0123456789ABCDEF00FF10A0",
            "0123456789abcdef00ff10a",
            "0123456789abcdef00ff10a00",
            "0123456789abcdef00ff10a\0",
            "é123456789abcdef00ff10a",
            "+123456789abcdef00ff10a0",
        ] {
            assert_eq!(bad.parse::<RequestId>(), Err(InvalidId), "{bad:?}");
        }
    }

    #[test]
    fn a_status_is_a_number_or_a_class() {
        assert_eq!("404".parse(), Ok(StatusFilter::Exactly(404)));
        assert_eq!("5xx".parse(), Ok(StatusFilter::Class(5)));
        for bad in ["", "xx", "0xx", "10xx", "99", "1000", "-1", "5XX", "abc"] {
            assert_eq!(bad.parse::<StatusFilter>(), Err(()), "{bad:?}");
        }
    }

    #[test]
    fn a_cursor_belongs_to_one_order_and_nothing_else_is_one() {
        let cursor = Cursor { duration_ns: 5, start: -7, id: RequestId([0xab; 12]) };
        for sort in Sort::ALL {
            let text = cursor.encode(sort);
            for other in Sort::ALL {
                let expected = if other == sort { Ok(cursor) } else { Err(BadCursor) };
                assert_eq!(Cursor::decode(&text, other), expected);
            }
        }
        for bad in ["", "10", "zz", "' OR 1=1 --", &"0".repeat(58), &"1".repeat(60)] {
            assert_eq!(Cursor::decode(bad, Sort::Newest), Err(BadCursor), "{bad:?}");
        }
    }
}
