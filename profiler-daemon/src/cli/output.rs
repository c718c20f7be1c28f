//! Data to stdout, messages to stderr, and colour where it is wanted.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::ValueEnum;

use super::{CliError, ExitCode};

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    /// What the arguments say before it is known whether they are right: errors in them are coloured too, or not.
    pub(super) fn asked(arguments: &[OsString]) -> Self {
        let mut words =
            arguments.iter().skip(1).map_while(|word| word.to_str()).take_while(|word| *word != "--");
        let mut asked = Self::default();
        while let Some(word) = words.next() {
            let value = match word.strip_prefix("--color") {
                Some("") => words.next(),
                Some(rest) => rest.strip_prefix('='),
                None => None,
            };
            asked = value.and_then(|value| Self::from_str(value, false).ok()).unwrap_or(asked);
        }
        asked
    }

    pub(super) fn set_for_process(self) {
        match self {
            Self::Auto => anstream::ColorChoice::Auto,
            Self::Always => anstream::ColorChoice::Always,
            Self::Never => anstream::ColorChoice::Never,
        }
        .write_global();
    }
}

/// Writes all of a command's data; colours in it are dropped where they are not wanted. A reader that went away
/// (`reqprof man | head`) has what it wanted.
pub fn stdout(bytes: &[u8]) -> Result<ExitCode, CliError> {
    let mut out = anstream::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(ExitCode::Success),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::Success),
        Err(e) => Err(CliError::runtime(format!("cannot write to stdout: {e}"))),
    }
}

/// Whether what goes to stderr is coloured, by the flag, the environment and the terminal.
pub fn stderr_has_colors() -> bool {
    anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never
}

/// Tells a person what went wrong.
pub fn report(error: &CliError) {
    let style = anstyle::AnsiColor::Red.on_default().bold();
    let mut text = format!("{style}error:{style:#} {error}\n");
    if let Some(remedy) = &error.remedy {
        text.push_str(&format!("  remedy: {remedy}\n"));
    }
    // Where stderr is gone there is nobody to tell.
    let _ = anstream::stderr().lock().write_all(text.as_bytes());
}
