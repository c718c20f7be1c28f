//! Planted CPU: each request burns in a function that no other has (`own_N`), and says in `X-Burned-Ns` how much. What was
//! seen of it, and in whose profile.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use super::Daemon;
use super::http::{Client, Exchange};
use super::tls::Trust;

/// Of the CPU time that was burned so much is seen at least; samples are a measurement.
pub const SEEN: f64 = 0.95;

/// `GET /KIND/N`, all kinds on all connections at once, each number once. `body` gives some of them one (and `POST`), by
/// the round.
pub fn load(
    port: u16,
    trust: Option<Trust>,
    (clients, rounds): (usize, usize),
    kinds: &[&str],
    body: impl Fn(usize) -> Vec<u8> + Sync,
) -> Vec<Exchange> {
    std::thread::scope(|scope| {
        let body = &body;
        let clients: Vec<_> = (0..clients)
            .map(|client| {
                let trust = trust.clone();
                scope.spawn(move || {
                    let mut connection = Client::trusting(port, trust);
                    let ask = |round: usize| {
                        let kind = kinds[(round + client) % kinds.len()];
                        let target = format!("/{kind}/{}", client * rounds + round);
                        let body = body(round);
                        let method = if body.is_empty() { "GET" } else { "POST" };
                        let answer = connection.request(method, &target, &body);
                        answer.unwrap_or_else(|e| panic!("{target}: {e}"))
                    };
                    (0..rounds).map(ask).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("answers")).collect()
    })
}

/// What a request's profile shows of its own function, ns. It has this attribution, and in its profile is no other request's
/// function nor one of `nobodys`. `owner`: the end of its function's name.
#[track_caller]
pub fn seen_in(daemon: &Daemon, record: &Value, owner: &str, attribution: &str, nobodys: &[&str]) -> u64 {
    assert_eq!(record["attribution"], attribution, "{record:#}");
    if record["profile"] != true {
        return 0;
    }
    let id = record["id"].as_str().expect("an id");
    let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded&view=cpu")).text();
    let mut seen = 0;
    for line in stacks.lines() {
        let (stack, micros) = line.rsplit_once(' ').expect("a stack and its time");
        let names: HashSet<&str> = stack.split(';').filter_map(|frame| frame.split(' ').next()).collect();
        let mut owners = names.iter().filter_map(|name| name.strip_prefix("own_"));
        assert!(owners.all(|of| of == owner), "another request's time: {record:#}\n{line}");
        assert!(nobodys.iter().all(|name| !names.contains(name)), "nobody's time: {record:#}\n{line}");
        if names.contains(&*format!("own_{owner}")) {
            seen += micros.parse::<u64>().expect("a time") * 1000;
        }
    }
    seen
}

/// What of each kind was burned and seen, ns; each by [`seen_in`].
#[track_caller]
pub fn seen(
    daemon: &Daemon,
    records: &HashMap<String, Value>,
    done: &[Exchange],
    attribution: &str,
    nobodys: &[&str],
) -> BTreeMap<String, (u64, u64)> {
    let mut sums = BTreeMap::<String, (u64, u64)>::new();
    for exchange in done {
        let (kind, number) = exchange.path()[1..].split_once('/').expect("two parts");
        let (burned, seen) = sums.entry(kind.to_owned()).or_default();
        *burned += exchange.number("x-burned-ns");
        *seen += seen_in(daemon, &records[exchange.path()], number, attribution, nobodys);
    }
    sums
}

/// Nearly all of it was, of each kind.
#[track_caller]
pub fn nearly_all(name: &str, sums: &BTreeMap<String, (u64, u64)>) {
    for (kind, (burned, seen)) in sums {
        let share = *seen as f64 / *burned as f64;
        println!("{name}: /{kind}: {seen} ns seen of {burned}: {share:.3}");
        assert!(share >= SEEN, "{name}: /{kind}: {seen} ns of {burned} were seen");
    }
}
