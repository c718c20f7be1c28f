//! `cargo xtask test`: everything that CI runs, in its order.
//!
//! In: the workspace. Out: each step announced and its output passed on, then what failed and what was skipped and why,
//! and as the last line `N passed, M failed, K skipped`. A check (format, lints, the object's bytes) counts as one; a
//! test step counts its tests. A step that fails does not stop the later ones, so one run shows everything.
//!
//! A test that cannot run here prints a line `SKIPPED name: reason` and returns; it then counts as skipped, not passed. So
//! does one that is marked to be ignored.
//! A step that cannot run is skipped as a whole. Two things are failures, because a green run would then say nothing: a
//! filter that no test's name contains, and root's rights without a single server profiled on the running kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::site::Install;
use crate::toolchain::Toolchain;
use crate::{ebpf, fuzz, needs, pythons, sh, toolchain, vm};

/// How long each fuzz target goes on from its corpus. Whoever changes a reader runs `cargo xtask fuzz` for longer.
const FUZZ_SECONDS: u64 = 5;

#[derive(Args)]
pub struct Options {
    /// Only what needs neither root nor the BPF toolchain: format, lints, unit tests
    #[arg(long)]
    fast: bool,
    /// Only tests whose name contains this; no format, lints or object
    filter: Option<String>,
}

/// Returns whether nothing failed.
pub fn run(options: &Options) -> Result<bool> {
    let mut report = Report::default();
    let filter = options.filter.as_deref();
    if let Err(error) = toolchain::check_compiler() {
        println!("warning: {error:#}");
    }
    if filter.is_none() {
        report.check("format", || {
            sh::run(sh::cargo().args(["fmt", "--all", "--check"]))?;
            sh::run(sh::cargo().args(["fmt", "--check", "--manifest-path", "fuzz/Cargo.toml"]))
        });
        let lints = ["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
        report.check("lints", || sh::run(sh::cargo().args(lints)));
        if !options.fast {
            object(&mut report);
        }
    }
    if !options.fast {
        // First, since unit tests too look at interpreters and their headers.
        for (package, reason) in needs::packages() {
            report.skip(&format!("Debian's package {package}"), &reason);
        }
        for (what, reason) in pythons::ensure() {
            report.skip(&what, &reason);
        }
    }
    report.tests("unit tests", cargo_test(&["--workspace", "--lib", "--bins"], filter));
    report.tests("documentation tests", cargo_test(&["--workspace", "--doc"], filter));
    if !options.fast {
        if filter.is_none() {
            fuzz_targets(&mut report);
            applications(&mut report);
        }
        integration_tests(&mut report, filter);
    }
    if let Some(filter) = filter {
        report.require_a_test(filter);
    } else if !options.fast && sh::is_root() {
        report.require_a_profiled_server();
        other_kernels(&mut report);
    }
    print!("\n{report}");
    Ok(report.failed == 0)
}

/// The committed BPF object against its source. Only a toolchain that cannot be had is a reason to skip: what it then
/// finds, a difference above all, is a failure.
fn object(report: &mut Report) {
    let (bytes, lints) = ("the BPF object is what its source builds", "lints of the kernel side");
    match announced("toolchain of the BPF object", Toolchain::ensure) {
        Ok(toolchain) => {
            report.check(bytes, || ebpf::verify(&toolchain));
            report.check(lints, || ebpf::clippy(&toolchain));
        }
        Err(error) => {
            let reason = format!("its toolchain cannot be had here: {error:#}");
            report.skip(bytes, &reason);
            report.skip(lints, &reason);
        }
    }
}

/// Their committed corpus, and a little beyond.
fn fuzz_targets(report: &mut Report) {
    let mut built = false;
    report.check("fuzz targets build", || {
        fuzz::build(&mut |line| println!("{line}"))?;
        built = true;
        Ok(())
    });
    for target in fuzz::TARGETS.iter().filter(|_| built) {
        report.check(&format!("fuzz target {target}"), || {
            fuzz::target_for(target, FUZZ_SECONDS, &mut |line| println!("{line}"))
        });
    }
}

/// The Python applications that the demo and the tests profile have to be right themselves.
fn applications(report: &mut Report) {
    let (shop, truth) = ("the demo site's own tests", "the ground-truth application's own account");
    match announced("environment of the demo site", Install::prepare) {
        Ok(install) => {
            report.check(shop, || install.own_tests());
            report.check(truth, || oracle(&install.program("python")));
        }
        Err(error) => {
            report.skip(shop, &format!("{error:#}"));
            report.skip(truth, &format!("{error:#}"));
        }
    }
}

/// The ground truth is what CPython says about its functions: it has to say it of the functions that burn.
fn oracle(python: &Path) -> Result<()> {
    let application = sh::root().join("profiler-daemon/tests/apps/truth/truth.py");
    let mut command = Command::new(python);
    let said = sh::capture(command.arg("-B").arg(application).arg("--oracle"))?;
    let said: serde_json::Value = serde_json::from_str(&said).context("the oracle speaks no JSON")?;
    let functions = said["functions"].as_array().context("the oracle lists no functions")?;
    for wanted in ["burn_a_leaf", "burn_b_leaf", "burn_c_leaf", "burn_d", "burn_z_leaf"] {
        let lines = functions
            .iter()
            .find(|function| function["co_name"] == wanted)
            .and_then(|function| function["lines"].as_array().map(Vec::len));
        ensure!(lines.is_some_and(|lines| lines > 0), "the oracle knows no lines of {wanted}");
    }
    Ok(())
}

/// Stacks are compared with its.
fn py_spy() -> Result<PathBuf> {
    let install = Install::prepare()?;
    install.add_packages("requirements-bench.txt")?;
    Ok(install.program("py-spy"))
}

/// The tests that run the real program and real readers of what it writes; as root, those too that load the BPF object
/// into the running kernel and profile real servers.
/// Programs of which each test looks at a service of its own, by pid, and at no figure that another could change.
const SIDE_BY_SIDE: [&str; 9] = [
    "event_loops",
    "interleaving",
    "matrix",
    "native_stacks",
    "odd_stacks",
    "reuse",
    "tls",
    "uwsgi",
    "versions",
];

fn integration_tests(report: &mut Report, filter: Option<&str>) {
    let tools = announced("readers of our formats from npm", needs::node_modules);
    let py_spy = announced("py-spy from PyPI", py_spy);
    // The tests that need them say so, one by one.
    for error in [tools.as_ref().err(), py_spy.as_ref().err()].into_iter().flatten() {
        println!("not to be had: {error:#}");
    }
    if !sh::is_root() {
        report.skip("the tests on the real kernel", "loading BPF programs needs root");
    }
    let command = |programs: &[String], threads: u32| {
        let mut what = vec!["--package", "profiler-daemon"];
        what.extend(programs.iter().flat_map(|name| ["--test", name.as_str()]));
        let mut command = cargo_test(&what, filter);
        command.arg(format!("--test-threads={threads}")).env("REQPROF_PYTHONS", pythons());
        if let Ok(tools) = &tools {
            command.env("REQPROF_TOOLS_DIR", tools);
        }
        if let Ok(program) = &py_spy {
            command.env("REQPROF_PY_SPY", program);
        }
        if sh::is_root() {
            command.env("REQPROF_E2E", "1");
        }
        command
    };
    let (two, one): (Vec<String>, Vec<String>) =
        test_programs().into_iter().partition(|name| SIDE_BY_SIDE.contains(&name.as_str()));
    // Others attach to the whole machine and would see each other's processes.
    report.tests("integration and end-to-end tests", command(&one, 1));
    report.tests("end-to-end tests, two at a time", command(&two, 2));
}

/// The programs in `profiler-daemon/tests`, sorted.
fn test_programs() -> Vec<String> {
    let folder = sh::root().join("profiler-daemon/tests");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let sources = files.filter(|path| path.extension().is_some_and(|end| end == "rs"));
    let mut names: Vec<String> =
        sources.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    names
}

/// The programs on the oldest and the newest kernel; here they run on one only.
fn other_kernels(report: &mut Report) {
    let kernels = vm::oldest_and_newest();
    let ready = announced("kernels for QEMU", || kernels.iter().try_for_each(|kernel| vm::prepare(*kernel)));
    let command = ready.and_then(|()| vm::tests());
    for kernel in kernels {
        let step = format!("tests on Linux {}", kernel.name);
        match &command {
            Ok(command) => report.collect(&step, |each| vm::on(kernel, command, each)),
            Err(error) => report.skip(&step, &format!("{error:#}")),
        }
    }
}

/// A `cargo test` to which further arguments for the test programs can be added. It shows what passing tests print: that is
/// where they say that they could not run.
fn cargo_test(what: &[&str], filter: Option<&str>) -> Command {
    let mut command = sh::cargo();
    command
        .args(["test", "--locked", "--no-fail-fast"])
        .args(what)
        .args(["--", "--show-output"])
        .args(filter);
    command
}

/// The CPython builds found here, joined as in `PATH`: the distribution's and pyenv's.
fn pythons() -> std::ffi::OsString {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".pyenv"));
    let pyenv = std::env::var_os("PYENV_ROOT").map(PathBuf::from).or(home);
    let versions = pyenv.and_then(|root| std::fs::read_dir(root.join("versions")).ok());
    let mut found = vec![PathBuf::from("/usr/bin/python3")];
    found.extend(versions.into_iter().flatten().flatten().map(|entry| entry.path().join("bin/python3")));
    found.retain(|python| sh::capture(Command::new(python).arg("--version")).is_ok());
    found.sort();
    // A path with a colon cannot be listed; such an interpreter is then not tested against.
    std::env::join_paths(found.iter().filter(|path| !path.to_string_lossy().contains(':')))
        .unwrap_or_default()
}

#[derive(Default)]
struct Report {
    passed: usize,
    failed: usize,
    failures: Vec<String>,
    /// By name, with the reason: a test may say it more than once.
    skips: BTreeMap<String, String>,
    /// Tests that ran, whatever came of them.
    ran: usize,
    /// Real servers that tests had profiled.
    profiled: usize,
    /// Does not pass on what tests print: a test of this, run by this, would be taken for what it plays.
    quiet: bool,
}

impl Report {
    fn check(&mut self, step: &str, run: impl FnOnce() -> Result<()>) {
        let result = announced(step, run);
        match result {
            Ok(()) => self.passed += 1,
            Err(error) => self.fail(format!("{step}: {error:#}")),
        }
    }

    fn tests(&mut self, step: &str, mut command: Command) {
        self.collect(step, |each| sh::lines(&mut command, each));
    }

    /// Counts the tests of a step by the lines that it hands on.
    fn collect(&mut self, step: &str, run: impl FnOnce(&mut dyn FnMut(&str)) -> Result<()>) {
        let mut seen = Output::default();
        let quiet = self.quiet;
        let result = announced(step, || {
            run(&mut |line: &str| {
                if !quiet {
                    println!("{line}");
                }
                seen.line(line);
            })
        });
        self.ran += seen.passed + seen.failed;
        self.profiled += seen.profiled;
        // One that failed at something else has not been skipped.
        // A name may come with its module, where several modules have a test of that name.
        let is = |path: &str, name: &str| {
            path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with("::"))
        };
        let failed = |name: &str| seen.failures.iter().any(|path| is(path, name));
        seen.skips.retain(|name, _| !failed(name));
        // Skipped tests returned early, so their harness counted them as passed.
        self.passed += seen.passed.saturating_sub(seen.skips.len());
        self.failed += seen.failed;
        self.skips.append(&mut seen.skips);
        self.skips.append(&mut seen.ignored);
        self.failures.extend(seen.failures.iter().map(|name| format!("{step}: {name}")));
        if let Err(error) = result
            && seen.failed == 0
        {
            // It did not compile, or a test program died before it could count.
            self.fail(format!("{step}: {error:#}"));
        }
    }

    fn skip(&mut self, what: &str, reason: &str) {
        println!("\n== {what}: skipped, {reason}");
        self.skips.insert(what.to_owned(), reason.to_owned());
    }

    fn require_a_test(&mut self, filter: &str) {
        // What did not compile is a failure already.
        if self.ran == 0 && self.failed == 0 {
            self.fail(format!("no test's name contains `{filter}`"));
        }
    }

    fn require_a_profiled_server(&mut self) {
        if self.profiled == 0 {
            self.fail(
                "no Python server was profiled on this kernel, although this is root: the end-to-end tests say \
                 above why they were skipped"
                    .into(),
            );
        }
    }

    fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, reason) in &self.skips {
            writeln!(f, "skipped  {name}: {reason}")?;
        }
        for what in &self.failures {
            writeln!(f, "FAILED   {what}")?;
        }
        writeln!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skips.len())
    }
}

fn announced<T>(step: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("\n== {step}");
    let start = Instant::now();
    let result = run();
    let outcome = if result.is_ok() { "ok" } else { "FAILED" };
    println!("== {step}: {outcome} ({:.0} s)", start.elapsed().as_secs_f64());
    result
}

/// What the output of `cargo test` says, over all its test programs.
#[derive(Default)]
struct Output {
    passed: usize,
    failed: usize,
    failures: Vec<String>,
    skips: BTreeMap<String, String>,
    /// By path, with the reason: these did not even begin.
    ignored: BTreeMap<String, String>,
    profiled: usize,
}

impl Output {
    fn line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            // `ok. 3 passed; 0 failed; 1 ignored; 0 measured; …`
            self.passed += count(counts, "passed");
            self.failed += count(counts, "failed");
        } else if let Some((name, reason)) =
            line.strip_prefix("SKIPPED ").and_then(|rest| rest.split_once(": "))
        {
            self.skips.insert(name.to_owned(), reason.to_owned());
        } else if line.starts_with("PROFILED ") {
            self.profiled += 1;
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        } else if let Some((name, reason)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored"))
        {
            // `ignored, reason`, or nothing more.
            let reason = reason.strip_prefix(", ").unwrap_or("ignored");
            self.ignored.insert(name.to_owned(), reason.to_owned());
        }
    }
}

/// The number before `word`.
fn count(counts: &str, word: &str) -> usize {
    let words: Vec<&str> = counts.split([' ', ';', '.']).filter(|w| !w.is_empty()).collect();
    words.windows(2).find(|pair| pair[1] == word).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two test programs as libtest prints them.
    const OUTPUT: &str = "\
running 4 tests
test a::works ... ok
test a::breaks ... FAILED
test a::later ... ignored
test a::slow ... ignored, a measurement

test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 2 filtered out; finished in 0.01s

running 2 tests
test nginx ... ok
test prometheus ... ok

successes:

---- nginx stdout ----
SKIPPED nginx: no nginx: not installed
SKIPPED nginx: no nginx: not installed

---- prometheus stdout ----
PROFILED gunicorn

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 12.30s";

    #[test]
    fn programs_that_run_side_by_side_are_there() {
        let all = test_programs();
        assert!(SIDE_BY_SIDE.iter().all(|name| all.iter().any(|have| have == name)), "{all:?}");
        assert!(all.len() > SIDE_BY_SIDE.len());
    }

    #[test]
    fn the_output_of_several_programs_is_summed() {
        let mut report = Report { quiet: true, ..Report::default() };
        let mut command = Command::new("printf");
        command.arg("%s\\n").arg(OUTPUT);
        report.tests("unit tests", command);
        report.require_a_test("e");
        report.require_a_profiled_server();
        assert_eq!(
            report.to_string(),
            "skipped  a::later: ignored\nskipped  a::slow: a measurement\nskipped  nginx: no nginx: not installed\n\
             FAILED   unit tests: a::breaks\n2 passed, 1 failed, 3 skipped\n"
        );
    }

    #[test]
    fn a_run_that_tested_nothing_has_failed() {
        let mut report = Report { quiet: true, ..Report::default() };
        let mut command = Command::new("printf");
        command.arg("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out\\n");
        report.tests("unit tests", command);
        report.skip("Debian's package wrk", "no archive");
        report.require_a_test("x");
        report.require_a_profiled_server();
        let text = report.to_string();
        assert!(text.contains("FAILED   no test's name contains `x`\n"), "{text}");
        assert!(text.contains("FAILED   no Python server was profiled"), "{text}");
        assert!(text.ends_with("\n0 passed, 2 failed, 1 skipped\n"), "{text}");
    }

    #[test]
    fn a_test_that_failed_was_not_skipped() {
        let mut report = Report { quiet: true, ..Report::default() };
        let mut command = Command::new("printf");
        command.arg("test a::b ... FAILED\\nSKIPPED b: half of it\\ntest result: FAILED. 4 passed; 1 failed; 0 ignored\\n");
        report.tests("unit tests", command);
        assert_eq!(report.to_string(), "FAILED   unit tests: a::b\n4 passed, 1 failed, 0 skipped\n");

        let mut report = Report { quiet: true, ..Report::default() };
        let mut command = Command::new("printf");
        command.arg("test a::b::c ... FAILED\\nSKIPPED b::c: half\\nSKIPPED d::c: none\\ntest result: FAILED. 4 passed; 1 failed; 0 ignored\\n");
        report.tests("unit tests", command);
        let text = report.to_string();
        assert!(text.contains("d::c: none") && !text.contains("half"), "{text}");
    }

    #[test]
    fn a_step_that_counts_nothing_but_fails_is_one_failure() {
        let mut report = Report { quiet: true, ..Report::default() };
        report.tests("unit tests", Command::new("false"));
        report.check("format", || Ok(()));
        let text = report.to_string();
        assert!(text.starts_with("FAILED   unit tests: `false` failed"), "{text}");
        assert!(text.ends_with("\n1 passed, 1 failed, 0 skipped\n"), "{text}");
    }
}
