//! Single settings as text: one type each, so that a file and a flag accept the same and complain alike.
//!
//! In: the text of one value. Out: a value in its range, or a reason that begins with what was given. The types
//! deserialize inside the scalar, which is how an error keeps its line and column.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

use crate::correlate::route::Pattern;
use crate::export::Template;
use crate::profile::format::{Format, planned};

/// A value was refused; the text says which and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

fn refuse<T>(text: &str, reason: impl fmt::Display) -> Result<T, ValueError> {
    // Long and strange text is shortened and escaped; it goes to a terminal.
    let shown: String = text.chars().take(64).flat_map(char::escape_debug).collect();
    Err(ValueError(format!("`{shown}`: {reason}")))
}

macro_rules! value {
    ($(#[$doc:meta])* $name:ident($inner:ty), $parse:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name($inner);

        impl $name {
            pub fn get(self) -> $inner {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = ValueError;
            fn from_str(text: &str) -> Result<Self, ValueError> {
                let parse: fn(&str) -> Result<$inner, ValueError> = $parse;
                parse(text).map($name)
            }
        }
    };
}

value!(
    /// Samples per second and CPU.
    Freq(u32), |text| in_range(text, 1, 9999, "the frequency")
);
value!(
    /// A process. The kernel's own limit is 4,194,304 (`PID_MAX_LIMIT`).
    Pid(u32), |text| in_range(text, 1, 4_194_304, "a pid")
);
value!(
    /// A TCP port.
    Port(u16), |text| in_range(text, 1, 65_535, "a port")
);
value!(
    /// Bytes, from 1 MiB: `512MiB`, `2GiB`, `500MB`.
    Size(u64), |text| match bytes(text)? {
        size if size < 1 << 20 => refuse(text, "the size must be at least 1MiB"),
        size => Ok(size),
    }
);
value!(
    /// Bytes of the ring buffer: the kernel takes powers of two of at least a page. Below 256 KiB a burst of 64
    /// threads' heads does not fit; above 256 MiB memory is wasted.
    RingSize(u32), |text| match bytes(text)? {
        size @ 0x4_0000..=0x1000_0000 if size.is_power_of_two() => Ok(size as u32),
        _ => refuse(text, "the ring size must be a power of two from 256KiB to 256MiB"),
    }
);
value!(
    /// A length of time: `500ms`, `30s`, `5m`, `1h 30m`, `7d`.
    Span(Duration), |text| match humantime::parse_duration(text) {
        Ok(span) => Ok(span),
        Err(_) if text == "0" => Ok(Duration::ZERO),
        Err(e) => refuse(text, format_args!("not a duration ({e}); write 500ms, 30s, 5m or 7d")),
    }
);
value!(
    /// A glob for names and paths.
    GlobText(globset::Glob), |text| glob(text, text)
);
value!(
    /// A glob for routes. Braces stand for themselves, because routes contain them: `/orders/{id}`.
    RouteGlob(globset::Glob), |text| {
        let literal = |c: char| match c {
            '{' => "[{]".to_owned(),
            '}' => "[}]".to_owned(),
            c => c.to_string(),
        };
        glob(text, &text.chars().map(literal).collect::<String>())
    }
);
value!(
    /// The name of an output format.
    FormatName(Format), |text| match Format::from_name(text) {
        Some(format) => Ok(format),
        None if planned(text) == Some(text) => refuse(text, "this format is planned, not in this version"),
        None => refuse(text, "not a format reqprof can write"),
    }
);
value!(
    /// The name of a service.
    ServiceName(String), |text| match text.len() {
        1..=128 if !text.contains(char::is_control) => Ok(text.to_owned()),
        _ => refuse(text, "a service name has 1 to 128 bytes and no control characters"),
    }
);
value!(
    /// A name that a host is reached by, in lower case.
    HostName(String), |text| {
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        match text.len() {
            1..=253 if text.chars().all(valid) => Ok(text.to_ascii_lowercase()),
            _ => refuse(text, "a host name has letters, digits, dots and hyphens, and no port"),
        }
    }
);

/// How the daemon writes its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => refuse(text, "the log format is `text` or `json`"),
        }
    }
}

/// Where requests are seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BoundarySource {
    /// In the C library where it can be probed, and at system calls where not.
    #[default]
    Auto,
    /// In the C library only.
    Uprobe,
    /// At system calls, of every process.
    Syscall,
}

impl FromStr for BoundarySource {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "auto" => Ok(Self::Auto),
            "uprobe" => Ok(Self::Uprobe),
            "syscall" => Ok(Self::Syscall),
            _ => refuse(text, "the source of boundaries is `auto`, `uprobe` or `syscall`"),
        }
    }
}

fn in_range<T: TryFrom<u64>>(text: &str, min: u64, max: u64, what: &str) -> Result<T, ValueError> {
    let number = text.parse::<u64>().ok().filter(|n| (min..=max).contains(n));
    match number.and_then(|n| T::try_from(n).ok()) {
        Some(n) => Ok(n),
        None => refuse(text, format_args!("{what} must be a whole number from {min} to {max}")),
    }
}

fn bytes(text: &str) -> Result<u64, ValueError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: Option<u64> = match text[digits..].trim_start() {
        "" | "B" => Some(1),
        "kB" | "KB" => Some(1000),
        "MB" => Some(1000_u64.pow(2)),
        "GB" => Some(1000_u64.pow(3)),
        "TB" => Some(1000_u64.pow(4)),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        "TiB" => Some(1 << 40),
        _ => None,
    };
    match (text[..digits].parse::<u64>().ok(), unit) {
        (Some(n), Some(unit)) => match n.checked_mul(unit) {
            // SQLite and the kernel count in signed 64 bits.
            Some(size) if i64::try_from(size).is_ok() => Ok(size),
            _ => refuse(text, "the size is too large"),
        },
        _ => refuse(text, "not a size; write a whole number and a unit, as in 512MiB or 2GB"),
    }
}

fn glob(shown: &str, text: &str) -> Result<globset::Glob, ValueError> {
    // 256 bytes keep every glob far below the size at which its automaton could be refused.
    if shown.is_empty() || shown.len() > 256 {
        return refuse(shown, "a glob has 1 to 256 bytes");
    }
    match globset::Glob::new(text) {
        Ok(glob) => Ok(glob),
        Err(e) => refuse(shown, format_args!("not a glob: {}", e.kind())),
    }
}

struct Scalar<T>(PhantomData<T>);

impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Scalar<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a single value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

macro_rules! deserialize_from_text {
    ($($name:ty),+) => {
        $(impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_str(Scalar(PhantomData))
            }
        })+
    };
}
deserialize_from_text!(
    Freq,
    Pid,
    Port,
    Size,
    RingSize,
    Span,
    GlobText,
    RouteGlob,
    FormatName,
    ServiceName,
    HostName,
    LogFormat,
    BoundarySource,
    Template,
    Pattern
);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<T: FromStr<Err = ValueError>>(text: &str) -> Result<T, String> {
        text.parse().map_err(|e: ValueError| e.to_string())
    }

    #[test]
    fn frequencies_have_a_range() {
        assert_eq!(parse("1"), Ok(Freq(1)));
        assert_eq!(parse("9999"), Ok(Freq(9999)));
        for bad in ["0", "10000", "-1", "99.5", "99Hz", "", "18446744073709551616"] {
            let message = parse::<Freq>(bad).expect_err(bad);
            assert_eq!(message, format!("`{bad}`: the frequency must be a whole number from 1 to 9999"));
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse("512MiB"), Ok(Size(536_870_912)));
        assert_eq!(parse("2 GB"), Ok(Size(2_000_000_000)));
        assert_eq!(parse("1048576"), Ok(Size(1_048_576)));
        for (bad, why) in [
            ("1048575", "at least 1MiB"),
            ("512M", "not a size"),
            ("MiB", "not a size"),
            ("1.5GiB", "not a size"),
            ("9223372036854775808", "too large"),
            ("99999999TiB", "too large"),
        ] {
            let message = parse::<Size>(bad).expect_err(bad);
            assert!(message.starts_with(&format!("`{bad}`: ")) && message.contains(why), "{message}");
        }
    }

    #[test]
    fn the_ring_is_a_power_of_two() {
        assert_eq!(parse("8MiB"), Ok(RingSize(8_388_608)));
        assert_eq!(parse("256KiB"), Ok(RingSize(262_144)));
        assert_eq!(parse("256MiB"), Ok(RingSize(268_435_456)));
        for bad in ["3MiB", "128KiB", "512MiB", "0"] {
            assert!(parse::<RingSize>(bad).expect_err(bad).contains("power of two"));
        }
    }

    #[test]
    fn durations_are_written_as_people_do() {
        assert_eq!(parse("500ms"), Ok(Span(Duration::from_millis(500))));
        assert_eq!(parse("5m"), Ok(Span(Duration::from_secs(300))));
        assert_eq!(parse("7d"), Ok(Span(Duration::from_secs(604_800))));
        assert_eq!(parse("0"), Ok(Span(Duration::ZERO)));
        for bad in ["30", "abc", "", "-5s"] {
            assert!(parse::<Span>(bad).expect_err(bad).contains("not a duration"));
        }
    }

    #[test]
    fn a_host_name_has_no_port() {
        assert_eq!(parse("Profiler.shop.example"), Ok(HostName("profiler.shop.example".into())));
        for bad in ["", "shop.example:9977", "http://shop.example", "*", "a b"] {
            assert!(parse::<HostName>(bad).expect_err(bad).contains("a host name"));
        }
    }

    #[test]
    fn hostile_text_is_escaped_and_cut() {
        let message = parse::<Freq>(&"\u{1b}[31m\n".repeat(100)).expect_err("no number");
        assert!(!message.contains(['\u{1b}', '\n']) && message.len() < 500);
    }

    #[test]
    fn braces_in_route_globs_are_literal() {
        let matches = |glob: &str, route: &str| {
            glob.parse::<RouteGlob>().expect(glob).0.compile_matcher().is_match(route)
        };
        assert!(matches("/orders/{id}", "/orders/{id}") && !matches("/orders/{id}", "/orders/id"));
        assert!(matches("/api/*", "/api/orders/{id}/lines"));
        assert!(!matches("/api/*", "/orders"));
        assert!(parse::<GlobText>("[").expect_err("open").starts_with("`[`: not a glob"));
        assert!(parse::<GlobText>("").is_err());
    }
}
