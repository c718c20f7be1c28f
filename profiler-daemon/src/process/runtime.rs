//! What runs the code of a process, and what the kernel side needs to know of it.
//!
//! In: a pid and its map. Out: the entry for the kernel's `TARGETS`, the runtime's name and version, and whether stacks
//! of its interpreter can be had, with the reason where they cannot.

use profiler_common::{Target, target_flags};

use super::maps::Maps;
use super::patience::{FILES, PATIENCE};
use super::program::Program;
use super::python::{self, PythonError};
use super::targets::{Feature, Runtime};

/// See the module.
pub struct Found {
    pub target: Target,
    pub runtime: Runtime,
    pub interpreter_stacks: Feature,
    /// Whether another look would find the same: an interpreter takes a while to start.
    pub settled: bool,
}

/// Looks at a process.
pub fn examine(pid: u32, program: Option<&Program>, maps: &Maps) -> Found {
    let seen = maps.clone();
    let python = PATIENCE.ask(pid, FILES, move || {
        python::detect(pid, &seen).map_err(|error| {
            let version = python::locate(pid, &seen).ok().flatten().map(|found| found.version.to_string());
            (error, version)
        })
    });
    let python = python.unwrap_or_else(|unanswered| Err((unanswered.into(), None)));
    let mut target = Target { flags: target_flags::SAMPLE | target_flags::HTTP, ..Target::default() };
    let mut settled = true;
    let (runtime, interpreter_stacks) = match python {
        Ok(None) => (other_runtime(program, maps), Feature::missing("no interpreter that is known")),
        Ok(Some(found)) => {
            found.fill(&mut target);
            let version = Some(found.release.clone());
            let detail = if found.interpreter_loop.found {
                "CPython's own frames"
            } else {
                "CPython's own frames, all outside the native ones: this build's loop has no symbols"
            };
            (Runtime { name: "python", version }, Feature::works(detail))
        }
        Err((error, version)) => {
            settled = !matches!(error, PythonError::NotStarted | PythonError::Memory(_));
            (Runtime { name: "python", version }, Feature::missing(error.to_string()))
        }
    };
    Found { target, runtime, interpreter_stacks, settled }
}

fn other_runtime(program: Option<&Program>, maps: &Maps) -> Runtime {
    if let Some(version) = program.and_then(|program| program.go.clone()) {
        return Runtime { name: "go", version };
    }
    let jvm = maps.iter().any(|m| m.file_name() == "libjvm.so");
    Runtime { name: if jvm { "jvm" } else { "native" }, version: None }
}

/// How it is known which request a thread of this runtime works on.
pub fn attribution(runtime: &Runtime, maps: &Maps) -> Feature {
    let gevent = || maps.iter().any(|m| m.executable && m.file_name().starts_with(python::GEVENT));
    match runtime.name {
        "go" => Feature::missing(
            "Go moves goroutines between threads, which is not followed: its requests have no stacks",
        ),
        "python" if gevent() => Feature::missing(
            "gevent switches greenlets on one thread, which is not followed: its requests have no stacks",
        ),
        "python" => Feature::works("by thread; by context where asyncio or uvloop serves"),
        _ => Feature::works("by thread"),
    }
}
