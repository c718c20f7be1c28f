//! The command line: from arguments to an exit code.
//!
//! In: the arguments. Out: data on stdout, messages on stderr, and one of the [`ExitCode`]s that scripts rely on.
//! [`args`] says what may be typed, [`dispatch`] which function does it.

pub mod args;
mod checkconfig;
pub mod client;

pub mod doctor;
mod error;
pub mod output;
mod remote;
mod run;
mod table;

use std::ffi::OsString;

use clap::{CommandFactory, Parser};

pub use error::{CliError, ExitCode};

use args::{Cli, Command};

/// Runs the command that `arguments` (the program's name first) ask for, and reports an error.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(e) => {
            // `--help` and `--version` are "errors" too, for stdout and with code 0. That nobody reads it is no error.
            let _ = e.print();
            return if e.exit_code() == 0 { ExitCode::Success } else { ExitCode::Usage };
        }
    };
    cli.color.set_for_process();
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(e) => {
            output::report(&e);
            e.code
        }
    }
}

/// One arm per command.
fn dispatch(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Doctor(args) => doctor::run(&args),
        Command::CheckConfig(args) => checkconfig::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "reqprof", &mut script);
            output::stdout(&script)
        }
        Command::Man => output::stdout(&man()?),
        Command::Daemon(args) => run::daemon(&args),
        Command::Record(args) => run::record(&args),
        Command::Replay { file } => run::replay(&file),
        Command::Requests(args) => remote::requests(&args),
        Command::Routes(args) => remote::routes(&args),
        Command::Targets(args) => remote::targets(&args),
        Command::Show(args) => remote::show(&args),
        Command::Export(args) => remote::export(&args),
    }
}

/// One page for the program and all its commands, for `man -l -`.
fn man() -> Result<Vec<u8>, CliError> {
    let mut command = Cli::command();
    command.build();
    let mut page = Vec::new();
    let failed = |e: std::io::Error| CliError::runtime(e.to_string());
    clap_mangen::Man::new(command.clone()).render(&mut page).map_err(failed)?;
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        let title = format!("reqprof {}", sub.get_name()).to_uppercase();
        page.extend_from_slice(format!(".SH \"{title}\"\n").as_bytes());
        let man = clap_mangen::Man::new(sub.clone());
        man.render_description_section(&mut page).map_err(failed)?;
        man.render_options_section(&mut page).map_err(failed)?;
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_man_page_names_every_command() {
        let page = String::from_utf8(man().expect("a page")).expect("text");
        for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
            let title = format!(".SH \"REQPROF {}\"", command.get_name().to_uppercase());
            assert!(page.contains(&title), "{title}");
        }
        assert!(!page.contains("REPLAY"));
    }
}
