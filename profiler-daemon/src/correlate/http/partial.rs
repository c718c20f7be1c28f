//! A head that arrives in parts: buffers them until the empty line, within a bound.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::head;

/// Most bytes of a partial head that are kept; servers refuse heads longer than 8 to 16 KiB themselves.
pub const PARTIAL_MAX: usize = 16 * 1024;

/// Bytes of all partial heads together: 4,096 of the longest. A client may leave as many connections in the middle of a
/// head as the server lets it, and all of them would be a gigabyte.
static ALL: Budget = Budget { held: AtomicUsize::new(0), max: 64 << 20 };

#[derive(Debug)]
struct Budget {
    held: AtomicUsize,
    max: usize,
}

/// The bytes of an unfinished head. Empty (and without memory) nearly always: most heads arrive whole.
#[derive(Debug)]
pub struct Partial {
    bytes: Vec<u8>,
    budget: &'static Budget,
}

impl Default for Partial {
    fn default() -> Self {
        Self { bytes: Vec::new(), budget: &ALL }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.take();
    }
}

/// What a part did to the head.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The empty line is there: this many bytes of the part belong to the head.
    Whole(usize),
    /// More is needed.
    Open,
    /// The bound, or that of all together, is reached without an empty line.
    Full,
}

impl Partial {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends the part, or of it what belongs to the head.
    pub fn push(&mut self, part: &[u8]) -> Progress {
        let old = self.bytes.len();
        let held = self.bytes.capacity();
        let others = self.budget.held.load(Relaxed).saturating_sub(held);
        let room = (PARTIAL_MAX - old).min(self.budget.max.saturating_sub(others + old));
        self.bytes.extend_from_slice(&part[..part.len().min(room)]);
        // A vector never shrinks by itself.
        self.budget.held.fetch_add(self.bytes.capacity() - held, Relaxed);
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
        self.budget.held.fetch_sub(self.bytes.capacity(), Relaxed);
        std::mem::take(&mut self.bytes)
    }

    #[cfg(test)]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_partial_heads_have_a_common_bound() {
        static SMALL: Budget = Budget { held: AtomicUsize::new(0), max: 10_000 };
        let new = || Partial { bytes: Vec::new(), budget: &SMALL };
        let mut open: Vec<Partial> = Vec::new();
        loop {
            let mut head = new();
            let progress = head.push(&[b'x'; 1_000]);
            open.push(head);
            if progress == Progress::Full {
                break;
            }
            assert!(open.len() <= 10);
        }
        assert_eq!(SMALL.held.load(Relaxed), open.iter().map(Partial::capacity).sum::<usize>());
        assert!(SMALL.held.load(Relaxed) <= 2 * SMALL.max, "a vector may grow to twice what is in it");
        open.truncate(3);
        let mut head = new();
        assert_eq!(head.push(b"GET / HTTP/1.1\r\n\r\nmore"), Progress::Whole(18));
        drop((head, open));
        assert_eq!(SMALL.held.load(Relaxed), 0);
    }
}
