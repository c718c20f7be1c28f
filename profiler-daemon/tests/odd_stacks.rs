//! Python stacks that are not whole or not honest, on every version: deeper than what is kept, frames that lead to
//! themselves or nowhere, native recursion, and builds whose frames are not known. Work is bounded, what can be told of
//! them is, and the rest is said and counted.

mod support;

use std::process::Command;

use serde_json::Value;
use support::http::Client;
use support::interpreters::{self, Interpreter};
use support::nesting::{Server, children, paths, python_paths};
use support::{Daemon, no_gil, skip, wait_for};

/// Requests of each kind.
const ROUNDS: usize = 24;
/// At the root of a stack whose outer frames are missing.
const DEEPER: &str = "[stack deeper than 512 frames]";
const UNREADABLE: &str = "[Python frames unreadable]";
/// Python frames that are kept at least.
const DEPTH: usize = 256;

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
    let mut records_until_now = 0;
    for Forged { route, marker, repeated, rest } in &FORGED {
        if *route == "shims" && ["3.8", "3.9", "3.10", "3.11"].contains(&build.version) {
            continue;
        }
        let before = counted(daemon, marker);
        let mut client = Client::new(server.port);
        for round in 0..ROUNDS {
            let answer = client.request("GET", &format!("/{route}/{round}"), b"").expect("an answer");
            assert_eq!(answer.status, 200);
        }
        records_until_now += ROUNDS;
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

/// On the first build of a version that can be run.
fn check(test: &str, version: &'static str) {
    let Some(build) = support::first_build(test, version) else { return };
    let server = Server::start(build.command());
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "999"]);
    forged(&build, &server, &daemon);
    let lost = daemon.status()["lost"].clone();
    assert!(lost.as_object().expect("an object").values().all(|count| *count == 0), "{lost:#}");
}

mod forged_frames {
    crate::support::interpreters::each_version!(super::check);
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
    let Some(build) = support::first_build(test, version) else { return };
    let command = match no_gil::claiming(&build) {
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
