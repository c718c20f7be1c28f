//! The kernel side's capture rule, for tests: which bytes of a transfer become visible.
//!
//! What looks like a head and where it ends is asked of the kernel side's own functions, so that the machine is tested
//! with what it will meet; the states around them are `kernel/piece.rs` of that side, told again for flat buffers and
//! without the limit of what is captured of one head.

use profiler_common::HEAD_MAX;
use profiler_ebpf::head::{
    Where, empty_line, empty_lines, first_mark, may_be_request_line, may_begin_request, may_begin_response,
};

use super::{Direction, Piece, TAIL_MAX};

/// Of another protocol so much is captured.
const FOREIGN_MAX: usize = 24;
/// Pieces of one transfer that are looked at.
const PIECES: usize = 33;

/// A [`Piece`] with bytes of its own.
#[derive(Clone, Debug)]
pub struct Captured {
    pub time: u64,
    pub handed: u64,
    pub tid: u32,
    pub activation: u64,
    pub begins: bool,
    pub direction: Direction,
    pub advance: u64,
    pub bytes: Vec<u8>,
    pub tail: Vec<u8>,
    pub lost: u32,
    pub blind: bool,
}

impl Captured {
    pub fn piece(&self) -> Piece<'_> {
        let mut tail = [0; TAIL_MAX];
        tail[..self.tail.len()].copy_from_slice(&self.tail);
        Piece {
            time: self.time,
            handed: self.handed,
            tid: self.tid,
            activation: self.activation,
            begins: self.begins,
            direction: self.direction,
            advance: self.advance,
            captured: &self.bytes,
            tail,
            tail_len: self.tail.len() as u8,
            lost: self.lost,
            blind: self.blind,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Expect,
    Head,
    Body,
    Responded,
}

/// One connection.
#[derive(Debug, Default)]
pub struct Kernel {
    input: State,
    output: State,
    activation: u64,
    /// The last four bytes of an unfinished head.
    window_in: u32,
    window_out: u32,
    http: bool,
    ignored: bool,
    held: bool,
}

fn first_bytes(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    let len = bytes.len().min(8);
    first[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(first)
}

/// Whether an empty line stands in front of what may be a request.
fn behind_empty_line(bytes: &[u8]) -> bool {
    let len = bytes.len() as u64;
    empty_line(first_bytes(bytes), len) && len > 2 && may_begin_request(first_bytes(&bytes[2..]), len - 2)
}

fn last_bytes(bytes: &[u8]) -> Vec<u8> {
    bytes[bytes.len().saturating_sub(TAIL_MAX)..].to_vec()
}

/// Where the head ends that goes on in `bytes`, after the four bytes of `window`.
fn head_end(window: u32, bytes: &[u8]) -> Option<usize> {
    let mut before = u64::from(window) << 32;
    for (at, word) in bytes.chunks(8).map(first_bytes).enumerate() {
        let marks = empty_lines(before, word);
        if marks != 0 {
            return Some(at * 8 + first_mark(marks) as usize);
        }
        before = word;
    }
    None
}

fn slide(window: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(window, |window, byte| (window >> 8) | (u32::from(*byte) << 24))
}

impl Kernel {
    pub fn transfer(&mut self, direction: Direction, bytes: &[u8], time: u64, tid: u32) -> Vec<Captured> {
        let mut pieces = Vec::new();
        let mut offset = 0;
        let mut headed = false;
        while offset < bytes.len() && !self.ignored {
            let rest = &bytes[offset..];
            let piece = match (pieces.len() < PIECES, direction) {
                (false, _) => {
                    let blind = self.captured(direction, &[], rest.len());
                    Some(Captured { tail: Vec::new(), blind: true, ..blind })
                }
                (true, Direction::In) => Some(self.receive(rest, &mut headed)),
                (true, Direction::Out) => self.send(rest),
            };
            let Some(piece) = piece else { break };
            offset += piece.advance as usize;
            pieces.push(Captured { time, handed: time, tid, ..piece });
        }
        pieces
    }

    fn captured(&self, direction: Direction, bytes: &[u8], advance: usize) -> Captured {
        Captured {
            time: 0,
            handed: 0,
            tid: 0,
            activation: self.activation,
            begins: false,
            direction,
            advance: advance as u64,
            bytes: bytes.to_vec(),
            tail: Vec::new(),
            lost: 0,
            blind: false,
        }
    }

    /// `headed`: a head ended in this transfer.
    fn receive(&mut self, bytes: &[u8], headed: &mut bool) -> Captured {
        let mut begins = false;
        if self.input != State::Head {
            let (first, len) = (first_bytes(bytes), bytes.len() as u64);
            let in_body = self.input == State::Body;
            if behind_empty_line(bytes) || (empty_line(first, len) && !in_body) {
                return self.captured(Direction::In, &[], 2);
            }
            let words = [0, 8, 16].map(|at| first_bytes(bytes.get(at..).unwrap_or_default()));
            let likely = if in_body {
                may_be_request_line(&words, len, Where::Body)
            } else if !self.http {
                may_be_request_line(&words, len, Where::Start)
            } else {
                may_begin_request(first, len)
            };
            if likely {
                self.held = !in_body || *headed;
                begins = !in_body;
                if begins {
                    (self.activation, self.http, self.output) = (self.activation + 1, true, State::Expect);
                }
                (self.input, self.window_in) = (State::Head, 0);
            } else if self.http {
                return self.captured(Direction::In, &[], bytes.len());
            } else {
                self.ignored = true;
            }
        }
        let room = if self.ignored { FOREIGN_MAX } else { HEAD_MAX };
        let window = &bytes[..bytes.len().min(room)];
        let (mut shown, mut advance) = (window.len(), bytes.len());
        match head_end(self.window_in, window) {
            Some(end) => {
                (shown, self.input) = (end, State::Body);
                *headed = true;
                let rest = &bytes[end..];
                let next = may_begin_request(first_bytes(rest), rest.len() as u64);
                if !rest.is_empty() && (next || behind_empty_line(rest)) {
                    advance = end;
                }
            }
            None if window.len() < bytes.len() => self.input = State::Body,
            None => self.window_in = slide(self.window_in, window),
        }
        Captured { begins, ..self.captured(Direction::In, &bytes[..shown], advance) }
    }

    fn send(&mut self, bytes: &[u8]) -> Option<Captured> {
        if !self.http {
            return None;
        }
        if self.input != State::Head || !self.held {
            self.input = State::Responded;
        }
        if self.output != State::Head && may_begin_response(first_bytes(bytes), bytes.len() as u64) {
            (self.output, self.window_out) = (State::Head, 0);
        }
        if self.output != State::Head {
            let tail = last_bytes(bytes);
            return Some(Captured { tail, ..self.captured(Direction::Out, &[], bytes.len()) });
        }
        let window = &bytes[..bytes.len().min(HEAD_MAX)];
        let (mut shown, mut advance) = (window.len(), bytes.len());
        match head_end(self.window_out, window) {
            Some(end) => {
                (shown, self.output) = (end, State::Body);
                let rest = &bytes[end..];
                if may_begin_response(first_bytes(rest), rest.len() as u64) {
                    advance = end;
                }
            }
            None if window.len() < bytes.len() => self.output = State::Body,
            None => self.window_out = slide(self.window_out, window),
        }
        let tail = if advance == bytes.len() { last_bytes(bytes) } else { Vec::new() };
        Some(Captured { tail, ..self.captured(Direction::Out, &bytes[..shown], advance) })
    }
}
