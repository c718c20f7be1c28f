//! A child process that runs in the background: started in a process group of its own with its output in a log
//! file, watched while somebody waits for it, and stopped with all its children when its owner goes away.
//!
//! The kernel stops it too when xtask dies without unwinding (Ctrl-C, SIGKILL), so that neither a demo nor a
//! benchmark leaves servers behind. A service that shall outlive xtask says so by [`Lifetime::Detached`], and is
//! written down where a later xtask finds it.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::register::Register;

/// Between two looks at a condition. Short against anything a person waits for, long against a context switch.
const POLL: Duration = Duration::from_millis(25);
/// A server that ignores a polite signal for this long is killed.
const GRACE: Duration = Duration::from_secs(10);
/// How much of a failed service's log is shown.
const LOG_TAIL_LINES: usize = 25;

#[derive(Clone, PartialEq, Eq)]
pub enum Lifetime {
    /// Dies with xtask, however xtask dies.
    Bound,
    /// Still stopped on drop, unless [`Service::leave_running`] gives it away. Where xtask dies without either, the register
    /// has it.
    Detached(Register),
}

pub struct Service {
    name: String,
    child: Child,
    log: PathBuf,
    stop_signal: i32,
    left: bool,
}

impl Service {
    /// Starts `command` with both outputs appended to a fresh file `log`.
    pub fn start(name: &str, command: Command, log: &Path, lifetime: &Lifetime) -> Result<Self> {
        Self::start_with(name, command, log, lifetime, libc::SIGTERM)
    }

    /// As [`Service::start`], for programs whose polite stop signal is not SIGTERM.
    pub fn start_with(
        name: &str,
        mut command: Command,
        log: &Path,
        lifetime: &Lifetime,
        stop_signal: i32,
    ) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        if *lifetime == Lifetime::Bound {
            die_with_parent(&mut command, stop_signal);
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("cannot start {name} ({program})"))?;
        let service = Self { name: name.into(), child, log: log.into(), stop_signal, left: false };
        if let Lifetime::Detached(register) = lifetime {
            let identity = Identity::of(service.pid()).with_context(|| format!("{name} has ended"))?;
            register.add(name, identity)?;
        }
        Ok(service)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Asks `condition` again and again until it yields a value. Fails when the service exits first or after
    /// `limit`, and then shows the end of the log.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let started = Instant::now();
        loop {
            if let Some(value) = condition() {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended before it was {what} ({status}){}", self.name, self.log_tail());
            }
            if started.elapsed() > limit {
                bail!("{} was not {what} within {limit:?}{}", self.name, self.log_tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until the log contains `text`: the readiness signal of programs that have no other.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) -> Result<()> {
        let log = self.log.clone();
        self.wait_for(&format!("ready (\"{text}\" in its log)"), limit, || {
            fs::read_to_string(&log).ok().filter(|content| content.contains(text)).map(drop)
        })
    }

    /// Sends the polite signal to the whole group, waits, and kills what is left of it.
    pub fn stop(&mut self) -> Result<()> {
        if self.left || self.child.try_wait()?.is_some() {
            return Ok(());
        }
        signal_group(self.pid(), self.stop_signal);
        let asked = Instant::now();
        while self.child.try_wait()?.is_none() {
            if asked.elapsed() > GRACE {
                signal_group(self.pid(), libc::SIGKILL);
                self.child.wait()?;
                bail!("{} did not stop within {GRACE:?} and was killed", self.name);
            }
            std::thread::sleep(POLL);
        }
        // The leader is gone; whatever it left behind in its group goes too.
        signal_group(self.pid(), libc::SIGKILL);
        Ok(())
    }

    /// Gives the process away: it goes on after xtask has ended.
    pub fn leave_running(mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended ({status}){}", self.name, self.log_tail());
        }
        self.left = true;
        Ok(())
    }

    fn log_tail(&self) -> String {
        let content = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&content);
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        format!("\n--- end of {} ---\n{}", self.log.display(), tail.join("\n"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("warning: {error:#}");
        }
    }
}

/// A process that may be looked up later: a pid alone can be reused, together with its start time it cannot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    pub start_ticks: u64,
}

impl Identity {
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks = stat_field(&stat, 22).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { pid, start_ticks })
    }

    /// Stops the process group that this process leads, if it is still the same process.
    pub fn stop_group(self) -> Result<bool> {
        if Self::of(self.pid).ok() != Some(self) {
            return Ok(false);
        }
        signal_group(self.pid, libc::SIGTERM);
        let asked = Instant::now();
        while Self::of(self.pid).ok() == Some(self) {
            if asked.elapsed() > GRACE {
                signal_group(self.pid, libc::SIGKILL);
                return Ok(true);
            }
            std::thread::sleep(POLL);
        }
        Ok(true)
    }
}

/// The direct children of a process, from the parent field of every `/proc/PID/stat` (proc_pid_stat(5)).
pub fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut children: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat_field(&stat, 4) == Some(u64::from(parent))
        })
        .collect();
    children.sort_unstable();
    children
}

/// Field `number` (counted from 1, from 4 on) of a `/proc/PID/stat` line. The command name in field 2 may hold
/// spaces and parentheses, so counting starts after the last one.
pub fn stat_field(stat: &str, number: usize) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(number - 3)?.parse().ok()
}

fn signal_group(leader: u32, signal: i32) {
    let Ok(group) = i32::try_from(leader) else { return };
    // SAFETY: kill(2) takes two integers and touches no memory. The group was created by `process_group(0)`, so
    // its number is the leader's pid, which stays reserved as long as any member lives.
    unsafe { libc::kill(-group, signal) };
}

fn die_with_parent(command: &mut Command, signal: i32) {
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed; prctl is
    // one, and the closure neither allocates nor takes locks (the error carries only the number of the failure).
    unsafe {
        command.pre_exec(move || match libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "77 (odd) name) S 42 77 77 0 -1 4194304 100 0 0 0 7 3 0 0 20 0 1 0 9876 1000 10";
        assert_eq!(stat_field(stat, 4), Some(42));
        assert_eq!(stat_field(stat, 14), Some(7));
        assert_eq!(stat_field(stat, 22), Some(9876));
        assert_eq!(stat_field("garbage", 4), None);
    }

    #[test]
    fn dropping_a_service_ends_its_children_too() {
        let log = std::env::temp_dir().join(format!("reqprof-service-test-{}.log", std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo started; wait"]);
        let mut service = Service::start("shell", command, &log, &Lifetime::Bound).unwrap();
        service.wait_for_log("started", Duration::from_secs(10)).unwrap();
        let leader = Identity::of(service.pid()).unwrap();
        let children = children_of(leader.pid);
        assert_eq!(children.len(), 1);
        drop(service);
        assert!(Identity::of(leader.pid).ok() != Some(leader));
        // A signal is on its way when kill(2) returns. An orphan is reaped by init; until then it is a zombie (state Z)
        // and runs no more.
        let gone = || {
            let state = fs::read_to_string(format!("/proc/{}/stat", children[0])).unwrap_or_default();
            state.rsplit_once(')').is_none_or(|(_, fields)| fields.trim_start().starts_with('Z'))
        };
        let asked = Instant::now();
        while !gone() {
            assert!(asked.elapsed() < GRACE, "the child runs on");
            std::thread::sleep(POLL);
        }
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn a_service_that_ends_early_is_reported_with_its_log() {
        let log = std::env::temp_dir().join(format!("reqprof-service-early-{}.log", std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such thing; exit 3"]);
        let mut service = Service::start("shell", command, &log, &Lifetime::Bound).unwrap();
        let error =
            service.wait_for("ready", Duration::from_secs(10), || None::<()>).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("no such thing"), "{error}");
        fs::remove_file(log).unwrap();
    }
}
