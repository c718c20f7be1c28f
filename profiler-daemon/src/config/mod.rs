//! The configuration: what the user wants, checked.
//!
//! In: a YAML file and the command line, both as [`RawConfig`] (what may be said), the command line winning. Out:
//! a [`Config`] whose values can be used without another check, or one message that names the file, the line and
//! the reason. Only [`yaml`] knows the file's format.

mod globs;
mod raw;
mod reload;
mod values;
mod yaml;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use globs::Globs;
pub use raw::{RawConfig, RawRoutePattern, RawStore};
pub use reload::Reload;
pub use values::{
    BoundarySource, FormatName, Freq, GlobText, HostName, LogFormat, Pid, Port, RingSize, RouteGlob,
    ServiceName, Size, Span, ValueError,
};

use crate::correlate::route::ServicePattern;
use crate::export::Template;
use crate::profile::format::Format;
use crate::store::{DEFAULT_MAX_AGE, DEFAULT_MAX_BYTES};

/// Samples per second and CPU. Not a divisor of common timer rates, so that samples do not keep step with them.
pub const DEFAULT_FREQ: u32 = 99;
/// Where the HTTP server listens.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:9977";
/// Where records and profiles are kept.
pub const DEFAULT_STORE: &str = "/var/lib/reqprof";
/// Holds a second of a saturated host's boundary records.
const DEFAULT_RING_SIZE: u32 = 8 << 20;

/// Why there is no configuration. Every text is one line and fit for a terminal.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: more than {max} bytes, which is no configuration", path.display())]
    TooLarge { path: PathBuf, max: u64 },
    /// `FILE:LINE:COLUMN: reason`.
    #[error("{}:{line}:{column}: {reason}", path.display())]
    At { path: PathBuf, line: usize, column: usize, reason: String },
    /// In the file, at no single place.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// On the command line.
    #[error("{flag}: {reason}")]
    Flag { flag: &'static str, reason: String },
}

/// Which processes are looked at.
#[derive(Clone, Debug, PartialEq)]
pub enum Selection {
    /// Every process that accepts a connection.
    All,
    /// Those that match any of these, and their children.
    Only(Selectors),
}

/// A process matches when any one of these matches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selectors {
    pub pids: Vec<u32>,
    pub comm: Globs,
    pub exe: Globs,
    /// Local TCP ports the process listens on.
    pub ports: Vec<u16>,
}

impl Selection {
    /// Whether a process is selected by what it is. Pids are left to whoever can tell a process from a later one of
    /// the same pid. `ports` are those it listens on; what is not known is given empty.
    pub fn matches(&self, comm: &str, exe: &Path, ports: &[u16]) -> bool {
        match self {
            Self::All => true,
            Self::Only(s) => {
                s.comm.matches(comm) || s.exe.matches(exe) || s.ports.iter().any(|p| ports.contains(p))
            }
        }
    }
}

/// Where and how long records are kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Store {
    pub dir: PathBuf,
    /// Bytes on disk.
    pub max_size: u64,
    pub max_age: Duration,
}

/// Everything that can be set, with its default where nothing was said.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub selection: Selection,
    /// Only requests of these routes are kept; empty = all.
    pub routes: Globs,
    pub route_patterns: Vec<ServicePattern>,
    pub freq: u32,
    /// Whether native frames are taken beside those of the interpreter.
    pub native_frames: bool,
    /// Where requests are seen.
    pub boundary: BoundarySource,
    /// Bytes of the ring buffer, a power of two.
    pub ring_size: u32,
    pub listen: SocketAddr,
    pub allow_remote: bool,
    /// Names that this host is reached by, in lower case.
    pub allow_hosts: Vec<String>,
    pub store: Store,
    /// One file per request goes here.
    pub prof_path: Option<PathBuf>,
    pub prof_file: Template,
    /// Formats of those files, without repetition and never empty.
    pub formats: Vec<Format>,
    /// Requests shorter than this are listed without a profile.
    pub min_duration: Duration,
    pub log_format: LogFormat,
}

impl Config {
    /// From the file, if one was named, and what the command line says.
    pub fn load(file: Option<&Path>, flags: &RawConfig) -> Result<Self, ConfigError> {
        let Some(path) = file else {
            return Self::build(RawConfig::default(), flags).map_err(Problem::of_flags);
        };
        let source = yaml::Source::read(path)?;
        let raw = source.parse()?;
        Self::build(raw, flags).map_err(|problem| match problem.flag {
            Some(_) => problem.of_flags(),
            None => source.error_at(problem.key, problem.reason),
        })
    }

    fn build(file: RawConfig, flags: &RawConfig) -> Result<Self, Problem> {
        let raw = file.overlaid(flags);
        let RawConfig {
            pid,
            all,
            comm,
            exe,
            port,
            route,
            route_patterns,
            freq,
            native_frames,
            boundary,
            ring_size,
            listen,
            allow_remote,
            allow_hosts,
            store,
            prof_path,
            prof_file,
            formats,
            min_duration,
            log_format,
        } = raw;
        let selectors = Selectors {
            pids: values(pid, |p: Pid| p.get()),
            comm: globs(comm, GlobText::get),
            exe: globs(exe, GlobText::get),
            ports: values(port, |p: Port| p.get()),
        };
        let selection = match (all, selectors == Selectors::default()) {
            (Some(true) | None, true) => Selection::All,
            (Some(false) | None, false) => Selection::Only(selectors),
            (Some(true), false) => {
                return Err(Problem::new(
                    "all",
                    flags.all,
                    "--all",
                    "contradicts the pids, names and ports that are given",
                ));
            }
            (Some(false), true) => {
                return Err(Problem::new(
                    "all",
                    flags.all,
                    "--all",
                    "is false and no pid, comm, exe or port is given",
                ));
            }
        };
        let listen =
            listen.unwrap_or_else(|| DEFAULT_LISTEN.parse().expect("a constant that a test parses too"));
        let allow_remote = allow_remote.unwrap_or(false);
        if !listen.ip().is_loopback() && !allow_remote {
            let reason = format!(
                "{listen} can be reached from other hosts, and what reqprof shows is private; \
                 say allow_remote: true (or --allow-remote) to do it all the same"
            );
            return Err(Problem::new("listen", flags.listen, "--listen", &reason));
        }
        let store = store.unwrap_or_default();
        let mut formats = values(formats, |f: FormatName| f.get());
        if formats.is_empty() {
            formats.push(Format::Text);
        }
        Ok(Self {
            selection,
            routes: globs(route, RouteGlob::get),
            route_patterns: values(route_patterns, |p: RawRoutePattern| ServicePattern {
                service: p.service.map(ServiceName::get),
                pattern: p.pattern,
            }),
            freq: freq.map_or(DEFAULT_FREQ, |f| f.get()),
            native_frames: native_frames.unwrap_or(true),
            boundary: boundary.unwrap_or_default(),
            ring_size: ring_size.map_or(DEFAULT_RING_SIZE, |s| s.get()),
            listen,
            allow_remote,
            allow_hosts: values(allow_hosts, HostName::get),
            store: Store {
                dir: store.dir.unwrap_or_else(|| DEFAULT_STORE.into()),
                max_size: store.max_size.map_or(DEFAULT_MAX_BYTES, |s| s.get()),
                max_age: store.max_age.map_or(DEFAULT_MAX_AGE, |s| s.get()),
            },
            prof_path,
            prof_file: prof_file.unwrap_or_default(),
            formats,
            min_duration: min_duration.map_or(Duration::ZERO, |s| s.get()),
            log_format: log_format.unwrap_or_default(),
        })
    }
}

/// A rule that more than one setting takes part in was broken.
struct Problem {
    key: &'static str,
    /// Set when the setting came from the command line.
    flag: Option<&'static str>,
    reason: String,
}

impl Problem {
    fn new<T>(key: &'static str, by_flag: Option<T>, flag: &'static str, reason: &str) -> Self {
        Self { key, flag: by_flag.map(|_| flag), reason: reason.to_owned() }
    }

    fn of_flags(self) -> ConfigError {
        ConfigError::Flag { flag: self.flag.unwrap_or(self.key), reason: self.reason }
    }
}

fn values<T, U: PartialEq>(list: Option<Vec<T>>, get: impl Fn(T) -> U) -> Vec<U> {
    let mut out = Vec::new();
    for value in list.into_iter().flatten().map(get) {
        if !out.contains(&value) {
            out.push(value);
        }
    }
    out
}

fn globs<T>(list: Option<Vec<T>>, get: impl Fn(T) -> globset::Glob) -> Globs {
    list.into_iter().flatten().map(get).collect()
}

#[cfg(test)]
mod tests;
