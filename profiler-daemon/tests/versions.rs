//! Python stacks of every version of CPython, live, against what the interpreter itself says of them.
//!
//! A server of the standard library (`apps/nesting`) burns CPU in chains of calls that it can name. Every function must
//! have its name, file, first line and lines, every caller the line it calls from, and at least 995 of 1,000 samples the
//! whole chain of Python functions; the others have a frame that says what is missing. Where the native functions between
//! them are, is not asserted here: in most builds they have no frame pointers.
//!
//! Then come stacks that are deeper than what is kept, and forged ones: frames that lead to themselves or nowhere.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::http::Client;
use support::interpreters::{self, Interpreter};
use support::process::{Group, free_port};
use support::{Daemon, rehosted, skip, wait_for};

const ROUTES: [&str; 8] =
    ["calls", "sorted", "generator", "extension", "made", "deep", "deepest", "released"];
/// Of each route, on each of the connections: about 3 s of work.
const ROUNDS: usize = 40;
const CONNECTIONS: usize = 2;
/// Samples without the whole chain, of a thousand.
const INCOMPLETE: f64 = 5.0;
/// Of each forged route.
const FORGED_ROUNDS: usize = 30;
/// At the root of a stack whose outer frames are missing.
const DEEPER: &str = "[stack deeper than 512 frames]";
const UNREADABLE: &str = "[Python frames unreadable]";
/// Python frames that are kept at least.
const DEPTH: usize = 256;

/// A function on the stack, as the interpreter knows it.
#[derive(Clone, Debug, PartialEq)]
struct Known {
    name: String,
    file: String,
    first_line: u64,
    /// Where it was when the leaf was reached.
    line: u64,
    lines: Vec<u64>,
}

impl Known {
    fn of(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().expect("a text").to_owned();
        let number = |value: &Value| value.as_u64().expect("a number");
        Self {
            name: text("name"),
            file: text("file"),
            first_line: number(&value["first_line"]),
            line: number(&value["line"]),
            lines: value["lines"].as_array().expect("an array").iter().map(number).collect(),
        }
    }

    fn is(&self, node: &Value) -> bool {
        node["name"] == self.name.as_str()
            && node["file"] == self.file.as_str()
            && node["first_line"] == self.first_line
    }
}

struct Server {
    port: u16,
    group: Group,
}

impl Server {
    fn start(command: Command) -> Self {
        Self::start_with(command, &[])
    }

    fn start_with(mut command: Command, arguments: &[&Path]) -> Self {
        let port = free_port();
        let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/nesting/nesting.py");
        command
            .arg("-B")
            .arg(app)
            .arg(port.to_string())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let group = Group::spawn(&mut command);
        wait_for("the server to answer", || Client::new(port).request("GET", "/calls/0", b"").ok());
        println!("PROFILED http.server");
        Self { port, group }
    }

    /// The chain of a route, outermost first.
    fn truth(&self, route: &str) -> Vec<Known> {
        let answer =
            Client::new(self.port).request("GET", &format!("/truth/{route}"), b"").expect("the truth");
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json().as_array().expect("an array").iter().map(Known::of).collect()
    }
}

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
                let told = path
                    .first()
                    .is_some_and(|node| [DEEPER, UNREADABLE].map(Value::from).contains(&node["name"]))
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

fn children(node: &Value) -> impl Iterator<Item = &Value> {
    node["children"].as_array().into_iter().flatten()
}

#[track_caller]
fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is no number in {value:#}"))
}

/// Serves, samples and compares.
fn compare(build: &Interpreter, command: Command) {
    let name = build.name();
    let server = Server::start(command);
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
    forged(build, &server, &daemon);
    let status = daemon.status();
    for (place, lost) in status["lost"].as_object().expect("an object") {
        assert_eq!(lost, 0, "lost at {place}: {status:#}");
    }
}

/// What is at the root and what below it, leaf last, of stacks that have no end or lead nowhere.
struct Forged {
    route: &'static str,
    marker: &'static str,
    /// Repeated up to the limit, if that is what fills the stack.
    repeated: Option<&'static str>,
    rest: &'static [&'static str],
}

const FORGED: [Forged; 4] = [
    Forged { route: "bottomless", marker: DEEPER, repeated: Some("descend"), rest: &["deep_leaf"] },
    Forged { route: "cyclic", marker: DEEPER, repeated: Some("cyclic"), rest: &["burn_with"] },
    Forged { route: "wild", marker: UNREADABLE, repeated: None, rest: &["wild", "burn_with"] },
    // The interpreter's own frames are not shown, however many there seem to be.
    Forged { route: "shims", marker: DEEPER, repeated: None, rest: &["shims_leaf", "burn_with"] },
];

/// Stacks that are not whole keep their innermost frames, say so, and are counted.
fn forged(build: &Interpreter, server: &Server, daemon: &Daemon) {
    let name = build.name();
    let mut records_until_now = ROUTES.len() * ROUNDS * CONNECTIONS;
    for Forged { route, marker, repeated, rest } in &FORGED {
        if *route == "shims" && ["3.8", "3.9", "3.10", "3.11"].contains(&build.version) {
            continue;
        }
        let before = counted(daemon, marker);
        let mut client = Client::new(server.port);
        for round in 0..FORGED_ROUNDS {
            let answer = client.request("GET", &format!("/{route}/{round}"), b"").expect("an answer");
            assert_eq!(answer.status, 200);
        }
        records_until_now += FORGED_ROUNDS;
        let records = daemon.records_by_path("", records_until_now);
        let (mut honest, mut seen) = (0, 0);
        for (path, record) in records {
            if path.split('/').nth(1) != Some(route) || record["profile"] != true {
                continue;
            }
            let id = record["id"].as_str().expect("an id");
            let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
            for (path, samples) in python_paths(&tree) {
                if path.last() != rest.last() {
                    continue;
                }
                if path[0] != *marker {
                    // Before the link was changed, or after.
                    honest += samples;
                    continue;
                }
                seen += samples;
                let (outer, inner) = path[1..].split_at(path.len() - 1 - rest.len());
                assert_eq!(inner, *rest, "/{route}");
                match repeated {
                    Some(function) => {
                        assert!(outer.iter().all(|name| name == function), "/{route}: {outer:?}");
                        assert!(path.len() > DEPTH, "/{route}: {} frames", path.len());
                    }
                    None => assert_eq!(outer, [""; 0], "/{route}"),
                }
            }
        }
        println!("{name}: /{route}: {seen} samples end in {marker}, {honest} do not");
        assert!(seen >= 20 && seen > honest * 4, "/{route}: {seen} as forged, {honest} not");
        wait_for("the stacks to be counted", || (counted(daemon, marker) >= before + seen).then_some(()));
    }
}

/// How many stacks were without their outer frames so far.
fn counted(daemon: &Daemon, marker: &str) -> u64 {
    let labels = if marker == DEEPER {
        r#"{kind="user",reason="truncated"} "#
    } else {
        r#"{kind="python",reason="fault"} "#
    };
    let metrics = daemon.get("/metrics").text();
    let lines = metrics.lines().filter_map(|line| line.strip_prefix("reqprof_unwind_errors_total"));
    lines.filter_map(|line| line.strip_prefix(labels)?.parse::<u64>().ok()).sum()
}

/// The ways down to where samples ended, and how many did.
fn paths(tree: &Value) -> Vec<(Vec<&Value>, u64)> {
    let (mut found, mut open) = (Vec::new(), vec![(Vec::new(), tree)]);
    while let Some((path, node)) = open.pop() {
        for child in children(node) {
            let mut path = path.clone();
            path.push(child);
            open.push((path, child));
        }
        let below: u64 = children(node).map(|child| number(child, "samples")).sum();
        if number(node, "samples") > below {
            found.push((path, number(node, "samples") - below));
        }
    }
    found
}

/// The names of the Python functions on them.
fn python_paths(tree: &Value) -> Vec<(Vec<&str>, u64)> {
    let mut found = Vec::new();
    for (path, samples) in paths(tree) {
        let python = path.iter().filter(|node| node["kind"] == "python");
        let names: Vec<&str> = python.filter_map(|node| node["name"].as_str()).collect();
        if !names.is_empty() {
            found.push((names, samples));
        }
    }
    found
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
    // One that is run by a loader of its own has another C library: see `rehosted`.
    let own_libc = |build: &&Interpreter| build.command().get_program() == build.program.as_os_str();
    let embedded = builds.iter().filter(own_libc).find_map(|build| build.embedded(&folder));
    let mut refused = Vec::new();
    let mut compared = 0;
    let mut run = |build: &Interpreter| match rehosted::command(build) {
        Ok(command) => {
            compare(build, command);
            compared += 1;
        }
        Err(reason) => refused.push(reason),
    };
    builds.iter().for_each(&mut run);
    match embedded {
        Some(Ok(build)) => run(&build),
        Some(Err(reason)) => refused.push(reason),
        None => {}
    }
    println!("{version}: {compared} builds; not: {refused:?}");
    if compared == 0 {
        skip(test, refused.join("; "));
    }
}

#[test]
fn python_3_8() {
    check("python_3_8", "3.8");
}

#[test]
fn python_3_9() {
    check("python_3_9", "3.9");
}

#[test]
fn python_3_10() {
    check("python_3_10", "3.10");
}

#[test]
fn python_3_11() {
    check("python_3_11", "3.11");
}

#[test]
fn python_3_12() {
    check("python_3_12", "3.12");
}

#[test]
fn python_3_13() {
    check("python_3_13", "3.13");
}

#[test]
fn python_3_14() {
    check("python_3_14", "3.14");
}

/// A function that calls itself with a frame pointer, whatever else is built without.
const DESCENT: &str = r#"
    static long deeper(long left) {
        volatile long sum = 0;
        if (left)
            return deeper(left - 1) + sum;
        for (long n = 0; n < 8000000; n++)
            sum += n;
        return sum;
    }
    long descend(long depth) { return deeper(depth); }
"#;

/// However deep native code is, it leaves room for the Python functions that called it, and a frame says so.
#[test]
fn python_frames_outlast_native_ones() {
    const TEST: &str = "python_frames_outlast_native_ones";
    if !support::can_run(TEST) {
        return;
    }
    let build = match interpreters::of_version("3.11") {
        Ok(builds) => builds[0].clone(),
        Err(reason) => return skip(TEST, reason),
    };
    let folder = tempfile::tempdir().expect("a folder");
    let (source, library) = (folder.path().join("descend.c"), folder.path().join("descend.so"));
    std::fs::write(&source, DESCENT).expect("a file");
    let mut compiler = Command::new("cc");
    compiler.args(["-O0", "-fno-omit-frame-pointer", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    match compiler.status() {
        Ok(status) => assert!(status.success()),
        Err(error) => return skip(TEST, format!("no C compiler: {error}")),
    }
    let server = Server::start_with(build.command(), &[&library]);
    let chain = server.truth("native");
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "999"]);
    let mut client = Client::new(server.port);
    for round in 0..ROUNDS {
        assert_eq!(client.request("GET", &format!("/native/{round}"), b"").expect("an answer").status, 200);
    }
    let (mut whole, mut other) = (0, 0);
    for record in daemon.records_by_path("", ROUNDS).values().filter(|record| record["profile"] == true) {
        let id = record["id"].as_str().expect("an id");
        let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
        for (path, samples) in paths(&tree) {
            let name = |node: &&Value| node["name"].as_str().unwrap_or_default().to_owned();
            if path.get(chain.len()).is_none_or(|node| name(node) != "[native frames left out]") {
                // On the way there, or serving.
                other += samples;
                continue;
            }
            assert!(chain.iter().zip(&path).all(|(known, node)| known.is(node)), "{path:?}");
            let native: Vec<String> =
                path[chain.len() + 1..].iter().filter(|node| node["kind"] == "native").map(name).collect();
            // A function that is just being entered has no frame pointer yet, which hides its caller.
            assert!(
                native.iter().all(|name| name == "deeper") && (254..=255).contains(&native.len()),
                "{native:?}"
            );
            whole += samples;
        }
    }
    println!("{whole} samples in native recursion, {other} elsewhere");
    assert!(whole >= 100 && whole > other * 4, "{whole} and {other} samples");
    let counted = daemon.status()["unwind_errors"]["native.left_out"].as_u64().unwrap_or_default();
    assert!(counted >= whole, "{counted} of {whole} counted");
}

/// Free-threaded builds have other layouts; what is not known is said, and requests are seen all the same.
fn without_gil(test: &str, version: &'static str) {
    if !support::can_run(test) {
        return;
    }
    let command = interpreters::of_version(version).and_then(|builds| rehosted::claiming_no_gil(&builds[0]));
    let command = match command {
        Ok(command) => command,
        Err(reason) => return skip(test, reason),
    };
    let server = Server::start(command);
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "999"]);
    let targets = daemon.json("/api/v1/targets");
    let stacks = &targets["targets"][0]["interpreter_stacks"];
    let detail = stacks["detail"].as_str().expect("a text");
    assert_eq!(stacks["works"], false, "{targets:#}");
    assert!(detail.starts_with(&format!("Python {version}.")), "{detail}");
    assert!(detail.ends_with(" without the GIL (free-threaded) is not supported"), "{detail}");
    let mut client = Client::new(server.port);
    for round in 0..ROUNDS {
        assert_eq!(client.request("GET", &format!("/calls/{round}"), b"").expect("an answer").status, 200);
    }
    let mut native = 0;
    for record in daemon.records_by_path("", ROUNDS).values().filter(|record| record["profile"] == true) {
        let id = record["id"].as_str().expect("an id");
        let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
        assert_eq!(python_paths(&tree), [], "{tree:#}");
        native += children(&tree).filter(|node| node["kind"] == "native").count();
    }
    assert!(native > 0, "no native frames either");
}

#[test]
fn python_3_13_without_the_gil() {
    without_gil("python_3_13_without_the_gil", "3.13");
}

#[test]
fn python_3_14_without_the_gil() {
    without_gil("python_3_14_without_the_gil", "3.14");
}
