//! Recording the kernel side's records, and running them through the pipeline again without a kernel.
//!
//! A recording is `reqprof2\n`, the ABI's version (u32, little-endian), the epoch offset (i64, little-endian), then
//! records: length (u32, little-endian) and bytes as they came from the ring. Captured bytes are blanked before they are
//! written: of a head only the request or status line without its query, and the headers that frame a message, keep
//! their letters, so a recording holds no secret that a record in the store would not hold.

mod blank;

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use profiler_common::{ABI_VERSION, DIR_IN, Data, Header, Kind};

use blank::Blanks;

use crate::correlate::Counters;
use crate::pipeline::{Finisher, Live, Naming, Reader, Stats, TICK};
use crate::process::targets::Targets;
use crate::record::RequestRecord;
use crate::serve::Metrics;

const MAGIC: &[u8; 9] = b"reqprof2\n";
const HEADER: usize = 9 + 4 + 8;
/// A record is at most a header, 4,096 captured bytes or a full stack.
const RECORD_MAX: u32 = 64 << 10;
/// Recordings are for minutes, not for days.
const FILE_MAX: u64 = 1 << 30;

/// A recording cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is not a recording of this version", .0.display())]
    Magic(PathBuf),
    #[error("{} holds records of version {found}, this program reads version {ABI_VERSION}: record anew", path.display())]
    Version { path: PathBuf, found: u32 },
    #[error("metrics: {0}")]
    Metrics(String),
    #[error("{} is damaged at byte {}", .0.display(), .1)]
    Damaged(PathBuf, u64),
}

/// Writes a recording.
pub struct Recorder {
    file: Option<BufWriter<File>>,
    written: u64,
    scratch: Vec<u8>,
    blanks: Blanks,
}

impl Recorder {
    pub fn create(path: &Path, epoch: i64) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut file = BufWriter::new(file);
        file.write_all(MAGIC)?;
        file.write_all(&ABI_VERSION.to_le_bytes())?;
        file.write_all(&epoch.to_le_bytes())?;
        Ok(Self { file: Some(file), written: 0, scratch: Vec::new(), blanks: Blanks::default() })
    }

    /// Appends a record; after an error or at the size limit the recording ends there.
    pub fn record(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        self.scratch.clear();
        self.scratch.extend_from_slice(bytes);
        blank(&mut self.scratch, &mut self.blanks);
        let length = self.scratch.len() as u32;
        let done = file.write_all(&length.to_le_bytes()).and_then(|()| file.write_all(&self.scratch));
        self.written += u64::from(length) + 4;
        if done.is_err() || self.written > FILE_MAX {
            tracing::warn!("the recording ends after {} bytes", self.written);
            self.file = None;
        }
    }
}

/// Blanks what a record's captured bytes and tail hold besides what is needed.
fn blank(record: &mut [u8], blanks: &mut Blanks) {
    let start = size_of::<Data>();
    if record.len() < start || record[..2] != (Kind::Data as u16).to_ne_bytes() {
        return;
    }
    // Places inside `Data`.
    let u16_at = |record: &[u8], at: usize| u16::from_ne_bytes([record[at], record[at + 1]]);
    let captured = usize::from(u16_at(record, std::mem::offset_of!(Data, captured)));
    let incoming = u16_at(record, std::mem::offset_of!(Data, direction)) == DIR_IN;
    let conn = std::mem::offset_of!(Data, conn);
    let mut place = [0; 16];
    place.copy_from_slice(&record[conn..conn + 16]);
    // Only the forms of a last chunk mean anything in a tail.
    let tail = std::mem::offset_of!(Data, tail);
    let letters = record[tail..tail + 8].iter_mut();
    letters.filter(|b| !matches!(b, b'\r' | b'\n' | b'0')).for_each(|b| *b = b'x');
    // Behind the captured bytes lies what the ring held before.
    let body = &mut record[start..];
    let captured = captured.min(body.len());
    body[captured..].fill(0);
    blanks.blank((place, incoming), &mut body[..captured]);
}

/// Reads a recording.
pub struct Player {
    path: PathBuf,
    file: BufReader<File>,
    /// As given to [`Recorder::create`].
    pub epoch: i64,
    at: u64,
}

impl Player {
    pub fn open(path: &Path) -> Result<Self, ReplayError> {
        let wrong = |source| ReplayError::Io { path: path.to_owned(), source };
        let mut file = BufReader::new(File::open(path).map_err(wrong)?);
        let mut head = [0; HEADER];
        file.read_exact(&mut head).map_err(|_| ReplayError::Magic(path.to_owned()))?;
        let (magic, rest) = head.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(ReplayError::Magic(path.to_owned()));
        }
        let (mut version, mut epoch) = ([0; 4], [0; 8]);
        version.copy_from_slice(&rest[..4]);
        epoch.copy_from_slice(&rest[4..]);
        let found = u32::from_le_bytes(version);
        if found != ABI_VERSION {
            return Err(ReplayError::Version { path: path.to_owned(), found });
        }
        let epoch = i64::from_le_bytes(epoch);
        Ok(Self { path: path.to_owned(), file, epoch, at: HEADER as u64 })
    }

    /// The next record; `None` at the end.
    pub fn next_record(&mut self, record: &mut Vec<u8>) -> Result<Option<()>, ReplayError> {
        let damaged = |at| ReplayError::Damaged(self.path.clone(), at);
        let mut length = [0; 4];
        match self.file.read(&mut length[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(source) => return Err(ReplayError::Io { path: self.path.clone(), source }),
        }
        self.file.read_exact(&mut length[1..]).map_err(|_| damaged(self.at))?;
        let length = u32::from_le_bytes(length);
        if length > RECORD_MAX {
            return Err(damaged(self.at));
        }
        record.resize(length as usize, 0);
        self.file.read_exact(record).map_err(|_| damaged(self.at))?;
        self.at += u64::from(length) + 4;
        Ok(Some(()))
    }
}

/// Runs a recording through the pipeline; time is the records' own. Stacks are not resolved, since what they belong to
/// is gone.
pub fn play(
    path: &Path,
    mut each: impl FnMut(&RequestRecord) + Send + 'static,
) -> Result<Counters, ReplayError> {
    let mut player = Player::open(path)?;
    let metrics = Metrics::new().map_err(|e| ReplayError::Metrics(e.to_string()))?;
    let (out, incoming) = crossbeam_channel::unbounded();
    let (targets, stats) = (Targets::default(), Stats::default());
    let mut reader = Reader::new(out, None, targets.clone(), stats.clone());
    let naming = Naming { epoch: player.epoch, salt: 0 };
    let mut finisher = Finisher::new(targets, naming, Live::default(), Arc::new(metrics), stats.clone());
    finisher.recorded = true;
    finisher.observer = Some(Box::new(move |record, _| each(record)));
    let mut take = || incoming.try_iter().flatten().for_each(|message| finisher.message(message));
    let mut record = Vec::new();
    let (mut ticked, mut last) = (0, 0);
    while player.next_record(&mut record)?.is_some() {
        let at = std::mem::offset_of!(Header, time);
        let time = record.get(at..at + 8).and_then(|b| Some(u64::from_ne_bytes(b.try_into().ok()?)));
        // A record may be a little older than the one before it.
        let time = time.unwrap_or_default();
        last = last.max(time);
        if time > ticked + TICK {
            ticked = time;
            reader.tick(time);
        }
        reader.record(&record);
        reader.flush();
        take();
    }
    reader.end(last);
    take();
    Ok(stats.snapshot().correlate)
}

#[cfg(test)]
mod tests;
