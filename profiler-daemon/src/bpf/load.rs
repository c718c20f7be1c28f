//! Loading the object: constants in, programs and maps out.

use std::io;

use aya::maps::{Map, MapData, MapError, ProgramArray};
use aya::programs::{PerfEvent, ProgramError, RawTracePoint, UProbe};
use aya::{Ebpf, EbpfError, EbpfLoader, Pod};
use aya_log::EbpfLogger;
use profiler_common::{KernelOffsets, Settings};

use super::{
    CodeDeaths, Connections, Contexts, Entries, KernelStats, ProbeState, ProbeTable, Ring, SettingsValue,
    SpaceValue, TargetValue, UnwindMaps, btf, syscalls,
};

/// The kernel side, built from `profiler-ebpf` by `cargo xtask ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/reqprof.bpf.o");

/// What is decided before loading.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of the ring, bytes: a power of two and a multiple of the page size.
    pub ring_bytes: u32,
    /// Processes that accept a connection become targets by themselves.
    pub adopt_acceptors: bool,
    /// The kernel side logs what processes do (aya-log).
    pub log: bool,
}

/// The kernel side could not be loaded. The message names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(
        "the kernel refused to load BPF programs: {0} (needs root, or CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN; see `reqprof doctor`)"
    )]
    Privilege(String),
    #[error("loading the kernel side: {0}")]
    Object(#[from] EbpfError),
    #[error("the kernel refused program {name}: {source} (set RUST_LOG=aya=debug for the verifier's log)")]
    Program { name: String, source: Box<ProgramError> },
    #[error("map {name}: {reason}")]
    Map { name: &'static str, reason: String },
}

/// Messages of the kernel side, into the daemon's own log.
pub type KernelLogger = EbpfLogger<&'static dyn log::Log>;

/// `AYA_LOG_LEVEL` that lets nothing through.
const LOG_OFF: u8 = 0;

/// aya-log's number of a level: 1 for errors to 5 for traces.
const fn aya_log_level(level: tracing::Level) -> u8 {
    match level {
        tracing::Level::ERROR => 1,
        tracing::Level::WARN => 2,
        tracing::Level::INFO => 3,
        tracing::Level::DEBUG => 4,
        tracing::Level::TRACE => 5,
    }
}

/// A map whose key is one integer.
pub type HashOf<K, V> = aya::maps::HashMap<MapData, K, V>;

/// The loaded kernel side, taken apart for the threads that own its pieces.
pub struct Kernel {
    pub ring: Ring,
    pub targets: HashOf<u32, TargetValue>,
    pub deaths: CodeDeaths,
    pub contexts: Contexts,
    pub connections: Connections,
    /// Of each table, by the name it has in the metrics.
    pub entries: Vec<(&'static str, Entries)>,
    pub stats: KernelStats,
    pub unwind: UnwindMaps,
    /// The programs. Dropping it detaches everything.
    pub object: Ebpf,
    /// To be flushed now and then, when the kernel side logs.
    pub logger: Option<KernelLogger>,
}

/// The slots of `TRANSFER_STEPS`; the order is the kernel side's `STEP_*`.
const TRANSFER_STEPS: [&str; 2] = ["transfer_in", "transfer_out"];
const PROBES: [&str; 22] = [
    "http_recv",
    "http_read",
    "http_readv",
    "http_recvmsg",
    "http_send",
    "http_writev",
    "http_sendmsg",
    "http_sendfile",
    "http_enter",
    "http_accept",
    "http_close",
    "epoll_wait",
    "code_death",
    "context_copied",
    "context_death",
    "tls_read",
    "tls_read_ex",
    "tls_write",
    "tls_write_ex",
    "tls_handshake",
    "tls_free",
    "tls_returned",
];
/// The same for `SYSCALL_STEPS`.
const SYSCALL_STEPS: [&str; 2] = ["syscall_in", "syscall_out"];
const SAMPLE_STEPS: [&str; 2] = ["sample_walk", "sample_finish"];
/// What can be full: as the metrics call it, and its map.
const TABLES: [(&str, &str); 7] = [
    ("targets", "TARGETS"),
    ("connections", "CONNECTIONS"),
    ("active", "ACTIVE"),
    ("transfers", "TRANSFERS"),
    ("contexts", "CONTEXTS"),
    ("turns", "TURNS"),
    ("tls_threads", "TLS_THREADS"),
];

/// Loads every program and attaches the process tracepoints. Sampling and boundaries are attached by
/// [`super::CpuSampler`] and [`super::BoundaryProbes`].
pub fn load(options: Options, probes: &ProbeTable) -> Result<Kernel, LoadError> {
    let (kernel, offsets_known) = match btf::kernel_offsets() {
        Ok(offsets) => {
            probes.set("kernel types", ProbeState::Active { detail: btf::VMLINUX.into() });
            (offsets, true)
        }
        Err(error) => {
            let reason = format!(
                "{error}; without them Python frames are not read, forked workers are found by scanning only, and a \
                 response ends when its last write returns. Remedy: a kernel built with CONFIG_DEBUG_INFO_BTF"
            );
            probes.set("kernel types", ProbeState::Disabled { reason });
            (KernelOffsets::default(), false)
        }
    };
    let settings = SettingsValue(Settings {
        kernel,
        own_pid: std::process::id(),
        adopt_acceptors: u32::from(options.adopt_acceptors),
        has_task_pt_regs: u32::from(kernel_at_least(5, 15)),
        reserved: 0,
        // A quarter is kept for boundary records: a lost sample costs one sample, a lost boundary a request.
        ring_reserve: u64::from(options.ring_bytes) / 4,
    });
    let log_level = if options.log { aya_log_level(tracing::Level::DEBUG) } else { LOG_OFF };
    let mut object = EbpfLoader::new()
        .override_global("SETTINGS", &settings, true)
        .override_global("AYA_LOG_LEVEL", &log_level, true)
        .map_max_entries("EVENTS", options.ring_bytes)
        .load(OBJECT)
        .map_err(|error| match privilege(&error) {
            Some(reason) => LoadError::Privilege(reason),
            None => LoadError::Object(error),
        })?;

    for name in TRANSFER_STEPS.iter().chain(&PROBES) {
        load_program(&mut object, name, |p: &mut UProbe| p.load())?;
    }
    for name in SAMPLE_STEPS.iter().chain(&["sample"]) {
        load_program(&mut object, name, |p: &mut PerfEvent| p.load())?;
    }
    for name in SYSCALL_STEPS.iter().chain(&syscalls::PROGRAMS) {
        load_program(&mut object, name, |p: &mut RawTracePoint| p.load())?;
    }
    for (name, tracepoint) in [
        ("process_fork", "sched_process_fork"),
        ("process_exec", "sched_process_exec"),
        ("process_exit", "sched_process_exit"),
    ] {
        load_program(&mut object, name, |p: &mut RawTracePoint| p.load())?;
        let attached = attach_raw(&mut object, name, tracepoint);
        probes.set(
            tracepoint,
            match attached {
                Ok(()) if name == "process_fork" && !offsets_known => {
                    ProbeState::Disabled { reason: "the kernel's types are not known".into() }
                }
                Ok(()) => ProbeState::Active { detail: "raw tracepoint".into() },
                Err(error) => ProbeState::Failed { reason: error.to_string() },
            },
        );
    }
    fill_steps(&mut object, "TRANSFER_STEPS", &TRANSFER_STEPS)?;
    fill_steps(&mut object, "SYSCALL_STEPS", &SYSCALL_STEPS)?;
    fill_steps(&mut object, "SAMPLE_STEPS", &SAMPLE_STEPS)?;

    let logger = if options.log {
        let logger = EbpfLogger::init(&mut object);
        Some(logger.map_err(|e| LoadError::Map { name: "AYA_LOGS", reason: e.to_string() })?)
    } else {
        None
    };
    let ring = Ring::new(take(&mut object, "EVENTS")?)?;
    let entries = TABLES
        .iter()
        .map(|(shown, name)| {
            let wrong = |reason: String| LoadError::Map { name, reason };
            let Some(Map::HashMap(map)) = object.map(name) else {
                return Err(wrong("is no hash map in the object".into()));
            };
            Ok((*shown, Entries::of(map).map_err(|e| wrong(e.to_string()))?))
        })
        .collect::<Result<_, LoadError>>()?;
    let targets = hash(take(&mut object, "TARGETS")?, "TARGETS")?;
    let connections = Connections::new(hash(take(&mut object, "CONNECTIONS")?, "CONNECTIONS")?);
    let deaths = CodeDeaths::new(hash(take(&mut object, "CODE_LIVES")?, "CODE_LIVES")?);
    let processes = hash(take(&mut object, "CONTEXT_PROCESSES")?, "CONTEXT_PROCESSES")?;
    let contexts = Contexts::new(processes, hash(take(&mut object, "CONTEXTS")?, "CONTEXTS")?);
    let stats = KernelStats::new(take(&mut object, "STATS")?)?;
    let spaces = take(&mut object, "SPACES")?;
    let unwind = UnwindMaps::new(
        take(&mut object, "UNWIND_CHUNKS")?,
        take(&mut object, "UNWIND_RULES")?,
        take(&mut object, "MAPPINGS")?,
        hash::<u32, SpaceValue>(spaces, "SPACES")?,
    )?;
    Ok(Kernel { ring, targets, deaths, contexts, connections, entries, stats, unwind, object, logger })
}

fn load_program<P>(
    object: &mut Ebpf,
    name: &str,
    load: impl FnOnce(&mut P) -> Result<(), ProgramError>,
) -> Result<(), LoadError>
where
    for<'a> &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let failed = |source: ProgramError| match program_privilege(&source) {
        Some(reason) => LoadError::Privilege(reason),
        None => LoadError::Program { name: name.to_owned(), source: Box::new(source) },
    };
    let program = object
        .program_mut(name)
        .ok_or(LoadError::Map { name: "programs", reason: format!("{name} is not in the object") })?;
    load(program.try_into().map_err(failed)?).map_err(failed)?;
    let info = object.program(name).and_then(|program| program.info().ok());
    // Since Linux 5.16.
    let verified = info.and_then(|info| info.verified_instruction_count());
    tracing::debug!(name, verified, "the verifier accepted a program");
    Ok(())
}

fn attach_raw(object: &mut Ebpf, name: &str, tracepoint: &str) -> Result<(), ProgramError> {
    if let Some(program) = object.program_mut(name) {
        let program: &mut RawTracePoint = program.try_into()?;
        program.attach(tracepoint)?;
    }
    Ok(())
}

fn fill_steps(object: &mut Ebpf, map: &'static str, names: &[&str]) -> Result<(), LoadError> {
    let wrong = |reason: String| LoadError::Map { name: map, reason };
    let mut steps = ProgramArray::try_from(take(object, map)?).map_err(|e: MapError| wrong(e.to_string()))?;
    for (slot, name) in names.iter().enumerate() {
        let program = object.program(name).ok_or_else(|| wrong(format!("{name} is not in the object")))?;
        let fd = program.fd().map_err(|e| wrong(e.to_string()))?;
        steps.set(slot as u32, fd, 0).map_err(|e| wrong(e.to_string()))?;
    }
    // The programs hold the map, and the map the programs, but a program array is emptied when its last user-space
    // reference goes: it must live as long as the daemon.
    std::mem::forget(steps);
    Ok(())
}

fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, LoadError> {
    object.take_map(name).ok_or(LoadError::Map { name, reason: "is not in the object".into() })
}

fn hash<K: Pod, V: Pod>(map: Map, name: &'static str) -> Result<HashOf<K, V>, LoadError> {
    aya::maps::HashMap::try_from(map).map_err(|e: MapError| LoadError::Map { name, reason: e.to_string() })
}

/// The operating system's words, when an error means "not allowed".
fn privilege(error: &EbpfError) -> Option<String> {
    denied(error)
}

fn program_privilege(error: &ProgramError) -> Option<String> {
    // The verifier's refusals are EACCES too, but carry a log.
    match error {
        ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM) => {
            Some(io_error.to_string())
        }
        _ => None,
    }
}

fn denied(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(io) = e.downcast_ref::<io::Error>()
            && matches!(io.raw_os_error(), Some(libc::EPERM | libc::EACCES))
        {
            return Some(io.to_string());
        }
        next = e.source();
    }
    None
}

/// Whether the running kernel is at least this version.
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    version_of(&release).is_some_and(|have| have >= (major, minor))
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(version_of("6.18.44-1-amd64"), Some((6, 18)));
        assert_eq!(version_of("5.10.0-30-cloud-amd64"), Some((5, 10)));
        assert_eq!(version_of(""), None);
    }
}
