//! The thread that makes tables, so that nobody else waits for it.
//!
//! In: what happened to processes, from the manager (targets) and from the reader (samples in unknown code). Out: lists
//! and tables in the kernel's memory, and how it stands. Who tells never waits: what finds no room in the queue is
//! counted, and made up for by the next look.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::cache::{Sink, Usage};
use super::spaces::{Counts, Spaces};
use crate::health::Pulse;

/// What the worker is told.
enum Message {
    Follow(u32),
    Forked {
        parent: u32,
        child: u32,
    },
    Ended(u32),
    Unknown(u32),
    /// Somebody waits for what was told before.
    Settle(Sender<()>),
    Stop,
}

/// A fork storm of some thousand processes finds room; the messages are 12 bytes.
const QUEUE: usize = 8192;
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// How it stands, for people.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub processes: usize,
    pub usage: Usage,
    pub counts: Counts,
    /// Messages that found no room in the queue.
    pub untold: u64,
}

#[derive(Default)]
struct Shared {
    report: Mutex<Report>,
    untold: AtomicU64,
}

/// Tells the worker, and asks how it stands; cheap to clone.
#[derive(Clone)]
pub struct Unwinding {
    queue: Sender<Message>,
    shared: Arc<Shared>,
}

/// The worker's end.
pub struct Worker {
    queue: Receiver<Message>,
    shared: Arc<Shared>,
}

/// Both ends.
pub fn unwinding() -> (Unwinding, Worker) {
    let (to, queue) = bounded(QUEUE);
    let shared = Arc::<Shared>::default();
    (Unwinding { queue: to, shared: shared.clone() }, Worker { queue, shared })
}

impl Unwinding {
    /// The process is a target, or may map something else by now.
    pub fn follow(&self, pid: u32) {
        self.tell(Message::Follow(pid));
    }

    pub fn forked(&self, parent: u32, child: u32) {
        self.tell(Message::Forked { parent, child });
    }

    /// The process is gone, or runs another program.
    pub fn ended(&self, pid: u32) {
        self.tell(Message::Ended(pid));
    }

    /// A sample of the process was in code that is in no mapping known.
    pub fn unknown(&self, pid: u32) {
        self.tell(Message::Unknown(pid));
    }

    /// Waits, not longer than that, until all that was told has been done.
    pub fn settle(&self, limit: Duration) {
        let (done, wait) = bounded(1);
        if self.queue.send_timeout(Message::Settle(done), limit).is_ok() {
            let _ = wait.recv_timeout(limit);
        }
    }

    /// Ends the worker; waits at most `limit` for room in its queue.
    pub fn stop(&self, limit: Duration) {
        // It empties its queue all the time, unless it hangs; then whoever waits for its end says so.
        let _ = self.queue.send_timeout(Message::Stop, limit);
    }

    fn tell(&self, message: Message) {
        if self.queue.try_send(message).is_err() {
            self.shared.untold.fetch_add(1, Relaxed);
        }
    }

    pub fn report(&self) -> Report {
        let mut report = self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        report.untold = self.shared.untold.load(Relaxed);
        report
    }
}

impl Worker {
    /// Works until told to stop.
    pub fn run(self, sink: impl Sink, pulse: &Pulse) {
        let mut spaces = Spaces::new(sink);
        spaces.pulse = Some(pulse.clone());
        let mut next = Instant::now() + TIDY_EVERY;
        // Something that the report does not say yet.
        let mut changed = true;
        loop {
            pulse.beat();
            match self.queue.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Message::Follow(pid)) => {
                    spaces.follow(pid);
                    changed = true;
                }
                Ok(Message::Forked { parent, child }) => {
                    spaces.forked(parent, child);
                    changed = true;
                }
                Ok(Message::Ended(pid)) => {
                    spaces.ended(pid);
                    changed = true;
                }
                // They come by the thousand, and adding up takes longer than most of them.
                Ok(Message::Unknown(pid)) => changed |= spaces.unknown(pid),
                Ok(Message::Settle(done)) => {
                    // Whoever waited may have gone on.
                    let _ = done.try_send(());
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if Instant::now() >= next {
                spaces.tidy();
                next = Instant::now() + TIDY_EVERY;
                changed = true;
            }
            if changed && self.queue.is_empty() {
                let report = Report {
                    processes: spaces.processes(),
                    usage: spaces.cache.usage(),
                    counts: spaces.counts.clone(),
                    untold: 0,
                };
                *self.shared.report.lock().unwrap_or_else(PoisonError::into_inner) = report;
                changed = false;
            }
        }
    }
}
