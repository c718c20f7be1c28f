//! `cargo xtask demo`: everything from nothing to a call tree. Builds the profiler, installs and starts the demo
//! shop, starts the daemon, drives a bounded load over loopback, then shows what the daemon saw: the table of routes
//! and the slowest request's tree.
//!
//! What it started it stops, unless `--keep` asks to leave site and daemon running; `--stop` ends those, and so does
//! the next demo, also when the one that should have kept them was interrupted.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::load::{self, Plan, Report, Route, client};
use crate::sh;
use crate::site::register::Register;
use crate::site::service::{Lifetime, Service};
use crate::site::{Install, ServeOptions, Site, free_port};

const DEFAULT_PORT: u16 = 9977;
const WORKERS: usize = 3;
const CONNECTIONS: usize = 4;
/// Enough that, in all likelihood, every worker has served every route once.
const WARM_UP_REQUESTS: u64 = 150;
/// Loading the BPF programs and the first scan of all processes.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long after the load the last requests may take to appear in the daemon's answers.
const SETTLE_LIMIT: Duration = Duration::from_secs(15);

#[derive(clap::Args)]
pub struct Options {
    /// Leave the site and the daemon running
    #[arg(long)]
    keep: bool,
    /// Stop what an earlier `demo --keep` left running, and do nothing else
    #[arg(long, conflicts_with = "keep")]
    stop: bool,
    /// How long to drive the load
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Use this reqprof instead of building one
    #[arg(long, value_name = "FILE")]
    reqprof: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<()> {
    require_root()?;
    let kept = Register::at(sh::root().join("target/demo/running.json"));
    if kept.stop_all()? {
        eprintln!("Stopped the site and the daemon of an earlier demo.");
    } else if options.stop {
        eprintln!("No demo is running.");
    }
    if options.stop {
        return Ok(());
    }
    let reqprof = match &options.reqprof {
        Some(file) => std::path::absolute(file)?,
        None => build_reqprof()?,
    };
    let install = Install::prepare()?;
    let lifetime = if options.keep { Lifetime::Detached(kept) } else { Lifetime::Bound };
    let site = install.serve(&ServeOptions {
        name: "gunicorn".into(),
        workers: WORKERS,
        database_url: install.sqlite()?,
        middleware: None,
        lifetime: lifetime.clone(),
    })?;
    eprintln!("The shop runs at http://{}/ with {WORKERS} gunicorn workers.", site.addr);

    // The first request of every worker imports half of Django; those are not the ones to look at.
    drive(&site, None, Some(WARM_UP_REQUESTS))?;
    let mut daemon = Daemon::start(&reqprof, &install, &site, &lifetime)?;
    eprintln!("reqprof listens at http://{}/.", daemon.addr);

    eprintln!("Driving {CONNECTIONS} connections for {} seconds …", options.seconds);
    let report = drive(&site, Some(Duration::from_secs(options.seconds)), None)?;
    let log = install.home.join("client.jsonl");
    write_client_log(&report, &log)?;
    eprintln!("\nWhat the client saw (each request in {}):\n\n{}", log.display(), report.table());
    ensure!(report.answered() > 0, "the site answered nothing: {}", report.first_error.unwrap_or_default());

    let slowest = daemon.wait_for_slowest(&site, report.answered())?;
    println!("What reqprof saw, per route:\n");
    daemon.show(&reqprof, &["routes"])?;
    println!("\nThe slowest request, {}:\n", slowest.title);
    daemon.show(&reqprof, &["show", &slowest.id])?;
    println!(
        "\nThe client got {} answers; reqprof recorded {} requests.",
        report.answered(),
        slowest.recorded
    );

    let page = format!("http://{}/", daemon.addr);
    if options.keep {
        site.service.leave_running()?;
        daemon.service.leave_running()?;
        println!("\nThe web page: {page}");
        println!("The shop:     http://{}/", site.addr);
        println!("Both go on running. `cargo xtask demo --stop` stops them.");
    } else {
        drop(daemon);
        drop(site);
        println!(
            "\nEverything is stopped. `cargo xtask demo --keep` leaves site and daemon running, with the web"
        );
        println!("page at {page}");
    }
    Ok(())
}

/// Only root may load the BPF programs; better said now than after a minute of building.
pub fn require_root() -> Result<()> {
    ensure!(sh::is_root(), "the daemon needs root to attach its probes. Remedy: `sudo -E cargo xtask …`");
    Ok(())
}

/// Builds the release binary and returns its path.
pub fn build_reqprof() -> Result<PathBuf> {
    eprintln!("Building reqprof in release mode …");
    crate::run::build(true)
}

fn drive(site: &Site, duration: Option<Duration>, count: Option<u64>) -> Result<Report> {
    load::run(&Plan {
        server: site.addr,
        connections: CONNECTIONS,
        keep_alive: true,
        routes: shop_routes(),
        duration,
        count,
        log: true,
    })
}

/// A mixture as a shop would see it: mostly light pages, a few slow ones.
fn shop_routes() -> Vec<Route> {
    let numbered = |prefix: &str, range: std::ops::Range<u32>| -> Vec<String> {
        range.map(|number| format!("/{prefix}/{number}/")).collect()
    };
    vec![
        Route::get("/", vec!["/".into()], 6),
        Route::get("/products/", vec!["/products/".into(), "/products/?category=garden".into()], 4),
        Route::get("/products/<id>/", numbered("products", 1..200), 5),
        Route::get("/orders/<id>/", numbered("orders", 1..60), 4),
        Route::get("/reports/sales/", vec!["/reports/sales/".into()], 1),
        Route::get("/search/", vec!["/search/?q=lamp+kettle".into(), "/search/?q=quilt".into()], 2),
        Route::get("/healthz", vec!["/healthz".into()], 2),
    ]
}

fn write_client_log(report: &Report, file: &Path) -> Result<()> {
    let mut lines = Vec::new();
    for entry in &report.log {
        let line = json!({
            "method": entry.method, "path": entry.path, "status": entry.status,
            "start_unix_ns": entry.start_unix_ns, "duration_ns": entry.duration_ns,
        });
        writeln!(lines, "{line}")?;
    }
    fs::write(file, lines).with_context(|| format!("cannot write {}", file.display()))
}

struct Daemon {
    service: Service,
    addr: SocketAddr,
}

struct Slowest {
    id: String,
    title: String,
    /// How many requests the daemon has of this request's service.
    recorded: u64,
}

impl Daemon {
    fn start(reqprof: &Path, install: &Install, site: &Site, lifetime: &Lifetime) -> Result<Self> {
        let store = install.home.join("store");
        remove_store(&store)?;
        // The daemon refuses a store that others may read or write.
        DirBuilder::new().mode(0o700).create(&store)?;
        let addr = listen_address()?;
        let mut command = Command::new(reqprof);
        command.arg("daemon").arg("--store").arg(&store).args(["--listen", &addr.to_string()]);
        // By itself it watches every service of the machine; here the shop is to be seen alone, with its workers.
        command.args(["--pid", &site.service.pid().to_string()]);
        let mut service = Service::start("reqprof", command, &install.log("reqprof"), lifetime)?;
        service.wait_for("ready", READY_LIMIT, || is_ready(addr).then_some(()))?;
        Ok(Self { service, addr })
    }

    /// Waits until the daemon has as many requests of the site as the client saw answered, or some of them after
    /// the limit, and names the slowest.
    fn wait_for_slowest(&mut self, site: &Site, answered: u64) -> Result<Slowest> {
        let (addr, workers) = (self.addr, site.workers());
        let complete = self.service.wait_for("done with all requests", SETTLE_LIMIT, || {
            slowest_of(addr, &workers).ok().filter(|slowest| slowest.recorded >= answered)
        });
        let seen = complete.or_else(|_| slowest_of(addr, &workers));
        seen.with_context(|| format!("the daemon's log is {}", self.service.log().display()))
    }

    /// Runs one of reqprof's own commands against the daemon, with its output on ours.
    fn show(&self, reqprof: &Path, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(reqprof);
        command.args(arguments).args(["--url", &format!("http://{}", self.addr)]);
        let status = command.status().with_context(|| format!("cannot run {}", reqprof.display()))?;
        ensure!(status.success(), "reqprof {} failed ({status})", arguments.join(" "));
        Ok(())
    }
}

/// Removes a store of an earlier daemon, but not under one that still writes to it.
pub fn remove_store(store: &Path) -> Result<()> {
    if !store.exists() {
        return Ok(());
    }
    // A daemon holds the lock on this file as long as it lives. It stays ours until the file is gone.
    let lock = File::open(store.join("lock"));
    if let Ok(lock) = &lock
        && let Err(TryLockError::WouldBlock) = lock.try_lock()
    {
        bail!("a daemon is still using {}. Remedy: stop it first", store.display());
    }
    fs::remove_dir_all(store).with_context(|| format!("cannot remove {}", store.display()))
}

/// Whether the daemon at `addr` has attached its probes.
pub fn is_ready(addr: SocketAddr) -> bool {
    client::get(addr, "/-/ready").is_ok_and(|response| response.status == 200)
}

/// Asks the daemon's HTTP interface; anything but 200 and JSON is an error.
pub fn ask(addr: SocketAddr, target: &str) -> Result<Value> {
    let response = client::get(addr, target).with_context(|| format!("GET {target}"))?;
    ensure!(response.status == 200, "GET {target} answered {}", response.status);
    serde_json::from_slice(&response.body).with_context(|| format!("GET {target} answered no JSON"))
}

fn slowest_of(addr: SocketAddr, workers: &[u32]) -> Result<Slowest> {
    let requests = ask(addr, "/api/v1/requests?sort=-duration&limit=100")?;
    let routes = ask(addr, "/api/v1/routes")?;
    pick_slowest(&requests, &routes, workers)
}

/// From the daemon's two lists, the requests slowest first. The site's requests are those of its workers.
fn pick_slowest(requests: &Value, routes: &Value, workers: &[u32]) -> Result<Slowest> {
    let ours =
        |request: &&Value| workers.iter().any(|worker| request["pid"].as_u64() == Some((*worker).into()));
    let requests = requests["requests"].as_array().context("the list of requests is no list")?;
    let Some(slowest) = requests.iter().find(ours) else {
        bail!("reqprof recorded none of the site's requests");
    };
    let text = |key: &str| slowest[key].as_str().unwrap_or("?").to_owned();
    let of_service = |route: &&Value| route["service"] == slowest["service"];
    let recorded = routes["routes"].as_array().map_or(0, |routes| {
        routes.iter().filter(of_service).filter_map(|route| route["count"].as_u64()).sum()
    });
    let milliseconds = slowest["duration_ns"].as_u64().unwrap_or_default() as f64 / 1e6;
    Ok(Slowest {
        id: slowest["id"].as_str().context("a request without an id")?.into(),
        title: format!("{} {} ({milliseconds:.1} ms)", text("method"), text("path")),
        recorded,
    })
}

/// The daemon's usual port, or a free one when something else has it.
fn listen_address() -> Result<SocketAddr> {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT));
    if TcpListener::bind(usual).is_ok() {
        return Ok(usual);
    }
    let other = free_port()?;
    eprintln!("Port {DEFAULT_PORT} is taken; the demo's daemon listens on {} instead.", other.port());
    Ok(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_request_is_the_sites_and_not_the_machines() {
        let request = |id: &str, pid: u32, service: &str| json!({"id": id, "pid": pid, "service": service, "method": "GET", "path": "/x/", "duration_ns": 12_340_000});
        let requests = json!({"requests": [request("r1", 7, "other"), request("r2", 42, "shop"), request("r3", 41, "shop")]});
        let routes = json!({"routes": [
            {"service": "shop", "route": "/", "count": 30},
            {"service": "other", "route": "/", "count": 500},
            {"service": "shop", "route": "/x/", "count": 12},
        ]});
        let slowest = pick_slowest(&requests, &routes, &[41, 42]).unwrap();
        assert_eq!((slowest.id.as_str(), slowest.recorded), ("r2", 42));
        assert_eq!(slowest.title, "GET /x/ (12.3 ms)");
        assert!(pick_slowest(&requests, &routes, &[8]).is_err());
        assert!(pick_slowest(&json!({}), &routes, &[41]).is_err());
    }

    #[test]
    fn a_store_is_not_removed_under_a_daemon() {
        let store = std::env::temp_dir().join(format!("reqprof-demo-store-{}", std::process::id()));
        remove_store(&store).unwrap();
        fs::create_dir_all(&store).unwrap();
        let lock = File::create(store.join("lock")).unwrap();
        lock.lock().unwrap();
        let refusal = remove_store(&store).unwrap_err().to_string();
        assert!(refusal.contains("still using") && store.join("lock").exists(), "{refusal}");
        drop(lock);
        remove_store(&store).unwrap();
        assert!(!store.exists());
    }
}
