//! Boundary programs at the kernel's own entry and exit of system calls, for processes without a library to probe.
//!
//! In: whether any target needs them. Out: two raw tracepoints, attached while one does. While they are attached every
//! system call of the host is a little slower, so they go when the last such process does.

use aya::Ebpf;
use aya::programs::raw_trace_point::RawTracePointLinkId;
use aya::programs::{ProgramError, RawTracePoint};

use super::{ProbeState, ProbeTable};

/// Each with the tracepoint of which it is the program.
const TRACEPOINTS: [(&str, &str); 2] = [("syscall_enter", "sys_enter"), ("syscall_exit", "sys_exit")];
pub(super) const PROGRAMS: [&str; 2] = [TRACEPOINTS[0].0, TRACEPOINTS[1].0];
/// The name in the table of probes.
const PROBE: &str = "system calls";

/// See the module.
#[derive(Default)]
pub struct SyscallProbes {
    links: Vec<(&'static str, RawTracePointLinkId)>,
}

impl SyscallProbes {
    /// Attaches them, unless they are. The error says why that is not possible.
    pub fn attach(&mut self, object: &mut Ebpf, probes: &ProbeTable) -> Result<(), String> {
        if !self.links.is_empty() {
            return Ok(());
        }
        for (name, tracepoint) in TRACEPOINTS {
            match attach(object, name, tracepoint) {
                Ok(link) => self.links.push((name, link)),
                Err(error) => {
                    self.detach(object);
                    let reason = format!("attaching to {tracepoint}: {error}");
                    probes.set(PROBE, ProbeState::Failed { reason: reason.clone() });
                    return Err(reason);
                }
            }
        }
        probes.set(PROBE, ProbeState::Active { detail: "raw tracepoints".into() });
        Ok(())
    }

    /// Lets them go if no process is followed by them. Called every second.
    pub fn tend(&mut self, object: &mut Ebpf, probes: &ProbeTable, needed: bool) {
        if !needed && !self.links.is_empty() {
            self.detach(object);
            probes.remove(PROBE);
        }
    }

    pub fn detach(&mut self, object: &mut Ebpf) {
        for (name, link) in self.links.drain(..) {
            if let Some(program) = program(object, name) {
                // A link that cannot be closed is closed with the daemon.
                let _ = program.detach(link);
            }
        }
    }
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> Option<&'a mut RawTracePoint> {
    object.program_mut(name)?.try_into().ok()
}

fn attach(object: &mut Ebpf, name: &str, tracepoint: &str) -> Result<RawTracePointLinkId, String> {
    let explain = |error: ProgramError| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let program = program(object, name).ok_or_else(|| format!("{name} is not in the object"))?;
    program.attach(tracepoint).map_err(explain)
}
