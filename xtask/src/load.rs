//! A bounded HTTP load generator: a plan goes in (server, connections, weighted routes, when to stop), exact counts
//! and latencies per route come out, and on request a log of every single request.
//!
//! It is closed-loop: each connection sends its next request when the last one is answered, so it never asks for
//! more than the server can do and the server is never idle. Only loopback is allowed: it is made for servers that
//! xtask started itself.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use client::Client;

pub mod client;

/// Keeps the latencies of one run below 80 MB, whatever the plan says.
const MAX_REQUESTS: u64 = 10_000_000;
/// A response may take this long before it counts as failed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// One kind of request. Its paths are taken in turn, and it gets `weight` shares of all requests.
#[derive(Clone)]
pub struct Route {
    pub name: String,
    pub method: String,
    pub paths: Vec<String>,
    pub weight: u32,
}

impl Route {
    pub fn get(name: &str, paths: Vec<String>, weight: u32) -> Self {
        Self { name: name.into(), method: "GET".into(), paths, weight }
    }
}

pub struct Plan {
    pub server: SocketAddr,
    pub connections: usize,
    pub keep_alive: bool,
    pub routes: Vec<Route>,
    /// No request starts after this long.
    pub duration: Option<Duration>,
    /// No more than this many requests start.
    pub count: Option<u64>,
    /// Keep one [`Entry`] per request.
    pub log: bool,
}

#[derive(Default)]
pub struct Report {
    /// From the first request's start to the last one's end.
    pub elapsed: Duration,
    pub routes: BTreeMap<String, RouteReport>,
    /// Why the first failed request failed.
    pub first_error: Option<String>,
    pub log: Vec<Entry>,
}

#[derive(Default)]
pub struct RouteReport {
    /// Answered requests by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Requests without a complete answer.
    pub failed: u64,
    /// Of the answered requests, in nanoseconds, ascending.
    pub latencies_ns: Vec<u64>,
}

/// A request as the client saw it.
pub struct Entry {
    pub method: String,
    pub path: String,
    /// `None`: no complete answer.
    pub status: Option<u16>,
    pub start_unix_ns: u64,
    pub duration_ns: u64,
}

impl Report {
    /// Requests that got a complete answer.
    pub fn answered(&self) -> u64 {
        self.routes.values().map(RouteReport::answered).sum()
    }

    /// Complete answers with a status of 400 and above, and requests without an answer.
    pub fn failures(&self) -> u64 {
        let bad = |route: &RouteReport| route.statuses.range(400..).map(|(_, count)| count).sum::<u64>();
        self.routes.values().map(|route| route.failed + bad(route)).sum()
    }

    /// A table for people: one line per route.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<22}{:>9}{:>8}{:>10}{:>10}{:>10}  status\n",
            "route", "requests", "failed", "p50 ms", "p95 ms", "p99 ms"
        );
        for (name, route) in &self.routes {
            let ms = |percent| {
                percentile(&route.latencies_ns, percent)
                    .map_or("-".into(), |ns| format!("{:.1}", ns as f64 / 1e6))
            };
            let statuses: Vec<String> =
                route.statuses.iter().map(|(status, count)| format!("{status}×{count}")).collect();
            let (answered, failed) = (route.answered(), route.failed);
            let (p50, p95, p99) = (ms(50.0), ms(95.0), ms(99.0));
            writeln!(
                text,
                "{name:<22}{answered:>9}{failed:>8}{p50:>10}{p95:>10}{p99:>10}  {}",
                statuses.join(" ")
            )
            .expect("writing to a string cannot fail");
        }
        text
    }

    fn merge(&mut self, other: Report) {
        for (name, theirs) in other.routes {
            let ours = self.routes.entry(name).or_default();
            ours.failed += theirs.failed;
            ours.latencies_ns.extend(theirs.latencies_ns);
            for (status, count) in theirs.statuses {
                *ours.statuses.entry(status).or_default() += count;
            }
        }
        self.first_error = self.first_error.take().or(other.first_error);
        self.log.extend(other.log);
    }
}

impl RouteReport {
    pub fn answered(&self) -> u64 {
        self.statuses.values().sum()
    }
}

/// Nearest rank: the smallest value that at least `percent` of all values do not exceed. `None` of no values.
pub fn percentile(ascending: &[u64], percent: f64) -> Option<u64> {
    let rank = (ascending.len() as f64 * percent / 100.0).ceil() as usize;
    ascending.get(rank.max(1) - 1).copied()
}

/// Drives the load and returns when every request that was started has ended.
pub fn run(plan: &Plan) -> Result<Report> {
    ensure!(
        plan.server.ip().is_loopback(),
        "the load generator only talks to loopback, not to {}",
        plan.server
    );
    ensure!(plan.duration.is_some() || plan.count.is_some(), "a load without an end");
    ensure!(plan.connections > 0, "a load needs at least one connection");
    ensure!(plan.routes.iter().all(|route| !route.paths.is_empty()), "a route without a path");
    let schedule = schedule(&plan.routes);
    ensure!(!schedule.is_empty(), "a load needs at least one route with a weight");

    let tickets = AtomicU64::new(0);
    let merged = Mutex::new(Report::default());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..plan.connections {
            scope.spawn(|| {
                let report = drive(plan, &schedule, &tickets, started);
                merged.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).merge(report);
            });
        }
    });
    let mut report = merged.into_inner().ok().context("a load thread panicked")?;
    report.elapsed = started.elapsed();
    for route in report.routes.values_mut() {
        route.latencies_ns.sort_unstable();
    }
    report.log.sort_by_key(|entry| entry.start_unix_ns);
    Ok(report)
}

/// One connection's requests, from tickets that all connections draw from one counter: which requests are sent,
/// in which order, does not depend on who is faster.
fn drive(plan: &Plan, schedule: &[(usize, usize)], tickets: &AtomicU64, started: Instant) -> Report {
    let mut client = Client::new(plan.server, plan.keep_alive, TIMEOUT);
    let mut report = Report::default();
    let limit = plan.count.unwrap_or(MAX_REQUESTS).min(MAX_REQUESTS);
    while plan.duration.is_none_or(|duration| started.elapsed() < duration) {
        let ticket = tickets.fetch_add(1, Ordering::Relaxed);
        if ticket >= limit {
            break;
        }
        let (round, place) = (ticket as usize / schedule.len(), ticket as usize % schedule.len());
        let (chosen, turn) = schedule[place];
        let route = &plan.routes[chosen];
        let path = &route.paths[(round * route.weight as usize + turn) % route.paths.len()];

        let start_unix_ns =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let begun = Instant::now();
        let outcome = client.send(&route.method, path);
        let duration_ns = begun.elapsed().as_nanos() as u64;

        let counts = report.routes.entry(route.name.clone()).or_default();
        let status = match outcome {
            Ok(response) => {
                counts.latencies_ns.push(duration_ns);
                *counts.statuses.entry(response.status).or_default() += 1;
                Some(response.status)
            }
            Err(error) => {
                counts.failed += 1;
                report.first_error.get_or_insert_with(|| format!("{} {path}: {error}", route.method));
                None
            }
        };
        if plan.log {
            let (method, path) = (route.method.clone(), path.clone());
            report.log.push(Entry { method, path, status, start_unix_ns, duration_ns });
        }
    }
    report
}

/// The order in which routes are asked for: smooth weighted round robin, so that a heavy route's requests are
/// spread out instead of coming in a row. One round has as many places as the weights sum up to; a place says which
/// route, and how often that route had its turn in this round before.
fn schedule(routes: &[Route]) -> Vec<(usize, usize)> {
    let total: i64 = routes.iter().map(|route| i64::from(route.weight)).sum();
    let mut credit = vec![0_i64; routes.len()];
    let mut turns = vec![0_usize; routes.len()];
    (0..total)
        .map(|_| {
            for (credit, route) in credit.iter_mut().zip(routes) {
                *credit += i64::from(route.weight);
            }
            let mut chosen = 0;
            for (index, value) in credit.iter().enumerate() {
                if *value > credit[chosen] {
                    chosen = index;
                }
            }
            credit[chosen] -= total;
            turns[chosen] += 1;
            (chosen, turns[chosen] - 1)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use super::*;

    fn plan(server: SocketAddr) -> Plan {
        let routes = vec![
            Route::get("one", vec!["/1".into(), "/one".into()], 3),
            Route::get("two", vec!["/2".into()], 1),
        ];
        Plan { server, connections: 1, keep_alive: true, routes, duration: None, count: Some(8), log: true }
    }

    /// Answers as many requests per connection as its list says, 404 to `/2`, and returns all request lines.
    fn server(listener: TcpListener, requests_per_connection: Vec<usize>) -> Vec<String> {
        let mut lines = Vec::new();
        for requests in requests_per_connection {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            for _ in 0..requests {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    assert_ne!(reader.read_until(b'\n', &mut head).unwrap(), 0);
                }
                let line = String::from_utf8(head).unwrap().lines().next().unwrap().to_owned();
                let status = if line.contains("/2") { "404 Not Found" } else { "200 OK" };
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nok");
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
                lines.push(line);
            }
        }
        lines
    }

    #[test]
    fn weights_are_spread_evenly_and_paths_taken_in_turn() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        // The server closes after five requests, without saying so: the client goes on with a new connection.
        let answered = std::thread::spawn(move || server(listener, vec![5, 3]));
        let report = run(&plan(addr)).unwrap();
        let paths: Vec<String> =
            answered.join().unwrap().iter().map(|line| line.split(' ').nth(1).unwrap().to_owned()).collect();
        assert_eq!(paths, ["/1", "/one", "/2", "/1", "/one", "/1", "/2", "/one"]);
        assert_eq!(report.routes["one"].statuses, BTreeMap::from([(200, 6)]));
        assert_eq!(report.routes["two"].statuses, BTreeMap::from([(404, 2)]));
        assert_eq!((report.answered(), report.failures(), report.log.len()), (8, 2, 8));
        assert_eq!((report.log[2].path.as_str(), report.log[2].status), ("/2", Some(404)));
    }

    #[test]
    fn a_server_that_is_not_there_is_counted_and_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        drop(listener);
        let report = run(&plan(addr)).unwrap();
        assert_eq!((report.answered(), report.failures()), (0, 8));
        assert!(report.first_error.unwrap().starts_with("GET /1: "));
    }

    #[test]
    fn other_machines_and_endless_loads_are_refused() {
        let mut elsewhere = plan("192.0.2.1:80".parse().unwrap());
        assert!(run(&elsewhere).is_err());
        elsewhere.server = "127.0.0.1:9".parse().unwrap();
        elsewhere.count = None;
        assert!(run(&elsewhere).is_err());
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let values = [15, 20, 35, 40, 50];
        assert_eq!(percentile(&values, 5.0), Some(15));
        assert_eq!(percentile(&values, 30.0), Some(20));
        assert_eq!(percentile(&values, 50.0), Some(35));
        assert_eq!(percentile(&values, 100.0), Some(50));
        assert_eq!(percentile(&[], 50.0), None);
    }
}
