//! Names of code made at run time, from the map that its maker leaves for profilers: `/tmp/perf-PID.map`.
//!
//! In: a process, whose file it is, and an address. Out: a name. The file is a line per function, `START SIZE NAME`
//! with hexadecimal numbers, and grows while the process runs; what was read is not read again, and of two lines that
//! claim the same address the later one holds, since code is thrown away and its room used again.
//!
//! The process decides what lies there, and we are root. So the path is followed below the process's own root, with
//! no symbolic link on the way; what is found must be a regular file with one name, of the process's own user or of
//! root, and not older than the process, whose pid somebody else may have had before. A lie in it costs the liar its
//! own names.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::text::NAME_MAX;
use crate::process::identity;
use crate::process::maps::{open_in_root, open_path};

/// Most bytes that one look reads: tens of thousands of functions, some 50 ms. A longer file takes several looks.
const LOOK_BYTES: usize = 4 << 20;
/// Longest line that is looked at: what is longer holds no name that anyone would read.
const LINE_MAX: usize = 4096;
/// Memory for one process's names, bytes, about: half of what one process may take for all. Some 40,000 functions
/// that live at once; a large Node.js service has half of that.
const BYTES_MAX: usize = 4 << 20;
/// What an entry costs beside its name.
const ENTRY_COST: usize = 64;
/// `status` has 60 lines and less than 2 KiB; many CPUs or groups add some.
const STATUS_MAX: u64 = 8192;
/// Clocks of files are coarse, and a process's start is known in hundredths of a second.
const SLACK: Duration = Duration::from_secs(2);

/// Where reading stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    file: (u64, u64),
    offset: u64,
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// The file's name, which is shown as the place of its functions.
    name: String,
    position: Position,
    /// Whether `bytes` follow what was read before.
    continues: bool,
    /// Whole lines.
    bytes: Vec<u8>,
}

/// The names of one process.
#[derive(Clone, Debug, Default)]
pub(super) struct PerfMap {
    name: String,
    position: Option<Position>,
    /// By start: where it ends, and its name. Nothing overlaps.
    functions: BTreeMap<u64, (u64, Box<str>)>,
    bytes: usize,
}

impl PerfMap {
    /// Of whom it is, and the name there.
    pub(super) fn lookup(&self, address: u64) -> Option<(&str, &str)> {
        let (_, (end, name)) = self.functions.range(..=address).next_back()?;
        (address < *end).then_some((name, &self.name))
    }

    pub(super) fn position(&self) -> Option<Position> {
        self.position
    }

    /// The child's beginning: it has its parent's code, and will write a file of its own.
    pub(super) fn fork(&self) -> Self {
        Self { position: None, ..self.clone() }
    }

    /// Bytes held, about.
    pub(super) fn size(&self) -> usize {
        self.bytes
    }

    /// Takes in what a look found. Whether anything has another name than before.
    pub(super) fn add(&mut self, look: Look) -> bool {
        let mut changed = false;
        if !look.continues && self.position.is_some() {
            changed = !self.functions.is_empty();
            self.functions.clear();
            self.bytes = 0;
        }
        (self.position, self.name) = (Some(look.position), look.name);
        for line in look.bytes.split(|&b| b == b'\n').filter(|line| line.len() <= LINE_MAX) {
            if let Some((start, end, name)) = parse(line) {
                changed |= self.insert(start, end, name);
            }
        }
        changed
    }

    fn insert(&mut self, start: u64, end: u64, name: &[u8]) -> bool {
        let name = String::from_utf8_lossy(&name[..name.len().min(NAME_MAX)]);
        // Each entry is taken out at most once.
        while let Some((&at, _)) = self.functions.range(start..end).next() {
            if let Some((_, old)) = self.functions.remove(&at) {
                self.bytes -= ENTRY_COST + old.len();
            }
        }
        if let Some((_, (before, _))) = self.functions.range_mut(..start).next_back() {
            *before = (*before).min(start);
        }
        let cost = ENTRY_COST + name.len();
        if self.bytes + cost > BYTES_MAX {
            return false;
        }
        self.bytes += cost;
        self.functions.insert(start, (end, name.into()));
        true
    }
}

/// `START SIZE NAME`; V8 and others write the numbers with or without `0x`.
fn parse(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut fields = line.splitn(3, |&b| b == b' ');
    let mut number = || {
        let text = std::str::from_utf8(fields.next()?).ok()?;
        u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    let name = fields.next()?.trim_ascii();
    let end = start.checked_add(size).filter(|end| *end > start)?;
    (!name.is_empty()).then_some((start, end, name))
}

/// Looks at the file of a process: what is new since `last`. `None`: there is none, or none that is believed. `age`:
/// how long the process runs, where that is known. May take as long as the process likes.
pub(super) fn look(pid: u32, last: Option<Position>, age: Option<Duration>) -> Option<Look> {
    let mut status = String::new();
    let limited = io::Read::take(File::open(format!("/proc/{pid}/status")).ok()?, STATUS_MAX);
    io::Read::read_to_string(&mut { limited }, &mut status).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    // The pid as the process itself knows it: the one of the innermost namespace.
    let inner: u32 = field("NSpid:")?.split_ascii_whitespace().last()?.parse().ok()?;
    // Real, effective, saved, file system.
    let user: u32 = field("Uid:")?.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let root = open_path(&format!("/proc/{}/root", identity::via(pid))).ok()?;
    match read(&root, inner, user, last, age) {
        Ok(look) => look,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::debug!(pid, %error, "cannot read the perf map");
            }
            None
        }
    }
}

fn read(
    root: &OwnedFd,
    pid: u32,
    user: u32,
    last: Option<Position>,
    age: Option<Duration>,
) -> io::Result<Option<Look>> {
    let name = format!("perf-{pid}.map");
    let handle =
        File::from(open_in_root(root, Path::new(&format!("tmp/{name}")), libc::RESOLVE_NO_SYMLINKS)?);
    let meta = handle.metadata()?;
    // A second name could be somebody else's file.
    let theirs = meta.is_file() && meta.nlink() == 1 && (meta.uid() == user || meta.uid() == 0);
    let unchanged = SystemTime::now().duration_since(meta.modified()?).unwrap_or_default();
    if !theirs || age.is_some_and(|age| unchanged > age + SLACK) {
        return Ok(None);
    }
    let id = (meta.dev(), meta.ino());
    let continued = last.filter(|last| last.file == id && last.offset <= meta.len());
    let offset = continued.map_or(0, |last| last.offset);
    // Our own descriptor cannot lead to another file than the one just looked at.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", handle.as_raw_fd()))?;
    let mut bytes = vec![0; usize::try_from(meta.len() - offset).unwrap_or(LOOK_BYTES).min(LOOK_BYTES)];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    bytes.truncate(filled);
    // The last line may be half written; one that fills a whole look is none.
    let whole =
        memchr::memrchr(b'\n', &bytes).map_or(if filled == LOOK_BYTES { filled } else { 0 }, |n| n + 1);
    bytes.truncate(whole);
    let position = Position { file: id, offset: offset + whole as u64 };
    Ok(Some(Look { name, position, continues: continued.is_some(), bytes }))
}

#[cfg(test)]
mod tests;
