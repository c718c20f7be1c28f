//! A head that arrives in parts: buffers them until the empty line, within a bound.

use super::head;

/// Most bytes of a partial head that are kept; servers refuse heads longer than 8 to 16 KiB themselves.
pub const PARTIAL_MAX: usize = 16 * 1024;

/// The bytes of an unfinished head. Empty (and without memory) nearly always: most heads arrive whole.
#[derive(Debug, Default)]
pub struct Partial {
    bytes: Vec<u8>,
}

/// What a part did to the head.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The empty line is there: this many bytes of the part belong to the head.
    Whole(usize),
    /// More is needed.
    Open,
    /// The bound is reached without an empty line.
    Full,
}

impl Partial {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends the part, or of it what belongs to the head.
    pub fn push(&mut self, part: &[u8]) -> Progress {
        let old = self.bytes.len();
        let room = PARTIAL_MAX - old;
        self.bytes.extend_from_slice(&part[..part.len().min(room)]);
        // The line feed that begins the empty line can be two bytes back: LF CR | LF.
        match head::end(&self.bytes, old.saturating_sub(2)) {
            Some(end) => {
                self.bytes.truncate(end);
                Progress::Whole(end - old)
            }
            None if part.len() >= room => Progress::Full,
            None => Progress::Open,
        }
    }

    /// Forgets what was pushed after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    /// Empties the buffer and gives its memory back: thousands of idle connections must not keep 16 KiB each.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    #[cfg(test)]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}
