//! What may be said, in a file or on the command line. Nothing here is decided: a setting that was not mentioned
//! is `None`, and the command line is laid over the file before the whole is checked.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use super::values::{
    BoundarySource, FormatName, Freq, GlobText, HostName, LogFormat, Pid, Port, RingSize, RouteGlob,
    ServiceName, Size, Span,
};
use crate::correlate::route::Pattern;
use crate::export::Template;

/// The file's keys. Those that are flags too have the flag's name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a mapping")]
pub struct RawConfig {
    pub pid: Option<Vec<Pid>>,
    pub all: Option<bool>,
    pub comm: Option<Vec<GlobText>>,
    pub exe: Option<Vec<GlobText>>,
    pub port: Option<Vec<Port>>,
    pub route: Option<Vec<RouteGlob>>,
    pub route_patterns: Option<Vec<RawRoutePattern>>,
    pub freq: Option<Freq>,
    pub native_frames: Option<bool>,
    pub boundary: Option<BoundarySource>,
    pub ring_size: Option<RingSize>,
    pub listen: Option<SocketAddr>,
    pub allow_remote: Option<bool>,
    pub allow_hosts: Option<Vec<HostName>>,
    pub store: Option<RawStore>,
    pub prof_path: Option<PathBuf>,
    pub prof_file: Option<Template>,
    pub formats: Option<Vec<FormatName>>,
    pub min_duration: Option<Span>,
    pub log_format: Option<LogFormat>,
}

/// The key `store`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a mapping")]
pub struct RawStore {
    pub dir: Option<PathBuf>,
    pub max_size: Option<Size>,
    pub max_age: Option<Span>,
}

/// An entry of `route_patterns`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub struct RawRoutePattern {
    /// Absent = every service.
    pub service: Option<ServiceName>,
    pub pattern: Pattern,
}

impl RawConfig {
    /// What `flags` says, and for the rest what the file says. Which processes are looked at is one decision: a
    /// flag about it replaces all that the file says about it.
    pub(super) fn overlaid(self, flags: &RawConfig) -> RawConfig {
        let flags = flags.clone();
        let selects = flags.pid.is_some()
            || flags.all.is_some()
            || flags.comm.is_some()
            || flags.exe.is_some()
            || flags.port.is_some();
        let file = if selects {
            RawConfig { pid: None, all: None, comm: None, exe: None, port: None, ..self }
        } else {
            self
        };
        RawConfig {
            pid: flags.pid.or(file.pid),
            all: flags.all.or(file.all),
            comm: flags.comm.or(file.comm),
            exe: flags.exe.or(file.exe),
            port: flags.port.or(file.port),
            route: flags.route.or(file.route),
            route_patterns: flags.route_patterns.or(file.route_patterns),
            freq: flags.freq.or(file.freq),
            native_frames: flags.native_frames.or(file.native_frames),
            boundary: flags.boundary.or(file.boundary),
            ring_size: flags.ring_size.or(file.ring_size),
            listen: flags.listen.or(file.listen),
            allow_remote: flags.allow_remote.or(file.allow_remote),
            allow_hosts: flags.allow_hosts.or(file.allow_hosts),
            store: match (flags.store, file.store) {
                (Some(flags), Some(file)) => Some(RawStore {
                    dir: flags.dir.or(file.dir),
                    max_size: flags.max_size.or(file.max_size),
                    max_age: flags.max_age.or(file.max_age),
                }),
                (flags, file) => flags.or(file),
            },
            prof_path: flags.prof_path.or(file.prof_path),
            prof_file: flags.prof_file.or(file.prof_file),
            formats: flags.formats.or(file.formats),
            min_duration: flags.min_duration.or(file.min_duration),
            log_format: flags.log_format.or(file.log_format),
        }
    }
}
