//! What may be typed.
//!
//! In: arguments. Out: [`Cli`], in which single values are in their range (they parse with the configuration's own
//! types) and nothing is decided yet; [`SettingArgs::to_config`] lays them over the file and checks the whole.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use super::output::Color;
use crate::config::{
    Config, ConfigError, FormatName, Freq, GlobText, Pid, Port, RawConfig, RawStore, RouteGlob, Size, Span,
};
use crate::export::Template;

/// Where the time of every HTTP request on this host goes: down to the Python line and the native function,
/// with no code change and no restart.
#[derive(Debug, Parser)]
#[command(
    name = "reqprof",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 success, 1 runtime error, 2 wrong usage or configuration, \
        3 a kernel feature or privilege is missing, 130 Ctrl-C.\n\n\
        Examples:\n  \
        sudo reqprof doctor                     what works on this machine\n  \
        sudo reqprof record -d 30s -o profiles  profile everything for half a minute\n  \
        sudo reqprof daemon                     profile until told otherwise; page at http://127.0.0.1:9977/\n  \
        reqprof requests --sort=-duration       the slowest requests of the running daemon"
)]
pub struct Cli {
    /// When to colour output
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: Color,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Profile until told otherwise, in the foreground, and serve the web page, the API and the metrics
    #[command(after_help = "Examples:\n  \
        reqprof daemon --config /etc/reqprof.yaml\n  \
        reqprof daemon --comm 'gunicorn*' --freq 199\n\n\
        SIGHUP reloads the file. A file with an error is reported and the old configuration stays in force.")]
    Daemon(DaemonArgs),
    /// Profile for a while, write one file per request, then print a summary; needs no running daemon
    #[command(after_help = "Examples:\n  \
        reqprof record -d 30s -o profiles\n  \
        reqprof record --pid 4711 --format speedscope -o profiles\n  \
        reqprof record -o profiles -- gunicorn shop.wsgi\n\n\
        Without -o, a directory reqprof-DATE-TIME is made in the current one. A store is kept only when one of the \
        --store flags or --listen is given; page and API are served only with --listen.")]
    Record(RecordArgs),
    /// List requests of a running daemon
    #[command(after_help = "Examples:\n  \
        reqprof requests --route '/orders/{id}' --min-duration 500ms\n  \
        reqprof requests --since 10m --sort=-duration --limit 20 --json")]
    Requests(RequestsArgs),
    /// List routes of a running daemon with their latencies and where their time goes
    Routes(RoutesArgs),
    /// List the processes a running daemon looks at, and what works on each
    Targets(TargetsArgs),
    /// Show one request as a tree
    #[command(after_help = "Example:\n  reqprof show 18c5f2a9b0d3e47100000042 --view cpu")]
    Show(ShowArgs),
    /// Write the profile of a request, or of all requests of a route, to a file
    #[command(after_help = "Examples:\n  \
        reqprof export 18c5f2a9b0d3e47100000042 -o slow.svg\n  \
        reqprof export --route '/orders/{id}' -f pprof -o orders.pb.gz")]
    Export(ExportArgs),
    /// Say what this kernel, these privileges and these targets allow, what is missing, and the remedy
    #[command(after_help = "Exits with 3 when something that reqprof cannot do without is missing.")]
    Doctor(DoctorArgs),
    /// Check a configuration file: exit 0, or the file, the line and the reason
    CheckConfig(CheckConfigArgs),
    /// Compare two requests or routes: planned, not in this version
    #[command(hide = true, disable_help_flag = true)]
    Diff(PlannedArgs),
    /// Arm a trigger in a running daemon: planned, not in this version
    #[command(hide = true, disable_help_flag = true)]
    Capture(PlannedArgs),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  reqprof completions bash > /etc/bash_completion.d/reqprof")]
    Completions { shell: clap_complete::Shell },
    /// Print the manual page
    #[command(after_help = "Example:\n  reqprof man | man -l -")]
    Man,
    /// Run a recorded event stream through the pipeline, without a kernel
    #[command(hide = true)]
    Replay {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}

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
            native_frames: None,
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

/// Whatever is typed after a command that is not there yet.
#[derive(Debug, Args)]
pub struct PlannedArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 0..)]
    pub arguments: Vec<std::ffi::OsString>,
}

/// How to reach a daemon, and how to print.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// The daemon's address
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9977", value_hint = ValueHint::Url)]
    pub url: String,
}

/// Which view of a profile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ViewName {
    /// All of the requests' time
    #[default]
    Wall,
    /// Time on a CPU
    Cpu,
    /// Time waiting; this build has no data of it yet
    Offcpu,
}

impl ViewName {
    /// As in `?view=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Cpu => "cpu",
            Self::Offcpu => "offcpu",
        }
    }
}

#[derive(Debug, Args)]
pub struct RequestsArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Only this service
    #[arg(long)]
    pub service: Option<String>,
    /// Only this route
    #[arg(long)]
    pub route: Option<String>,
    /// Only this method
    #[arg(long)]
    pub method: Option<String>,
    /// Only this status, such as 404, or class, such as 5xx
    #[arg(long, value_parser = status)]
    pub status: Option<String>,
    /// Only this process
    #[arg(long)]
    pub pid: Option<Pid>,
    /// Only requests that took at least this long
    #[arg(long, value_name = "DURATION")]
    pub min_duration: Option<Span>,
    /// Only requests that took at most this long
    #[arg(long, value_name = "DURATION")]
    pub max_duration: Option<Span>,
    #[command(flatten)]
    pub window: WindowArgs,
    /// Order: start or duration, with a minus for the largest first
    #[arg(long, value_name = "KEY", default_value = "-start", allow_hyphen_values = true,
          value_parser = ["start", "-start", "duration", "-duration"])]
    pub sort: String,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub limit: u32,
    /// Go on where an earlier list ended, which named this
    #[arg(long, value_name = "CURSOR")]
    pub cursor: Option<String>,
}

/// A stretch of time.
#[derive(Clone, Debug, Args)]
pub struct WindowArgs {
    /// From this time: RFC 3339, or a duration that ends now
    #[arg(long, value_name = "TIME", value_parser = instant)]
    pub since: Option<jiff::Timestamp>,
    /// Up to this time: RFC 3339, or a duration before now
    #[arg(long, value_name = "TIME", value_parser = instant)]
    pub until: Option<jiff::Timestamp>,
}

/// Checked here and sent as it is: the server's own reading of it.
fn status(text: &str) -> Result<String, String> {
    let known = text.parse::<crate::store::StatusFilter>();
    known
        .map(|_| text.to_owned())
        .map_err(|()| "neither a status such as 404 nor a class such as 5xx".to_owned())
}

fn instant(text: &str) -> Result<jiff::Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text)
        .map_err(|_| "neither a time such as 2026-01-31T12:00:00Z nor a duration such as 10m".to_owned())?;
    jiff::Timestamp::now().checked_sub(ago).map_err(|_| "too long ago".to_owned())
}

#[derive(Debug, Args)]
pub struct RoutesArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Only this service
    #[arg(long)]
    pub service: Option<String>,
    #[command(flatten)]
    pub window: WindowArgs,
}

#[derive(Debug, Args)]
pub struct TargetsArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The request's id
    #[arg(value_parser = request_id)]
    pub id: String,
    #[command(flatten)]
    pub server: ServerArgs,
    /// Which time to show
    #[arg(long, value_enum, default_value_t)]
    pub view: ViewName,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("subject").required(true).args(["id", "route"]))]
pub struct ExportArgs {
    /// The request's id
    #[arg(value_parser = request_id)]
    pub id: Option<String>,
    /// All requests of this route, merged
    #[arg(long)]
    pub route: Option<String>,
    /// Only those of this service
    #[arg(long, requires = "route")]
    pub service: Option<String>,
    #[command(flatten)]
    pub window: WindowArgs,
    #[command(flatten)]
    pub server: ServerArgs,
    /// The format [default: by the file's extension]
    #[arg(short, long)]
    pub format: Option<FormatName>,
    /// The file to write; `-` is stdout and needs --format
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Which time to export
    #[arg(long, value_enum, default_value_t)]
    pub view: ViewName,
}

fn request_id(text: &str) -> Result<String, String> {
    let valid = text.len() == 24 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if valid { Ok(text.to_owned()) } else { Err("an id has 24 lower-case hexadecimal digits".to_owned()) }
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Also look at this process (repeatable)
    #[arg(short, long, value_name = "PID")]
    pub pid: Vec<Pid>,
    /// The directory the daemon would keep its records in
    #[arg(long, value_name = "DIR", default_value = crate::config::DEFAULT_STORE, value_hint = ValueHint::DirPath)]
    pub store: PathBuf,
}

#[derive(Debug, Args)]
pub struct CheckConfigArgs {
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Selection;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    fn daemon(line: &str) -> Config {
        let Ok(Command::Daemon(args)) = parse(line) else { panic!("{line}") };
        args.settings.to_config().expect(line)
    }

    #[test]
    fn flags_become_settings() {
        let config = daemon(
            "reqprof daemon -p 17 --pid 18 --comm nginx --port 80 --route /a/* --rate 49 --listen [::1]:1 \
             --store /s --store-max-size 1GiB --store-max-age 1d --prof-path /p --prof-file {id} --min-duration 5ms",
        );
        let Selection::Only(selectors) = &config.selection else { panic!("{config:?}") };
        assert_eq!(
            (selectors.pids.as_slice(), selectors.ports.as_slice()),
            ([17, 18].as_slice(), [80].as_slice())
        );
        assert!(selectors.comm.matches("nginx") && config.routes.matches("/a/b"));
        assert_eq!((config.freq, config.listen.to_string().as_str()), (49, "[::1]:1"));
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

    #[test]
    fn ids_are_checked_before_anything_is_asked() {
        assert!(parse("reqprof show 0123456789abcdef01234567").is_ok());
        for bad in ["../x", "0123456789ABCDEF01234567", "0123"] {
            assert!(parse(&format!("reqprof show {bad}")).is_err(), "{bad}");
        }
        assert!(parse("reqprof export -o x.svg").is_err(), "an id or a route");
        assert!(parse("reqprof export --route /a 0123456789abcdef01234567 -o x.svg").is_err(), "not both");
        assert!(parse("reqprof export --route /a -o x.svg").is_ok());
    }

    #[test]
    fn times_are_absolute_or_relative() {
        assert_eq!(instant("2026-01-31T12:00:00Z").expect("a time").as_second(), 1_769_860_800);
        let before = jiff::Timestamp::now();
        let hour_ago = instant("1h").expect("a duration");
        assert!(before.as_second() - hour_ago.as_second() <= 3600);
        assert!(hour_ago < before);
        assert!(instant("yesterday").is_err());
    }

    #[test]
    fn sort_takes_a_minus() {
        let Ok(Command::Requests(args)) = parse("reqprof requests --sort -duration --limit 5 --cursor 12ab")
        else {
            panic!()
        };
        assert_eq!((args.sort.as_str(), args.limit, args.cursor.as_deref()), ("-duration", 5, Some("12ab")));
        assert!(parse("reqprof requests --sort size").is_err());
        assert!(parse("reqprof requests --status 404").is_ok());
        assert!(parse("reqprof requests --status 5xx").is_ok());
        assert!(parse("reqprof requests --status fast").is_err());
        assert!(parse("reqprof requests --limit 0").is_err());
    }
}
