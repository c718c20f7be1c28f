//! `reqprof check-config FILE`: exit 0, or `FILE:LINE:COLUMN: reason` and exit 2.

use super::args::CheckConfigArgs;
use super::{CliError, ExitCode, output};
use crate::config::{Config, RawConfig};

pub(super) fn run(args: &CheckConfigArgs) -> Result<ExitCode, CliError> {
    Config::load(Some(&args.file), &RawConfig::default())?;
    output::stdout(format!("{}: valid\n", args.file.display()).as_bytes())
}
