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

/// Instructions that the verifier may go through for a program, and for any other one. It gives up at 1,000,000; how many
/// it needs differs between its versions. docs/kernels.md has what it needed.
const LIMITS: [(&str, u64); 3] =
    [("transfer_in", 600_000), ("transfer_out", 250_000), ("sample_walk", 250_000)];
const LIMIT: u64 = 5_000;
/// As many as the daemon loads.
const PROGRAMS: usize = 19;

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
    daemon.env("RUST_LOG", "profiler_daemon::bpf=debug");
    let daemon =
        Daemon::start_with(daemon, dir.path(), &["--pid", &server.pid().to_string(), "--freq", "499"]);

    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let messages = daemon.messages();
    let accepted = accepted(&messages);
    assert_eq!(accepted.len(), PROGRAMS, "{messages}");
    for (name, verified) in &accepted {
        println!(
            "{}: {name}: {} instructions verified",
            release.trim(),
            verified.map_or("?".into(), |n| n.to_string())
        );
        let limit = LIMITS.iter().find(|(program, _)| program == name).map_or(LIMIT, |(_, limit)| *limit);
        assert!(verified.is_none_or(|count| count > 0 && count <= limit), "{name}: more than {limit}");
    }

    let (mut kept, mut done) = (Client::new(port), Vec::<Exchange>::new());
    for number in 0..10 {
        for client in [&mut kept, &mut Client::new(port)] {
            let target = format!("/{}", done.len());
            done.push(client.request("GET", &target, b"").unwrap_or_else(|e| panic!("{number}: {e}")));
        }
    }
    daemon.recorded_exactly(&done);
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
