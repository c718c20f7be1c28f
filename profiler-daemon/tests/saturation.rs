//! As many requests as this machine can serve: nothing is lost, or what is lost is counted exactly.
//!
//! The oracle is nginx's own count of requests (`stub_status`). What the kernel side saw begin must equal it, and
//! must be the sum of what was recorded and what was counted as lost: under full load, and while the daemon is
//! stopped for longer than its (here tiny) ring lasts. Memory is compared between two equal loads.
//!
//! Needs root, nginx and wrk. Runs with `REQPROF_E2E=1`; otherwise, and where something is missing, it says so.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::http::Client;
use support::process::{Group, free_port};
use support::{Daemon, skip, wait_for};
use tempfile::TempDir;

/// How much larger the daemon may be after a second load than after the first of the same kind. What grows for good
/// is SQLite's page cache and the allocator's slack, some megabytes; one leaked record per request would be more.
const GROWTH_MAX_KIB: u64 = 16 * 1024;
/// How often the ring is made to overflow until it happened in the middle of a request, for which chances are even.
const ROUNDS: u32 = 16;
/// The budget for the daemon as a whole.
const RSS_MAX_KIB: u64 = 100 * 1024;

/// Whether this can run here; says so if not.
fn can_run(name: &str) -> bool {
    if !support::can_run(name) {
        return false;
    }
    let missing = [("nginx", Command::new(nginx())), ("wrk", Command::new("wrk"))]
        .into_iter()
        .find_map(|(tool, mut command)| command.arg("-v").output().err().map(|error| (tool, error)));
    if let Some((tool, error)) = &missing {
        skip(name, format!("{tool} does not run: {error}"));
    }
    missing.is_none()
}

/// Debian's is not on everybody's `PATH`.
fn nginx() -> &'static str {
    if Path::new("/usr/sbin/nginx").is_file() { "/usr/sbin/nginx" } else { "nginx" }
}

/// The body, if the answer is a good one.
fn get(port: u16, path: &str) -> Option<String> {
    let answer = Client::new(port).request("GET", path, b"").ok()?;
    (answer.status == 200).then(|| answer.text())
}

fn start_nginx(dir: &Path, port: u16) -> Group {
    fs::create_dir_all(dir.join("html")).unwrap();
    fs::write(dir.join("html/small.html"), vec![b'x'; 1024]).unwrap();
    fs::write(dir.join("html/large.bin"), vec![b'y'; 1 << 20]).unwrap();
    let at = dir.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {at}/{kind};\n"))
        .concat();
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {at}/nginx.pid; error_log {at}/error.log;
         events {{ worker_connections 1024; }}
         http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
         {temporary}
         server {{ listen 127.0.0.1:{port}; root {at}/html; location = /count {{ stub_status; }}
         location /words/ {{ return 200; }} }} }}"
    );
    fs::write(dir.join("nginx.conf"), config).unwrap();
    let mut command = Command::new(nginx());
    let server = Group::spawn(command.arg("-c").arg(dir.join("nginx.conf")).stderr(Stdio::null()));
    wait_for("nginx", || get(port, "/count"));
    server
}

fn start_daemon(dir: &Path, nginx: &Group, ring: &str) -> Daemon {
    let config = dir.join("reqprof.yaml");
    fs::write(&config, format!("ring_size: {ring}\n")).unwrap();
    let config = config.to_str().expect("a path of letters");
    Daemon::start_in(dir, &["--config", config, "--pid", &nginx.pid().to_string()])
}

fn wrk(port: u16, seconds: u32, arguments: &[&str], path: &str) -> Child {
    Command::new("wrk")
        .args(["-t", "1", "-c", "64", "-d", &format!("{seconds}s")])
        .args(arguments)
        .arg(format!("http://127.0.0.1:{port}{path}"))
        .stdout(Stdio::null())
        .spawn()
        .expect("wrk starts")
}

/// Requests that nginx counted, this one included.
fn served(port: u16) -> u64 {
    let text = get(port, "/count").expect("nginx answers");
    let numbers = text.lines().nth(2).and_then(|line| line.split_whitespace().nth(2));
    numbers.and_then(|n| n.parse().ok()).expect("the third number of the third line")
}

fn resident_kib(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

/// The daemon's account of requests, by name, once it has no open request left.
struct Books(Value);

impl Books {
    /// `seen`: requests that must have begun by then.
    fn settled(port: u16, seen: u64) -> Self {
        wait_for("the books to be closed", || {
            let status: Value = serde_json::from_str(&get(port, "/api/v1/status")?).ok()?;
            let books = Self(status);
            let (begun, ended) = (books.of("begun"), books.of("finished") + books.of("lost"));
            // Only a sum that cannot be reached any more is wrong; less may still be on the way.
            assert!(begun <= seen && ended <= begun, "more than {seen} was served: {}", books.0["requests"]);
            (books.of("open") == 0 && ended == begun && begun == seen).then_some(books)
        })
    }

    fn of(&self, name: &str) -> u64 {
        self.0["requests"][name].as_u64().unwrap_or_else(|| panic!("{name} in {}", self.0["requests"]))
    }

    fn records_lost(&self) -> u64 {
        self.0["lost"]["kernel.boundary_ring_full"].as_u64().unwrap()
    }
}

fn outcomes(port: u16) -> Vec<(String, u64)> {
    let text = get(port, "/metrics").expect("metrics");
    text.lines()
        .filter_map(|line| line.strip_prefix("reqprof_requests_total{outcome=\"")?.split_once("\"} "))
        .map(|(outcome, n)| (outcome.to_owned(), n.parse::<f64>().unwrap() as u64))
        .collect()
}

#[test]
fn every_request_is_recorded_or_counted_as_lost() {
    if !can_run("every_request_is_recorded_or_counted_as_lost") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let web = free_port();
    let nginx = start_nginx(dir.path(), web);
    let before = served(web);
    let daemon = start_daemon(dir.path(), &nginx, "8MiB");
    let api = daemon.port;
    let loads: [(&[&str], &str, u32); 4] = [
        (&[], "/small.html", 3),
        (&["-H", "Connection: close"], "/small.html", 2),
        (&[], "/large.bin", 2),
        (&[], "/small.html", 3),
    ];
    let mut memory = Vec::new();
    for (arguments, path, seconds) in loads {
        assert!(wrk(web, seconds, arguments, path).wait().unwrap().success());
        let seen = served(web) - before;
        let books = Books::settled(api, seen);
        let outcomes = outcomes(api);
        let recorded: u64 = outcomes.iter().map(|(_, n)| n).sum();
        assert_eq!(recorded + books.of("lost"), seen, "{path}: {outcomes:?}");
        if books.records_lost() == 0 {
            // The client leaves in the middle of what it asked for last.
            let cut = outcomes.iter().filter(|(o, _)| o != "complete").map(|(_, n)| n).sum::<u64>();
            assert!(cut <= 64 * loads.len() as u64, "{outcomes:?}");
        }
        memory.push(resident_kib(&daemon));
    }
    println!("{memory:?} KiB resident after each load");
    let (first, last) = (memory[0], memory[memory.len() - 1]);
    assert!(last <= first + GROWTH_MAX_KIB, "the daemon grew from {first} to {last} KiB: {memory:?}");
    assert!(memory.iter().all(|kib| *kib <= RSS_MAX_KIB), "{memory:?}");
}

/// A path that no other request has, of letters only, so that nothing in it looks like an identifier.
const WORDS: &str = r#"
init = function(arguments) n = tonumber(arguments[1]) end
request = function()
  local word, left = "", n
  repeat word = word .. string.char(97 + left % 26); left = math.floor(left / 26) until left == 0
  n = n + 1
  return wrk.format("GET", "/words/" .. word)
end
"#;

/// The values of a label in the histogram's counts, each with the sum of them.
fn counts_by_route(port: u16) -> BTreeMap<String, u64> {
    let text = get(port, "/metrics").expect("metrics");
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("http_server_request_duration_seconds_count{") else { continue };
        let (labels, count) = rest.rsplit_once("} ").expect("labels and a value");
        let route = labels.split("http_route=\"").nth(1).and_then(|rest| rest.split('"').next());
        let route = route.expect("a route").to_owned();
        *counts.entry(route).or_default() += count.parse::<f64>().expect("a number") as u64;
    }
    counts
}

/// Somebody tries all words: labels stay few, and memory is what it was.
#[test]
fn a_hundred_thousand_paths_are_few_routes() {
    const PATHS: u64 = 100_000;
    /// Requests after which the store's cache of pages is full: from here on memory is flat.
    const WARM: u64 = 200_000;
    /// The allocator's slack; 100 bytes for each path would be more.
    const GROWTH_KIB: u64 = 8 * 1024;
    /// What `correlate::route` allows a service, and the one for the others.
    const ROUTES: usize = 200 + 1;
    if !can_run("a_hundred_thousand_paths_are_few_routes") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let script = dir.path().join("words.lua");
    fs::write(&script, WORDS).unwrap();
    let web = free_port();
    let nginx = start_nginx(dir.path(), web);
    let before = served(web);
    let daemon = start_daemon(dir.path(), &nginx, "8MiB");
    let mut memory = Vec::new();
    let mut seen = 0;
    while seen < WARM + PATHS {
        // Words go on where they were; those that wrk had under way are skipped.
        let first = (seen + 1_000 * memory.len() as u64).to_string();
        let mut load = Command::new("wrk");
        load.args(["-t", "1", "-c", "64", "-d", "3s", "-s"]).arg(&script);
        load.arg(format!("http://127.0.0.1:{web}/")).args(["--", &first]).stdout(Stdio::null());
        assert!(load.status().expect("wrk starts").success());
        seen = served(web) - before;
        let books = Books::settled(daemon.port, seen);
        let counts = counts_by_route(daemon.port);
        assert_eq!(counts.values().sum::<u64>() + books.of("lost"), seen);
        assert!(counts.len() <= ROUTES, "{} routes", counts.len());
        assert!(counts["_OTHER"] * 10 > seen * 9, "{} of {seen}", counts["_OTHER"]);
        memory.push((seen, resident_kib(&daemon)));
    }
    let text = get(daemon.port, "/metrics").expect("metrics");
    let overflow = text.lines().find_map(|line| line.strip_prefix("reqprof_routes_overflow_total "));
    let other = counts_by_route(daemon.port)["_OTHER"];
    assert_eq!(overflow.and_then(|n| n.parse::<f64>().ok()), Some(other as f64));
    let listed = daemon.json("/api/v1/routes")["routes"].as_array().expect("a list").len();
    assert!(listed <= ROUTES, "{listed} routes are listed");
    println!("{memory:?}: paths, and KiB resident after them");
    let warm = memory.iter().find(|(seen, _)| *seen >= WARM).expect("it was reached").1;
    let last = memory[memory.len() - 1].1;
    assert!(last <= warm + GROWTH_KIB, "the daemon grew from {warm} to {last} KiB: {memory:?}");
    assert!(memory.iter().all(|(_, kib)| *kib <= RSS_MAX_KIB), "{memory:?}");
}

#[test]
fn what_a_full_ring_loses_is_counted_and_flagged() {
    if !can_run("what_a_full_ring_loses_is_counted_and_flagged") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let web = free_port();
    let nginx = start_nginx(dir.path(), web);
    let before = served(web);
    let daemon = start_daemon(dir.path(), &nginx, "256KiB");
    let api = daemon.port;
    // The ring becomes full within a request or between two, as it happens; both are to be seen.
    for round in 0..ROUNDS {
        let arguments = if round % 2 == 0 { &[][..] } else { &["-H", "Connection: close"] };
        let mut load = wrk(web, 3, arguments, "/small.html");
        // Stopped until nginx has answered more than the ring has room for.
        let full = served(web) + 2_000;
        daemon.signal(libc::SIGSTOP);
        wait_for("nginx to be ahead", || {
            (served(web) >= full || load.try_wait().unwrap().is_some()).then_some(())
        });
        daemon.signal(libc::SIGCONT);
        assert!(load.wait().unwrap().success());
        let flagged = outcomes(api).iter().any(|(outcome, n)| outcome == "incomplete" && *n > 0);
        if round > 0 && flagged {
            break;
        }
    }
    let seen = served(web) - before;
    let books = Books::settled(api, seen);
    assert!(books.of("lost") > 0 && books.records_lost() > books.of("lost"), "{}", books.0);
    let text = get(api, "/api/v1/requests?limit=1000").expect("requests");
    let list: Value = serde_json::from_str(&text).unwrap();
    for request in list["requests"].as_array().unwrap() {
        // A record with a gap does not pass for complete unless its length proves it.
        if request["outcome"] == "incomplete" {
            assert!(request["lost_events"].as_u64() > Some(0), "{request}");
            assert!(request["note"].is_string(), "{request}");
        }
    }
    let flagged = outcomes(api).iter().any(|(outcome, n)| outcome == "incomplete" && *n > 0);
    assert!(flagged, "those whose end was lost are flagged: {:?}", outcomes(api));
}
