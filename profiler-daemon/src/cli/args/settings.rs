//! The commands that profile: their settings as flags, and what else they take.
//!
//! [`SettingArgs::to_config`] lays the flags over the file and checks the whole.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use crate::config::{
    BoundarySource, Config, ConfigError, FormatName, Freq, GlobText, Pid, Port, RawConfig, RawStore,
    RouteGlob, Size, Span,
};
use crate::export::Template;

/// Settings of `daemon` and `record`; each wins over the file's.
#[derive(Clone, Debug, Default, Args)]
pub struct SettingArgs {
    /// Read settings from this file
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Look at this process and its children (repeatable)
    #[arg(short, long, value_name = "PID", help_heading = "Targets")]
    pub pid: Vec<Pid>,
    /// Look at every process that accepts connections (the default)
    #[arg(short, long, help_heading = "Targets", conflicts_with_all = ["pid", "comm", "exe", "port"])]
    pub all: bool,
    /// Look at processes with this name (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Targets")]
    pub comm: Vec<GlobText>,
    /// Look at processes that run this executable (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Targets")]
    pub exe: Vec<GlobText>,
    /// Look at processes that listen on this TCP port (repeatable)
    #[arg(long, value_name = "N", help_heading = "Targets")]
    pub port: Vec<Port>,
    /// Keep only requests of these routes (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Targets")]
    pub route: Vec<RouteGlob>,
    /// CPU samples per second and CPU, 1 to 9999 [default: 99]
    #[arg(short = 'F', long, visible_alias = "rate", value_name = "HZ")]
    pub freq: Option<Freq>,
    /// Show native and kernel frames in stacks that have Python frames [default: yes]
    #[arg(long, value_name = "yes|no", value_parser = clap::builder::BoolishValueParser::new())]
    pub native: Option<bool>,
    /// See requests in C libraries, at system calls, or where it costs least [default: auto]
    #[arg(long, value_name = "auto|uprobe|syscall", help_heading = "Targets")]
    pub boundary: Option<BoundarySource>,
    /// Serve HTTP here [default: 127.0.0.1:9977]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Allow --listen to be an address that other hosts can reach
    #[arg(long)]
    pub allow_remote: bool,
    /// Keep records and profiles in this directory [default: /var/lib/reqprof]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub store: Option<PathBuf>,
    /// Most disk space for them [default: 512MiB]
    #[arg(long, value_name = "SIZE")]
    pub store_max_size: Option<Size>,
    /// Longest time to keep them [default: 7d]
    #[arg(long, value_name = "DURATION")]
    pub store_max_age: Option<Span>,
    /// Also write one file per request into this directory
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Files")]
    pub prof_path: Option<PathBuf>,
    /// Name those files, in Python's format syntax [default: {path}.{duration:06d}ms.{time}]
    #[arg(
        long,
        value_name = "TEMPLATE",
        help_heading = "Files",
        long_help = "Name those files, in Python's format syntax, from path, duration (ms), time (s), method, route, \
            status, pid, service and id. The id and the format's extension are always added.\n\n\
            [default: {path}.{duration:06d}ms.{time}]"
    )]
    pub prof_file: Option<Template>,
    /// Write those files in this format (repeatable) [default: text]
    #[arg(long, value_name = "F", help_heading = "Files")]
    pub format: Vec<FormatName>,
    /// List requests shorter than this without a profile
    #[arg(long, value_name = "DURATION", help_heading = "Targets")]
    pub min_duration: Option<Span>,
}

impl SettingArgs {
    /// The checked configuration: these flags over the file.
    pub fn to_config(&self) -> Result<Config, ConfigError> {
        Config::load(self.config.as_deref(), &self.to_raw())
    }

    fn to_raw(&self) -> RawConfig {
        let store = RawStore {
            dir: self.store.clone(),
            max_size: self.store_max_size.clone(),
            max_age: self.store_max_age.clone(),
        };
        RawConfig {
            pid: given(&self.pid),
            all: self.all.then_some(true),
            comm: given(&self.comm),
            exe: given(&self.exe),
            port: given(&self.port),
            route: given(&self.route),
            route_patterns: None,
            freq: self.freq.clone(),
            native_frames: self.native,
            boundary: self.boundary,
            ring_size: None,
            listen: self.listen,
            allow_remote: self.allow_remote.then_some(true),
            allow_hosts: None,
            store: (store != RawStore::default()).then_some(store),
            prof_path: self.prof_path.clone(),
            prof_file: self.prof_file.clone(),
            formats: given(&self.format),
            min_duration: self.min_duration.clone(),
            log_format: None,
        }
    }
}

fn given<T: Clone>(list: &[T]) -> Option<Vec<T>> {
    (!list.is_empty()).then(|| list.to_vec())
}

#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Also write the raw events to this file, for `reqprof replay`
    #[arg(long, hide = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub events: Option<PathBuf>,
    #[command(flatten)]
    pub settings: SettingArgs,
}

#[derive(Debug, Args)]
pub struct RecordArgs {
    /// Stop after this time [default: at Ctrl-C, or when CMD ends]
    #[arg(short, long, value_name = "DURATION")]
    pub duration: Option<Span>,
    /// Write one file per request into this directory; the same as --prof-path [default: a new reqprof-DATE-TIME]
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "prof_path")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub settings: SettingArgs,
    /// Start this command, look at it and its children, and stop when it ends
    #[arg(
        last = true,
        value_name = "CMD",
        value_hint = ValueHint::CommandWithArguments,
        conflicts_with_all = ["pid", "all", "comm", "exe", "port"]
    )]
    pub command: Vec<std::ffi::OsString>,
}

impl RecordArgs {
    /// The checked configuration, with `-o` as the directory for files.
    pub fn to_config(&self) -> Result<Config, ConfigError> {
        let mut settings = self.settings.clone();
        settings.prof_path = self.output.clone().or(settings.prof_path);
        settings.to_config()
    }

    /// Whether page, API and metrics were asked for. A file's `listen` is the daemon's.
    pub fn serves(&self) -> bool {
        self.settings.listen.is_some()
    }

    /// Whether a store was asked for, or is needed by what is served.
    pub fn stores(&self) -> bool {
        let SettingArgs { store, store_max_size, store_max_age, .. } = &self.settings;
        self.serves() || store.is_some() || store_max_size.is_some() || store_max_age.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Command, parse};
    use super::*;
    use crate::config::Selection;

    fn daemon(line: &str) -> Config {
        let Ok(Command::Daemon(args)) = parse(line) else { panic!("{line}") };
        args.settings.to_config().expect(line)
    }

    #[test]
    fn flags_become_settings() {
        let config = daemon(
            "reqprof daemon -p 17 --pid 18 --comm nginx --port 80 --route /a/* --rate 49 --listen [::1]:1 \
             --store /s --store-max-size 1GiB --store-max-age 1d --prof-path /p --prof-file {id} --min-duration 5ms \
             --native=no",
        );
        let Selection::Only(selectors) = &config.selection else { panic!("{config:?}") };
        assert_eq!(
            (selectors.pids.as_slice(), selectors.ports.as_slice()),
            ([17, 18].as_slice(), [80].as_slice())
        );
        assert!(selectors.comm.matches("nginx") && config.routes.matches("/a/b"));
        assert_eq!((config.freq, config.listen.to_string().as_str()), (49, "[::1]:1"));
        assert!(!config.native_frames && daemon("reqprof daemon --native yes").native_frames);
        assert_eq!((config.store.dir.to_str(), config.store.max_size), (Some("/s"), 1 << 30));
        assert_eq!(config.store.max_age, Duration::from_secs(86_400));
        assert_eq!(config.prof_path.as_deref(), Some(std::path::Path::new("/p")));
        assert_eq!(config.min_duration, Duration::from_millis(5));
        assert_eq!(daemon("reqprof daemon -F 50 -a").selection, Selection::All);
    }

    #[test]
    fn record_takes_a_duration_a_directory_and_a_command() {
        let Ok(Command::Record(args)) = parse("reqprof record -d 30s -o out -- gunicorn -w 4 shop:app")
        else {
            panic!("record")
        };
        assert_eq!(args.duration.clone().map(Span::get), Some(Duration::from_secs(30)));
        assert_eq!(args.command, ["gunicorn", "-w", "4", "shop:app"]);
        assert_eq!(args.to_config().expect("valid").prof_path, Some("out".into()));
        assert!(parse("reqprof record -o a --prof-path b").is_err());
        assert!(!args.stores() && !args.serves());
        for (flags, stores, serves) in [("--store s", true, false), ("--listen 127.0.0.1:1", true, true)] {
            let Ok(Command::Record(args)) = parse(&format!("reqprof record {flags}")) else {
                panic!("{flags}")
            };
            assert_eq!((args.stores(), args.serves()), (stores, serves), "{flags}");
        }
    }
}
