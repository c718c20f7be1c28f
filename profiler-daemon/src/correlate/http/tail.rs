//! The last bytes written on a connection, which tell whether a chunked response is over.
//!
//! Chunk sizes are invisible, so this is evidence, not proof: data may look like the last chunk at the end of a
//! write. The caller therefore treats the end as provisional until something else confirms it.

use super::TAIL_MAX;

/// Whether the bytes written so far can be a whole chunked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// They do not end in an empty line, which every chunked message does.
    Open,
    /// An empty line: trailers end so, but so does a chunk of text.
    EmptyLine,
    /// The last chunk, without trailers.
    LastChunk,
    /// The bytes could not be read.
    Unknown,
}

/// A window over the end of the outgoing stream.
#[derive(Debug, Default)]
pub struct Tail {
    bytes: [u8; TAIL_MAX],
    len: usize,
}

impl Tail {
    /// Moves the window over `advance` more bytes that end in `tail`.
    pub fn push(&mut self, tail: &[u8], advance: u64) {
        let new = tail.len().min(TAIL_MAX);
        let whole = new as u64 == advance;
        let kept = if whole { self.len.min(TAIL_MAX - new) } else { 0 };
        self.bytes.copy_within(self.len - kept..self.len, 0);
        self.bytes[kept..kept + new].copy_from_slice(&tail[tail.len() - new..]);
        self.len = kept + new;
    }

    /// Forgets everything: bytes were lost.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    pub fn ending(&self) -> Ending {
        let seen = &self.bytes[..self.len];
        let Some(before) = seen.strip_suffix(b"\r\n\r\n") else {
            // Fewer than four known bytes prove nothing unless they already differ.
            let comparable = self.len.min(4);
            let fits = self.len < 4 && b"\r\n\r\n"[4 - comparable..] == *seen;
            return if fits { Ending::Unknown } else { Ending::Open };
        };
        // Any number of zeros is a size of 0; whatever precedes it ends in a line feed.
        let zeros = before.iter().rev().take_while(|b| **b == b'0').count();
        match before.len().checked_sub(zeros + 1).map(|at| before[at]) {
            Some(b'\n') if zeros > 0 => Ending::LastChunk,
            _ => Ending::EmptyLine,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(parts: &[&[u8]]) -> Ending {
        let mut tail = Tail::default();
        for part in parts {
            tail.push(&part[part.len().saturating_sub(TAIL_MAX)..], part.len() as u64);
        }
        tail.ending()
    }

    #[test]
    fn last_chunk_is_found_whole_and_split() {
        assert_eq!(after(&[b"5\r\nhello\r\n0\r\n\r\n"]), Ending::LastChunk);
        assert_eq!(after(&[b"5\r\nhello\r\n", b"0\r\n\r\n"]), Ending::LastChunk);
        assert_eq!(after(&[b"5\r\nhello\r\n", b"0", b"\r", b"\n", b"\r", b"\n"]), Ending::LastChunk);
        assert_eq!(after(&[b"HTTP/1.1 200 OK\n\n", b"000\r\n\r\n"]), Ending::LastChunk);
    }

    #[test]
    fn other_endings() {
        assert_eq!(after(&[b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"]), Ending::EmptyLine);
        assert_eq!(after(&[b"4\r\n10\r\n\r\n"]), Ending::EmptyLine, "a chunk that says 10");
        assert_eq!(after(&[b"5\r\nhello\r\n0\r\n\r"]), Ending::Open);
        assert_eq!(after(&[b"5\r\nhello\r\n0\r\n\r\n", b"x"]), Ending::Open);
        assert_eq!(after(&[]), Ending::Unknown);
    }

    #[test]
    fn unread_bytes_are_unknown() {
        let mut tail = Tail::default();
        tail.push(b"\r\n0\r\n\r\n", 100);
        assert_eq!(tail.ending(), Ending::LastChunk);
        tail.push(b"", 100);
        assert_eq!(tail.ending(), Ending::Unknown);
    }
}
