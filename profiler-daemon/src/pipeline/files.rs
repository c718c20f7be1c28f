//! One file per request, written by a thread of its own: a slow disk must not hold up the stages before it.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};

use super::Stats;
use crate::export::{ExportError, ProfileDir};
use crate::health;
use crate::profile::Profile;
use crate::record::RequestRecord;

/// Requests waiting to be written; a profile is some tens of kilobytes, mostly.
const QUEUE: usize = 256;
/// Memory of the profiles that wait, for those that are large: up to a hundred times that.
const QUEUE_BYTES: usize = 64 << 20;

/// How long the last files may take.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Writes files; cheap to clone.
#[derive(Clone)]
pub struct FileExporter {
    queue: Sender<(RequestRecord, Arc<Profile>)>,
    /// Of what is queued, and of what is being written.
    bytes: Arc<AtomicUsize>,
    /// How many these are.
    waiting: Arc<AtomicUsize>,
    max_bytes: usize,
    stats: Stats,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl FileExporter {
    pub fn start(directory: ProfileDir, stats: Stats) -> std::io::Result<Self> {
        Self::with(move |record, profile| directory.write(record, profile).map(drop), stats, QUEUE_BYTES)
    }

    fn with(
        write: impl Fn(&RequestRecord, &Profile) -> Result<(), ExportError> + Send + 'static,
        stats: Stats,
        max_bytes: usize,
    ) -> std::io::Result<Self> {
        let (bytes, waiting) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (queued, left) = (Arc::clone(&bytes), Arc::clone(&waiting));
        let (queue, incoming) = bounded::<(RequestRecord, Arc<Profile>)>(QUEUE);
        let counts = stats.clone();
        let thread = std::thread::Builder::new().name("files".into()).spawn(move || {
            let mut said = false;
            for (record, profile) in incoming {
                let written = write(&record, &profile);
                queued.fetch_sub(profile.heap_bytes(), Relaxed);
                left.fetch_sub(1, Relaxed);
                match written {
                    Ok(()) => said = false,
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
        Ok(Self { queue, bytes, waiting, max_bytes, stats, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    pub fn write(&self, record: RequestRecord, profile: Arc<Profile>) {
        let size = profile.heap_bytes();
        let fits = self.bytes.fetch_add(size, Relaxed) + size <= self.max_bytes;
        self.waiting.fetch_add(1, Relaxed);
        if !fits || self.queue.try_send((record, profile)).is_err() {
            self.bytes.fetch_sub(size, Relaxed);
            self.waiting.fetch_sub(1, Relaxed);
            self.stats.update(|s| s.files_dropped += 1);
        }
    }

    /// Waits until everything is written, but not for ever: what a disk that hangs has not taken counts as dropped. No
    /// clone may be left.
    pub fn finish(self) {
        self.finish_within(STOP_LIMIT);
    }

    fn finish_within(self, limit: Duration) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(self.queue);
        if let Some(thread) = thread
            && health::join("files", thread, limit).is_none()
        {
            let left = self.waiting.load(Relaxed) as u64;
            self.stats.update(|s| s.files_dropped += left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::Template;
    use crate::export::tests::record;
    use crate::profile::Builder;
    use crate::profile::format::Format;
    use crate::profile::testing::{py, stack};

    #[test]
    fn profiles_that_wait_are_bounded_by_their_size() {
        let dir = tempfile::tempdir().unwrap();
        let directory = ProfileDir::open(dir.path(), Template::default(), vec![Format::Text]).unwrap();
        let stats = Stats::default();
        let mut builder = Builder::default();
        builder.add(&stack(&[py("view", 3)]), 1);
        let small = Arc::new(builder.finish(1));
        let mut builder = Builder::default();
        for line in 1..1_000 {
            builder.add(&stack(&[py("view", line)]), 1);
        }
        let large = Arc::new(builder.finish(1));
        let write =
            move |record: &RequestRecord, profile: &Profile| directory.write(record, profile).map(drop);
        let files = FileExporter::with(write, stats.clone(), 2 * small.heap_bytes()).unwrap();
        assert!(large.heap_bytes() > 10 * small.heap_bytes());
        files.write(record("GET", "/large", 5), large);
        files.write(record("GET", "/small", 5), small);
        let bytes = Arc::clone(&files.bytes);
        files.finish();
        assert_eq!((stats.snapshot().files_dropped, bytes.load(Relaxed)), (1, 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_disk_that_hangs_does_not_take_is_counted() {
        let (disk, hangs) = crossbeam_channel::bounded::<()>(0);
        let write = move |_: &RequestRecord, _: &Profile| {
            // Until the test is over.
            let _ = hangs.recv();
            Ok(())
        };
        let stats = Stats::default();
        let files = FileExporter::with(write, stats.clone(), QUEUE_BYTES).unwrap();
        for _ in 0..3 {
            files.write(record("GET", "/", 5), Arc::new(Builder::default().finish(1)));
        }
        files.finish_within(Duration::ZERO);
        assert_eq!(stats.snapshot().files_dropped, 3);
        drop(disk);
    }
}
