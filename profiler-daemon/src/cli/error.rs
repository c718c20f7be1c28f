//! How a command ends: a code for scripts, and for people what went wrong and what to do about it.

use std::process::Termination;

/// The exit codes of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    Success = 0,
    /// Something failed while running.
    Runtime = 1,
    /// The arguments or the configuration are wrong.
    Usage = 2,
    /// The kernel or our privileges lack something.
    Unsupported = 3,
    /// Ended by Ctrl-C.
    Interrupted = 130,
}

impl Termination for ExitCode {
    fn report(self) -> std::process::ExitCode {
        std::process::ExitCode::from(self as u8)
    }
}

/// A command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CliError {
    pub code: ExitCode,
    pub message: String,
    /// What the user can do, as an imperative or a command.
    pub remedy: Option<String>,
}

impl CliError {
    fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: None }
    }

    pub fn runtime(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Runtime, message)
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Usage, message)
    }

    /// Nothing of this kind goes without a remedy.
    pub fn unsupported(message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(ExitCode::Unsupported, message).with_remedy(remedy)
    }

    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl From<crate::config::ConfigError> for CliError {
    fn from(e: crate::config::ConfigError) -> Self {
        Self::usage(e.to_string())
    }
}
