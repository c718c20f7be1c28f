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
mod server;
mod summary;
mod table;

use std::ffi::OsString;

use clap::{CommandFactory, Parser};

pub use error::{CliError, ExitCode};

use args::{Cli, Command};

/// Runs the command that `arguments` (the program's name first) ask for, and reports an error.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    output::Color::asked(&arguments).set_for_process();
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
        Command::Diff(_) => Err(planned("diff")),
        Command::Capture(_) => Err(planned("capture")),
    }
}

fn planned(command: &str) -> CliError {
    CliError::usage(format!("`reqprof {command}` is planned, not in this version"))
}

/// One page for the program and all its commands, for `man -l -`.
fn man() -> Result<Vec<u8>, CliError> {
    let mut command = Cli::command();
    command.build();
    let mut page = Vec::new();
    let failed = |e: std::io::Error| CliError::runtime(e.to_string());
    let whole = clap_mangen::Man::new(command.clone());
    whole.render_title(&mut page).map_err(failed)?;
    whole.render_name_section(&mut page).map_err(failed)?;
    whole.render_synopsis_section(&mut page).map_err(failed)?;
    whole.render_description_section(&mut page).map_err(failed)?;
    whole.render_options_section(&mut page).map_err(failed)?;
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        let title = format!("reqprof {}", sub.get_name()).to_uppercase();
        page.extend_from_slice(format!(".SH \"{title}\"\n").as_bytes());
        // The generator says nothing of other names of a flag.
        let sub = sub.clone().mut_args(name_aliases);
        let man = clap_mangen::Man::new(sub.clone());
        // These name themselves sections, of which the page has one each already.
        let mut parts = Vec::new();
        man.render_synopsis_section(&mut parts).map_err(failed)?;
        man.render_description_section(&mut parts).map_err(failed)?;
        man.render_options_section(&mut parts).map_err(failed)?;
        man.render_extra_section(&mut parts).map_err(failed)?;
        page.extend(subsections(&String::from_utf8_lossy(&parts)).into_bytes());
    }
    let mut notes = Vec::new();
    whole.render_extra_section(&mut notes).map_err(failed)?;
    page.extend(String::from_utf8_lossy(&notes).replace(".SH EXTRA", ".SH NOTES").into_bytes());
    whole.render_version_section(&mut page).map_err(failed)?;
    Ok(page)
}

fn name_aliases(arg: clap::Arg) -> clap::Arg {
    let Some(names) = arg.get_visible_aliases().filter(|names| !names.is_empty()) else { return arg };
    let names: Vec<String> = names.iter().map(|name| format!("--{name}")).collect();
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    arg.help(format!("{help} (also {})", names.join(", ")))
}

/// Sections as parts of another one.
fn subsections(sections: &str) -> String {
    let sections = sections.replace(".SH EXTRA", ".SH NOTES");
    sections
        .lines()
        .map(|line| line.replacen(".SH ", ".SS ", usize::from(line.starts_with(".SH "))) + "\n")
        .collect()
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
        assert!(page.contains("\\-\\-rate"), "an alias is a name");
        // Cross references would name pages that nobody installs.
        assert!(!page.contains("reqprof\\-daemon(1)") && !page.contains("reqprof-daemon(1)"), "{page}");
        assert_eq!(page.matches("\n.SH NAME").count(), 1);
        let record = page.split(".SH \"REQPROF RECORD\"").nth(1).expect("a section");
        let record = record.split(".SH ").next().unwrap_or_default();
        assert!(record.contains(".SS SYNOPSIS") && record.contains("gunicorn shop.wsgi"), "{record}");
    }
}
