//! `cargo xtask bench boundaries`: what it costs to see a request, by each source, on a server that does nothing else.
//!
//! In: nginx with one worker that answers two bytes, in clear text and by TLS, and wrk at saturation. Out: the worker's CPU
//! time and the throughput with reqprof over without it, in alternating slices; the time inside our programs for each
//! request; and whether every request was seen, by nginx's own count.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::peer::{Attached, Tools};
use super::stats::Estimate;
use super::steady::{Counters, Counting};
use super::{report, usage, write_document};
use crate::demo::{ask, build_reqprof, require_root};
use crate::load::client;
use crate::sh;
use crate::site::free_port;
use crate::site::service::{Lifetime, Service, children_of};

const LIMIT: Duration = Duration::from_secs(60);
/// As many connections as wrk keeps busy.
const CONNECTIONS: &str = "4";
const INTRODUCTION: &str = "# Overhead\n\nMeasured by `cargo xtask bench overhead`, and where it says so by `cargo xtask bench boundaries`.\n";

#[derive(clap::Args)]
pub struct Options {
    /// Pairs of slices per source
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(6..=1000))]
    pairs: u32,
    /// Length of a slice, in seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=60))]
    slice: u32,
    /// File the result in this Markdown document, under a heading with day, kernel and processor
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Use this reqprof instead of building one
    #[arg(long, value_name = "FILE")]
    reqprof: Option<PathBuf>,
}

/// Where requests are seen.
struct Source {
    name: &'static str,
    flags: &'static [&'static str],
    tls: bool,
    /// Of a record.
    boundary: &'static str,
}

/// Samples are left out as far as may be: they have a benchmark of their own.
const SOURCES: [Source; 3] = [
    Source { name: "uprobes in the C library", flags: &["--freq", "1"], tls: false, boundary: "uprobe" },
    Source {
        name: "system calls",
        flags: &["--freq", "1", "--boundary", "syscall"],
        tls: false,
        boundary: "syscall",
    },
    Source { name: "uprobes in OpenSSL", flags: &["--freq", "1"], tls: true, boundary: "tls" },
];

struct Server {
    service: Service,
    worker: u32,
    clear: SocketAddr,
    tls: SocketAddr,
}

struct Slice {
    requests: u64,
    cpu_ns: f64,
    seconds: f64,
}

/// What reqprof says of the requests that nginx counted.
struct Account {
    served: u64,
    seen: u64,
    recorded: u64,
    lost: u64,
}

struct Row {
    source: &'static Source,
    cpu: Estimate,
    throughput: Estimate,
    probes: Vec<(String, f64)>,
    account: Account,
}

pub fn run(options: &Options) -> Result<()> {
    require_root()?;
    let home = sh::root().join("target/bench/boundaries");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let reqprof = match &options.reqprof {
        Some(file) => std::path::absolute(file)?,
        None => build_reqprof()?,
    };
    let tools = Tools { reqprof: Some(reqprof), py_spy: PathBuf::new(), home: home.clone() };
    let mut server = serve(&home)?;
    let mut rows = Vec::new();
    for source in &SOURCES {
        println!("{} …", source.name);
        rows.push(measure(&tools, &server, source, options)?);
    }
    server.service.stop()?;
    let text = render(&rows, options);
    let title = format!("{}: what it costs to see a request", report::title());
    println!("## {title}\n\n{text}");
    match &options.write {
        Some(file) => write_document(&sh::root().join(file), INTRODUCTION, &title, &text),
        None => Ok(()),
    }
}

fn serve(home: &Path) -> Result<Server> {
    let (certificate, key) = (home.join("cert.pem"), home.join("key.pem"));
    sh::capture(
        Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate),
    )?;
    let (clear, tls) = (free_port()?, free_port()?);
    let at = |name: &str| home.join(name).display().to_string();
    let config = format!(
        "daemon off; worker_processes 1; pid {pid}; error_log {log};\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {temp}; proxy_temp_path {temp};\n\
         fastcgi_temp_path {temp}; uwsgi_temp_path {temp}; scgi_temp_path {temp};\n\
         ssl_certificate {certificate}; ssl_certificate_key {key};\n\
         server {{ listen {clear}; listen {tls} ssl; location / {{ return 200 ok; }}\n\
         location = /count {{ stub_status; }} }} }}\n",
        pid = at("pid"),
        log = at("error.log"),
        temp = at("temp"),
        certificate = certificate.display(),
        key = key.display(),
    );
    let file = home.join("nginx.conf");
    fs::write(&file, config)?;
    let mut command = Command::new(sh::on_path("nginx").context("nginx is not installed")?);
    command.arg("-c").arg(&file);
    let mut service = Service::start("nginx", command, &home.join("nginx.log"), &Lifetime::Bound)?;
    service.wait_for("listening", LIMIT, || std::net::TcpStream::connect(tls).ok())?;
    let pid = service.pid();
    let worker = service.wait_for("its worker", LIMIT, || children_of(pid).first().copied())?;
    Ok(Server { service, worker, clear, tls })
}

impl Server {
    /// Requests that nginx has served, this one too.
    fn served(&self) -> Result<u64> {
        let answer = client::Client::new(self.clear, false, LIMIT).send("GET", "/count")?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        // `server accepts handled requests`, and in the next line the numbers.
        let numbers = text.lines().nth(2).context("nginx does not say what it counted")?;
        Ok(numbers.split_whitespace().nth(2).context("nginx counts no requests")?.parse()?)
    }

    fn drive(&self, source: &Source, seconds: u32) -> Result<Slice> {
        let url =
            if source.tls { format!("https://{}/", self.tls) } else { format!("http://{}/", self.clear) };
        let cpu = || usage::cpu_ns(&[self.worker]);
        let (served, before, began) = (self.served()?, cpu()?, std::time::Instant::now());
        sh::capture(Command::new("wrk").args([
            "-t1",
            "-c",
            CONNECTIONS,
            "-d",
            &format!("{seconds}s"),
            &url,
        ]))?;
        let elapsed = began.elapsed().as_secs_f64();
        let cpu_ns = cpu()?.saturating_sub(before) as f64;
        let requests = self.served()? - served;
        ensure!(requests > 100, "only {requests} requests in {elapsed:.1} s");
        Ok(Slice { requests, cpu_ns, seconds: elapsed })
    }

    fn attach(&self, tools: &Tools, source: &Source) -> Result<Attached> {
        tools.attach_reqprof(source.flags, self.service.pid(), &[self.worker])
    }
}

fn measure(tools: &Tools, server: &Server, source: &'static Source, options: &Options) -> Result<Row> {
    let (mut cpu, mut throughput) = (Vec::new(), Vec::new());
    for _ in 0..options.pairs {
        let without = server.drive(source, options.slice)?;
        let attached = server.attach(tools, source)?;
        let with = server.drive(source, options.slice)?;
        attached.detach()?;
        cpu.push((with.cpu_ns / with.requests as f64) / (without.cpu_ns / without.requests as f64));
        throughput.push((with.requests as f64 / with.seconds) / (without.requests as f64 / without.seconds));
    }
    // The kernel counts the time in programs, which itself costs something: apart from the slices that are compared.
    let _counting = Counting::start()?;
    let attached = server.attach(tools, source)?;
    let before = Counters::of(&attached)?.context("reqprof has no counters")?;
    let served = server.served()?;
    let slice = server.drive(source, options.slice)?;
    // What was asked before counts itself, and so does what is asked now.
    let served = server.served()? - served + 1;
    let account = account(&attached, source, served)?;
    let after = Counters::of(&attached)?.context("reqprof has no counters")?;
    let probes = after.spent_since(&before).into_iter();
    let probes = probes.map(|(name, seconds)| (name, seconds * 1e6 / slice.requests as f64)).collect();
    attached.detach()?;
    let of = |values| Estimate::of(values).context("nothing was measured");
    Ok(Row { source, cpu: of(cpu)?, throughput: of(throughput)?, probes, account })
}

/// Waits until what was seen is recorded, and compares.
fn account(attached: &Attached, source: &Source, served: u64) -> Result<Account> {
    let addr = attached.api.context("reqprof has no address")?;
    let number = |value: &Value, name: &str| value[name].as_u64().unwrap_or(0);
    let deadline = std::time::Instant::now() + LIMIT;
    let requests = loop {
        let requests = ask(addr, "/api/v1/status")?["requests"].take();
        if number(&requests, "finished") + number(&requests, "lost") >= number(&requests, "begun") {
            break requests;
        }
        // What is open at the end stays open: that is to be seen in the table, and not to be waited for.
        if std::time::Instant::now() > deadline {
            break requests;
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    let newest = ask(addr, "/api/v1/requests?limit=1&route=/")?;
    let boundary = newest["requests"][0]["boundary"].as_str().context("no request was recorded")?.to_owned();
    ensure!(boundary == source.boundary, "seen by {boundary}, not by {}", source.boundary);
    Ok(Account {
        served,
        seen: number(&requests, "begun"),
        recorded: number(&requests, "finished"),
        lost: number(&requests, "lost"),
    })
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut text = format!(
        "`cargo xtask bench boundaries --pairs {} --slice {}`: nginx with one worker, `return 200 ok`, wrk with {CONNECTIONS} \
         connections at saturation.\nThe CPU ratio is the worker's own time for a request with reqprof over without it, median \
         with a 95 % interval; the daemon\ntakes its share of the same machine, which the throughput shows. Requests are by \
         nginx's own count.\n\n\
         | source | CPU ratio | throughput ratio | our programs, per request | served | seen | recorded | lost, counted |\n\
         |---|---|---|---|---|---|---|---|\n",
        options.pairs, options.slice
    );
    for Row { source, cpu, throughput, probes, account } in rows {
        let total: f64 = probes.iter().map(|(_, us)| us).sum();
        let Account { served, seen, recorded, lost } = account;
        text += &format!(
            "| {} | {cpu} | {throughput} | {total:.2} µs | {served} | {seen} | {recorded} | {lost} |\n",
            source.name
        );
    }
    for Row { source, probes, .. } in rows {
        let most: Vec<String> = probes
            .iter()
            .filter(|(_, us)| *us >= 0.05)
            .map(|(name, us)| format!("`{}` {us:.2}", name.trim_start_matches("probe=").trim_matches('"')))
            .collect();
        text += &format!("\nBy program, {}: {} µs.\n", source.name, most.join(", "));
    }
    text
}
