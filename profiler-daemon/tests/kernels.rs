//! What has to hold on every kernel: the verifier accepts all programs, and a real server's requests have their times and
//! their stacks. `cargo xtask vm` runs this on kernels other than the machine's own.

mod support;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::daemon::reqprof;
use support::http::{Client, Exchange};
use support::process::{Group, free_port};
use support::{Daemon, wait_for};

/// Instructions and states that the verifier may go through for a program, and for any other one. It gives up at 1,000,000
/// instructions, and states are memory; how many it needs differs between its versions. docs/kernels.md has what it needed.
const LIMITS: [(&str, Verified); 7] = [
    ("transfer_in", Verified { instructions: 450_000, states: 15_000 }),
    ("transfer_out", Verified { instructions: 250_000, states: 7_000 }),
    // The same code in another kind of program, and the calls of all kinds in one.
    ("syscall_in", Verified { instructions: 450_000, states: 15_000 }),
    ("syscall_out", Verified { instructions: 250_000, states: 7_000 }),
    ("syscall_exit", Verified { instructions: 15_000, states: 700 }),
    // What a session works on.
    ("tls_returned", Verified { instructions: 10_000, states: 400 }),
    ("sample_walk", Verified { instructions: 250_000, states: 9_000 }),
];
const LIMIT: Verified = Verified { instructions: 5_000, states: 150 };
/// As many as the daemon loads.
const PROGRAMS: usize = 34;

#[test]
fn programs_load_and_a_server_is_profiled() {
    let Some(python) = support::any_python("programs_load_and_a_server_is_profiled") else { return };
    let port = free_port();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/kernels/server.py");
    let mut command = Command::new(&python.program);
    let server = Group::spawn(command.arg(program).arg(port.to_string()).stdin(Stdio::null()));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());

    let dir = tempfile::tempdir().expect("a directory");
    let mut daemon = reqprof();
    let (library, log) = (dir.path().join("verifier.so"), dir.path().join("verified"));
    build(&library);
    daemon
        .env("RUST_LOG", "profiler_daemon::bpf=debug")
        .env("LD_PRELOAD", &library)
        .env("VERIFIER_LOG", &log);
    let daemon =
        Daemon::start_with(daemon, dir.path(), &["--pid", &server.pid().to_string(), "--freq", "499"]);

    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let messages = daemon.messages();
    let accepted = accepted(&messages);
    assert_eq!(accepted.len(), PROGRAMS, "{messages}");
    let verified = verified(&std::fs::read_to_string(&log).expect("what the verifier said"));
    for (name, count) in &accepted {
        let Verified { instructions, states } = verified[name];
        println!("{}: {name}: {instructions} instructions, {states} states verified", release.trim());
        let limit = LIMITS.iter().find(|(program, _)| program == name).map_or(LIMIT, |(_, limit)| *limit);
        assert!((1..=limit.instructions).contains(&instructions), "{name}: {instructions} of {limit:?}");
        assert!((1..=limit.states).contains(&states), "{name}: {states} of {limit:?}");
        // What the kernel says of a program that is loaded is the same.
        assert!(count.is_none_or(|count| count == instructions), "{name}: {count:?}");
    }

    // An emulated machine takes its time to make unwind tables, and the daemon waits for them only so long.
    wait_for("the unwind tables", || (daemon.status()["unwind"]["processes"] == 1).then_some(()));
    let (mut kept, mut done) = (Client::new(port), Vec::<Exchange>::new());
    for number in 0..10 {
        for client in [&mut kept, &mut Client::new(port)] {
            let target = format!("/{}", done.len());
            done.push(client.request("GET", &target, b"").unwrap_or_else(|e| panic!("{number}: {e}")));
        }
    }
    daemon.recorded_exactly(&done);
    // Tables are the kernel's maps: whether they can be written, and read by the programs, differs between kernels.
    let stacks = &daemon.status()["unwind"]["stacks"];
    let (samples, complete) = (&stacks["samples"], &stacks["complete"]);
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("{stacks}"));
    assert!(number(samples) >= done.len() as u64 && number(complete) * 10 >= number(samples) * 9, "{stacks}");
    println!("PROFILED {} on {}", python.program.display(), release.trim());
    for (path, record) in daemon.records_by_path("", done.len()) {
        assert_eq!(record["attribution"], "thread", "{path}: {record:#}");
        assert_ne!(record["samples"], 0, "{path}: {record:#}");
        let id = record["id"].as_str().expect("an id");
        let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded")).text();
        assert!(
            stacks.lines().any(|stack| stack.contains("Handler.do_GET") && stack.contains("burn")),
            "{path}: {stacks}"
        );
    }
}

/// What the verifier went through.
#[derive(Clone, Copy, Debug)]
struct Verified {
    instructions: u64,
    states: u64,
}

/// A library that brings the verifier a log, and keeps what is in it.
fn build(library: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/kernels/verifier.c");
    let mut compiler = Command::new("cc");
    let built = compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(library).arg(source).output();
    let built = built.expect("a C compiler");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// By program: `NAME processed N insns (limit 1000000) max_states_per_insn N total_states N peak_states N mark_read N`; 7.2
/// says before what each of its functions had of it.
fn verified(log: &str) -> BTreeMap<String, Verified> {
    log.lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = |word: &str| {
                words.iter().position(|w| *w == word).unwrap_or_else(|| panic!("no {word}: {line}"))
            };
            let number = |at: usize| words[at].parse().expect("a number");
            let (instructions, states) = (number(at("insns") - 1), number(at("total_states") + 1));
            (words[0].to_owned(), Verified { instructions, states })
        })
        .collect()
}

/// The programs that the verifier accepted, by name, and how many instructions it went through; kernels tell since 5.16.
fn accepted(messages: &str) -> BTreeMap<String, Option<u64>> {
    messages
        .lines()
        .filter(|line| line.contains("the verifier accepted a program"))
        .map(|line| {
            let field = |name: &str| line.split_once(name)?.1.split_whitespace().next();
            let name = field("name=").expect("a name").trim_matches('"');
            (name.to_owned(), field("verified=").map(|count| count.parse().expect("a number")))
        })
        .collect()
}
