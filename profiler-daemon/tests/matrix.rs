//! Servers and frameworks as people run them: each request once, and its CPU time its own or nobody's.
//!
//! Oracles: the client's log, and CPU time that each request burns, and measures, in a function that no other has.

mod support;

use std::collections::{BTreeMap, HashSet};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::http::{Client, Exchange};
use support::process::{Group, free_port};
use support::{Daemon, Python, skip, wait_for};

const CLIENTS: usize = 10;
const ROUNDS: usize = 20;
const ROUTES: [&str; 2] = ["wait", "burn"];
/// Of the CPU time that was burned so much is seen at least; samples are a measurement.
const SEEN: f64 = 0.95;

/// A way to serve.
struct Cell {
    /// Arguments of the interpreter; `PORT` and `ADDRESS` are replaced.
    run: &'static [&'static str],
    /// What every request has for `attribution`.
    attribution: &'static str,
    routes: &'static [&'static str],
}

macro_rules! cells {
    ($($name:ident: $run:expr => $attribution:literal, $routes:expr;)*) => { $(
        #[test]
        fn $name() {
            check(stringify!($name), &Cell { run: &$run, attribution: $attribution, routes: &$routes });
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
    // One task serves a connection, so no context is made for a request.
    aiohttp: ["with_aiohttp.py", "PORT"] => "none", ROUTES;
    hypercorn_fastapi: ["-m", "hypercorn", "-b", "ADDRESS", "with_fastapi:app"] => "none", ROUTES;
    // Greenlets share contexts, and waitress reads and works in different threads.
    gunicorn_gevent_flask: ["-m", "gunicorn", "-k", "gevent", "-b", "ADDRESS", "with_flask:app"] => "none", ROUTES;
    waitress_flask: ["-m", "waitress", "--listen", "ADDRESS", "--threads", "8", "with_flask:app"] => "none", ROUTES;
}

fn start(python: &Python, cell: &Cell) -> (u16, Group) {
    let port = free_port();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/matrix");
    let mut command = Command::new(&python.program);
    for argument in cell.run {
        match *argument {
            "PORT" => command.arg(port.to_string()),
            "ADDRESS" => command.arg(format!("127.0.0.1:{port}")),
            other => command.arg(other),
        };
    }
    // The folder is part of the sources.
    command.current_dir(&folder).env("PYTHONPATH", &folder).env("PYTHONDONTWRITEBYTECODE", "1");
    let group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    (port, group)
}

fn load(port: u16, routes: &[&str]) -> Vec<Exchange> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                scope.spawn(move || {
                    let mut connection = Client::new(port);
                    let ask = |round: usize| {
                        let route = routes[(round + client) % routes.len()];
                        let target = format!("/{route}/{}", client * ROUNDS + round);
                        // Large enough that a loop stops reading, and goes on in the request's own context.
                        let body = vec![b'x'; if round % 5 == 1 { 200_000 } else { 0 }];
                        let method = if body.is_empty() { "GET" } else { "POST" };
                        let answer = connection.request(method, &target, &body);
                        answer.unwrap_or_else(|e| panic!("{target}: {e}"))
                    };
                    (0..ROUNDS).map(ask).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("answers")).collect()
    })
}

fn check(name: &str, cell: &Cell) {
    if !support::can_run(name) {
        return;
    }
    let python = match Python::debian().or_else(|_| Python::pyenv()) {
        Ok(python) => python,
        Err(reason) => return skip(name, reason),
    };
    let (port, group) = start(&python, cell);
    // It answers when all that it needs is loaded.
    Client::new(port).request("GET", &format!("/{}/1000000", cell.routes[0]), b"").expect("an answer");
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
    if cell.attribution == "context" {
        wait_for("the probes on contexts", || {
            let detail = daemon.status()["probes"]["contexts of event loops"]["detail"].clone();
            detail.as_str()?.starts_with("in 1 processes").then_some(())
        });
    }
    let done = load(port, cell.routes);
    assert!(done.iter().all(|exchange| exchange.status == 200));
    daemon.recorded_exactly(&done);
    let records = daemon.records_by_path("", done.len());
    let mut sums = BTreeMap::<&str, (u64, u64)>::new();
    for exchange in &done {
        let record = &records[exchange.path()];
        assert_eq!(record["attribution"], cell.attribution, "{record:#}");
        let (route, number) = exchange.path()[1..].split_once('/').expect("two parts");
        let (burned, seen) = sums.entry(route).or_default();
        *burned += exchange.number("x-burned-ns");
        if record["profile"] != true {
            continue;
        }
        let id = record["id"].as_str().expect("an id");
        let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded&view=cpu")).text();
        for line in stacks.lines() {
            let (stack, micros) = line.rsplit_once(' ').expect("a stack and its time");
            let names: HashSet<&str> = stack.split(';').filter_map(|frame| frame.split(' ').next()).collect();
            let mut owners = names.iter().filter_map(|name| name.strip_prefix("own_"));
            assert!(owners.all(|of| of == number), "another request's time: {record:#}\n{line}");
            if names.contains(&*format!("own_{number}")) {
                *seen += micros.parse::<u64>().expect("a time") * 1000;
            }
        }
    }
    for (route, (burned, seen)) in &sums {
        let share = *seen as f64 / *burned as f64;
        println!("{name}: /{route}: {seen} ns seen of {burned}: {share:.3}");
        match cell.attribution {
            "none" => assert_eq!(*seen, 0, "{name}: /{route}"),
            _ => assert!(share >= SEEN, "{name}: /{route}: {seen} ns of {burned} were seen"),
        }
    }
}
