//! (stub) The formats a profile can be written in.
use super::Profile;

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
    /// Not yet measured; [`render`] is never called with it.
    OffCpu,
}

/// What a rendered profile says about itself.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// Heading, e.g. `GET /orders/{id} 200 - 123.4 ms`.
    pub title: String,
    pub service: String,
    pub route: String,
    pub method: String,
    pub status: Option<u16>,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
    /// Start, ns since the epoch; 0 = unknown.
    pub start: i64,
}

impl Format {
    /// By name (`tree`, `text` …) as in `?format=` and `-f`.
    pub fn from_name(name: &str) -> Option<Self> {
        let _ = name;
        None
    }
    /// By a file's extension: `json` tree, `txt` text, `folded`, `svg`, `pb.gz` pprof, `speedscope.json`.
    pub fn from_path(path: &std::path::Path) -> Option<Self> {
        let _ = path;
        None
    }
    pub fn name(self) -> &'static str {
        ""
    }
    pub fn extension(self) -> &'static str {
        ""
    }
    pub fn content_type(self) -> &'static str {
        ""
    }
}

/// Writes a profile. `color`: ANSI colours, for `text` only.
pub fn render(profile: &Profile, subject: &Subject, format: Format, view: View, color: bool) -> Vec<u8> {
    let _ = (profile, subject, format, view, color);
    Vec::new()
}
