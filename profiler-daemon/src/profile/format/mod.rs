//! The formats a profile can be written in; each is a file of this folder.
//!
//! In: a [`Profile`] and what it is about ([`Subject`]). Out: bytes. Names in a profile come from the profiled
//! programs, so every writer escapes them for its own syntax.

mod folded;
mod origin;
mod pprof;
mod speedscope;
mod svg;
pub mod text;
mod tree;

use std::fmt;
use std::path::Path;

use super::Profile;
use crate::record::RequestRecord;

/// An output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    Tree,
    Text,
    Folded,
    Svg,
    Pprof,
    Speedscope,
}

/// Which time a profile is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum View {
    /// CPU time, and the rest of the requests' durations as `[unsampled]`.
    #[default]
    Wall,
    Cpu,
    /// Not yet measured: an empty tree.
    OffCpu,
}

impl View {
    /// The name in `?view=` and in outputs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Cpu => "cpu",
            Self::OffCpu => "offcpu",
        }
    }

    /// The inverse of [`Self::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Wall, Self::Cpu, Self::OffCpu].into_iter().find(|view| view.name() == name)
    }
}

/// What a rendered profile says about itself.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// Heading, e.g. `GET /orders/{id} 200 - 123.4 ms`.
    pub title: String,
    pub service: String,
    /// Empty, as are the others: not known, or not one.
    pub route: String,
    pub method: String,
    pub status: Option<u16>,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
    /// Start, ns since the epoch; 0 = unknown.
    pub start: i64,
    /// Of many merged requests, how many had samples.
    pub with_samples: Option<u64>,
}

impl Subject {
    /// One request.
    pub fn of(record: &RequestRecord) -> Self {
        let status = record.status.map_or_else(|| record.outcome.name().to_owned(), |s| s.to_string());
        // Milliseconds with one decimal, from integers: 123.4.
        let tenths = record.duration_ns / 100_000;
        Self {
            title: format!(
                "{} {} {status} - {}.{} ms",
                record.method.as_deref().unwrap_or("-"),
                record.route.as_deref().unwrap_or("-"),
                tenths / 10,
                tenths % 10
            ),
            service: record.service.clone(),
            route: record.route.clone().unwrap_or_default(),
            method: record.method.clone().unwrap_or_default(),
            status: record.status,
            request_id: Some(record.id.clone()),
            trace_id: record.trace_id.clone(),
            start: record.start,
            with_samples: None,
        }
    }
}

/// Formats that have a name and an extension, but no writer in this version.
const PLANNED: [(&str, &str); 7] = [
    ("html", "html"),
    ("callgrind", "callgrind"),
    ("pstats", "pstats"),
    ("pyisession", "pyisession"),
    ("firefox", "firefox.json"),
    ("chrome", "chrome.json"),
    ("otlp", "otlp"),
];

/// The planned format of this name, or of a file with this extension.
pub fn planned(text: &str) -> Option<&'static str> {
    let lower = text.to_ascii_lowercase();
    let is = |(name, extension): &&(&str, &str)| {
        lower == *name
            || lower.strip_suffix(extension).is_some_and(|stem| stem.len() > 1 && stem.ends_with('.'))
    };
    PLANNED.iter().find(is).map(|(name, _)| *name)
}

impl Format {
    /// Every format that can be written.
    pub const ALL: [Self; 6] =
        [Self::Tree, Self::Text, Self::Folded, Self::Svg, Self::Pprof, Self::Speedscope];

    /// By name (`tree`, `text` …) as in `?format=` and `-f`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// By a file's extension: `json` tree, `txt` text, `folded`, `svg`, `pb.gz` pprof, `speedscope.json`.
    pub fn from_path(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .filter(|format| {
                name.strip_suffix(format.extension())
                    .is_some_and(|stem| stem.len() > 1 && stem.ends_with('.'))
            })
            // `x.speedscope.json` also ends in `.json`.
            .max_by_key(|format| format.extension().len())
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Tree => "tree",
            Self::Text => "text",
            Self::Folded => "folded",
            Self::Svg => "svg",
            Self::Pprof => "pprof",
            Self::Speedscope => "speedscope",
        }
    }

    /// Without the leading dot.
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Tree => "json",
            Self::Text => "txt",
            Self::Folded => "folded",
            Self::Svg => "svg",
            Self::Pprof => "pb.gz",
            Self::Speedscope => "speedscope.json",
        }
    }

    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Tree | Self::Speedscope => "application/json",
            Self::Text | Self::Folded => "text/plain; charset=utf-8",
            Self::Svg => "image/svg+xml",
            Self::Pprof => "application/vnd.google.protobuf+gzip",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes a profile. `color`: ANSI colours, for `text` only.
pub fn render(profile: &Profile, subject: &Subject, format: Format, view: View, color: bool) -> Vec<u8> {
    match format {
        Format::Tree => tree::render(profile, subject, view),
        Format::Text => {
            text::render(profile, subject, view, &text::Options { color, ..text::Options::default() })
                .into_bytes()
        }
        Format::Folded => folded::render(profile, view).into_bytes(),
        Format::Svg => svg::render(profile, subject, view).into_bytes(),
        Format::Pprof => pprof::render(profile, subject, view),
        Format::Speedscope => speedscope::render(profile, subject, view),
    }
}

/// `part` of `whole` in percent, 0 for nothing of nothing.
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 * 100.0 }
}

/// A duration with three or four digits: `1.23 s`, `12.3 ms`, `456 µs`, `0 ms`.
fn duration(ns: u64) -> String {
    let ms = ns as f64 / 1e6;
    match ns {
        0 => "0 ms".into(),
        1..1_000_000 => format!("{:.0} µs", ms * 1e3),
        1_000_000..10_000_000 => format!("{ms:.2} ms"),
        10_000_000..1_000_000_000 => format!("{ms:.1} ms"),
        _ => format!("{:.2} s", ms / 1e3),
    }
}

/// A name without what could act on a terminal, break a line or turn text around: control characters (C0, C1) and
/// Unicode's direction overrides become U+FFFD, as do the code points that XML 1.0 forbids.
fn printable(text: &str) -> std::borrow::Cow<'_, str> {
    let bad = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            || matches!(c, '\u{feff}' | '\u{fffe}' | '\u{ffff}')
    };
    if text.contains(bad) {
        text.chars().map(|c| if bad(c) { char::REPLACEMENT_CHARACTER } else { c }).collect::<String>().into()
    } else {
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Builder;
    use super::super::testing::{py, stack};
    use super::*;

    #[test]
    fn formats_are_found_by_name_and_by_extension() {
        for format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
            assert_eq!(
                Format::from_path(Path::new(&format!("/tmp/a.b.{}", format.extension()))),
                Some(format)
            );
        }
        for (path, format) in [
            ("slow.json", Some(Format::Tree)),
            ("slow.speedscope.json", Some(Format::Speedscope)),
            ("SLOW.SVG", Some(Format::Svg)),
            ("x.pb.gz", Some(Format::Pprof)),
            ("x.gz", None),
            ("json", None),
            (".json", None),
            ("xjson", None),
            ("/", None),
        ] {
            assert_eq!(Format::from_path(Path::new(path)), format, "{path}");
        }
        assert_eq!(Format::from_name("Tree"), None);
    }

    #[test]
    fn durations_keep_their_digits() {
        let texts = [0, 999, 1_500, 999_499, 1_234_567, 12_345_678, 1_234_567_890].map(duration);
        assert_eq!(texts, ["0 ms", "1 µs", "2 µs", "999 µs", "1.23 ms", "12.3 ms", "1.23 s"]);
    }

    #[test]
    fn names_cannot_act_on_a_terminal() {
        assert_eq!(printable("a\x1b[31mb\u{9b}c\u{202e}d\ne"), "a\u{fffd}[31mb\u{fffd}c\u{fffd}d\u{fffd}e");
        assert!(matches!(printable("Größe<T>::f"), std::borrow::Cow::Borrowed(_)));
    }

    #[test]
    fn every_format_takes_empty_and_hostile_profiles() {
        let mut b = Builder::default();
        b.add(&stack(&[py("a;b\n\x1b]0;x\x07<script>&\"'\u{0}\u{ffff}]]>", 3)]), 5_000);
        let empty = Profile::default();
        let hostile = b.finish(0);
        for format in Format::ALL {
            for view in [View::Wall, View::Cpu, View::OffCpu] {
                for profile in [&empty, &hostile] {
                    let bytes = render(profile, &Subject::default(), format, view, true);
                    // pprof is binary.
                    if let Ok(text) = String::from_utf8(bytes) {
                        assert!(!text.contains("\x1b]"), "{format}: {text}");
                    } else {
                        assert_eq!(format, Format::Pprof);
                    }
                }
            }
        }
    }
}
