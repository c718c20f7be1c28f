//! `cargo xtask bench unwind`: what a stack costs where it is walked, and what the tables cost that it is walked by.
//!
//! In: programs whose stacks are deep on purpose, and files of this machine. Out: microseconds inside our BPF program for
//! each sample, by the kernel's own count of its run time; memory and time of unwind tables, by the daemon's status.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::peer::{Attached, Tools};
use super::stats::Estimate;
use super::steady::{Counters, Counting};
use super::{report, write_document};
use crate::demo::{ask, build_reqprof, require_root};
use crate::load::client;
use crate::sh;
use crate::site::free_port;
use crate::site::service::{Lifetime, Service};

/// How many samples a second: the rate at which a sample's cost matters.
const HZ: u32 = 999;
/// The label of the sampler's programs, which are one chain.
const SAMPLER: &str = "sample";
const LIMIT: Duration = Duration::from_secs(60);
/// As many mapped ELF files as a busy host has.
const FILES: usize = 500;
const INTRODUCTION: &str = "# Stacks\n\nMeasured by `cargo xtask bench unwind`: what a stack costs where it is walked, \
    and what the tables cost that it is\nwalked by.\n";

#[derive(clap::Args)]
pub struct Options {
    /// Requests of each program, of 0.4 s of CPU time each
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(6..=1000))]
    rounds: u32,
    /// File the result in this Markdown document, under a heading with day, kernel and processor
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Use this reqprof instead of building one
    #[arg(long, value_name = "FILE")]
    reqprof: Option<PathBuf>,
}

struct Depth {
    what: String,
    frames: usize,
    microseconds: Estimate,
    samples: f64,
}

pub fn run(options: &Options) -> Result<()> {
    require_root()?;
    let home = sh::root().join("target/bench/unwind");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let reqprof = match &options.reqprof {
        Some(file) => std::path::absolute(file)?,
        None => build_reqprof()?,
    };
    let tools = Tools { reqprof: Some(reqprof), py_spy: PathBuf::new(), home: home.clone() };
    let python = sh::on_path("python3").context("there is no python3 on PATH")?;

    let script = home.join("deep.py");
    fs::write(&script, include_str!("deep.py"))?;
    let port = free_port()?;
    let mut deep = Command::new(&python);
    deep.arg(&script).arg(port.port().to_string());
    let mut rows = vec![depth(&tools, options.rounds, "Python", deep, port, "/")?];

    let (program, plugin) = compile(&home)?;
    let port = free_port()?;
    let mut nested = Command::new(program);
    nested.arg(port.port().to_string()).arg(plugin).arg("main");
    rows.push(depth(&tools, options.rounds, "native (C, no frame pointers)", nested, port, "/direct")?);

    let hosts = tables_of_files(&tools, &python)?;
    let node = tables_of_node(&tools)?;

    let mut text = String::from(
        "The time is that between entering and leaving our program, by the kernel's own count (`BPF_ENABLE_STATS`): the walk \
         of all\nframes, the kernel's part of the stack, the copy into the ring. Median over requests of 0.4 s of CPU time, with a \
         95 % interval.\n\n| stack | frames | time per sample | samples |\n|---|---|---|---|\n",
    );
    for row in &rows {
        let Estimate { median, interval, .. } = row.microseconds;
        let interval = interval.map_or(String::new(), |(low, high)| format!(" ({low:.1} to {high:.1})"));
        text += &format!(
            "| {} | {} | **{median:.1} µs**{interval} | {:.0} |\n",
            row.what, row.frames, row.samples
        );
    }
    text += &format!("\n{hosts}\n\n{node}\n");
    let title = report::title();
    println!("## {title}\n\n{text}");
    match &options.write {
        Some(file) => write_document(&sh::root().join(file), INTRODUCTION, &title, &text),
        None => Ok(()),
    }
}

fn depth(
    tools: &Tools,
    rounds: u32,
    what: &str,
    command: Command,
    addr: SocketAddr,
    path: &str,
) -> Result<Depth> {
    let mut service = Service::start(what, command, &tools.home.join("service.log"), &Lifetime::Bound)?;
    service.wait_for("listening", LIMIT, || std::net::TcpStream::connect(addr).ok())?;
    let _counting = Counting::start()?;
    let attached = tools.attach_reqprof(&["--freq", &HZ.to_string()], service.pid(), &[service.pid()])?;
    let counters = || Counters::of(&attached)?.context("reqprof has no counters");
    let (mut costs, mut samples) = (Vec::new(), 0.0);
    for round in 0..=rounds {
        let before = counters()?;
        client::Client::new(addr, false, LIMIT).send("GET", path)?;
        // What was counted just now may show a second later.
        std::thread::sleep(Duration::from_millis(1100));
        let (taken, seconds) = counters()?.since(&before, SAMPLER);
        ensure!(taken > 0.0 && seconds > 0.0, "no sample, or no time in `{SAMPLER}`");
        // The first fills caches, of names and of the machine.
        if round > 0 {
            costs.push(seconds * 1e6 / taken);
            samples += taken;
        }
    }
    let frames = frames(&attached)?;
    attached.detach()?;
    service.stop()?;
    let microseconds = Estimate::of(costs).context("nothing was measured")?;
    Ok(Depth { what: what.into(), frames, microseconds, samples })
}

/// Frames of the stack with most samples, of the newest request: without the line for the request itself.
fn frames(attached: &Attached) -> Result<usize> {
    let addr = attached.api.context("reqprof has no address")?;
    let newest = ask(addr, "/api/v1/requests?limit=1")?;
    let id = newest["requests"][0]["id"].as_str().context("no request was recorded")?.to_owned();
    let folded = client::get(addr, &format!("/api/v1/requests/{id}/profile?format=folded&view=cpu"))?;
    let folded = String::from_utf8_lossy(&folded.body).into_owned();
    let stacks = folded.lines().filter_map(|line| {
        let (stack, weight) = line.rsplit_once(' ')?;
        Some((weight.parse::<u64>().ok()?, stack.split(';').count() - 1))
    });
    Ok(stacks.max().context("the request has no stack")?.1)
}

/// The server of the tests of native stacks, and the library that it loads.
fn compile(home: &Path) -> Result<(PathBuf, PathBuf)> {
    let source = sh::root().join("profiler-daemon/tests/apps/nested");
    let (program, plugin) = (home.join("nested"), home.join("plugin.so"));
    let compiler = || {
        let mut command = Command::new("cc");
        command.args(["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"]);
        command
    };
    let server = source.join("server.c");
    sh::capture(compiler().arg("-pthread").arg("-o").arg(&program).arg(server).args(["-lm", "-ldl"]))?;
    sh::capture(compiler().args(["-shared", "-fPIC", "-o"]).arg(&plugin).arg(source.join("plugin.c")))?;
    Ok((program, plugin))
}

/// What the daemon says of its tables, once it has looked at this process.
fn tables(attached: &Attached, service: &mut Service) -> Result<Value> {
    let addr = attached.api.context("reqprof has no address")?;
    service.wait_for("known with its tables", LIMIT, || {
        // A process counts once its files have theirs.
        let unwind = ask(addr, "/api/v1/status").ok()?["unwind"].take();
        (unwind["processes"].as_u64()? > 0).then_some(unwind)
    })
}

fn tables_of_files(tools: &Tools, python: &Path) -> Result<String> {
    let script = tools.home.join("mapping.py");
    fs::write(&script, include_str!("mapping.py"))?;
    let files = libraries()?;
    let list = tools.home.join("files");
    fs::File::create(&list)?.write_all(files.join("\n").as_bytes())?;
    let mut command = Command::new("sh");
    let words = format!("exec {} {} < {}", python.display(), script.display(), list.display());
    command.args(["-c", &words]).stdin(Stdio::null());
    let mut service = Service::start("mapping", command, &tools.home.join("mapping.log"), &Lifetime::Bound)?;
    let log = service.log().to_owned();
    let mapped = service.wait_for("ready", LIMIT, || {
        let text = fs::read_to_string(&log).ok()?;
        text.trim().parse::<usize>().ok()
    })?;
    let attached = tools.attach_reqprof(&[], service.pid(), &[service.pid()])?;
    // Some have the same contents, and some none, so there are fewer tables.
    let unwind = tables(&attached, &mut service)?;
    ensure!(unwind["tables"].as_u64() > Some(mapped as u64 / 2), "few tables: {unwind}");
    attached.detach()?;
    service.stop()?;
    let number = |name: &str| unwind[name].as_f64().unwrap_or(f64::NAN);
    Ok(format!(
        "A process that maps {mapped} ELF files of this machine as code: {} tables of {:.1} million rows and {} rules take \
         **{:.1} MiB** and were made in {:.1} s, the longest in {:.0} ms, on a thread of their own.",
        number("tables"),
        number("rows") / 1e6,
        number("rules"),
        number("bytes") / f64::from(1 << 20),
        number("build_ms") / 1e3,
        number("build_ms_longest"),
    ))
}

/// Shared libraries of this machine, each only under one name.
fn libraries() -> Result<Vec<String>> {
    let found = sh::capture(
        Command::new("find").args(["/usr/lib", "-xdev", "-type", "f", "-name", "*.so*", "-size", "+8k"]),
    )?;
    let mut files: Vec<String> = found
        .lines()
        .filter(|file| {
            let mut magic = [0; 4];
            let read = fs::File::open(file).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut magic));
            read.is_ok() && magic == *b"\x7fELF"
        })
        .map(str::to_owned)
        .collect();
    files.sort_unstable();
    ensure!(files.len() >= FILES, "this machine has only {} shared libraries", files.len());
    // Spread over all, which are ordered by name, so that no package makes up most of them.
    let every = files.len() / FILES;
    Ok(files.into_iter().step_by(every).take(FILES).collect())
}

fn tables_of_node(tools: &Tools) -> Result<String> {
    let Some(node) = sh::on_path("node") else {
        return Ok("node: not measured, it is not installed.".into());
    };
    let addr = free_port()?;
    let mut command = Command::new(node);
    let program =
        format!("require('http').createServer((q, a) => a.end('ok')).listen({}, '127.0.0.1')", addr.port());
    command.args(["-e", &program]);
    let mut service = Service::start("node", command, &tools.home.join("node.log"), &Lifetime::Bound)?;
    service.wait_for("listening", LIMIT, || std::net::TcpStream::connect(addr).ok())?;
    let attached = tools.attach_reqprof(&[], service.pid(), &[service.pid()])?;
    let unwind = tables(&attached, &mut service)?;
    attached.detach()?;
    service.stop()?;
    let number = |name: &str| unwind[name].as_f64().unwrap_or(f64::NAN);
    Ok(format!(
        "node and its libraries: {} tables, {} rows, {:.1} MiB; **node's own table was made in {:.0} ms**.",
        number("tables"),
        number("rows"),
        number("bytes") / f64::from(1 << 20),
        number("build_ms_longest"),
    ))
}
