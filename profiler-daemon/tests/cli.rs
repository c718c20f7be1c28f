//! The program as a user types it: exit codes, what goes to stdout and what to stderr.

#[path = "support/skip.rs"]
mod skip;

use std::fs;
use std::process::{Command, Output, Stdio};

use skip::skip;

fn reqprof(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_reqprof"))
        .args(arguments)
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .output()
        .expect("the program runs")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("ended by itself")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("text")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("text")
}

#[test]
fn wrong_arguments_end_with_2_and_nothing_on_stdout() {
    for arguments in [
        &["--no-such-flag"][..],
        &["daemon", "--no-such-flag"],
        &["no-such-command"],
        &[],
        &["record", "-d", "soon"],
        &["record", "-d", "30"],
        &["daemon", "--freq", "0"],
        &["daemon", "--freq", "10000"],
        &["daemon", "--pid", "0"],
        &["daemon", "--all", "--pid", "1"],
        &["daemon", "--port", "70000"],
        &["daemon", "--comm", "["],
        &["daemon", "--prof-file", "{user}"],
        &["daemon", "--format", "xml"],
        &["show", "../x"],
        &["export", "-o", "x.svg"],
        &["check-config"],
        &["--color", "sometimes", "man"],
        &["diff", "a", "b", "--json"],
        &["capture", "--route", "/x", "--next", "100"],
        &["record", "--pid", "1", "--", "true"],
        &["record", "--all", "--", "true"],
        &["export", "0123456789abcdef01234567", "-o", "x.html"],
        &["export", "0123456789abcdef01234567", "-f", "html", "-o", "x"],
    ] {
        let output = reqprof(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn an_error_names_the_value_and_the_reason() {
    let output = reqprof(&["record", "-d", "soon"]);
    assert!(stderr(&output).contains("`soon`: not a duration"), "{}", stderr(&output));
    let output = reqprof(&["daemon", "--prof-file", "a/{path}"]);
    assert!(stderr(&output).contains("'/' is not allowed in a file name"), "{}", stderr(&output));
}

#[test]
fn what_is_planned_says_so() {
    let id = "0123456789abcdef01234567";
    for arguments in [
        &["diff", id, id][..],
        &["capture", "--next", "1"],
        &["export", id, "-o", "x.html"],
        &["export", id, "-f", "pstats", "-o", "x"],
        &["daemon", "--format", "callgrind"],
    ] {
        let output = reqprof(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert!(stderr(&output).contains("planned, not in this version"), "{}", stderr(&output));
    }
}

#[test]
fn wrong_arguments_are_coloured_as_told() {
    for (arguments, coloured) in [
        (&["--color=always", "--no-such-flag"][..], true),
        (&["daemon", "--color", "always", "--no-such-flag"], true),
        (&["--color=never", "--no-such-flag"], false),
        (&["--no-such-flag"], false),
        (&["record", "--no-such-flag", "--", "--color=always"], false),
    ] {
        let output = reqprof(arguments);
        assert_eq!((code(&output), stderr(&output).contains('\u{1b}')), (2, coloured), "{arguments:?}");
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for arguments in [&["--help"][..], &["record", "--help"], &["help", "daemon"], &["--version"]] {
        let output = reqprof(arguments);
        assert_eq!(code(&output), 0, "{arguments:?}");
        assert!(output.stderr.is_empty() && !output.stdout.is_empty(), "{arguments:?}");
    }
    let help = reqprof(&["--help"]);
    for command in [
        "daemon",
        "record",
        "requests",
        "routes",
        "targets",
        "show",
        "export",
        "doctor",
        "check-config",
        "completions",
        "man",
    ] {
        assert!(stdout(&help).contains(&format!("\n  {command} ")), "{command}");
    }
    assert!(!stdout(&help).contains("replay"), "hidden");
    let record = reqprof(&["record", "--help"]);
    for flag in [
        "-p, --pid",
        "-a, --all",
        "--comm",
        "--exe",
        "--port",
        "--route",
        "-F, --freq",
        "--rate]",
        "--listen",
        "--store ",
        "--prof-path",
        "--prof-file",
        "--format",
        "-d, --duration",
        "-o, --output",
    ] {
        assert!(stdout(&record).contains(flag), "{flag} in\n{}", stdout(&record));
    }
}

#[test]
fn check_config_names_file_line_and_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("reqprof.yaml");
    let path = file.to_str().expect("text");

    fs::write(&file, "freq: 99\nstore:\n  max_size: 1GiB\n").expect("written");
    let output = reqprof(&["check-config", path]);
    assert_eq!((code(&output), stdout(&output)), (0, format!("{path}: valid\n").as_str()));

    fs::write(&file, "# comment\nfreq: 99\nstore:\n  max_sise: 1GiB\n").expect("written");
    let output = reqprof(&["check-config", path]);
    assert_eq!(code(&output), 2);
    let expected =
        format!("error: {path}:4:3: unknown key `max_sise` in `store`; did you mean `max_size`?\n");
    assert_eq!(stderr(&output), expected, "no colours without a terminal");

    let output = reqprof(&["--color=always", "check-config", path]);
    assert!(stderr(&output).contains("\u{1b}["));

    fs::write(&file, "freq: 12000\n").expect("written");
    let output = reqprof(&["check-config", path]);
    assert_eq!(code(&output), 2);
    assert!(
        stderr(&output).starts_with(&format!("error: {path}:1:7: freq: `12000`: ")),
        "{}",
        stderr(&output)
    );

    let output = reqprof(&["check-config", "/no/such/file"]);
    assert_eq!(code(&output), 2);
    assert_eq!(
        stderr(&output),
        "error: /no/such/file: cannot be read: No such file or directory (os error 2)\n"
    );
}

#[test]
fn completions_are_scripts_that_the_shell_accepts() {
    let script = tempfile::NamedTempFile::new().expect("a file");
    // Each shell's own way of reading a script without running it.
    for (shell, read_only) in [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")] {
        let output = reqprof(&["completions", shell]);
        assert_eq!(code(&output), 0, "{shell}");
        assert!(stdout(&output).contains("check-config"), "{shell}");
        fs::write(script.path(), &output.stdout).expect("written");
        match Command::new(shell).arg(read_only).arg(script.path()).output() {
            Ok(read) => assert!(read.status.success(), "{shell}: {}", stderr(&read)),
            Err(error) => skip(
                "completions_are_scripts_that_the_shell_accepts",
                format!("{shell} does not run: {error}"),
            ),
        }
    }
    assert_eq!(code(&reqprof(&["completions", "cmd.exe"])), 2);
}

#[test]
fn the_manual_is_a_manual() {
    let output = reqprof(&["man"]);
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).contains(".TH reqprof"), "{}", stdout(&output));
    assert!(stdout(&output).contains("REQPROF CHECK-CONFIG"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_reqprof"))
        .arg("man")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((code(&output), stderr(&output)), (0, ""));
}

#[test]
fn doctor_says_the_same_to_people_and_programs() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = dir.path().to_str().expect("text");
    let pid = std::process::id().to_string();
    let json = reqprof(&["doctor", "--json", "--store", store, "--pid", &pid]);
    let value: serde_json::Value = serde_json::from_str(stdout(&json)).expect("JSON");
    let checks = value["checks"].as_array().expect("a list");
    let failed = checks.iter().any(|c| c["status"] == "fail");
    assert_eq!(code(&json), if failed { 3 } else { 0 });
    assert_eq!(value["ok"], !failed);
    for check in checks {
        assert!(["ok", "warn", "fail"].iter().any(|s| check["status"] == *s), "{check}");
        assert_eq!(check["remedy"].is_null(), check["status"] == "ok", "{check}");
    }
    // The kernel's release, from another source.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the release");
    let kernel = checks.iter().find(|c| c["name"] == "kernel").expect("the kernel");
    assert!(kernel["finding"].as_str().expect("text").contains(release.trim()));

    let table = reqprof(&["doctor", "--store", store, "--pid", &pid]);
    assert_eq!(code(&table), code(&json));
    for check in checks {
        assert!(stdout(&table).contains(check["name"].as_str().expect("text")));
    }
}

#[test]
fn doctor_finds_what_is_wrong() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
    let store = dir.path().to_str().expect("text");
    // 4194304 is PID_MAX_LIMIT, one more than the largest pid.
    let output = reqprof(&["doctor", "--store", store, "--pid", "4194304"]);
    assert_eq!(code(&output), 3);
    assert!(stdout(&output).contains(&format!("remedy: chmod 0700 {store}")), "{}", stdout(&output));
    assert!(stdout(&output).contains("no such process"));
}

#[test]
fn doctor_names_the_process_that_uses_the_store() {
    let dir = tempfile::tempdir().expect("a directory");
    let lock = fs::File::create(dir.path().join("lock")).expect("a file");
    lock.lock().expect("locked");
    let output = reqprof(&["doctor", "--store", dir.path().to_str().expect("text")]);
    let expected = format!("process {} uses this store", std::process::id());
    assert!(stdout(&output).contains(&expected), "{}", stdout(&output));
}
