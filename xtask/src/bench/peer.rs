//! The profilers that the benchmark compares, and how each is switched on: those that attach to running workers are
//! started before a slice and stopped after it, those that are middlewares get a server of their own.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::usage;
use crate::demo::{ask, is_ready, remove_store};
use crate::load::client;
use crate::site::service::{Lifetime, Service, children_of};
use crate::site::{Site, free_port};

const FAST_HZ: u32 = 999;
const ATTACH_LIMIT: Duration = Duration::from_secs(60);
/// How long after a slice its last requests may take to be counted.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Peer {
    /// Nothing is attached in either slice: what the method itself cannot tell from no difference
    Control,
    /// perf's bare clock at 999 Hz on every CPU, with nobody who samples: what the machine's timer costs alone
    #[value(name = "clock-999")]
    Clock999,
    /// reqprof at its default rate
    Reqprof,
    /// reqprof at 999 Hz
    #[value(name = "reqprof-999")]
    Reqprof999,
    /// reqprof at its default rate, with boundaries at system calls instead of in the C library
    #[value(name = "reqprof-syscall")]
    ReqprofSyscall,
    /// py-spy record at 100 Hz
    PySpy,
    /// pyinstrument's Django middleware, one HTML file per request
    Pyinstrument,
    /// cProfile around every request, one .prof file per request
    Cprofile,
}

impl Peer {
    pub fn label(self) -> &'static str {
        match self {
            Self::Control => "nothing (control)",
            Self::Clock999 => "bare clock, 999 Hz",
            Self::Reqprof => "reqprof, default rate",
            Self::Reqprof999 => "reqprof, 999 Hz",
            Self::ReqprofSyscall => "reqprof, at system calls",
            Self::PySpy => "py-spy, 100 Hz",
            Self::Pyinstrument => "pyinstrument middleware",
            Self::Cprofile => "cProfile per request",
        }
    }

    pub fn is_reqprof(self) -> bool {
        matches!(self, Self::Reqprof | Self::Reqprof999 | Self::ReqprofSyscall)
    }

    /// Whether it is a process of its own, whose CPU and memory can be told from the workers'.
    pub fn has_process(self) -> bool {
        self.is_reqprof() || self == Self::PySpy
    }

    /// The name that the shop's settings know a middleware by.
    pub fn middleware(self) -> Option<&'static str> {
        match self {
            Self::Pyinstrument => Some("pyinstrument"),
            Self::Cprofile => Some("cprofile"),
            Self::Control
            | Self::Clock999
            | Self::Reqprof
            | Self::Reqprof999
            | Self::ReqprofSyscall
            | Self::PySpy => None,
        }
    }

    /// A guess of what attaching and detaching once takes, for the announcement of the run's length.
    pub fn transition(self) -> Duration {
        match self {
            Self::Reqprof | Self::Reqprof999 | Self::ReqprofSyscall => Duration::from_secs(4),
            Self::PySpy => Duration::from_secs(2),
            Self::Control | Self::Clock999 | Self::Pyinstrument | Self::Cprofile => Duration::ZERO,
        }
    }
}

/// Where the profilers' programs are and where they may write.
pub struct Tools {
    /// Present when a reqprof peer is measured.
    pub reqprof: Option<PathBuf>,
    pub py_spy: PathBuf,
    pub home: PathBuf,
}

/// A profiler that watches the workers until it is detached (or dropped).
pub struct Attached {
    service: Option<Service>,
    /// reqprof's HTTP interface.
    pub api: Option<SocketAddr>,
    _clocks: Vec<perf_event::Counter>,
}

impl Tools {
    /// Attaches a profiler and returns once it really watches every worker.
    pub fn attach(&self, peer: Peer, site: &Site) -> Result<Attached> {
        match peer {
            // The site alone: what else the machine serves is neither measured nor counted.
            Peer::Reqprof => self.attach_reqprof(&[], site.service.pid(), &site.workers()),
            Peer::Reqprof999 => {
                let rate = FAST_HZ.to_string();
                self.attach_reqprof(&["--freq", &rate], site.service.pid(), &site.workers())
            }
            Peer::ReqprofSyscall => {
                self.attach_reqprof(&["--boundary", "syscall"], site.service.pid(), &site.workers())
            }
            Peer::PySpy => self.attach_py_spy(site),
            Peer::Clock999 => Ok(Attached { _clocks: clocks()?, ..Attached::nothing() }),
            Peer::Control | Peer::Pyinstrument | Peer::Cprofile => Ok(Attached::nothing()),
        }
    }

    /// Attaches reqprof to a process and its children, and waits until it watches these.
    pub fn attach_reqprof(&self, flags: &[&str], pid: u32, workers: &[u32]) -> Result<Attached> {
        // A fresh store every time: no slice inherits another's work.
        let store = self.home.join("store");
        remove_store(&store)?;
        let addr = free_port()?;
        let mut command = Command::new(self.reqprof.as_ref().context("reqprof was not built")?);
        command.arg("daemon").arg("--store").arg(&store).args(["--listen", &addr.to_string()]);
        command.args(["--pid", &pid.to_string()]).args(flags);
        let mut service =
            Service::start("reqprof", command, &self.home.join("reqprof.log"), &Lifetime::Bound)?;
        service.wait_for("ready", ATTACH_LIMIT, || is_ready(addr).then_some(()))?;
        service.wait_for("watching every worker", ATTACH_LIMIT, || watches(addr, workers).then_some(()))?;
        Ok(Attached { service: Some(service), api: Some(addr), ..Attached::nothing() })
    }

    fn attach_py_spy(&self, site: &Site) -> Result<Attached> {
        let mut command = Command::new(&self.py_spy);
        command
            .args(["record", "--rate", "100", "--subprocesses", "--format", "raw", "--duration", "unlimited"])
            .args(["--pid", &site.service.pid().to_string(), "--output"])
            .arg(self.home.join("py-spy.folded"));
        let log = self.home.join("py-spy.log");
        let mut service = Service::start_with("py-spy", command, &log, &Lifetime::Bound, libc::SIGINT)?;
        service.wait_for_log("Sampling process", ATTACH_LIMIT)?;
        Ok(Attached { service: Some(service), ..Attached::nothing() })
    }
}

/// The clock that reqprof samples by, on every CPU, without a program or a buffer behind it.
fn clocks() -> Result<Vec<perf_event::Counter>> {
    let mut clock = perf_event::Builder::new(perf_event::events::Software::CPU_CLOCK);
    clock.any_pid().include_kernel().sample_frequency(u64::from(FAST_HZ)).enabled(true);
    // SAFETY: it asks for a number and touches no memory of ours.
    let configured = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    (0..usize::try_from(configured)?)
        .map(|cpu| (cpu, clock.one_cpu(cpu).build()))
        // A CPU that is taken offline.
        .filter(|(_, opened)| opened.as_ref().err().and_then(io::Error::raw_os_error) != Some(libc::ENODEV))
        .map(|(cpu, opened)| opened.with_context(|| format!("cannot open the clock of CPU {cpu}")))
        .collect()
}

fn watches(addr: SocketAddr, workers: &[u32]) -> bool {
    let Ok(answer) = ask(addr, "/api/v1/targets") else { return false };
    let Some(targets) = answer["targets"].as_array() else { return false };
    workers
        .iter()
        .all(|worker| targets.iter().any(|target| target["pid"].as_u64() == Some(u64::from(*worker))))
}

impl Attached {
    fn nothing() -> Self {
        Self { service: None, api: None, _clocks: Vec::new() }
    }

    /// CPU time of the profiler itself so far. `None`: it has no process of its own.
    pub fn cpu_ns(&self) -> Option<u64> {
        usage::cpu_ns(&self.processes()?).ok()
    }

    pub fn resident_bytes(&self) -> Option<u64> {
        self.processes()?.into_iter().map(usage::resident_bytes).sum()
    }

    /// Requests that reqprof has counted so far.
    pub fn recorded(&self) -> Result<Option<u64>> {
        let Some(addr) = self.api else { return Ok(None) };
        let total: f64 = metric(addr, "reqprof_requests_total")?.into_iter().map(|(_, value)| value).sum();
        Ok(Some(total as u64))
    }

    /// The same, after waiting (not for long) until at least `expected` are there.
    pub fn recorded_in_the_end(&self, expected: u64) -> Result<Option<u64>> {
        let asked = Instant::now();
        loop {
            let recorded = self.recorded()?;
            if recorded.is_none_or(|count| count >= expected) || asked.elapsed() > SETTLE_LIMIT {
                return Ok(recorded);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn detach(mut self) -> Result<()> {
        self.service.as_mut().map_or(Ok(()), Service::stop)
    }

    fn processes(&self) -> Option<Vec<u32>> {
        let leader = self.service.as_ref()?.pid();
        let mut pids = children_of(leader);
        pids.push(leader);
        Some(pids)
    }
}

/// The samples of one metric of reqprof: the label part as it stands, and the value.
pub fn metric(addr: SocketAddr, name: &str) -> Result<Vec<(String, f64)>> {
    let response = client::get(addr, "/metrics").context("GET /metrics")?;
    ensure!(response.status == 200, "GET /metrics answered {}", response.status);
    Ok(samples(&String::from_utf8_lossy(&response.body), name))
}

/// Reads Prometheus' text format, version 0.0.4: `name{labels} value`.
fn samples(text: &str, name: &str) -> Vec<(String, f64)> {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = match rest.strip_prefix('{') {
                Some(labelled) => labelled.rsplit_once('}')?,
                None if rest.starts_with(' ') => ("", rest),
                None => return None,
            };
            Some((labels.to_owned(), value.split_whitespace().next()?.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::samples;

    #[test]
    fn metrics_with_and_without_labels_and_their_namesakes() {
        let text = "# TYPE a counter\na{probe=\"x}\"} 1.5 1700000000\na{probe=\"y\"} 2\na_total 7\nb 3e-3\nb{} nonsense\n";
        assert_eq!(samples(text, "a"), [("probe=\"x}\"".to_owned(), 1.5), ("probe=\"y\"".to_owned(), 2.0)]);
        assert_eq!(samples(text, "b"), [(String::new(), 0.003)]);
        assert_eq!(samples(text, "c"), []);
    }
}
