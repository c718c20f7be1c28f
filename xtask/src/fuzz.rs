//! `cargo xtask fuzz`: the fuzz targets of `fuzz/`, for a while, with stable Rust.
//!
//! In: which targets, how long. Out: what libFuzzer says; an error if one found something, with the file that reproduces
//! it. The flags are those of `cargo fuzz run --sanitizer none`: they instrument the code for coverage. What is found new
//! on the way stays under `target/fuzz`; the corpus that is committed changes only on purpose.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::sh;

/// The targets; `fuzz/Cargo.toml` has them too.
pub const TARGETS: [&str; 5] = ["elf", "eh_frame", "line_table", "native_walk", "notes"];
/// What coverage takes, as libFuzzer reads it.
const FLAGS: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

#[derive(clap::Args)]
pub struct Options {
    /// Only these targets
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    target: Vec<String>,
    /// How long each is run, after its corpus
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Reduce what was found to what adds coverage, and put that into the committed corpus
    #[arg(long)]
    keep: bool,
}

pub fn run(options: &Options) -> Result<()> {
    build(&mut |line| println!("{line}"))?;
    for target in
        TARGETS.iter().filter(|name| options.target.is_empty() || options.target.iter().any(|t| t == *name))
    {
        target_for(target, options.seconds, &mut |line| println!("{line}"))?;
        if options.keep {
            let merge = ["-merge=1".into(), corpus(target), found(target)];
            sh::lines(Command::new(program(target)).args(merge), |line| println!("{line}"))?;
        }
    }
    Ok(())
}

pub fn build(each: &mut dyn FnMut(&str)) -> Result<()> {
    let mut build = sh::cargo();
    build
        .args(["build", "--locked", "--release", "--target", TRIPLE, "--bins", "--manifest-path"])
        .arg(sh::root().join("fuzz/Cargo.toml"))
        .env("CARGO_TARGET_DIR", folder())
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        // A failed assertion, an overflow too, has to end the program.
        .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
    sh::lines(&mut build, each)
}

/// Runs the corpus, then goes on from there for so many seconds.
pub fn target_for(target: &str, seconds: u64, each: &mut dyn FnMut(&str)) -> Result<()> {
    let (found, corpus) = (found(target), corpus(target));
    fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
    ensure!(corpus.is_dir(), "{} has no corpus", corpus.display());
    let mut fuzz = Command::new(program(target));
    fuzz.arg(format!("-max_total_time={seconds}"))
        // Slower than a thousand inputs together: work that is not bounded. Memory likewise.
        .args(["-timeout=20", "-rss_limit_mb=2048", "-verbosity=0", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", folder().join("artifacts").join(target).display()))
        .args([&found, &corpus]);
    fs::create_dir_all(folder().join("artifacts").join(target))?;
    sh::lines(&mut fuzz, each).with_context(|| format!("the fuzz target `{target}` found something"))
}

fn folder() -> PathBuf {
    sh::root().join("target/fuzz")
}

fn found(target: &str) -> PathBuf {
    folder().join("corpus").join(target)
}

fn corpus(target: &str) -> PathBuf {
    sh::root().join("fuzz/corpus").join(target)
}

fn program(target: &str) -> PathBuf {
    Path::new(&folder()).join(TRIPLE).join("release").join(target)
}
