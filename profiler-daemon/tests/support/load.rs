//! A bounded load whose every request has a path of its own, and the client's books about it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::{Client, Exchange};

/// The routes that burn CPU in functions of their own.
pub const BURNERS: [&str; 5] = ["a", "b", "c", "d", "z"];

/// Sends requests to all burners over this many connections for this long.
pub fn burn(port: u16, connections: u64, time: Duration) -> Vec<Exchange> {
    let deadline = Instant::now() + time;
    burn_while(port, connections, || Instant::now() < deadline)
}

fn burn_while(port: u16, connections: u64, go_on: impl Fn() -> bool + Sync) -> Vec<Exchange> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|connection| {
                let go_on = &go_on;
                scope.spawn(move || {
                    let mut client = Client::new(port);
                    let mut done = Vec::new();
                    while go_on() {
                        let number = connection * 1_000_000 + done.len() as u64;
                        let route = BURNERS[(number % BURNERS.len() as u64) as usize];
                        let target = format!("/{route}/{number}");
                        let exchange = client.request("GET", &target, b"");
                        done.push(exchange.unwrap_or_else(|e| panic!("{target}: {e}")));
                    }
                    done
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("every request was answered")).collect()
    })
}

/// A load that runs until it is told to stop.
pub struct Background {
    stop: std::sync::Arc<AtomicBool>,
    thread: JoinHandle<Vec<Exchange>>,
}

impl Background {
    pub fn start(port: u16, connections: u64) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread =
            std::thread::spawn(move || burn_while(port, connections, || !told.load(Ordering::Relaxed)));
        Self { stop, thread }
    }

    /// Ends it; panics if a request was not answered.
    pub fn finish(self) -> Vec<Exchange> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("every request was answered")
    }
}

/// How many requests each route had: the numbers of paths are `{id}`.
pub fn per_route(exchanges: &[Exchange]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for exchange in exchanges {
        let route = match exchange.path().rsplit_once('/') {
            Some((front, number)) if number.parse::<u64>().is_ok() => format!("{front}/{{id}}"),
            _ => exchange.path().to_owned(),
        };
        *counts.entry(route).or_default() += 1;
    }
    counts
}
