//! reqprof's build and test commands, run as `cargo xtask <command>`. Each command is a file; this one only names them.

mod apt;
mod ebpf;
mod sh;
mod toolchain;

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, runs and tests reqprof")]
enum Command {
    /// Build the BPF object and put it where the daemon embeds it
    Ebpf(ebpf::Options),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Ebpf(options) => ebpf::run(&options),
    }
}
