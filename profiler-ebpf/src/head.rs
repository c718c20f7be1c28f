//! Recognising the start and the end of an HTTP head in raw bytes.
//!
//! In: the first bytes of a transfer, or a word of it at a time. Out: whether they look like a request, a response,
//! or hold the empty line that ends a head. What they really are is decided by the daemon's state machine.

const fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

const fn token(b: u8) -> bool {
    b.is_ascii_uppercase() || b == b'-' || b == b'_'
}

/// Whether the first `visible` bytes, in the low bytes of `first`, may begin a request line: up to four bytes of an
/// upper-case token, or fewer and a space. Any method passes, but not the start of a response.
#[inline(always)]
pub fn may_begin_request(first: u64, visible: u64) -> bool {
    let b = first.to_le_bytes();
    if !b[0].is_ascii_uppercase() || first as u32 == word(b"HTTP") {
        return false;
    }
    if visible < 2 || b[1] == b' ' {
        return true;
    }
    if !token(b[1]) {
        return false;
    }
    if visible < 3 || b[2] == b' ' {
        return true;
    }
    if !token(b[2]) {
        return false;
    }
    visible < 4 || b[3] == b' ' || token(b[3])
}

/// Whether an empty line stands first, as may be in front of a request (RFC 9112, 2.2).
#[inline(always)]
pub fn empty_line(first: u64, visible: u64) -> bool {
    visible >= 2 && first as u16 == u16::from_le_bytes(*b"\r\n")
}

/// Where a request line is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// At the start of a connection: the PROXY protocol's line may stand there.
    Start,
    /// Behind a head, where a body is likelier.
    Body,
}

/// Longest method; registered ones have up to 17 letters (`UPDATEREDIRECTREF`).
const METHOD_MAX: u64 = 20;

/// Whether bytes, of which the first 24 or all `visible` are in `words` and 0 behind them, begin a request line as far
/// as they go: an upper-case token, a space, and what can begin a target.
#[inline(always)]
pub fn may_be_request_line(words: &[u64; 3], visible: u64, at: Where) -> bool {
    if !may_begin_request(words[0], visible) {
        return false;
    }
    let marks = [no_token(words[0]), no_token(words[1]), no_token(words[2])];
    let length = if marks[0] != 0 {
        first_mark(marks[0]) - 1
    } else if marks[1] != 0 {
        first_mark(marks[1]) + 7
    } else if marks[2] != 0 {
        first_mark(marks[2]) + 15
    } else {
        24
    };
    if length > METHOD_MAX {
        return false;
    }
    if length >= visible {
        return true;
    }
    if byte(words, length) != b' ' {
        return false;
    }
    if length + 1 >= visible {
        return true;
    }
    let target = byte(words, length + 1);
    match target {
        b'/' | b'*' | b'h' | b'H' => return true,
        b'[' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' if words[0] == u64::from_le_bytes(*b"CONNECT ") => {
            return true;
        }
        _ => {}
    }
    let first = words[0] as u32;
    at == Where::Start
        && (first == word(b"GET ")
            || first == word(b"PUT ")
            || (length == 4 && (first == word(b"POST") || first == word(b"HEAD")))
            || (first == word(b"PROX") && (target == b'T' || target == b'U')))
}

/// The byte at `at`, below 24.
#[inline(always)]
fn byte(words: &[u64; 3], at: u64) -> u8 {
    let w = if at < 8 {
        words[0]
    } else if at < 16 {
        words[1]
    } else {
        words[2]
    };
    (w >> ((at & 7) * 8)) as u8
}

/// Marks, with its top bit, each byte that is not of a method.
#[inline(always)]
const fn no_token(w: u64) -> u64 {
    const TOP: u64 = 0x8080_8080_8080_8080;
    const EACH: u64 = 0x0101_0101_0101_0101;
    let low = w & !TOP;
    let from_a = low + (0x80 - b'A' as u64) * EACH;
    let beyond_z = low + (0x7f - b'Z' as u64) * EACH;
    let letter = from_a & !beyond_z & !w & TOP;
    let other = equal(w, b'-' as u64 * EACH) | equal(w, b'_' as u64 * EACH);
    !(letter | other) & TOP
}

/// Whether four bytes begin one of the registered methods; asked for connections that nobody saw being accepted,
/// where an upper-case word may as well be another protocol's reply.
#[inline(always)]
pub fn begins_known_method(first: u32) -> bool {
    first == word(b"GET ")
        || first == word(b"POST")
        || first == word(b"PUT ")
        || first == word(b"HEAD")
        || first == word(b"DELE")
        || first == word(b"PATC")
        || first == word(b"OPTI")
        || first == word(b"CONN")
        || first == word(b"TRAC")
}

/// Whether the first `visible` bytes, in the low bytes of `first`, are `HTTP/1.` as far as they go.
#[inline(always)]
pub fn may_begin_response(first: u64, visible: u64) -> bool {
    const START: u64 = u64::from_le_bytes(*b"HTTP/1.\0");
    let seen = if visible >= 7 { 7 } else { visible };
    if seen == 0 {
        return false;
    }
    // The bytes beyond what is visible are shifted out of both.
    let shift = 8 * (8 - seen as u32);
    (first << (shift & 63)) == (START << (shift & 63))
}

/// The top bit of each byte of `w` that equals the byte repeated in `pattern`. Exact: no carry crosses bytes.
#[inline(always)]
const fn equal(w: u64, pattern: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let x = w ^ pattern;
    !(((x & LOW) + LOW) | x | LOW)
}

/// Marks, with its top bit, each byte of `w` that ends an empty line `\r\n\r\n`; `before` holds the eight bytes in
/// front of `w`. Without a branch: the verifier follows every branch of a loop's body in every turn.
#[inline(always)]
pub const fn empty_lines(before: u64, w: u64) -> u64 {
    const CR: u64 = 0x0d0d_0d0d_0d0d_0d0d;
    const LF: u64 = 0x0a0a_0a0a_0a0a_0a0a;
    let (cr, lf) = (equal(w, CR), equal(w, LF));
    let (cr_before, lf_before) = (equal(before, CR), equal(before, LF));
    lf & ((cr << 8) | (cr_before >> 56)) & ((lf << 16) | (lf_before >> 48)) & ((cr << 24) | (cr_before >> 40))
}

/// Which byte (1 to 8) the first mark of [`empty_lines`] is at; `marks` is not 0.
#[inline(always)]
pub const fn first_mark(marks: u64) -> u64 {
    // All bits below the lowest mark: 8 n + 7 of them for byte n, so 8 n + 8 with the mark itself.
    let below = marks ^ (marks - 1);
    // One bit for each whole byte, added up by the multiplication into the top byte.
    ((below & 0x0101_0101_0101_0101).wrapping_mul(0x0101_0101_0101_0101)) >> 56
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(text: &[u8]) -> (u64, u64) {
        let mut b = [0; 8];
        let n = text.len().min(8);
        b[..n].copy_from_slice(&text[..n]);
        (u64::from_le_bytes(b), n as u64)
    }

    #[test]
    fn requests_and_responses_are_told_apart() {
        for text in ["GET / HTTP/1.1", "G", "PR", "M-SEARCH *", "PROPFIND /x", "X /x", "GE"] {
            let (w, n) = first(text.as_bytes());
            assert!(may_begin_request(w, n), "{text}");
        }
        for text in [
            "HTTP/1.1 200",
            "get /",
            "\x16\x03\x01",
            "R\0\0\0",
            "{\"a\"",
            "",
            "Ge",
            "X\n",
            "\r\n",
            "\r\nHTTP/1.1 200",
            "\r\r\nGET",
            "\n",
        ] {
            let (w, n) = first(text.as_bytes());
            assert!(!may_begin_request(w, n), "{text}");
        }
        for text in ["HTTP/1.0 404", "HTTP/1.", "HTTP/", "H"] {
            let (w, n) = first(text.as_bytes());
            assert!(may_begin_response(w, n), "{text}");
        }
        for text in ["HTTPS is", "HTTP/2 200", "Hello", "", "GET / HTTP/1.1"] {
            let (w, n) = first(text.as_bytes());
            assert!(!may_begin_response(w, n), "{text}");
        }
        assert!(begins_known_method(first(b"PATCH /").0 as u32));
        assert!(!begins_known_method(first(b"VALUE k").0 as u32));
    }

    #[test]
    fn request_lines_are_told_from_other_text() {
        let line = |text: &str, at: Where| {
            let mut b = [0u8; 24];
            let n = text.len().min(24);
            b[..n].copy_from_slice(&text.as_bytes()[..n]);
            let w = |i: usize| u64::from_le_bytes(b[i * 8..i * 8 + 8].try_into().unwrap());
            may_be_request_line(&[w(0), w(1), w(2)], text.len() as u64, at)
        };
        let both = [
            "GET / HTTP/1.1",
            "G",
            "GET",
            "GET ",
            "GET /",
            "OPTIONS * HTTP/1.1",
            "M-SEARCH * HTTP/1.1",
            "VERSION-CONTROL /x HTTP/1.1",
            "UPDATEREDIRECTREF /x HTTP/1.1",
            "GET http://a/",
            "CONNECT a:443 HTTP/1.1",
            "CONNECT [::1]:443",
            "PRI * HTTP/2.0",
            "ABCDEFGHIJKLMNOPQRST /",
            "ABCDEFGH /",
            "ABCDEFG /",
        ];
        for text in both {
            assert!(line(text, Where::Start) && line(text, Where::Body), "{text}");
        }
        for text in ["PROXY TCP4 127.0.0.1", "PROXY UNKNOWN\r\n", "GET x HTTP/1.1", "POST ?"] {
            assert!(line(text, Where::Start) && !line(text, Where::Body), "{text}");
        }
        let neither = [
            "USER anna\r\n",
            "PASS secret",
            "EHLO mail",
            "PUB foo 5\r\n",
            "CONNECT {\"a\"",
            "QUIT\r\n",
            "NAME=value",
            "ABCDEFGHIJKLMNOPQRSTU /",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            "HTTP/1.1 200",
            "get /",
            "A,B,C",
            "POSTAL CODE",
            "GeT /",
            "ABCDEFGh /",
            "\u{e9}A /",
            "",
        ];
        for text in neither {
            assert!(!line(text, Where::Start) && !line(text, Where::Body), "{text}");
        }
        let (empty, n) = first(b"\r\nGET /");
        assert!(empty_line(empty, n) && !empty_line(empty, 1) && !empty_line(first(b"\n\r").0, 2));
    }

    /// The word-wise search against a plain search for the four bytes, at every position and split.
    #[test]
    fn the_empty_line_is_found_wherever_it_lies() {
        for lead in 0..24usize {
            let mut text = vec![b'x'; lead];
            text.extend_from_slice(b"\r\n\r\nbody\n\r\n");
            text.resize(48, b'y');
            let expected = text.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
            let mut before = 0u64;
            let mut found = None;
            for (i, chunk) in text.chunks_exact(8).enumerate() {
                let w = u64::from_le_bytes(chunk.try_into().unwrap());
                let marks = empty_lines(before, w);
                if marks != 0 {
                    found = Some(i * 8 + first_mark(marks) as usize);
                    break;
                }
                before = w;
            }
            assert_eq!(found, Some(expected), "lead {lead}");
        }
    }

    #[test]
    fn neighbours_of_what_is_looked_for_are_not_taken_for_it() {
        for text in
            [b"\r\n\x0d\x0b\r\n\x8d\x8a", b"\x0c\n\r\n\r\r\n\n", b"\n\n\n\n\r\r\r\r", b"\0\x01\r\n\0\r\n\r"]
        {
            assert_eq!(empty_lines(0, u64::from_le_bytes(*text)), 0, "{text:?}");
        }
        assert_eq!(
            first_mark(empty_lines(0, u64::from_le_bytes(*b"\r\n\r\n\r\n\r\n"))),
            4,
            "the first of several"
        );
    }
}
