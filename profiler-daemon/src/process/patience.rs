//! Asking a process something without waiting for its answer for ever.
//!
//! In: a job that reads what a process controls: its memory, its map, its files. Out: the answer, or that there was
//! none in time. A page behind `userfaultfd` or a FUSE file is served by whoever made it, at leisure or never, and a
//! read of it cannot be called off. So jobs run on a thread that can be spared: when the time is over it is left
//! behind, and the process is left alone until the thread comes back and for a while after it.
//!
//! Each thread that asks has one such thread at hand; handing a job over costs some 10 µs, so what belongs together
//! is asked together.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::identity;
use super::slot::{Empty, Giver, slot};

/// For memory and `/proc`: microseconds, or milliseconds where pages have to be read from a disk.
pub const MEMORY: Duration = Duration::from_secs(1);
/// For files, of which megabytes may be read from a slow disk.
pub const FILES: Duration = Duration::from_secs(5);

/// Threads left behind; beyond, nothing is asked at all. Each costs some 20 KiB and a descriptor or two, and a host
/// with so many processes that do not answer has hung storage, or somebody who wants us to wait.
pub const STUCK_MAX: usize = 16;
/// How long a process is left alone after the thread came back; doubled each time, up to the second.
const REST: Duration = Duration::from_secs(10);
const REST_MAX: Duration = Duration::from_secs(600);
/// Processes remembered for it. To get into the table each must make us wait for the time above.
const SLOW_MAX: usize = 1024;

/// The daemon's own: what is bounded are threads of this process.
pub static PATIENCE: LazyLock<Patience> = LazyLock::new(Patience::default);

/// There is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    #[error("the process did not answer in time")]
    Late,
    #[error("the process did not answer in time before, and is left alone")]
    Resting,
    #[error("{STUCK_MAX} reads hang, so no process is asked any more")]
    Off,
    #[error("the read failed inside the daemon")]
    Failed,
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Answers that did not come in time, since the start.
    pub late: u64,
    /// Threads that wait for one now.
    pub stuck: usize,
    /// Processes that are left alone.
    pub processes: Vec<u32>,
}

impl Report {
    /// Whether nothing is asked any more.
    pub fn off(&self) -> bool {
        self.stuck >= STUCK_MAX
    }
}

/// Who is asked, and who did not answer; cheap to clone.
#[derive(Clone, Default)]
pub struct Patience(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    late: AtomicU64,
    /// Whether the table holds anybody: nearly always not, and then nobody takes the lock.
    any: AtomicBool,
}

#[derive(Default)]
struct State {
    stuck: usize,
    slow: HashMap<u32, Slow>,
}

struct Slow {
    start_time: u64,
    times: u32,
    /// `None`: a thread still waits.
    until: Option<Instant>,
}

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    /// The thread at hand.
    static WORKER: RefCell<Option<Giver<Job>>> = const { RefCell::new(None) };
}

impl Patience {
    /// Runs `job`, which reads what `pid` controls, and waits for it at most `limit`.
    pub fn ask<T: Send + 'static>(
        &self,
        pid: u32,
        limit: Duration,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unanswered> {
        self.admit(pid)?;
        let (reply, answer) = slot();
        let left = Arc::new(AtomicBool::new(false));
        let (abandoned, back) = (left.clone(), self.clone());
        let run = Box::new(move || {
            if let Ok(found) = catch_unwind(AssertUnwindSafe(job)) {
                // Whoever asked may have gone on.
                let _ = reply.give(found);
            }
            drop(reply);
            let mut state = back.lock();
            if abandoned.load(Relaxed) {
                state.came_back(pid);
            }
        });
        hand_over(run)?;
        match answer.take(Some(limit)) {
            Ok(found) => Ok(found),
            Err(Empty::Closed) => Err(Unanswered::Failed),
            Err(Empty::Timeout) => {
                let mut state = self.lock();
                // Decided under the lock that the job takes at its end: it is either here, or will find itself left.
                match answer.take(Some(Duration::ZERO)) {
                    Ok(found) => return Ok(found),
                    Err(Empty::Closed) => return Err(Unanswered::Failed),
                    Err(Empty::Timeout) => {}
                }
                left.store(true, Relaxed);
                WORKER.with_borrow_mut(Option::take);
                state.left_behind(pid);
                self.0.any.store(true, Relaxed);
                self.0.late.fetch_add(1, Relaxed);
                tracing::warn!(pid, "the process lets reads of its memory or files wait; it is left alone");
                Err(Unanswered::Late)
            }
        }
    }

    pub fn report(&self) -> Report {
        let now = Instant::now();
        let state = self.lock();
        let resting = |slow: &Slow| slow.until.is_none_or(|until| now < until);
        let mut processes: Vec<u32> =
            state.slow.iter().filter(|(_, slow)| resting(slow)).map(|(pid, _)| *pid).collect();
        processes.sort_unstable();
        Report { late: self.0.late.load(Relaxed), stuck: state.stuck, processes }
    }

    fn admit(&self, pid: u32) -> Result<(), Unanswered> {
        if !self.0.any.load(Relaxed) {
            return Ok(());
        }
        let mut state = self.lock();
        if let Some(slow) = state.slow.get(&pid) {
            if slow.start_time != start_time(pid) {
                state.slow.remove(&pid);
            } else if slow.until.is_none_or(|until| Instant::now() < until) {
                return Err(Unanswered::Resting);
            }
        }
        if state.stuck >= STUCK_MAX { Err(Unanswered::Off) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn left_behind(&mut self, pid: u32) {
        self.stuck += 1;
        if self.slow.len() >= SLOW_MAX {
            self.slow.retain(|pid, slow| slow.until.is_none() || slow.start_time == start_time(*pid));
        }
        let start_time = start_time(pid);
        let slow = self.slow.entry(pid).or_insert(Slow { start_time, times: 0, until: None });
        (slow.start_time, slow.until) = (start_time, None);
        slow.times += 1;
    }

    fn came_back(&mut self, pid: u32) {
        self.stuck -= 1;
        if let Some(slow) = self.slow.get_mut(&pid) {
            let rest = REST.saturating_mul(1 << (slow.times - 1).min(16)).min(REST_MAX);
            slow.until = Some(Instant::now() + rest);
        }
    }
}

/// `/proc/PID/stat` says it without asking the process; 0 when it is gone.
fn start_time(pid: u32) -> u64 {
    identity::key(pid).map_or(0, |key| key.start_time)
}

fn hand_over(job: Job) -> Result<(), Unanswered> {
    WORKER.with_borrow_mut(|worker| {
        let job = match worker {
            // It has taken the one before, since that was answered.
            Some(jobs) => match jobs.give(job) {
                Ok(()) => return Ok(()),
                Err(refused) => refused,
            },
            None => job,
        };
        let (jobs, incoming) = slot::<Job>();
        let work = move || {
            while let Ok(job) = incoming.take(None) {
                job();
            }
        };
        std::thread::Builder::new().name("asker".into()).spawn(work).map_err(|_| Unanswered::Failed)?;
        jobs.give(job).map_err(|_| Unanswered::Failed)?;
        *worker = Some(jobs);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::memory::{Memory, ProcessMemory};
    use crossbeam_channel::bounded;
    use std::os::fd::{FromRawFd, OwnedFd};

    const SHORT: Duration = Duration::from_millis(50);

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < Duration::from_secs(60), "waiting for {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_answer_is_passed_on_and_a_panic_is_not_the_end() {
        let patience = Patience::default();
        assert_eq!(patience.ask(1, MEMORY, || 7), Ok(7));
        assert_eq!(patience.ask(1, MEMORY, || panic!("as a parser might")), Err::<u8, _>(Unanswered::Failed));
        assert_eq!(patience.ask(1, MEMORY, || 8), Ok(8));
        assert_eq!(patience.report(), Report::default());
    }

    #[test]
    fn who_does_not_answer_is_left_alone_and_others_are_not() {
        let patience = Patience::default();
        let me = std::process::id();
        let (release, wait) = bounded::<()>(0);
        assert_eq!(patience.ask(me, SHORT, move || wait.recv().is_ok()), Err(Unanswered::Late));
        assert_eq!(patience.ask(me, MEMORY, || 1), Err(Unanswered::Resting));
        assert_eq!(patience.ask(1, MEMORY, || 2), Ok(2));
        assert_eq!(patience.report(), Report { late: 1, stuck: 1, processes: vec![me] });
        drop(release);
        until("the thread to come back", || patience.report().stuck == 0);
        assert_eq!(patience.ask(me, MEMORY, || 1), Err(Unanswered::Resting));
        // Another process under the same pid has done nothing wrong.
        patience.lock().slow.get_mut(&me).unwrap().start_time += 1;
        assert_eq!(patience.ask(me, MEMORY, || 1), Ok(1));
    }

    #[test]
    fn the_number_of_threads_left_behind_is_bounded() {
        let patience = Patience::default();
        let (release, wait) = bounded::<()>(0);
        // Pids that cannot be: nobody's process is concerned.
        for pid in 0..STUCK_MAX as u32 {
            let wait = wait.clone();
            let job = move || wait.recv().is_ok();
            assert_eq!(patience.ask(u32::MAX - pid, SHORT, job), Err(Unanswered::Late));
        }
        assert!(patience.report().off());
        assert_eq!(patience.ask(1, MEMORY, || 1), Err(Unanswered::Off));
        drop(release);
        until("all to come back", || patience.report().stuck == 0);
        assert_eq!(patience.ask(1, MEMORY, || 1), Ok(1));
    }

    /// `struct uffdio_api` and `struct uffdio_register` (include/uapi/linux/userfaultfd.h).
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

    #[test]
    fn a_page_that_nobody_serves_costs_the_limit_and_no_more() {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if fd < 0 {
            crate::skip::skip(
                "a_page_that_nobody_serves_costs_the_limit_and_no_more",
                "userfaultfd is not permitted here",
            );
            return;
        }
        // SAFETY: the kernel just returned this descriptor.
        let handle = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // SAFETY: a fresh mapping, which nothing else refers to.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        let mut api = [0xaau64, 0, 0];
        let mut register = [page as u64, 4096, 1, 0];
        // SAFETY: structures of the sizes that the requests carry, which outlive the calls.
        unsafe {
            assert_eq!(libc::ioctl(fd as i32, UFFDIO_API, api.as_mut_ptr()), 0);
            assert_eq!(libc::ioctl(fd as i32, UFFDIO_REGISTER, register.as_mut_ptr()), 0);
        }
        let (patience, me, address) = (Patience::default(), std::process::id(), page as u64);
        let read = move || ProcessMemory::new(me).read_u64(address);
        assert_eq!(patience.ask(me, SHORT, read), Err(Unanswered::Late));
        // Without its descriptor the page is an ordinary one.
        drop(handle);
        until("the read to end", || patience.report().stuck == 0);
        // SAFETY: the page mapped above.
        unsafe { libc::munmap(page, 4096) };
    }
}
