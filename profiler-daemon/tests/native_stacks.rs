//! Native code without frame pointers: every sample of it has its whole stack.
//!
//! The oracle is a server in C whose functions call each other in an order that its source says, built without frame
//! pointers. All that its requests burn must be found below all of these functions, in this order.

mod support;

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::http::Client;
use support::process::{Group, free_port};
use support::{Daemon, skip, tree, wait_for};

/// Of a thousand samples so many have the whole stack, at least.
const WHOLE: u64 = 995;
/// Requests of each kind: some 160 samples at 400 Hz each, to which the kernel's clock of 250 Hz or more comes close.
const REQUESTS: usize = 3;
const ROUTES: [&str; 5] = ["direct", "sorted", "signal", "linked", "plugin"];

struct Server {
    port: u16,
    group: Group,
    _folder: tempfile::TempDir,
}

fn apps() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/nested")
}

fn compile(arguments: &[&str], source: &str, to: &Path) -> bool {
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"]).args(arguments);
    let built = compiler.arg("-o").arg(to).arg(apps().join(source)).args(["-lm", "-ldl"]).status();
    built.is_ok_and(|status| status.success())
}

/// Copies the libraries that a program needs below another root, where the program looks for them.
fn furnish(root: &Path, program: &Path) {
    let listed = Command::new("ldd").arg(program).output().expect("the loader's list");
    let text = String::from_utf8(listed.stdout).expect("text");
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(&library[1..]);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(library, &to).expect("a copy");
    }
}

impl Server {
    /// `None`: there is no compiler.
    fn start(how: &str, contained: bool) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let (program, plugin) = (folder.path().join("nested"), folder.path().join("plugin.so"));
        // Bound lazily, as programs were for decades: calls of libraries go through the linkage table.
        if !compile(&["-pthread", "-Wl,-z,lazy"], "server.c", &program)
            || !compile(&["-shared", "-fPIC"], "plugin.c", &plugin)
        {
            return None;
        }
        let port = free_port();
        let mut command = if contained {
            furnish(folder.path(), &program);
            let mut command = Command::new("unshare");
            command.args(["--mount", "--pid", "--fork", "--kill-child", "chroot"]).arg(folder.path());
            command.args(["/nested", &port.to_string(), "/plugin.so"]);
            command
        } else {
            let mut command = Command::new(&program);
            command.arg(port.to_string()).arg(&plugin);
            command
        };
        command.arg(how).stdin(Stdio::null()).stdout(Stdio::null());
        let group = Group::spawn(&mut command);
        wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
        Some(Self { port, group, _folder: folder })
    }
}

/// The functions that call each other for a request of this kind, the outermost first.
fn chain(route: &str, outermost: &[&str]) -> Vec<String> {
    let mut chain: Vec<String> = outermost.iter().map(|name| (*name).to_owned()).collect();
    chain.push("serve".into());
    chain.extend((1..=40).map(|level| format!("level_{level}")));
    chain.push("at_end".into());
    let rest: &[&str] = match route {
        "direct" => &["fire"],
        "sorted" => &["sorted", "qsort", "compare", "fire"],
        "signal" => &["signalled", "handler", "fire"],
        "plugin" => &["plugged", "plugin", "fire"],
        "linked" => &["linked_fire"],
        other => panic!("{other}"),
    };
    chain.extend(rest.iter().map(|name| (*name).to_owned()));
    chain
}

/// Whether these functions are in the stack in this order. Others may be in between: the C library's, and the compiler's
/// parts of one (`qsort_r`, `level_4.cold`), which is why names are compared by how they begin; the C library's with debug
/// symbols is `__qsort_r`.
fn is_whole(stack: &[&str], chain: &[String]) -> bool {
    let mut at = 0;
    for name in chain {
        match stack[at..].iter().position(|found| found.trim_start_matches('_').starts_with(name.as_str())) {
            Some(place) => at += place + 1,
            None => return false,
        }
    }
    true
}

/// Samples below the last function of the chain with all of it above them, and samples that have its last function.
fn count(tree: &Value, chain: &[String], wrong: &mut Vec<String>) -> (u64, u64) {
    let last = chain.last().expect("a chain");
    let (mut whole, mut all) = (0, 0);
    tree::walk(tree, &mut |ancestors, node| {
        let samples = |node: &Value| node["samples"].as_u64().expect("a number of samples");
        let own = samples(node) - node["children"].as_array().into_iter().flatten().map(samples).sum::<u64>();
        if own == 0 {
            return;
        }
        let stack: Vec<&str> =
            ancestors.iter().chain([&node]).filter_map(|frame| frame["name"].as_str()).collect();
        if !stack.iter().any(|name| name.starts_with(last.as_str())) && !is_burning(&stack) {
            return;
        }
        all += own;
        if is_whole(&stack, chain) {
            whole += own;
        } else if wrong.len() < 5 {
            wrong.push(format!("{own}: {stack:?}"));
        }
    });
    (whole, all)
}

/// Whether one of the functions is at work that nothing but the fire calls.
fn is_burning(stack: &[&str]) -> bool {
    stack
        .last()
        .is_some_and(|leaf| ["bare", "spilling", "fmod", "cbrt"].iter().any(|name| leaf.contains(name)))
}

fn check(test: &str, how: &str, contained: bool, outermost: &[&str]) {
    if !support::can_run(test) {
        return;
    }
    let Some(server) = Server::start(how, contained) else { return skip(test, "no C compiler") };
    let daemon = Daemon::start(&["--pid", &server.group.pid().to_string(), "--freq", "400"]);
    for route in ROUTES {
        for n in 0..REQUESTS {
            let answer = Client::new(server.port).request("GET", &format!("/{route}/{n}"), b"");
            assert_eq!(answer.expect("an answer").status, 200);
        }
    }
    let records = daemon.records_by_path("", ROUTES.len() * REQUESTS);
    let mut report = Vec::new();
    for route in ROUTES {
        let chain = chain(route, outermost);
        let (mut whole, mut all, mut wrong) = (0, 0, Vec::new());
        for n in 0..REQUESTS {
            let id = records[&format!("/{route}/{n}")]["id"].as_str().expect("an id").to_owned();
            let tree = daemon.json(&format!("/api/v1/requests/{id}/profile?format=tree"));
            // The first request that loads the library is how it becomes known.
            if route == "plugin" && n == 0 {
                continue;
            }
            let (w, a) = count(&tree, &chain, &mut wrong);
            (whole, all) = (whole + w, all + a);
        }
        report.push(format!("{route}: {whole} of {all}; {wrong:?}"));
        assert!(all >= 50, "too few samples to tell: {report:#?}");
        assert!(whole * 1000 >= all * WHOLE, "{report:#?}");
    }
    println!("{report:#?}");

    let targets = daemon.json("/api/v1/targets");
    let all = targets["targets"].as_array().expect("a list");
    let unwind = &all.iter().find(|target| target["comm"] == "nested").expect("the server")["unwind"];
    let (samples, complete) = (unwind["samples"].as_u64(), unwind["complete"].as_u64());
    println!("{unwind}; {}", daemon.status()["unwind"]);
    let (samples, complete) = (samples.expect("a number"), complete.expect("a number"));
    assert!(samples > 0 && complete * 1000 >= samples * WHOLE, "{unwind}");
    assert_eq!(daemon.status()["unwind"]["stacks"]["samples"], samples);
}

#[test]
fn stacks_of_the_main_thread_are_whole() {
    check("stacks_of_the_main_thread_are_whole", "main", false, &["main"]);
}

#[test]
fn stacks_of_threads_are_whole() {
    check("stacks_of_threads_are_whole", "threads", false, &["thread"]);
}

/// In namespaces of its own, with a root of its own: its files are at no path of this machine that it would name.
#[test]
fn stacks_in_a_container_are_whole() {
    check("stacks_in_a_container_are_whole", "main", true, &["main"]);
}
