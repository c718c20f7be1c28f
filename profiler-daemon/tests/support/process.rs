//! Processes: groups that end with the test, ports that nobody has, conditions that are waited for.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Generous: it only bounds how long a failing test takes, and the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);

/// Asks until there is an answer, and panics with what was waited for when there is none for long.
#[track_caller]
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(POLL);
    }
}

/// A TCP port of the loopback that nobody listens on. Below the range that the kernel gives to clients, so that no
/// client's connection can take it before the server does.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 20_000;
    for _ in 0..COUNT {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (FIRST + (std::process::id() * 37 + step) % COUNT) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// Sends a signal to one process.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(pid as i32, signal) };
}

/// The children of a process, oldest first.
pub fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// The BPF programs that a process holds, by the kernel's number: never used twice.
pub fn bpf_programs(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("our own process");
    let texts = entries.flatten().filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let mut ids: Vec<u32> = texts
        .flat_map(|text| {
            let id = |line: &str| line.strip_prefix("prog_id:")?.trim().parse().ok();
            text.lines().filter_map(id).collect::<Vec<u32>>()
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Which of these BPF programs the kernel still has.
pub fn still_loaded(ids: &[u32]) -> Vec<u32> {
    let loaded = aya::programs::loaded_programs().flatten().map(|program| program.id());
    loaded.filter(|id| ids.contains(id)).collect()
}

/// A process and all that it starts; ends with this value.
#[derive(Debug)]
pub struct Group {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Group {
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.process_group(0).spawn();
        Self { child: child.unwrap_or_else(|e| panic!("{command:?}: {e}")), ended: None }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("our own child");
        }
        self.ended
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("a process to end", || self.try_wait())
    }

    pub fn signal(&self, signal: i32) {
        if self.ended.is_none() {
            self::signal(self.pid(), signal);
        }
    }

    fn signal_group(&self, signal: i32) {
        // SAFETY: no memory is involved; the group is ours, since we made it.
        unsafe { libc::kill(-(self.pid() as i32), signal) };
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal_group(libc::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.try_wait().is_none() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        // Whatever is left of the group, and the leader if it did not listen.
        self.signal_group(libc::SIGKILL);
        if self.ended.is_none() {
            // Its end is all that matters here.
            let _ = self.child.wait();
        }
    }
}
