//! Against an application that knows the truth: every request is recorded once and rightly, its time lies between what
//! the handler and what the client measured, and its call tree is what the interpreter's own tables allow.
//!
//! Nothing here is a tolerance for noise but where said: counts are exact.

mod support;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde_json::Value;
use support::http::{Client, Exchange};
use support::load::{self, BURNERS};
use support::tree::{self, Oracle};
use support::{Daemon, Gunicorn, Python};

/// The clocks of client and daemon are the same, but the daemon's last look may be a moment after the client's.
const SLACK_NS: u64 = 1_000_000;

/// The functions of the application that may be on the stack of a route's request, outermost first. A stack holds
/// these from the first on, down to where the sample was taken.
fn chain(route: &str) -> Vec<&'static str> {
    let own: &[&str] = match route {
        "a" => &["burn_a", "burn_a_middle", "burn_a_leaf"],
        "b" => &[
            "burn_b",
            "burn_b_middle",
            "burn_b_middle.<locals>.<genexpr>",
            "burn_b_leaf",
            "burn_b_leaf.<locals>.<listcomp>",
        ],
        "c" => &["burn_c", "burn_c_middle", "burn_c_leaf"],
        "d" => &[
            "burn_d",
            "BurnD.middle",
            "BurnD.middle.<locals>.leaf",
            "BurnD.middle.<locals>.leaf.<locals>.<dictcomp>",
        ],
        "z" => &["burn_z", "burn_z_middle", "burn_z_leaf"],
        other => panic!("no route {other}"),
    };
    ["application", "burn"].iter().chain(own).copied().collect()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is no number in {value:#}"))
}

fn route_of(path: &str) -> &str {
    path.split('/').nth(1).unwrap_or_default()
}

/// The record says what the client knows.
#[track_caller]
fn check_record(record: &Value, exchange: &Exchange) {
    let about = format!("{record:#}\n{exchange:?}");
    assert_eq!(record["method"], exchange.method, "{about}");
    assert_eq!(record["path"], exchange.path(), "{about}");
    assert_eq!(record["status"], exchange.status, "{about}");
    assert_eq!(record["outcome"], "complete", "{about}");
    assert_eq!(record["attribution"], "thread", "{about}");
    assert_eq!(record["lost_events"], 0, "{about}");
    assert_eq!(number(record, "pid"), exchange.number("x-pid"), "{about}");
    assert_eq!(number(record, "request_bytes"), exchange.sent, "{about}");
    assert_eq!(number(record, "response_bytes"), exchange.received, "{about}");
    let duration = number(record, "duration_ns");
    assert!(duration >= exchange.number("x-handler-ns"), "shorter than the handler: {about}");
    assert!(number(record, "ttfb_ns") <= duration, "{about}");
    for unknown in ["on_cpu_ns", "runqueue_ns", "off_cpu_ns", "trace_id"] {
        assert!(record[unknown].is_null(), "{unknown} was invented: {about}");
    }
}

/// No request lasts longer than the client saw, also where the client that the last write woke took the server's CPU.
#[track_caller]
fn check_durations(records: &HashMap<String, Value>, exchanges: &[Exchange]) {
    let excess: Vec<(&str, u64)> = exchanges
        .iter()
        .map(|e| {
            let duration = number(&records[e.path()], "duration_ns");
            (e.path(), duration.saturating_sub(e.end - e.start + SLACK_NS))
        })
        .filter(|(_, excess)| *excess > 0)
        .collect();
    assert!(excess.is_empty(), "of {} requests these seem longer, in ns: {excess:?}", exchanges.len());
}

/// What the trees of a route's requests added up to.
#[derive(Default, Debug)]
struct Burned {
    requests: u64,
    samples: u64,
    /// With the route's own function on the stack.
    burning: u64,
    burning_ns: u64,
    /// By the application's own clock.
    handler_cpu_ns: u64,
    /// In libz, below the leaf.
    libz: u64,
}

/// The tree holds this route's functions only, nested as they are called, on lines that they have.
fn check_tree(tree: &Value, oracle: &Oracle, route: &str, sums: &mut Burned) {
    let chain = chain(route);
    tree::walk(tree, &mut |ancestors, node| {
        if node["kind"] == "native" {
            let leaf = ancestors.iter().any(|a| oracle.owns(a) && a["name"] == "burn_z_leaf");
            let outermost = !ancestors.iter().any(|a| in_libz(a));
            if leaf && outermost && in_libz(node) {
                sums.libz += number(node, "samples");
            }
        }
        if !oracle.owns(node) {
            return;
        }
        oracle.check(node);
        let mut names: Vec<&str> =
            ancestors.iter().filter(|a| oracle.owns(a)).filter_map(|a| a["name"].as_str()).collect();
        names.push(node["name"].as_str().unwrap_or_default());
        assert!(chain.starts_with(&names), "{route}: {names:?} is not how it calls {chain:?}: {tree:#}");
        if names.last() == chain.get(2) {
            sums.burning += number(node, "samples");
            sums.burning_ns += number(node, "total_ns");
        }
    });
}

fn in_libz(node: &Value) -> bool {
    node["kind"] == "native" && node["file"].as_str().is_some_and(|file| file.contains("libz"))
}

/// Nothing was lost on the way, and no sample was left over that was taken inside a handler.
fn check_status(status: &Value, burning: u64) {
    for (place, count) in status["lost"].as_object().expect("an object") {
        assert_eq!(count, 0, "lost at {place}: {status:#}");
    }
    let unattributed = &status["samples"]["unattributed"];
    let left_over: u64 =
        ["unknown_request", "interleaved", "revoked"].iter().map(|reason| number(unattributed, reason)).sum();
    assert!(left_over * 1000 <= burning, "{left_over} unattributed of {burning}: {status:#}");
}

/// Runs the load against a server and compares.
fn compare(name: &str, python: &Python, server_arguments: &[&str], time: Duration) {
    let server = Gunicorn::start(python, 4, server_arguments);
    let oracle = Oracle::ask(python);
    let daemon = Daemon::start(&["--pid", &server.master().to_string(), "--freq", "999"]);
    let exchanges = load::burn(server.port, 8, time);
    assert!(exchanges.iter().all(|exchange| exchange.status == 200));
    let records = daemon.records_by_path("", exchanges.len());
    let status = daemon.status();

    // The routes as the daemon counts them, against the client's books.
    let routes = daemon.json("/api/v1/routes");
    let counted: BTreeMap<String, u64> = routes["routes"]
        .as_array()
        .expect("an array")
        .iter()
        .map(|route| (route["route"].as_str().unwrap_or_default().to_owned(), number(route, "count")))
        .collect();
    assert_eq!(counted, load::per_route(&exchanges));
    assert_eq!(records.len(), exchanges.len());
    check_durations(&records, &exchanges);

    let mut sums: BTreeMap<&str, Burned> = BTreeMap::new();
    let mut client = Client::new(daemon.port);
    for exchange in &exchanges {
        let record = &records[exchange.path()];
        check_record(record, exchange);
        let route = route_of(exchange.path());
        let sum = sums.entry(route).or_default();
        sum.requests += 1;
        sum.samples += number(record, "samples");
        sum.handler_cpu_ns += exchange.number("x-cpu-ns");
        if record["profile"] == true {
            let id = record["id"].as_str().unwrap_or_default();
            let target = format!("/api/v1/requests/{id}/profile?format=tree&view=cpu");
            let answer = client.request("GET", &target, b"").expect("the profile");
            assert_eq!(answer.status, 200, "{}", answer.text());
            let tree = answer.json();
            assert_eq!(number(&tree, "samples"), number(record, "samples"));
            check_tree(&tree, &oracle, route, sum);
        }
    }
    println!("{name}: {} requests\n{sums:#?}\n{status:#}", exchanges.len());
    assert_eq!(sums.keys().copied().collect::<Vec<_>>(), BURNERS);
    for (route, sum) in &sums {
        // An estimate by sampling, held against the application's own clock: if samples of a handler went missing on a
        // large scale, uncounted, it would show here. A quarter is beyond the noise of some hundred samples.
        let ratio = sum.burning_ns as f64 / sum.handler_cpu_ns as f64;
        assert!((0.75..1.25).contains(&ratio), "{route}: {ratio}: {sum:?}");
    }
    check_status(&status, sums.values().map(|sum| sum.burning).sum());
    let z = &sums["z"];
    assert!(z.libz * 10 > z.burning * 9, "zlib's own time is in libz: {z:?}");
}

/// Each request on a connection of its own: gunicorn's sync workers close after every response.
const SYNC: &[&str] = &[];
/// Connections are kept, and the threads of a worker take turns with them.
const THREADS: &[&str] = &["--worker-class", "gthread", "--threads", "2", "--keep-alive", "30"];

fn run(name: &str, python: impl Fn() -> Result<Python, String>, arguments: &[&str], seconds: u64) {
    if support::can_run(name) {
        match python() {
            Ok(python) => compare(name, &python, arguments, Duration::from_secs(seconds)),
            Err(reason) => support::skip::skip(name, reason),
        }
    }
}

#[test]
fn sync_workers_of_debians_python() {
    run("sync_workers_of_debians_python", Python::debian, SYNC, 30);
}

#[test]
fn sync_workers_of_pyenvs_python() {
    run("sync_workers_of_pyenvs_python", Python::pyenv, SYNC, 8);
}

#[test]
fn kept_connections_of_debians_python() {
    run("kept_connections_of_debians_python", Python::debian, THREADS, 8);
}

#[test]
fn kept_connections_of_pyenvs_python() {
    run("kept_connections_of_pyenvs_python", Python::pyenv, THREADS, 8);
}

/// Bodies, none, chunks, and an end by closing: every byte is counted, and the next request is not disturbed.
fn corner_cases(server: &Gunicorn) -> Vec<Exchange> {
    let mut client = Client::new(server.port);
    let body: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
    let chunked = b"POST /echo/2 HTTP/1.1\r\nHost: truth\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n6;an=extension\r\n world\r\n0\r\nA-Trailer: 1\r\n\r\n";
    let no_keep_alive = b"GET /chunked/9?n=5 HTTP/1.0\r\nHost: truth\r\n\r\n";
    let mut request = |method: &str, target: &str, body: &[u8]| {
        client.request(method, target, body).unwrap_or_else(|e| panic!("{method} {target}: {e}"))
    };
    let mut done = vec![
        request("POST", "/echo/1", &body),
        request("GET", "/missing/3", b""),
        request("GET", "/empty/4", b""),
        request("HEAD", "/a/5", b""),
        request("GET", "/chunked/6?n=100", b""),
        request("GET", "/large/7", b""),
        request("GET", "/sleep/8?ms=50", b""),
        request("PUT", "/b/10?a=1&b=2", b"x"),
        request("DELETE", "/c/11", b""),
    ];
    done.push(client.send("POST", "/echo/2", chunked).expect("an answer to chunks"));
    done.push(client.send("GET", "/chunked/9?n=5", no_keep_alive).expect("an answer to HTTP/1.0"));
    let statuses: Vec<u16> = done.iter().map(|exchange| exchange.status).collect();
    assert_eq!(statuses, [200, 404, 204, 200, 200, 200, 200, 200, 200, 200, 200]);
    assert!(done[0].text().starts_with("200000 "));
    assert!(done[9].text().starts_with("11 "));
    assert_eq!(done[5].body.len(), 1 << 20);
    done
}

#[test]
fn every_byte_of_every_kind_of_message_is_counted() {
    let name = "every_byte_of_every_kind_of_message_is_counted";
    let Some(python) = support::any_python(name) else { return };
    for arguments in [SYNC, THREADS] {
        let server = Gunicorn::start(&python, 1, arguments);
        let daemon = Daemon::start(&["--pid", &server.master().to_string()]);
        let exchanges = corner_cases(&server);
        let records = daemon.records_by_path("", exchanges.len());
        assert_eq!(records.len(), exchanges.len());
        for exchange in &exchanges {
            check_record(&records[exchange.path()], exchange);
        }
        check_durations(&records, &exchanges);
        assert!(number(&records["/sleep/8"], "duration_ns") >= 50_000_000);
        check_status(&daemon.status(), 0);
    }
}
