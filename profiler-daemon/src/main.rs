//! The program `reqprof`. All it does is in the library, where tests reach it.

use profiler_daemon::cli;

fn main() -> cli::ExitCode {
    cli::main(std::env::args_os())
}
