//! Servers and frameworks as people run them: each request once, and its CPU time its own or nobody's.
//!
//! Oracles: the client's log, and CPU time that each request burns, and measures, in a function that no other has.

mod support;

use std::collections::HashMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::burned;
use support::http::Client;
use support::process::{Group, free_port};
use support::tls::{self, Certificate};
use support::{Daemon, Python, skip, wait_for};

const CLIENTS: usize = 10;
const ROUNDS: usize = 20;
const ROUTES: [&str; 2] = ["wait", "burn"];

/// A way to serve.
struct Cell {
    /// Arguments of the interpreter; `PORT` and `ADDRESS` are replaced.
    run: &'static [&'static str],
    /// What every request has for `attribution`.
    attribution: &'static str,
    routes: &'static [&'static str],
    /// It ends TLS itself.
    tls: bool,
}

macro_rules! cells {
    ($($name:ident: $run:expr => $attribution:literal, $routes:expr $(, $tls:ident)?;)*) => { $(
        #[test]
        fn $name() {
            let tls = matches!(stringify!($($tls)?), "tls");
            check(stringify!($name), &Cell { run: &$run, attribution: $attribution, routes: &$routes, tls });
        }
    )* };
}
cells! {
    gunicorn_sync_django: ["-m", "gunicorn", "-w", "2", "-b", "ADDRESS", "with_django:wsgi"] => "thread", ["burn"];
    gunicorn_gthread_django: ["-m", "gunicorn", "-k", "gthread", "--threads", "8", "-b", "ADDRESS", "with_django:wsgi"] => "thread", ["burn"];
    gunicorn_gthread_flask: ["-m", "gunicorn", "-k", "gthread", "--threads", "8", "-b", "ADDRESS", "with_flask:app"] => "thread", ROUTES;
    uvicorn_asyncio_fastapi: ["-m", "uvicorn", "--loop", "asyncio", "--http", "h11", "--port", "PORT", "with_fastapi:app"] => "context", ROUTES;
    uvicorn_uvloop_fastapi: ["-m", "uvicorn", "--loop", "uvloop", "--http", "httptools", "--port", "PORT", "with_fastapi:app"] => "context", ROUTES;
    uvicorn_asyncio_django: ["-m", "uvicorn", "--loop", "asyncio", "--http", "httptools", "--port", "PORT", "with_django:asgi"] => "context", ROUTES;
    uvicorn_uvloop_django: ["-m", "uvicorn", "--loop", "uvloop", "--http", "h11", "--port", "PORT", "with_django:asgi"] => "context", ROUTES;
    gunicorn_sync_flask_tls: ["-m", "gunicorn", "-w", "2", "-b", "ADDRESS", "--certfile", "CERT", "--keyfile", "KEY", "with_flask:app"] => "thread", ["burn"], tls;
    gunicorn_gthread_django_tls: ["-m", "gunicorn", "-k", "gthread", "--threads", "8", "-b", "ADDRESS", "--certfile", "CERT", "--keyfile", "KEY", "with_django:wsgi"] => "thread", ["burn"], tls;
    uvicorn_asyncio_fastapi_tls: ["-m", "uvicorn", "--loop", "asyncio", "--http", "h11", "--port", "PORT", "--ssl-certfile", "CERT", "--ssl-keyfile", "KEY", "with_fastapi:app"] => "context", ROUTES, tls;
    uvicorn_uvloop_fastapi_tls: ["-m", "uvicorn", "--loop", "uvloop", "--http", "httptools", "--port", "PORT", "--ssl-certfile", "CERT", "--ssl-keyfile", "KEY", "with_fastapi:app"] => "context", ROUTES, tls;
    hypercorn_fastapi_tls: ["-m", "hypercorn", "-b", "ADDRESS", "--certfile", "CERT", "--keyfile", "KEY", "with_fastapi:app"] => "none", ROUTES, tls;
    // One task serves a connection, so no context is made for a request.
    aiohttp: ["with_aiohttp.py", "PORT"] => "none", ROUTES;
    hypercorn_fastapi: ["-m", "hypercorn", "-b", "ADDRESS", "with_fastapi:app"] => "none", ROUTES;
    // Greenlets share contexts, and waitress reads and works in different threads.
    gunicorn_gevent_flask: ["-m", "gunicorn", "-k", "gevent", "-b", "ADDRESS", "with_flask:app"] => "none", ROUTES;
    waitress_flask: ["-m", "waitress", "--listen", "ADDRESS", "--threads", "8", "with_flask:app"] => "none", ROUTES;
}

/// An interpreter that finds the applications.
fn beside_the_applications(python: &Python) -> Command {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/matrix");
    let path = std::env::join_paths([&folder, folder.parent().expect("a folder")]).expect("a path");
    let mut command = Command::new(&python.program);
    // The folder is part of the sources.
    command.current_dir(&folder).env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn start(python: &Python, cell: &Cell, files: &Certificate) -> (u16, Group) {
    let port = free_port();
    let mut command = beside_the_applications(python);
    for argument in cell.run {
        match *argument {
            "PORT" => command.arg(port.to_string()),
            "ADDRESS" => command.arg(format!("127.0.0.1:{port}")),
            "CERT" => command.arg(&files.certificate),
            "KEY" => command.arg(&files.key),
            other => command.arg(other),
        };
    }
    let group = Group::spawn(&mut command);
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    (port, group)
}

fn check(name: &str, cell: &Cell) {
    let Some(python) = support::any_python(name) else { return };
    let folder = tempfile::tempdir().expect("a directory");
    let (files, trust) = tls::certificate(folder.path());
    let trust = cell.tls.then_some(trust);
    let (port, group) = start(&python, cell, &files);
    // It answers when all that it needs is loaded.
    let mut first = Client::trusting(port, trust.clone());
    first.request("GET", &format!("/{}/1000000", cell.routes[0]), b"").expect("an answer");
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
    if cell.attribution == "context" {
        wait_for("the probes on contexts", || {
            let detail = daemon.status()["probes"]["contexts of event loops"]["detail"].clone();
            detail.as_str()?.starts_with("in 1 processes").then_some(())
        });
    }
    // Bodies so large that a loop stops reading, and goes on in the request's own context.
    let body = |round: usize| vec![b'x'; if round % 5 == 1 { 200_000 } else { 0 }];
    let done = burned::load(port, trust, (CLIENTS, ROUNDS), cell.routes, body);
    assert!(done.iter().all(|exchange| exchange.status == 200));
    daemon.recorded_exactly(&done);
    let records = daemon.records_by_path("", done.len());
    let boundary = if cell.tls { "tls" } else { "uprobe" };
    assert!(records.values().all(|record| record["boundary"] == boundary), "{name}: {records:?}");
    let sums = burned::seen(&daemon, &records, &done, cell.attribution, &[]);
    match cell.attribution {
        "none" => assert!(sums.values().all(|(_, seen)| *seen == 0), "{name}: {sums:?}"),
        _ => burned::nearly_all(name, &sums),
    }
}

/// Debian's nginx in front, which speaks to gunicorn over a unix socket. Each of them serves each request once, and its
/// waits for the other are no work for anybody.
#[test]
fn nginx_in_front_of_gunicorn() {
    behind_nginx("nginx_in_front_of_gunicorn", false);
}

/// The same where nginx ends TLS.
#[test]
fn nginx_with_tls_in_front_of_gunicorn() {
    behind_nginx("nginx_with_tls_in_front_of_gunicorn", true);
}

fn behind_nginx(name: &str, tls: bool) {
    let Some(python) = support::any_python(name) else { return };
    let folder = tempfile::tempdir().expect("a directory");
    let at = |name: &str| folder.path().join(name);
    let (files, trust) = tls::certificate(folder.path());
    let trust = tls.then_some(trust);
    let ends_tls = format!(
        "ssl_certificate {}; ssl_certificate_key {};",
        files.certificate.display(),
        files.key.display()
    );
    let (ssl, ends_tls) = if tls { (" ssl", ends_tls.as_str()) } else { ("", "") };
    let (socket, config, port) = (at("gunicorn.sock"), at("nginx.conf"), free_port());
    let text = format!(
        "daemon off; worker_processes 1; pid {pid}; error_log {log};\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; client_max_body_size 10m; client_body_temp_path {body}; proxy_temp_path {proxy};\n\
         fastcgi_temp_path {other}; uwsgi_temp_path {other}; scgi_temp_path {other};\n\
         server {{ listen 127.0.0.1:{port}{ssl}; {ends_tls} location / {{ proxy_pass http://unix:{socket}; }} }} }}\n",
        pid = at("pid").display(),
        log = at("error.log").display(),
        body = at("body").display(),
        proxy = at("proxy").display(),
        other = at("other").display(),
        socket = socket.display(),
    );
    std::fs::write(&config, text).expect("a file");
    let mut behind = beside_the_applications(&python);
    let bind = format!("unix:{}", socket.display());
    behind.args(["-m", "gunicorn", "-k", "gthread", "--threads", "8", "-b", &bind, "with_flask:app"]);
    let behind = Group::spawn(&mut behind);
    wait_for("gunicorn to listen", || std::os::unix::net::UnixStream::connect(&socket).ok());
    let mut front = Command::new("nginx");
    front.arg("-c").arg(&config).stdin(Stdio::null()).stderr(Stdio::null());
    if let Err(error) = Command::new("nginx").arg("-v").stderr(Stdio::null()).status() {
        return skip(name, format!("no nginx: {error}"));
    }
    let front = Group::spawn(&mut front);
    wait_for("nginx to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    Client::trusting(port, trust.clone()).request("GET", "/burn/1000000", b"").expect("an answer");
    let pids = [front.pid().to_string(), behind.pid().to_string()];
    let daemon = Daemon::start(&["--pid", &pids[0], "--pid", &pids[1], "--freq", "999"]);
    let body = |round: usize| vec![b'x'; if round % 5 == 1 { 200_000 } else { 0 }];
    let done = burned::load(port, trust, (CLIENTS, ROUNDS), &["burn"], body);
    assert!(done.iter().all(|exchange| exchange.status == 200));
    let all = wait_for("all of both", || {
        Some(daemon.records("")).filter(|records| records.len() >= 2 * done.len())
    });
    let (of_front, of_behind): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|record| record["service"] == "nginx");
    let by_path = |records: Vec<serde_json::Value>| {
        let count = records.len();
        let path = |record: &serde_json::Value| record["path"].as_str().expect("a path").to_owned();
        let by_path: HashMap<_, _> = records.into_iter().map(|record| (path(&record), record)).collect();
        assert_eq!((by_path.len(), count), (done.len(), done.len()), "each once");
        by_path
    };
    let (of_front, of_behind) = (by_path(of_front), by_path(of_behind));
    for exchange in &done {
        let record = &of_front[exchange.path()];
        let bytes = (record["request_bytes"].as_u64(), record["response_bytes"].as_u64());
        assert_eq!(bytes, (Some(exchange.sent), Some(exchange.received)), "{record:#}");
        assert_eq!((&record["status"], &record["attribution"]), (&200.into(), &"none".into()), "{record:#}");
        assert_eq!(record["boundary"], if tls { "tls" } else { "uprobe" }, "{record:#}");
    }
    burned::nearly_all(name, &burned::seen(&daemon, &of_behind, &done, "thread", &[]));
}

/// One thread runs all JavaScript. A request whose work is done in one go may have its samples; whatever waits has none.
#[test]
fn node_http() {
    const NAME: &str = "node_http";
    if !support::can_run(NAME) {
        return;
    }
    if let Err(error) = Command::new("node").arg("--version").stdout(Stdio::null()).status() {
        return skip(NAME, format!("no node: {error}"));
    }
    let port = free_port();
    let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/matrix/with_node.js");
    let mut command = Command::new("node");
    // So that functions have names in `/tmp/perf-PID.map`.
    command.args(["--perf-basic-prof", "--interpreted-frames-native-stack"]).arg(app).arg(port.to_string());
    let folder = tempfile::tempdir().expect("a directory");
    command.current_dir(folder.path()); // V8 leaves a log there
    let group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()));
    let _names = Removed(PathBuf::from(format!("/tmp/perf-{}.map", group.pid())));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
    // While it does one thing after the other, its thread tells. That it is a loop shows when it waits within a request.
    let mut client = Client::new(port);
    const ALONE: usize = 20;
    let mut done: Vec<_> = (0..ALONE)
        .map(|n| client.request("GET", &format!("/burn/{}", 1000 + n), b"").expect("an answer"))
        .collect();
    let body = |round: usize| vec![b'x'; if round % 5 == 1 { 200_000 } else { 0 }];
    done.extend(burned::load(port, None, (CLIENTS, ROUNDS), &ROUTES, body));
    assert!(done.iter().all(|exchange| exchange.status == 200));
    daemon.recorded_exactly(&done);
    let mut named = 0;
    let records = daemon.records_by_path("", done.len());
    for (path, record) in &records {
        let number = path.rsplit('/').next().expect("a number");
        let id = record["id"].as_str().expect("an id");
        if record["profile"] != true {
            continue;
        }
        assert!(path.starts_with("/burn/"), "what waits: {record:#}");
        let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded&view=cpu")).text();
        // `JS:~own_7 …`: interpreted; `*`, `^`, `+`: compiled.
        let own = stacks.split(['~', '*', '^', '+']).filter_map(|rest| rest.strip_prefix("own_"));
        let owners: Vec<&str> =
            own.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default()).collect();
        assert!(owners.iter().all(|owner| *owner == number), "another request's time: {record:#}\n{stacks}");
        named += usize::from(!owners.is_empty());
    }
    // V8 moves code without a word in its map, so many have lost their names.
    assert!(named > 0, "no profile has a function of its own");
    let alone = done[..ALONE].iter().map(|exchange| &records[exchange.path()]);
    let samples = alone.map(|record| {
        assert_eq!(record["attribution"], "thread", "{record:#}");
        record["samples"].as_u64().expect("a number")
    });
    // 10 ms each at 999 Hz, by a clock that goes on while others have the CPU.
    let samples = samples.sum::<u64>();
    assert!(samples as usize >= ALONE * 5, "{samples} samples of {ALONE} requests");
}

/// A file that goes when the test is over.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It may never have come to be.
        let _ = std::fs::remove_file(&self.0);
    }
}
