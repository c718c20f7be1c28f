//! Python stacks of every version of CPython, live, against what the interpreter itself says of them.
//!
//! A server of the standard library (`apps/nesting`) burns CPU in chains of calls that it can name. Every function must
//! have its name, file, first line and lines, every caller the line it calls from, and at least 995 of 1,000 samples the
//! whole chain of Python functions; the others have a frame that says what is missing. Where the native functions between
//! them are, is not asserted here: in most builds they have no frame pointers.

mod support;

use std::path::PathBuf;

use serde_json::Value;
use support::http::Client;
use support::interpreters::{self, Interpreter};
use support::nesting::{Known, Server, children, number};
use support::{Daemon, skip};

const ROUTES: [&str; 8] =
    ["calls", "sorted", "generator", "extension", "made", "deep", "deepest", "released"];
/// Of each route, on each of the connections: about 1 s of work.
const ROUNDS: usize = 20;
const CONNECTIONS: usize = 2;
/// Samples without the whole chain, of a thousand.
const INCOMPLETE: f64 = 5.0;
/// At the root of a stack whose outer frames are missing.
const MARKERS: [&str; 2] = ["[stack deeper than 512 frames]", "[Python frames unreadable]"];
/// Python frames that are kept at least.
const DEPTH: usize = 256;

/// How the samples of a route went.
#[derive(Default, Debug)]
struct Tally {
    samples: u64,
    /// Without the whole chain: some shown below.
    incomplete: u64,
    /// Of these, those in which no frame says so.
    untold: u64,
    in_leaf: u64,
    /// In the leaf's own byte code: nothing native below it, because the interpreter's loop was recognised.
    in_loop: u64,
    examples: Vec<String>,
}

/// The Python functions on the way to a node, and the samples that ended there.
fn judge(tree: &Value, chain: &[Known], app: &str, tally: &mut Tally) {
    // From the first byte of a request on, its thread is in here.
    let base =
        chain.iter().position(|known| known.name.ends_with("handle_one_request")).expect("a handler") + 1;
    // Without recursion: a tree is as deep as a stack.
    let mut open: Vec<(Vec<&Value>, &Value)> = children(tree).map(|child| (Vec::new(), child)).collect();
    let mut seen = tally.samples;
    tally.samples += number(tree, "samples");
    while let Some((mut path, node)) = open.pop() {
        if node["kind"] == "python" {
            path.push(node);
        }
        let own = number(node, "samples") - children(node).map(|child| number(child, "samples")).sum::<u64>();
        seen += own;
        if own > 0 {
            let same = path.iter().zip(chain).take_while(|(node, known)| known.is(node)).count();
            let rest = &path[same..];
            // What leaves the chain is the standard library at work (a head, an answer), or a leaf's look whether it
            // is asked.
            let whole = same >= base
                && rest.first().is_none_or(|node| {
                    node["file"] != app
                        || (same == chain.len() && node["name"] == "reached" && rest.len() == 1)
                });
            if whole {
                tally.in_leaf += own * u64::from(same == chain.len());
                tally.in_loop += own * u64::from(path.len() == chain.len() && node["kind"] == "python");
            } else {
                tally.incomplete += own;
                let told = path.first().is_some_and(|node| MARKERS.map(Value::from).contains(&node["name"]))
                    || path.iter().any(|node| {
                        node["name"].as_str().is_some_and(|name| name.starts_with("<python code"))
                    });
                tally.untold += own * u64::from(!told);
                if tally.examples.len() < 3 {
                    let names: Vec<&str> = path.iter().filter_map(|node| node["name"].as_str()).collect();
                    tally.examples.push(format!("{same} of {} right: {names:?}", chain.len()));
                }
            }
        }
        if let Some(known) =
            path.len().checked_sub(1).and_then(|at| chain.get(at)).filter(|known| known.is(node))
        {
            // Of the standard library's functions, some call the same one from several lines.
            let callee = chain.get(path.len()).filter(|_| known.file == app);
            check_lines(node, known, callee);
        }
        open.extend(children(node).map(|child| (path.clone(), child)));
    }
    assert_eq!(seen, tally.samples);
}

/// The function was seen on lines it has, and whenever it called `callee`, on the line of that call.
#[track_caller]
fn check_lines(node: &Value, known: &Known, callee: Option<&Known>) {
    let mut total = 0;
    let mut calling = 0;
    for (line, ns) in node["lines"].as_object().expect("an object") {
        let (line, ns): (u64, u64) = (line.parse().expect("a number"), ns.as_u64().expect("a time"));
        assert!(known.lines.contains(&line), "{} has no line {line}: {node:#}", known.name);
        total += ns;
        calling += if line == known.line { ns } else { 0 };
    }
    assert_eq!(total, number(node, "total_ns"), "{} was seen on unknown lines", known.name);
    let Some(callee) = callee else { return };
    // With whatever native functions are between.
    let (mut below, mut open) = (0, children(node).collect::<Vec<_>>());
    while let Some(child) = open.pop() {
        match child["kind"] == "python" {
            true if callee.is(child) => below += number(child, "total_ns"),
            true => {}
            false => open.extend(children(child)),
        }
    }
    assert!(calling >= below, "{} calls {} from {}: {}", known.name, callee.name, known.line, node["lines"]);
}

/// Serves, samples and compares.
fn compare(build: &Interpreter) {
    let name = build.name();
    let server = Server::start(build.command());
    let truths: Vec<Vec<Known>> = ROUTES.iter().map(|route| server.truth(route)).collect();
    let deepest = &truths[ROUTES.iter().position(|route| *route == "deepest").expect("a route")];
    assert!((DEPTH - 16..=DEPTH).contains(&deepest.len()), "{} frames", deepest.len());
    let app = truths[0].last().expect("a leaf").file.clone();
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "999"]);
    let targets = daemon.json("/api/v1/targets");
    let interpreter = &targets["targets"][0]["interpreter_stacks"];
    assert_eq!(interpreter["works"], true, "{targets:#}");
    std::thread::scope(|scope| {
        for connection in 0..CONNECTIONS {
            let port = server.port;
            scope.spawn(move || {
                let mut client = Client::new(port);
                for round in 0..ROUNDS {
                    for route in ROUTES {
                        let target = format!("/{route}/{}", round * CONNECTIONS + connection);
                        assert_eq!(client.request("GET", &target, b"").expect("an answer").status, 200);
                    }
                }
            });
        }
    });
    let count = ROUTES.len() * ROUNDS * CONNECTIONS;
    let records = daemon.records_by_path("", count);
    for (route, chain) in ROUTES.iter().zip(&truths) {
        let mut tally = Tally::default();
        let own = records.iter().filter(|(path, _)| path.split('/').nth(1) == Some(route));
        for (path, record) in own {
            assert_eq!(record["attribution"], "thread", "{path}: {record:#}");
            if record["profile"] != true {
                continue;
            }
            let id = record["id"].as_str().expect("an id");
            let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
            assert_eq!(number(&tree, "truncated_samples"), 0);
            judge(&tree, chain, &app, &mut tally);
        }
        println!("{name}: /{route}: {tally:?}");
        assert!(tally.samples >= 100, "too few to judge: /{route}: {tally:?}");
        let share = tally.incomplete as f64 * 1000.0 / tally.samples as f64;
        assert!(
            share <= INCOMPLETE,
            "{share} of 1,000 samples lack a part of the chain: /{route}: {tally:?}"
        );
        assert_eq!(tally.untold, 0, "/{route}: {tally:?}");
        // Wherever the compiler put the loop, in one piece or two.
        assert!(
            *route != "calls" || tally.in_loop * 2 > tally.in_leaf,
            "the loop is not recognised: /{route}: {tally:?}"
        );
        assert!(tally.in_leaf * 10 > tally.samples * 8, "the leaf is where the time is: /{route}: {tally:?}");
    }
    let status = daemon.status();
    for (place, lost) in status["lost"].as_object().expect("an object") {
        assert_eq!(lost, 0, "lost at {place}: {status:#}");
    }
}

/// Every build of a version, and a program that has it in it.
fn check(test: &str, version: &'static str) {
    if !support::can_run(test) {
        return;
    }
    let builds = match interpreters::of_version(version) {
        Ok(builds) => builds,
        Err(reason) => return skip(test, reason),
    };
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("embedding-{version}"));
    std::fs::create_dir_all(&folder).expect("a folder");
    // One that is run by a loader of its own has another C library than the compiler.
    let own_libc = |build: &&Interpreter| build.command().get_program() == build.program.as_os_str();
    let embedded = builds.iter().filter(own_libc).find_map(|build| build.embedded(&folder));
    builds.iter().for_each(compare);
    match embedded {
        Some(Ok(build)) => compare(&build),
        Some(Err(reason)) => println!("{version}: none embedded: {reason}"),
        None => {}
    }
}

support::interpreters::each_version!(check);
