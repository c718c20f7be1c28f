//! What the tests share: real servers, a real daemon, a client that keeps its own books, the server alone, a browser.
//!
//! Everything a test starts ends with it: each server and daemon runs in a process group of its own, and its guard ends
//! that group when it is dropped, also when the test fails.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test program is compiled with all of this and uses a part"
)]

pub mod browser;
pub mod burned;
pub mod daemon;
pub mod gunicorn;
pub mod http;
pub mod interpreters;
pub mod load;
pub mod nesting;
pub mod no_gil;
pub mod own_program;
pub mod process;
pub mod python;
pub mod reader;
pub mod served;
pub mod skip;
pub mod tls;
pub mod tree;

pub use daemon::Daemon;
pub use gunicorn::Gunicorn;
pub use process::wait_for;
pub use python::Python;
pub use skip::skip;

/// Whether tests on the real kernel were asked for and can run; says so if not.
pub fn can_run(name: &str) -> bool {
    if std::env::var_os("REQPROF_E2E").is_none_or(|value| value != "1") {
        skip(name, "it profiles real servers on this machine's kernel; REQPROF_E2E=1 allows that");
        return false;
    }
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        skip(name, "loading BPF programs needs root");
        return false;
    }
    true
}

/// The first interpreter there is, for what does not depend on which one it is.
pub fn any_python(name: &str) -> Option<Python> {
    if !can_run(name) {
        return None;
    }
    let found = Python::debian().or_else(|_| Python::pyenv());
    found.map_err(|reason| skip(name, reason)).ok()
}

/// The first build of a version, for a test on the real kernel; says so if it cannot run.
pub fn first_build(name: &str, version: &'static str) -> Option<interpreters::Interpreter> {
    if !can_run(name) {
        return None;
    }
    let builds = interpreters::of_version(version);
    builds.map(|mut builds| builds.remove(0)).map_err(|reason| skip(name, reason)).ok()
}
