//! What may be typed.
//!
//! In: arguments. Out: [`Cli`], in which single values are in their range (they parse with the configuration's own
//! types) and nothing is decided yet. What sets up a profiling command is in [`settings`], what is asked of a running
//! daemon in [`questions`].

mod questions;
mod settings;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueHint};

pub use questions::{
    ExportArgs, RequestsArgs, RoutesArgs, ServerArgs, ShowArgs, TargetsArgs, ViewName, WindowArgs,
};
pub use settings::{DaemonArgs, RecordArgs, SettingArgs};

use super::output::Color;
use crate::config::Pid;

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

/// Whatever is typed after a command that is not there yet.
#[derive(Debug, Args)]
pub struct PlannedArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 0..)]
    pub arguments: Vec<std::ffi::OsString>,
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
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct CheckConfigArgs {
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[cfg(test)]
fn parse(line: &str) -> Result<Command, clap::Error> {
    Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
}
