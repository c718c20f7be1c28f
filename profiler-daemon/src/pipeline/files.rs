//! One file per request, written by a thread of its own: a slow disk must not hold up the stages before it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError, bounded};

use super::Stats;
use crate::export::ProfileDir;
use crate::health;
use crate::profile::Profile;
use crate::record::RequestRecord;

/// Requests waiting to be written; a profile is some tens of kilobytes.
const QUEUE: usize = 256;

/// How long the last files may take.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Writes files; cheap to clone.
#[derive(Clone)]
pub struct FileExporter {
    queue: Sender<(RequestRecord, Arc<Profile>)>,
    stats: Stats,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl FileExporter {
    pub fn start(directory: ProfileDir, stats: Stats) -> std::io::Result<Self> {
        let (queue, incoming) = bounded::<(RequestRecord, Arc<Profile>)>(QUEUE);
        let counts = stats.clone();
        let thread = std::thread::Builder::new().name("files".into()).spawn(move || {
            let mut said = false;
            for (record, profile) in incoming {
                match directory.write(&record, &profile) {
                    Ok(_) => said = false,
                    Err(error) => {
                        counts.update(|s| s.files_failed += 1);
                        // Once per row of failures: a full disk fails for every request.
                        if !std::mem::replace(&mut said, true) {
                            tracing::error!("writing a request's file: {error}");
                        }
                    }
                }
            }
        })?;
        Ok(Self { queue, stats, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    pub fn write(&self, record: RequestRecord, profile: Arc<Profile>) {
        match self.queue.try_send((record, profile)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.stats.update(|s| s.files_dropped += 1);
            }
        }
    }

    /// Waits until everything is written. No clone may be left.
    pub fn finish(self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(self.queue);
        if let Some(thread) = thread {
            health::join("files", thread, STOP_LIMIT);
        }
    }
}
