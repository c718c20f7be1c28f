//! `reqprof doctor`: what this kernel, these privileges and these targets allow, what is missing, and the remedy.
//!
//! In: the machine ([`facts`], through the system calls in [`probe`]). Out: a list of [`Check`]s, judged in
//! [`judge`] without touching the machine, as a table or JSON; and from a running daemon, how whole the stacks
//! are that it takes ([`stacks`]). The daemon asks [`probe`](fn@probe) too when
//! something could not be attached, so that both name the same remedy.

mod facts;
mod judge;
mod probe;
mod report;
mod stacks;

use std::borrow::Cow;
use std::path::Path;

use serde::Serialize;

use super::args::DoctorArgs;
use super::{CliError, ExitCode, output, remote};
use crate::config::{DEFAULT_STORE, Pid};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// Something works less well.
    Warn,
    /// reqprof cannot do without it.
    Fail,
}

impl Level {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: Cow<'static, str>,
    #[serde(rename = "status")]
    pub level: Level,
    pub finding: String,
    /// Present unless all is well.
    pub remedy: Option<String>,
}

/// Looks at this machine, with the default store.
pub fn probe() -> Vec<Check> {
    examine(Path::new(DEFAULT_STORE), &[])
}

/// Looks at this machine, at a store directory and at processes.
pub fn examine(store: &Path, pids: &[u32]) -> Vec<Check> {
    judge::judge(&facts::Facts::gather(store, pids))
}

pub(super) fn run(args: &DoctorArgs) -> Result<ExitCode, CliError> {
    let pids: Vec<u32> = args.pid.iter().cloned().map(Pid::get).collect();
    let mut checks = examine(&args.store, &pids);
    checks.extend(stacks::checks(remote::target_list(&args.server)));
    let text = if args.json { report::json(&checks)? } else { report::table(&checks) };
    output::stdout(text.as_bytes())?;
    let failed = checks.iter().any(|c| c.level == Level::Fail);
    Ok(if failed { ExitCode::Unsupported } else { ExitCode::Success })
}
