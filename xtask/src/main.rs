//! reqprof's build and test commands, run as `cargo xtask <command>`. Each command is a file; this one only names them.

mod apt;
mod bench;
mod demo;
mod ebpf;
mod fixture;
mod fuzz;
mod load;
mod needs;
mod pythons;
mod run;
mod sh;
mod site;
mod testing;
mod toolchain;
mod vm;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, runs and tests reqprof")]
enum Command {
    /// Measure what profiling costs
    #[command(subcommand)]
    Bench(bench::Command),
    /// Show it all on a real Django site: build, serve, load, profile, print
    Demo(demo::Options),
    /// Build the BPF object and put it where the daemon embeds it
    Ebpf(ebpf::Options),
    /// Record anew, on this kernel, what the tests replay; due when the layout of records changes
    Fixture,
    /// Build reqprof and run it as root
    Run(run::Options),
    /// Feed the readers of what targets control with made-up bytes
    Fuzz(fuzz::Options),
    /// Run everything that CI runs
    Test(testing::Options),
    /// Run a command, or the tests of the BPF programs, on other kernels in QEMU
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let succeeded = match Command::parse() {
        Command::Bench(command) => bench::run(&command).map(|()| true),
        Command::Demo(options) => demo::run(&options).map(|()| true),
        Command::Ebpf(options) => ebpf::run(&options).map(|()| true),
        Command::Fixture => fixture::run().map(|()| true),
        Command::Fuzz(options) => fuzz::run(&options).map(|()| true),
        Command::Run(options) => run::run(&options).map(|()| true),
        Command::Test(options) => testing::run(&options),
        Command::Vm(options) => vm::run(&options).map(|()| true),
    };
    match succeeded {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
