//! What goes wrong outside: missing privileges and kernel features, wrong arguments, hostile bytes. Each has an exit
//! code or a status that says so, and nothing of it disturbs the rest.

mod support;

use std::fs::{self, Permissions};
use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use support::daemon::reqprof;
use support::http::Client;
use support::process::{Group, free_port, signal};
use support::{Daemon, Gunicorn, wait_for};
use tempfile::TempDir;

/// A `reqprof daemon` that is expected to end by itself.
fn daemon(mut program: Command, store: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let listen = format!("127.0.0.1:{}", free_port());
    program.args(["daemon", "--listen", &listen, "--store"]).arg(store).args(arguments);
    let Output { status, stderr, .. } = ends(&mut program);
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// Runs a command to its end, which must come.
fn ends(command: &mut Command) -> Output {
    let dir = TempDir::new().expect("a directory");
    let messages = dir.path().join("stderr");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(&messages).expect("a file for messages"));
    let status = Group::spawn(command).wait();
    Output { status, stdout: Vec::new(), stderr: fs::read(&messages).expect("its messages") }
}

#[track_caller]
fn get(port: u16, target: &str) {
    let answer = Client::new(port).request("GET", target, b"").unwrap_or_else(|e| panic!("{target}: {e}"));
    assert_eq!(answer.status, 200, "{target}");
}

#[test]
fn an_unknown_pid_is_a_mistake_of_the_user() {
    if !support::can_run("an_unknown_pid_is_a_mistake_of_the_user") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    // The kernel's largest is 2^22 - 1.
    let (code, messages) = daemon(reqprof(), dir.path(), &["--pid", "4194304"]);
    assert_eq!(code, Some(2), "{messages}");
    assert!(messages.contains("4194304"), "{messages}");
    let output = ends(reqprof().args(["record", "-d", "1s", "-p", "4194304", "-o"]).arg(dir.path()));
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_target_that_exits_does_not_end_the_daemon() {
    if !support::can_run("a_target_that_exits_does_not_end_the_daemon") {
        return;
    }
    let target = Group::spawn(Command::new("sleep").arg("1000"));
    let pid = target.pid();
    let mut daemon = Daemon::start(&["--pid", &pid.to_string()]);
    assert!(daemon.target_pids().contains(&pid));
    drop(target);
    wait_for("the target to be forgotten", || (!daemon.target_pids().contains(&pid)).then_some(()));
    assert!(daemon.is_running());
    assert_eq!(daemon.get("/-/ready").status, 200);
}

#[test]
fn without_privileges_the_remedy_is_named() {
    if !support::can_run("without_privileges_the_remedy_is_named") {
        return;
    }
    // Where anybody may run it.
    let dir = TempDir::new().expect("a directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("our own directory");
    let program = dir.path().join("reqprof");
    fs::copy(env!("CARGO_BIN_EXE_reqprof"), &program).expect("a copy");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("our own file");
    const NOBODY: u32 = 65_534;
    for arguments in [&["daemon"][..], &["record", "-d", "1s"]] {
        let mut command = Command::new(&program);
        command.args(arguments).current_dir("/").uid(NOBODY).gid(NOBODY);
        let output = ends(&mut command);
        let messages = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {messages}");
        assert!(messages.contains("root") && messages.contains("CAP_BPF"), "{messages}");
    }
}

#[test]
fn without_the_kernels_types_requests_are_still_recorded() {
    let name = "without_the_kernels_types_requests_are_still_recorded";
    let Some(python) = support::any_python(name) else { return };
    let server = Gunicorn::start(&python, 1, &[]);
    let dir = TempDir::new().expect("a directory");
    let empty = dir.path().join("empty");
    fs::write(&empty, b"").expect("an empty file");
    // A mount namespace of its own, in which the file with the types is empty.
    let mut program = Command::new("unshare");
    program
        .args(["--mount", "sh", "-c"])
        .arg("mount --bind \"$0\" /sys/kernel/btf/vmlinux && exec \"$@\"")
        .arg(&empty)
        .arg(env!("CARGO_BIN_EXE_reqprof"));
    let daemon = Daemon::start_with(program, dir.path(), &["--pid", &server.master().to_string()]);
    let types = &daemon.status()["probes"]["kernel types"];
    assert_eq!(types["state"], "disabled", "{types:#}");
    let reason = types["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("/sys/kernel/btf/vmlinux") && reason.contains("Remedy"), "{reason}");
    for n in 0..10 {
        get(server.port, &format!("/a/{n}"));
    }
    let records = daemon.records_by_path("", 10);
    assert!(records.values().all(|record| record["status"] == 200 && record["outcome"] == "complete"));
}

#[test]
fn a_port_that_is_taken_is_named_with_the_remedy() {
    if !support::can_run("a_port_that_is_taken_is_named_with_the_remedy") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = other.local_addr().expect("its address").to_string();
    let output = ends(reqprof().args(["daemon", "--listen", &address, "--store"]).arg(dir.path()));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{messages}");
    assert!(messages.contains(&address) && messages.contains("--listen"), "{messages}");
}

#[test]
fn a_store_has_one_daemon() {
    if !support::can_run("a_store_has_one_daemon") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let nobody = std::process::id().to_string();
    let mut first = Daemon::start_in(dir.path(), &["--pid", &nobody]);
    let (code, messages) = daemon(reqprof(), &dir.path().join("store"), &["--pid", &nobody]);
    assert_eq!(code, Some(1), "{messages}");
    assert!(messages.contains(&first.pid().to_string()), "{messages}");
    assert!(first.is_running());
    assert_eq!(first.get("/-/ready").status, 200);
}

#[test]
fn a_store_that_others_may_write_is_refused() {
    if !support::can_run("a_store_that_others_may_write_is_refused") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).expect("our own directory");
    let (code, messages) = daemon(reqprof(), dir.path(), &[]);
    assert_eq!(code, Some(1), "{messages}");
    assert!(messages.contains(&dir.path().display().to_string()), "{messages}");
    assert_eq!(fs::read_dir(dir.path()).expect("the directory").count(), 0, "it wrote there");
}

#[test]
fn a_configuration_that_is_wrong_is_named_by_file_and_line() {
    if !support::can_run("a_configuration_that_is_wrong_is_named_by_file_and_line") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("reqprof.yaml");
    let path = file.to_str().expect("a name in UTF-8");
    for (text, line) in [
        ("freq: 99\nno_such_key: 1\n", 2),
        ("freq: 99\nlisten: nowhere\n", 2),
        ("freq: ninety\n", 1),
        ("store:\n  dir: /tmp/x\n  colour: red\n", 3),
        ("freq: [\n", 1),
    ] {
        fs::write(&file, text).expect("our own file");
        let (code, messages) = daemon(reqprof(), dir.path(), &["--config", path]);
        assert_eq!(code, Some(2), "{text:?}: {messages}");
        assert!(messages.contains(&format!("{path}:{line}")), "{text:?}: {messages}");
    }
    for unreadable in ["/no/such/file.yaml", "/proc"] {
        let (code, messages) = daemon(reqprof(), dir.path(), &["--config", unreadable]);
        assert_eq!(code, Some(2), "{messages}");
        assert!(messages.contains(unreadable), "{messages}");
    }
}

#[test]
fn an_id_is_never_a_path() {
    if !support::can_run("an_id_is_never_a_path") {
        return;
    }
    let daemon = Daemon::start(&["--pid", &std::process::id().to_string()]);
    for id in ["..", "%2e%2e", "..%2fx", "%2e%2e%2fx", "..%5cx", "%00", "0", "../x", "..%2f..%2fetc%2fpasswd"]
    {
        for suffix in ["", "/profile"] {
            let answer = daemon.get(&format!("/api/v1/requests/{id}{suffix}"));
            assert_eq!(answer.status, 400, "{id}{suffix}: {}", answer.text());
            assert_eq!(answer.json()["error"]["code"], "invalid_id", "{id}{suffix}: {}", answer.text());
        }
    }
}

#[test]
fn hostile_bytes_disturb_neither_daemon_nor_server() {
    let Some(python) = support::any_python("hostile_bytes_disturb_neither_daemon_nor_server") else { return };
    let long_line = [b"GET /".to_vec(), vec![b'x'; 100_000], b" HTTP/1.1\r\n\r\n".to_vec()].concat();
    let many_headers =
        [b"GET /a/1 HTTP/1.1\r\nHost: truth\r\n".to_vec(), b"X: y\r\n".repeat(5_000), b"\r\n".to_vec()]
            .concat();
    let noise: Vec<u8> = (0..50_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let messages: [&[u8]; 13] = [
        b"\0\0\0\0\0\0\0\0",
        b"GET",
        b"GET ",
        b"GET /a/1",
        b"GET /a/1 HTTP/1.1\r\n",
        b"GET /a/1 HTTP/9.9\r\n\r\n",
        b"GET /a\x1b[2J\xff\xfe HTTP/1.1\r\nHost: truth\r\n\r\n",
        b"GET /a/1 HTTP/1.1\r\nHost: truth\r\nEvil: a\nInjected: b\r\rX\r\n\r\n",
        b"POST /echo/1 HTTP/1.1\r\nHost: truth\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /echo/1 HTTP/1.1\r\nHost: truth\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        &long_line,
        &many_headers,
        &noise,
    ];
    for arguments in [&[][..], &["--worker-class", "gthread", "--threads", "2"]] {
        let server = Gunicorn::start(&python, 2, arguments);
        let mut daemon = Daemon::start(&["--pid", &server.master().to_string()]);
        for (number, message) in messages.iter().enumerate() {
            let mut stream = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
            // The server may hang up before it has read everything.
            let _ = stream.write_all(message);
            let _ = stream.shutdown(Shutdown::Write);
            let path = format!("/b/{number}");
            get(server.port, &path);
            let record = daemon.record_of(&path);
            assert_eq!(
                (&record["status"], &record["outcome"]),
                (&200.into(), &"complete".into()),
                "{record:#}"
            );
        }
        for record in daemon.records("") {
            let path = record["path"].as_str().unwrap_or_default();
            assert!(!path.chars().any(char::is_control) && path.len() <= 1_024, "{record:#}");
        }
        assert!(daemon.is_running());
        assert_eq!(daemon.status()["lost"]["decode.malformed"], 0);
    }
}

#[test]
fn a_server_killed_as_a_whole_ends_its_requests() {
    let Some(python) = support::any_python("a_server_killed_as_a_whole_ends_its_requests") else { return };
    let server = Gunicorn::start(&python, 2, &[]);
    let mut daemon = Daemon::start(&["--pid", &server.master().to_string()]);
    let port = server.port;
    let clients: Vec<_> = (0..2)
        .map(|n| {
            let target = format!("/sleep/{n}?ms=10000");
            std::thread::spawn(move || Client::new(port).request("GET", &target, b""))
        })
        .collect();
    wait_for("both requests to be open", || (daemon.status()["requests"]["open"] == 2).then_some(()));
    let workers = server.workers();
    signal(server.master(), libc::SIGKILL);
    workers.into_iter().for_each(|pid| signal(pid, libc::SIGKILL));
    for client in clients {
        assert!(client.join().expect("no panic").is_err());
    }
    for path in ["/sleep/0", "/sleep/1"] {
        let record = daemon.record_of(path);
        assert_eq!(record["outcome"], "exit", "{record:#}");
    }
    wait_for("the targets to be forgotten", || daemon.target_pids().is_empty().then_some(()));
    assert!(daemon.is_running());
}

/// Answers whatever it is sent, as servers of HTTP/0.9 did.
const ANSWERS_ANYTHING: &str = "
import socket, sys
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True:
    client, _ = listener.accept()
    client.recv(100)
    client.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok')
    client.close()
";

#[test]
fn what_was_not_asked_to_the_end_is_not_made_up() {
    let Some(python) = support::any_python("what_was_not_asked_to_the_end_is_not_made_up") else { return };
    let port = free_port();
    let server =
        Group::spawn(Command::new(&python.program).args(["-c", ANSWERS_ANYTHING, &port.to_string()]));
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    let daemon = Daemon::start(&["--pid", &server.pid().to_string()]);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.write_all(b"GET /x").expect("sent");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).expect("an answer");
    assert!(answer.ends_with("ok"), "{answer}");
    let record = wait_for("a record", || daemon.records("").into_iter().next());
    for field in ["method", "path", "route"] {
        assert!(record[field].is_null(), "{record:#}");
    }
    assert_eq!((&record["status"], &record["outcome"]), (&200.into(), &"incomplete".into()), "{record:#}");
    let routes = daemon.json("/api/v1/routes");
    assert!(routes["routes"][0]["route"].is_null() && routes["routes"][0]["errors"] == 1, "{routes:#}");
}
