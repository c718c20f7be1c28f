//! uWSGI, which loads the interpreter as a plugin and gives each application one of its own.
//!
//! Oracle: the client's own log, and the source of the applications. The second one's threads run in another interpreter
//! than the one that their thread-specific slot leads to.

mod support;

use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use support::http::{Client, Exchange};
use support::process::{Group, free_port};
use support::{Daemon, skip, wait_for};

const PROGRAM: &str = "/usr/bin/uwsgi-core";
const PLUGIN: &str = "/usr/lib/uwsgi/plugins/python311_plugin.so";
/// Of each application, on each connection.
const ROUNDS: usize = 15;
const CLIENTS: usize = 3;
const APPLICATIONS: [&str; 2] = ["first", "second"];

fn start(threads: u32, folder: &Path) -> (u16, Group) {
    let port = free_port();
    let mut command = Command::new(PROGRAM);
    command.args(["--plugin", "python311", "--http-socket", &format!("127.0.0.1:{port}")]);
    command.args(["--master", "--processes", "2", "--threads", &threads.to_string()]);
    for name in APPLICATIONS {
        let program = folder.join(format!("{name}.py"));
        let text = include_str!("apps/uwsgi/app.py").replace("NAME", name);
        std::fs::write(&program, text).expect("a program");
        command.arg("--mount").arg(format!("/{name}={}", program.display()));
    }
    command.args(["--manage-script-name", "--need-app", "--disable-logging", "--die-on-term"]);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let group = Group::spawn(&mut command);
    wait_for("uWSGI to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    (port, group)
}

fn check(test: &str, threads: u32) {
    if !support::can_run(test) {
        return;
    }
    if !Path::new(PROGRAM).exists() || !Path::new(PLUGIN).exists() {
        return skip(test, format!("there is no {PROGRAM} with {PLUGIN}"));
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (port, group) = start(threads, folder.path());
    let daemon = Daemon::start(&["--pid", &group.pid().to_string(), "--freq", "999"]);
    let exchanges: Vec<Exchange> = std::thread::scope(|scope| {
        let clients = (0..CLIENTS).map(|client| {
            scope.spawn(move || {
                let mut done = Vec::new();
                for round in 0..ROUNDS {
                    for name in APPLICATIONS {
                        let target = format!("/{name}/{client}-{round}");
                        let answer = Client::new(port).request("GET", &target, b"").expect("an answer");
                        assert_eq!(answer.status, 200);
                        done.push(answer);
                    }
                }
                done
            })
        });
        let clients: Vec<_> = clients.collect();
        clients.into_iter().flat_map(|client| client.join().expect("no panic")).collect()
    });
    daemon.recorded_exactly(&exchanges);
    let records = daemon.records_by_path("", exchanges.len());
    for name in APPLICATIONS {
        let (mut burning, mut whole, mut all) = (0, 0, 0);
        let burn = format!("burn_{name}");
        let own = records.iter().filter(|(path, _)| path.split('/').nth(1) == Some(name));
        for (path, record) in own {
            assert_eq!(record["attribution"], "thread", "{path}: {record:#}");
            if record["profile"] != true {
                continue;
            }
            let id = record["id"].as_str().expect("an id");
            let stacks = daemon.get(&format!("/api/v1/requests/{id}/profile?format=folded&view=cpu")).text();
            for line in stacks.lines() {
                let (stack, weight) = line.rsplit_once(' ').expect("a weight");
                let weight: u64 = weight.parse().expect("a number");
                let names: Vec<&str> =
                    stack.split(';').map(|frame| frame.split(' ').next().unwrap_or_default()).collect();
                // What uWSGI does itself for a request is not asked about, nor its call before the interpreter's loop.
                let Some(call) = names.iter().position(|frame| *frame == "python_call") else { continue };
                assert!(names[..call].contains(&"uwsgi_request_wsgi"), "{line}");
                let application = names.iter().position(|frame| *frame == "application");
                // It stands for Python frames that are not there.
                let missing = names.contains(&"_PyEval_EvalFrameDefault");
                if application.is_none() && !missing {
                    continue;
                }
                all += weight;
                match application {
                    Some(at) if !missing => {
                        whole += weight;
                        burning += if names.get(at + 1) == Some(&burn.as_str()) { weight } else { 0 };
                    }
                    _ => println!("{path}: {line}"),
                }
                let other = |other: &&str| *other != name && stack.contains(&format!("/{other}.py"));
                let other = APPLICATIONS.iter().any(other);
                assert!(!other, "{path}: {line}");
            }
        }
        println!("{name}: {whole} of {all} us have the application's whole chain");
        // A third of what they burned at least, on a machine whose timers are late.
        assert!(all > 20_000 * (ROUNDS * CLIENTS) as u64 / 3, "{name}: too few samples to judge: {all} us");
        assert!(whole * 1000 >= all * 995, "{name}: {whole} of {all} us");
        // The rest is `start_response`.
        assert!(burning * 100 >= all * 95, "{name}: {burning} of {all} us are in {burn}");
    }
}

#[test]
fn every_application_has_its_stacks() {
    check("every_application_has_its_stacks", 1);
}

#[test]
fn every_application_has_its_stacks_in_threads() {
    check("every_application_has_its_stacks_in_threads", 3);
}
