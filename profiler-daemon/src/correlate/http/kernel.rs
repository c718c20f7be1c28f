//! The kernel side's capture rule, as a model for tests: which bytes of a transfer become visible.

use super::{Direction, Piece, TAIL_MAX};

/// Most bytes captured of one piece.
const CAPTURE_MAX: usize = 4096;
/// Of a connection's first transfer so much is always captured, to recognise other protocols.
const FIRST_MAX: usize = 24;

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
        }
    }
}

/// Finds the empty line across transfers.
#[derive(Clone, Copy, Debug, Default)]
struct EmptyLine {
    /// 1: after a line feed; 2: after a line feed and a carriage return.
    state: u8,
}

impl EmptyLine {
    fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, byte) in bytes.iter().enumerate() {
            match (self.state, byte) {
                (1 | 2, b'\n') => {
                    self.state = 0;
                    return Some(at + 1);
                }
                (1, b'\r') => self.state = 2,
                (_, b'\n') => self.state = 1,
                _ => self.state = 0,
            }
        }
        None
    }
}

#[derive(Clone, Copy, Debug)]
enum In {
    Expect,
    /// `sure`: not entered from a body.
    Head {
        sure: bool,
        line: EmptyLine,
    },
    Body,
    Responded,
}

#[derive(Clone, Copy, Debug)]
enum Out {
    Scan,
    Head { matched: usize, line: EmptyLine },
}

/// One connection.
#[derive(Debug)]
pub struct Kernel {
    input: In,
    output: Out,
    activation: u64,
    first: bool,
    /// Whether further responses in one write are looked for.
    splits_writes: bool,
}

const STATUS_LINE: &[u8] = b"HTTP/1.";

fn like_method(bytes: &[u8]) -> bool {
    let lead = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    let bytes = &bytes[lead..];
    bytes.first().is_some_and(u8::is_ascii_uppercase)
        && bytes
            .iter()
            .take(4)
            .take_while(|b| **b != b' ')
            .all(|b| b.is_ascii_uppercase() || b"-_".contains(b))
}

fn like_status_line(bytes: &[u8]) -> bool {
    let shared = bytes.len().min(STATUS_LINE.len());
    shared > 0 && bytes[..shared] == STATUS_LINE[..shared]
}

impl Kernel {
    pub fn new(splits_writes: bool) -> Self {
        Self { input: In::Expect, output: Out::Scan, activation: 0, first: true, splits_writes }
    }

    pub fn transfer(&mut self, direction: Direction, bytes: &[u8], time: u64, tid: u32) -> Vec<Captured> {
        let mut pieces = match direction {
            Direction::In => self.receive(bytes),
            Direction::Out => self.send(bytes),
        };
        for piece in &mut pieces {
            (piece.time, piece.handed, piece.tid) = (time, time, tid);
        }
        pieces
    }

    fn captured(&self, direction: Direction, begins: bool, bytes: &[u8], advance: usize) -> Captured {
        Captured {
            time: 0,
            handed: 0,
            tid: 0,
            activation: self.activation,
            begins,
            direction,
            advance: advance as u64,
            bytes: bytes.to_vec(),
            tail: Vec::new(),
            lost: 0,
        }
    }

    fn receive(&mut self, mut bytes: &[u8]) -> Vec<Captured> {
        let mut pieces: Vec<Captured> = Vec::new();
        let first = std::mem::take(&mut self.first);
        while !bytes.is_empty() {
            let (sure, mut line, begins) = match self.input {
                In::Head { sure, line } => (sure, line, false),
                _ if !like_method(bytes) => {
                    match pieces.last_mut() {
                        Some(last) => last.advance += bytes.len() as u64,
                        None => {
                            let shown = if first { bytes.len().min(FIRST_MAX) } else { 0 };
                            pieces.push(self.captured(Direction::In, false, &bytes[..shown], bytes.len()));
                        }
                    }
                    break;
                }
                In::Expect | In::Responded => {
                    self.activation += 1;
                    (true, EmptyLine::default(), true)
                }
                In::Body => (!pieces.is_empty(), EmptyLine::default(), false),
            };
            let window = &bytes[..bytes.len().min(CAPTURE_MAX)];
            // Leading empty lines do not end a head.
            let lead = if matches!(self.input, In::Head { .. }) {
                0
            } else {
                window.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count()
            };
            let end = line.find(&window[lead..]).map(|end| end + lead);
            let shown = end.unwrap_or(window.len());
            let advance = end.unwrap_or(bytes.len());
            pieces.push(self.captured(Direction::In, begins, &bytes[..shown], advance));
            self.input = if end.is_some() || advance > shown { In::Body } else { In::Head { sure, line } };
            bytes = &bytes[advance..];
        }
        pieces
    }

    fn send(&mut self, mut bytes: &[u8]) -> Vec<Captured> {
        if !matches!(self.input, In::Head { sure: true, .. }) {
            self.input = In::Responded;
        }
        let mut pieces: Vec<Captured> = Vec::new();
        while !bytes.is_empty() {
            let (mut matched, mut line) = match self.output {
                Out::Head { matched, line } => (matched, line),
                Out::Scan if like_status_line(bytes) && (pieces.is_empty() || self.splits_writes) => {
                    (0, EmptyLine::default())
                }
                Out::Scan => {
                    match pieces.last_mut() {
                        Some(last) => {
                            last.advance += bytes.len() as u64;
                            last.tail = tail(&last.bytes, bytes, last.advance);
                        }
                        None => {
                            pieces.push(self.captured(Direction::Out, false, &[], bytes.len()));
                            pieces[0].tail = tail(&[], bytes, bytes.len() as u64);
                        }
                    }
                    break;
                }
            };
            let expected = &STATUS_LINE[matched..];
            let compared = expected.len().min(bytes.len());
            if bytes[..compared] != expected[..compared] {
                self.output = Out::Scan;
                continue;
            }
            matched += compared;
            let window = &bytes[..bytes.len().min(CAPTURE_MAX)];
            let end = line.find(window);
            let shown = end.unwrap_or(window.len());
            let advance = end.unwrap_or(bytes.len());
            let mut piece = self.captured(Direction::Out, false, &bytes[..shown], advance);
            piece.tail = tail(&[], &bytes[..advance], advance as u64);
            pieces.push(piece);
            self.output =
                if end.is_some() || advance > shown { Out::Scan } else { Out::Head { matched, line } };
            bytes = &bytes[advance..];
        }
        pieces
    }
}

/// The last bytes of a piece that ends in `rest`, which `before` precedes.
fn tail(before: &[u8], rest: &[u8], advance: u64) -> Vec<u8> {
    let all = [before, rest].concat();
    assert!(all.len() as u64 == advance || rest.len() >= TAIL_MAX);
    all[all.len().saturating_sub(TAIL_MAX)..].to_vec()
}
