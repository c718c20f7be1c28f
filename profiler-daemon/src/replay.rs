//! Recording the kernel side's records, and running them through the pipeline again without a kernel.
//!
//! A recording is `reqprof1\n`, the epoch offset (i64, little-endian), then records: length (u32, little-endian) and
//! bytes as they came from the ring. Captured heads are blanked before they are written: of a head only the request
//! or status line without its query, and the headers that frame a message, keep their letters, so a recording holds
//! no secret that a record in the store would not hold.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use profiler_common::{Data, Kind};

const MAGIC: &[u8; 9] = b"reqprof1\n";
/// A record is at most a header, 4,096 captured bytes or a full stack.
const RECORD_MAX: u32 = 64 << 10;
/// Recordings are for minutes, not for days.
const FILE_MAX: u64 = 1 << 30;

/// Headers whose values frame a message or link it to a trace, and hold nothing secret.
const KEPT: [&[u8]; 6] =
    [b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade", b"traceparent"];

/// A recording cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is not a recording of this version", .0.display())]
    Magic(PathBuf),
    #[error("{} is damaged at byte {}", .0.display(), .1)]
    Damaged(PathBuf, u64),
}

/// Writes a recording.
pub struct Recorder {
    file: Option<BufWriter<File>>,
    written: u64,
    scratch: Vec<u8>,
}

impl Recorder {
    pub fn create(path: &Path, epoch: i64) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut file = BufWriter::new(file);
        file.write_all(MAGIC)?;
        file.write_all(&epoch.to_le_bytes())?;
        Ok(Self { file: Some(file), written: 0, scratch: Vec::new() })
    }

    /// Appends a record; after an error or at the size limit the recording ends there.
    pub fn record(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        self.scratch.clear();
        self.scratch.extend_from_slice(bytes);
        blank(&mut self.scratch);
        let length = self.scratch.len() as u32;
        let done = file.write_all(&length.to_le_bytes()).and_then(|()| file.write_all(&self.scratch));
        self.written += u64::from(length) + 4;
        if done.is_err() || self.written > FILE_MAX {
            tracing::warn!("the recording ends after {} bytes", self.written);
            self.file = None;
        }
    }
}

/// Blanks what a captured head holds besides the kept lines.
fn blank(record: &mut [u8]) {
    let start = size_of::<Data>();
    if record.len() < start || record[..2] != (Kind::Data as u16).to_ne_bytes() {
        return;
    }
    // Behind the captured bytes lies what the ring held before; `captured` is at a fixed place in `Data`.
    let at = std::mem::offset_of!(Data, captured);
    let captured = usize::from(u16::from_ne_bytes([record[at], record[at + 1]]));
    let body = &mut record[start..];
    let captured = captured.min(body.len());
    body[captured..].fill(0);
    let mut first = true;
    for line in body[..captured].split_mut(|b| *b == b'\n') {
        if first {
            first = false;
            if let Some(query) = line.iter().position(|b| *b == b'?') {
                let end = line[query..].iter().position(|b| *b == b' ').map_or(line.len(), |n| query + n);
                line[query + 1..end].fill(b'x');
            }
            continue;
        }
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            line.iter_mut().filter(|b| **b != b'\r').for_each(|b| *b = b'x');
            continue;
        };
        if !KEPT.iter().any(|kept| kept.eq_ignore_ascii_case(&line[..colon])) {
            line[colon + 1..].iter_mut().filter(|b| **b != b'\r').for_each(|b| *b = b'x');
        }
    }
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
        let mut head = [0; 17];
        file.read_exact(&mut head).map_err(|_| ReplayError::Magic(path.to_owned()))?;
        if head[..9] != *MAGIC {
            return Err(ReplayError::Magic(path.to_owned()));
        }
        let mut epoch = [0; 8];
        epoch.copy_from_slice(&head[9..]);
        Ok(Self { path: path.to_owned(), file, epoch: i64::from_le_bytes(epoch), at: 17 })
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
