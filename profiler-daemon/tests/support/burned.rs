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

/// What of each kind was burned and seen, ns. All records have this attribution, and no profile has another request's
/// function in it or one of `nobodys`.
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
        let record = &records[exchange.path()];
        assert_eq!(record["attribution"], attribution, "{record:#}");
        let (kind, number) = exchange.path()[1..].split_once('/').expect("two parts");
        let (burned, seen) = sums.entry(kind.to_owned()).or_default();
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
            assert!(nobodys.iter().all(|name| !names.contains(name)), "nobody's time: {record:#}\n{line}");
            if names.contains(&*format!("own_{number}")) {
                *seen += micros.parse::<u64>().expect("a time") * 1000;
            }
        }
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
