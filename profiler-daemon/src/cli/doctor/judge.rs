//! From facts to checks: what each fact means for the user and what to do about it. No system call here.

use super::facts::{Facts, Image, StoreFacts, TargetFacts};
use super::probe::Errno;
use super::{Check, Level};

/// Oldest kernel: 5.8 has the ring buffer, 5.10 is the oldest that is tested.
const MIN_KERNEL: (u32, u32) = (5, 10);
/// Less free space than this is soon none: the store's own default bound is twice as much.
const MIN_FREE: u64 = 256 << 20;

/// Bits of capabilities (linux/capability.h).
const DAC_READ_SEARCH: u32 = 2;
const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;
const SYSLOG: u32 = 34;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

fn ok(name: &'static str, finding: impl Into<String>) -> Check {
    Check { name: name.into(), level: Level::Ok, finding: finding.into(), remedy: None }
}

fn warn(name: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check { name: name.into(), level: Level::Warn, finding: finding.into(), remedy: Some(remedy.into()) }
}

fn fail(name: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check { level: Level::Fail, ..warn(name, finding, remedy) }
}

/// All checks, in the order of what depends on what.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![kernel(facts), architecture(facts), btf(facts)];
    checks.extend(capabilities(facts.capabilities));
    checks.extend([
        paranoid(facts),
        kernel_symbols(facts),
        lockdown(facts),
        namespace(facts),
        uprobe(facts),
        called(
            "ring buffer",
            facts.ring_buffer,
            "the kernel makes one",
            "run as root or with CAP_BPF; in a container, allow the system call bpf()",
        ),
        called(
            "CPU sampling",
            facts.cpu_clock,
            "the CPU clock can be sampled",
            "run as root or with CAP_PERFMON, and see perf_event_paranoid; in a container, allow perf_event_open()",
        ),
        memory(facts),
        statistics(facts),
    ]);
    checks.extend(store(&facts.store));
    checks.extend(facts.targets.iter().map(target));
    checks
}

fn kernel(facts: &Facts) -> Check {
    let name = "kernel";
    let mut numbers = facts.release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= MIN_KERNEL => ok(name, &facts.release),
        (Some(_), Some(_)) => fail(name, format!("{} is too old", facts.release), "use Linux 5.10 or later"),
        _ => warn(
            name,
            format!("{} is no version that can be read", facts.release),
            "check that it is 5.10 or later",
        ),
    }
}

fn architecture(facts: &Facts) -> Check {
    match facts.machine.as_str() {
        "x86_64" => ok("architecture", "x86_64"),
        other => fail("architecture", format!("{other} is not supported"), "use an x86_64 machine"),
    }
}

fn btf(facts: &Facts) -> Check {
    if facts.btf {
        ok("kernel types (BTF)", "/sys/kernel/btf/vmlinux")
    } else {
        warn(
            "kernel types (BTF)",
            "/sys/kernel/btf/vmlinux cannot be read; Python frames and thread exits are seen less well",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, as distributions' kernels are",
        )
    }
}

fn capabilities(effective: Option<u64>) -> Vec<Check> {
    let Some(set) = effective else {
        return vec![warn("capabilities", "/proc/self/status cannot be read", "mount /proc")];
    };
    let has = |bit: u32| set & (1 << bit) != 0;
    // CAP_SYS_ADMIN includes what was split from it in 5.8.
    [
        ("CAP_BPF", has(BPF) || has(SYS_ADMIN), "to load the kernel side", true),
        ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN), "to sample CPUs and attach probes", true),
        ("CAP_SYS_ADMIN", has(SYS_ADMIN), "to attach uprobes through the perf PMU", true),
        (
            "CAP_SYS_PTRACE",
            has(SYS_PTRACE),
            "to read code objects and mappings of other users' processes",
            true,
        ),
        ("CAP_DAC_READ_SEARCH", has(DAC_READ_SEARCH), "to read other users' binaries", false),
        ("CAP_SYSLOG", has(SYSLOG), "to see addresses of kernel symbols", false),
    ]
    .into_iter()
    .map(|(name, there, why, required)| match (there, required) {
        (true, _) => ok(name, "held"),
        (false, true) => fail(name, format!("missing; needed {why}"), "run as root, or grant it in the unit"),
        (false, false) => {
            warn(name, format!("missing; needed {why}"), "run as root, or grant it in the unit")
        }
    })
    .collect()
}

fn paranoid(facts: &Facts) -> Check {
    let name = "perf_event_paranoid";
    match (facts.perf_event_paranoid, facts.cpu_clock) {
        (None, _) => {
            fail(name, "not there: the kernel has no perf events", "use a kernel with CONFIG_PERF_EVENTS=y")
        }
        (Some(level), Ok(())) => ok(name, format!("{level}, and sampling is allowed")),
        // Debian's 3 and Ubuntu's 4 refuse in spite of CAP_PERFMON.
        (Some(level), Err(_)) if level >= 3 => fail(
            name,
            format!("{level} forbids sampling"),
            "sysctl kernel.perf_event_paranoid=2, or run as root",
        ),
        (Some(level), Err(_)) => warn(name, format!("{level}, yet sampling is refused"), "see CPU sampling"),
    }
}

fn kernel_symbols(facts: &Facts) -> Check {
    let name = "kptr_restrict";
    match facts.kptr_restrict {
        Some(2) => warn(
            name,
            "2 hides kernel symbols; kernel frames stay without names",
            "sysctl kernel.kptr_restrict=1",
        ),
        Some(level) => ok(name, level.to_string()),
        None => warn(name, "cannot be read", "mount /proc"),
    }
}

fn lockdown(facts: &Facts) -> Check {
    match facts.lockdown.as_deref() {
        None => ok("lockdown", "this kernel has none"),
        Some("confidentiality") => fail(
            "lockdown",
            "confidentiality forbids reading memory from BPF",
            "boot with lockdown=integrity, or without secure boot",
        ),
        Some(mode) => ok("lockdown", mode),
    }
}

fn namespace(facts: &Facts) -> Check {
    if facts.initial_pid_namespace {
        ok("pid namespace", "the host's")
    } else {
        fail(
            "pid namespace",
            "not the host's; the kernel side would speak of other pids than we see",
            "run on the host, or the container with --pid=host",
        )
    }
}

fn uprobe(facts: &Facts) -> Check {
    match facts.uprobe {
        Some(number) => ok("uprobes", format!("perf PMU {number}")),
        None => fail(
            "uprobes",
            "the kernel has no uprobe PMU",
            "use a kernel with CONFIG_UPROBE_EVENTS=y, and mount /sys",
        ),
    }
}

fn called(name: &'static str, result: Result<(), Errno>, good: &str, remedy: &str) -> Check {
    match result {
        Ok(()) => ok(name, good),
        Err(errno) => fail(name, std::io::Error::from_raw_os_error(errno).to_string(), remedy),
    }
}

fn memory(facts: &Facts) -> Check {
    let name = "process memory";
    match facts.foreign_memory {
        None => ok(name, "not tried: there is no parent process to try it on"),
        Some(Ok(())) => ok(name, "another process's memory can be read"),
        Some(Err(errno)) => {
            let remedy = match facts.ptrace_scope {
                Some(3) => "kernel.yama.ptrace_scope is 3 and stays so until the next boot; boot with less",
                _ => "run as root or with CAP_SYS_PTRACE; in a container, allow process_vm_readv()",
            };
            fail(name, format!("cannot be read: {}", std::io::Error::from_raw_os_error(errno)), remedy)
        }
    }
}

fn statistics(facts: &Facts) -> Check {
    let name = "BPF statistics";
    match facts.bpf_stats {
        Some(1..) => ok(name, "on; /metrics shows the time inside our programs"),
        Some(_) => ok(name, "off; sysctl kernel.bpf_stats_enabled=1 shows the time inside our programs"),
        None => ok(name, "not there"),
    }
}

fn store(store: &StoreFacts) -> Vec<Check> {
    let path = store.path.display();
    let name = "store directory";
    let directory = match &store.directory {
        Err(reason) => fail(name, format!("{path}: {reason}"), "name another with --store"),
        Ok(None) => ok(name, format!("{path} will be made")),
        Ok(Some(d)) if !d.is_dir => {
            fail(name, format!("{path} is not a directory"), "name another with --store")
        }
        Ok(Some(d)) if d.uid != 0 && d.uid != store.our_user => {
            fail(name, format!("{path} belongs to user {}", d.uid), format!("chown root {path}"))
        }
        Ok(Some(d)) if d.mode & 0o022 != 0 => fail(
            name,
            format!("{path} has mode {:04o}: others may write", d.mode),
            format!("chmod 0700 {path}"),
        ),
        Ok(Some(d)) => ok(name, format!("{path}, mode {:04o}", d.mode)),
    };
    let mib = |bytes: u64| bytes >> 20;
    let disk = match &store.free {
        Err(reason) => warn("disk space", format!("{path}: {reason}"), "name another directory with --store"),
        Ok(free) if *free < MIN_FREE => warn(
            "disk space",
            format!("only {} MiB free", mib(*free)),
            "free some, or name another with --store",
        ),
        Ok(free) => ok("disk space", format!("{} MiB free", mib(*free))),
    };
    let daemon = match store.user {
        None => ok("other reqprof", "none uses this store"),
        Some(pid) => warn(
            "other reqprof",
            format!("process {pid} uses this store"),
            "stop it before you start another, or give the other its own --store and --listen",
        ),
    };
    vec![directory, disk, daemon]
}

fn target(target: &TargetFacts) -> Check {
    let name = format!("target {}", target.pid);
    let safe = |text: &str| text.chars().flat_map(char::escape_debug).collect::<String>();
    let check = match &target.image {
        Err(reason) if reason == "no such process" => fail("", reason, "name a process that runs"),
        Err(reason) => fail("", safe(reason), "run as root or with CAP_SYS_PTRACE"),
        Ok(Image { exe, libc: None, .. }) => warn(
            "",
            format!("{} does not use a C library; its requests cannot be seen", safe(exe)),
            "none yet: statically linked programs are not supported",
        ),
        Ok(Image { exe, python: Some(Ok(version)), .. }) => {
            ok("", format!("{}: requests, native and Python {} frames", safe(exe), safe(version)))
        }
        Ok(Image { exe, python: Some(Err(reason)), .. }) => warn(
            "",
            format!("{}: requests and native frames, no Python frames: {}", safe(exe), safe(reason)),
            "use CPython 3.8 to 3.14 with the GIL, and look again once it has started",
        ),
        Ok(Image { exe, python: None, .. }) => ok("", format!("{}: requests and native frames", safe(exe))),
    };
    Check { name: name.into(), ..check }
}

#[cfg(test)]
mod tests;
