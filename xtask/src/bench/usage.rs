//! What processes cost: CPU time to the nanosecond, and resident memory.

use std::fs;
use std::io;

use anyhow::{Context, Result};

/// CPU time of all of these processes so far, in nanoseconds, ended threads included.
pub fn cpu_ns(pids: &[u32]) -> Result<u64> {
    pids.iter().map(|pid| process_cpu_ns(*pid).with_context(|| format!("CPU time of process {pid}"))).sum()
}

/// The process's CPU-time clock (clock_getcpuclockid(3)): the same sum as `utime + stime` in `/proc/PID/stat`, which
/// counts in ticks of 10 ms; and unlike `/proc/PID/task/*/schedstat` it is up to date for running threads and does
/// not lose the ended ones.
fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut clock = 0;
    // SAFETY: the call writes one clock number to a place that is ours and lives on.
    match unsafe { libc::clock_getcpuclockid(pid, &mut clock) } {
        0 => {}
        number => return Err(io::Error::from_raw_os_error(number)),
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to a place that is ours and lives on.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Resident memory in bytes (`VmRSS`).
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Above the kernel's largest pid_max (4,194,304).
    const NO_SUCH_PID: u32 = 4_194_305;

    #[test]
    fn cpu_time_of_another_process_agrees_with_its_own_account() {
        // The shell burns CPU, says how much by its own count (`times`: minutes and seconds), and waits.
        let script = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; times; read line";
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(shell.stdout.take().unwrap()), &mut line).unwrap();
        let seconds =
            |text: &str| text.trim_end_matches('s').split_once('m').unwrap().1.parse::<f64>().unwrap();
        let own: f64 = line.split_whitespace().map(seconds).sum();
        let ours = cpu_ns(&[shell.id()]).unwrap() as f64 / 1e9;
        shell.kill().unwrap();
        shell.wait().unwrap();
        // The shell counts in ticks of at most 10 ms, for user and system time each.
        assert!(own > 0.0 && (ours - own).abs() < 0.03, "{own} s by the shell, {ours} s by the clock");
    }

    #[test]
    fn memory_of_ourselves_and_processes_that_are_not_there() {
        assert!(resident_bytes(std::process::id()).unwrap() > 100_000);
        assert!(cpu_ns(&[NO_SUCH_PID]).is_err());
        assert_eq!(resident_bytes(NO_SUCH_PID), None);
    }
}
