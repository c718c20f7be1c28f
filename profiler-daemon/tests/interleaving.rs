//! Python and native frames of one stack, in call order.
//!
//! Two oracles: what the routes go through in C by the interpreter's own source, and py-spy (`dump --native`) on the same
//! process in the same request, whose frames must all be in a stack of ours, in the same order.

mod support;

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::http::Client;
use support::nesting::paths;
use support::process::{Group, free_port};
use support::{Daemon, skip, wait_for};
use support::{interpreters, own_program};

/// A route, the Python functions of its stacks, and the C functions that are between the last two of them, or below.
struct Route {
    name: &'static str,
    python: &'static [&'static str],
    native: &'static [&'static str],
}

/// The functions in C have these names in every version. Where the program has no symbols of its own functions, only
/// those that it exports are asked for.
const ROUTES: [Route; 5] = [
    Route {
        name: "by_sorted",
        python: &["by_sorted", "key", "burn"],
        native: &["builtin_sorted", "list_sort"],
    },
    Route {
        name: "by_generator",
        python: &["by_generator", "numbers", "burn"],
        native: &["builtin_sum", "gen_iternext"],
    },
    Route { name: "by_regex", python: &["by_regex", "sub", "<lambda>", "burn"], native: &["pattern_subx"] },
    Route {
        name: "by_repr",
        python: &["by_repr", "__repr__", "burn"],
        native: &["PyUnicode_Format", "PyObject_Repr"],
    },
    Route { name: "by_zlib", python: &["by_zlib"], native: &["zlib_compress", "deflate"] },
];

struct Server {
    port: u16,
    group: Group,
}

fn start(mut command: Command) -> Server {
    let port = free_port();
    let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/peer/peer.py");
    command.arg("-B").arg(app).arg(port.to_string()).stdin(Stdio::null()).stdout(Stdio::null());
    let group = Group::spawn(&mut command);
    wait_for("the server to listen", || {
        // It serves one connection at a time, and this one asks for nothing it has.
        TcpStream::connect(("127.0.0.1", port)).ok().map(drop)
    });
    Server { port, group }
}

/// A frame as py-spy prints it: `    name (file:line)`, or `    0x7f… (library)` where it knows no name.
#[derive(Clone, Debug, PartialEq)]
struct Theirs {
    name: String,
    line: Option<u64>,
}

/// The stack of the main thread, outermost first.
fn dump(py_spy: &Path, pid: u32) -> Option<Vec<Theirs>> {
    let output = Command::new(py_spy)
        .args(["dump", "--native", "--pid", &pid.to_string()])
        .stdin(Stdio::null())
        .output()
        .expect("py-spy starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return None;
    }
    let frame = |line: &str| {
        let (name, rest) = line.strip_prefix("    ")?.rsplit_once(" (")?;
        let line = rest.trim_end_matches(')').rsplit_once(':').and_then(|(_, line)| line.parse().ok());
        Some(Theirs { name: name.to_owned(), line })
    };
    let mut stack: Vec<Theirs> = text.lines().filter_map(frame).collect();
    stack.reverse();
    Some(stack)
}

fn names<'a>(path: &[&'a Value]) -> Vec<&'a str> {
    path.iter().map(|node| node["name"].as_str().expect("a name")).collect()
}

/// Whether `inner` is in `outer` in this order. Compilers' parts of a function have its name and more behind it.
fn is_within(inner: &[&str], outer: &[&str]) -> bool {
    let mut at = 0;
    inner.iter().all(|name| {
        let is = |found: &&str| {
            found == name || found.strip_prefix(*name).is_some_and(|rest| rest.starts_with('.'))
        };
        match outer[at..].iter().position(is) {
            Some(place) => {
                at += place + 1;
                true
            }
            None => false,
        }
    })
}

/// The last part of a qualified name of Python; what compilers put behind a name (`.part.0`) stays.
fn plain(name: &str) -> &str {
    name.rsplit('.').next().filter(|last| !last.starts_with(|c: char| c.is_ascii_digit())).unwrap_or(name)
}

fn check(test: &str, version: &'static str) {
    if !support::can_run(test) {
        return;
    }
    // One whose C functions have symbols.
    // py-spy looks for the interpreter in what the process was started as, which is not to be a loader.
    let folder = tempfile::tempdir().expect("a directory");
    let found = interpreters::of_version(version).and_then(|builds| {
        let build = builds.iter().find(|build| build.prefix.is_some()).unwrap_or(&builds[0]);
        own_program::started_by_itself(build, folder.path())
    });
    let build = match found {
        Ok(found) => found,
        Err(reason) => return skip(test, reason),
    };
    let with_symbols = build.program.components().any(|part| part.as_os_str() == ".pyenv");
    let py_spy = std::env::var_os("REQPROF_PY_SPY").map(PathBuf::from).filter(|path| path.exists());
    let server = start(build.command());
    let pid = server.group.pid();
    let daemon = Daemon::start(&["--pid", &pid.to_string(), "--freq", "499"]);
    println!("PROFILED {}", build.name());
    let (mut compared, mut differences) = (0, BTreeSet::new());
    for (done, route) in ROUTES.iter().enumerate() {
        let path = format!("/{}/0", route.name);
        let mut dumps = Vec::new();
        std::thread::scope(|scope| {
            let request = scope.spawn(|| Client::new(server.port).request("GET", &path, b""));
            while let Some(py_spy) = &py_spy
                && !request.is_finished()
            {
                dumps.extend(dump(py_spy, pid));
            }
            assert_eq!(request.join().expect("no panic").expect("an answer").status, 200);
        });
        let records = daemon.records_by_path("", done + 1);
        let id = records[&path]["id"].as_str().expect("an id").to_owned();
        let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
        let ours = paths(&tree);
        let stacks: Vec<Vec<&str>> =
            ours.iter().map(|(path, _)| names(path).into_iter().map(plain).collect()).collect();

        // What the source says.
        let last = *route.python.last().expect("a function");
        let leaf = if route.name == "by_zlib" { "compress" } else { last };
        let mut expected: Vec<&str> = vec!["<module>", "serve"];
        expected.extend(route.python);
        let (mut whole, mut all) = (0, 0);
        for ((path, samples), stack) in ours.iter().zip(&stacks) {
            let python: Vec<&str> = path
                .iter()
                .filter(|node| node["kind"] == "python")
                .map(|node| plain(node["name"].as_str().expect("a name")))
                .collect();
            let burning = if route.name == "by_zlib" {
                stack.contains(&"deflate")
            } else {
                python.last() == Some(&leaf)
            };
            if !burning {
                continue;
            }
            all += samples;
            let mut between: Vec<&str> = expected.clone();
            let exported = |name: &&&str| name.starts_with("Py") || **name == "deflate";
            let native = route.native.iter().filter(|name| with_symbols || exported(name));
            let at = if route.name == "by_zlib" { between.len() } else { between.len() - 1 };
            // Above the function that C calls back: the last of Python but one, except in zlib.
            let at = if route.name == "by_zlib" { at } else { at - usize::from(route.python.len() > 2) };
            between.splice(at..at, native.copied());
            let found = python == expected && is_within(&between, stack);
            if found {
                whole += samples;
            } else {
                println!("{}: {samples}: {stack:?}", route.name);
            }
        }
        println!("{}: {whole} of {all} samples have every frame, in order", route.name);
        assert!(all >= 100 && whole * 1000 >= all * 995, "{}: {whole} of {all}", route.name);

        // What py-spy says.
        for theirs in dumps {
            let Some(end) = theirs.iter().rposition(|frame| {
                plain(&frame.name).starts_with(leaf) || frame.name.contains("zlib_compress")
            }) else {
                continue;
            };
            let theirs: Vec<&Theirs> =
                theirs[..=end].iter().filter(|frame| !frame.name.starts_with("0x")).collect();
            let wanted: Vec<&str> = theirs.iter().map(|frame| plain(&frame.name)).collect();
            if !wanted.contains(&route.name) {
                continue;
            }
            let same = stacks.iter().position(|stack| is_within(&wanted, stack));
            let at = same.unwrap_or_else(|| panic!("{}: py-spy saw {wanted:?}, we {stacks:?}", route.name));
            assert!(stacks[at].len() >= wanted.len());
            compared += 1;
            for frame in &theirs[..theirs.len() - 1] {
                let node = ours[at]
                    .0
                    .iter()
                    .find(|node| plain(node["name"].as_str().unwrap_or_default()) == plain(&frame.name));
                let lines = node.and_then(|node| node["lines"].as_object());
                let (Some(line), Some(lines)) = (frame.line, lines) else { continue };
                if !lines.contains_key(&line.to_string()) {
                    let ours: Vec<&String> = lines.keys().collect();
                    differences.insert(format!("{}: py-spy has line {line}, we have {ours:?}", frame.name));
                }
            }
        }
    }
    assert!(differences.is_empty(), "lines differ: {differences:#?}");
    match py_spy {
        Some(_) => {
            println!("{compared} of py-spy's stacks are within ours");
            assert!(compared >= ROUTES.len(), "py-spy saw too little: {compared}");
        }
        None => skip(test, "REQPROF_PY_SPY names no py-spy, so only the source was compared"),
    }
}

support::interpreters::each_version!(check);

/// `--native=no`: the same stacks, and nothing of C in them.
#[test]
fn without_native_frames_only_python_is_left() {
    const TEST: &str = "without_native_frames_only_python_is_left";
    let Some(python) = support::any_python(TEST) else { return };
    let server = start(Command::new(&python.program));
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "499", "--native=no"]);
    let answer = Client::new(server.port).request("GET", "/by_sorted/0", b"").expect("an answer");
    assert_eq!(answer.status, 200);
    let id = daemon.records_by_path("", 1)["/by_sorted/0"]["id"].as_str().expect("an id").to_owned();
    let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree&view=cpu"));
    let (mut whole, mut all) = (0, 0);
    for (path, samples) in paths(&tree) {
        assert!(path.iter().all(|node| node["kind"] == "python"), "{:?}", names(&path));
        let stack: Vec<&str> = names(&path).into_iter().map(plain).collect();
        all += samples;
        if stack == ["<module>", "serve", "by_sorted", "key", "burn"] {
            whole += samples;
        }
    }
    assert!(all >= 100 && whole * 100 >= all * 98, "{whole} of {all}");
}
