//! The commands that ask a running daemon: which one, what for, and how to show it.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use crate::config::{DEFAULT_LISTEN, FormatName, Pid, Span};
use crate::store::{MAX_ROWS, Sort};

/// How to reach a daemon, and how to print.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// The daemon's address
    #[arg(long, value_name = "URL", default_value_t = format!("http://{DEFAULT_LISTEN}"), value_hint = ValueHint::Url)]
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
          value_parser = Sort::NAMES)]
    pub sort: String,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=MAX_ROWS as i64))]
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
    /// Print the record as JSON instead of record and tree
    #[arg(long, conflicts_with = "view")]
    pub json: bool,
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

#[cfg(test)]
mod tests {
    use super::super::{Command, parse};
    use super::*;

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
        assert!(parse("reqprof requests --limit 1000").is_ok());
        assert!(parse("reqprof requests --limit 1001").is_err());
    }
}
