//! Request and response heads: from bytes to what the connection needs to know of them.
//!
//! Lenient where servers are (bare line feeds, odd methods, spaces around values) and strict where a mistake would
//! misread the stream: a length that is not one number makes the framing [`Framing::Unreadable`].

use memchr::{memchr, memchr_iter, memrchr};

use super::trace::{TraceId, TraceReader};

/// Longest method taken for one; the longest registered (IANA) is `UPDATEREDIRECTREF` with 17 bytes.
const METHOD_MAX: usize = 32;
/// Longest path kept, as the record promises.
const PATH_MAX: usize = 1024;

/// A request method. The usual ones need no memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    Options,
    Trace,
    Patch,
    Other(Box<str>),
}

impl Method {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
            Self::Options => "OPTIONS",
            Self::Trace => "TRACE",
            Self::Patch => "PATCH",
            Self::Other(name) => name,
        }
    }

    /// Methods are case-sensitive (RFC 9110, 9.1).
    fn parse(token: &[u8]) -> Option<Self> {
        Some(match token {
            b"GET" => Self::Get,
            b"HEAD" => Self::Head,
            b"POST" => Self::Post,
            b"PUT" => Self::Put,
            b"DELETE" => Self::Delete,
            b"CONNECT" => Self::Connect,
            b"OPTIONS" => Self::Options,
            b"TRACE" => Self::Trace,
            b"PATCH" => Self::Patch,
            _ if is_method(token) => Self::Other(str::from_utf8(token).ok()?.into()),
            _ => return None,
        })
    }
}

/// How a head says its body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Nothing said.
    Unsaid,
    Length(u64),
    Chunked,
    /// A transfer coding whose last is not `chunked`: up to the end of the connection.
    Coded,
    /// Contradictory or not a number, or part of the head is invisible.
    Unreadable,
}

/// What is kept of a request's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    pub method: Method,
    /// Without query and fragment; an absolute target reduced to its path; `*` and an authority as they are. At
    /// most 1,024 bytes; control characters and invalid UTF-8 replaced by U+FFFD.
    pub path: Box<str>,
    /// The second `1` of `HTTP/1.1`; `None` when the request line is longer than what is visible.
    pub minor: Option<u8>,
    pub trace_id: Option<TraceId>,
    pub(super) framing: Framing,
    pub(super) expects_continue: bool,
}

/// What is kept of a response's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    pub status: u16,
    pub framing: Framing,
    pub event_stream: bool,
    /// A `Trailer` header: the message will not end in a bare last chunk.
    pub trailers: bool,
}

/// Why a request line is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadLine {
    Malformed,
    /// `PRI * HTTP/2.0`.
    Http2,
}

/// The index after the empty line that ends a head. Only line feeds at `from` or later are looked at.
pub fn end(bytes: &[u8], from: usize) -> Option<usize> {
    memchr_iter(b'\n', &bytes[from..]).map(|at| from + at + 1).find_map(|next| match bytes[next..] {
        [b'\n', ..] => Some(next + 1),
        [b'\r', b'\n', ..] => Some(next + 2),
        _ => None,
    })
}

/// Whether `bytes`, which hold no line feed yet, can be the beginning of a request line.
pub fn may_become_request(bytes: &[u8]) -> bool {
    match memchr(b' ', &bytes[..bytes.len().min(METHOD_MAX + 1)]) {
        Some(space) => is_method(&bytes[..space]),
        None => is_method(bytes),
    }
}

/// Whether the first line of `bytes` is a request line.
pub fn request_line_fits(bytes: &[u8]) -> bool {
    let line = memchr(b'\n', bytes).map_or(bytes, |at| &bytes[..at]);
    split_request_line(line).is_ok()
}

/// Parses a request's head. `complete` says whether `bytes` reach to the empty line; if not, what the missing
/// headers may say about the body is unknown.
pub fn parse_request(bytes: &[u8], complete: bool) -> Result<RequestHead, BadLine> {
    let mut lines = Lines(bytes);
    let (method, target, minor) = match lines.next() {
        Some(line) => {
            split_request_line(line).map(|(method, target, minor)| (method, target, Some(minor)))?
        }
        None => split_cut_line(bytes).map(|(method, target)| (method, target, None))?,
    };
    let method = Method::parse(method).ok_or(BadLine::Malformed)?;
    let path = path(target);
    let mut body = FramingReader::default();
    let mut trace = TraceReader::default();
    let mut head = RequestHead {
        method,
        path,
        minor,
        trace_id: None,
        framing: Framing::Unreadable,
        expects_continue: false,
    };
    for (name, value) in lines.filter_map(split_header) {
        if body.read(name, value) || trace.read(name, value) {
        } else if name.eq_ignore_ascii_case(b"expect") {
            head.expects_continue = value.eq_ignore_ascii_case(b"100-continue");
        }
    }
    head.trace_id = trace.trace_id();
    if complete {
        head.framing = body.framing();
    }
    Ok(head)
}

/// Whether `bytes` begin a response's head, as far as they go.
pub fn may_become_response(bytes: &[u8]) -> bool {
    const MAGIC: &[u8] = b"HTTP/1.";
    let shared = bytes.len().min(MAGIC.len());
    bytes[..shared] == MAGIC[..shared]
}

/// Parses a response's head; see [`parse_request`] for `complete`.
pub fn parse_response(bytes: &[u8], complete: bool) -> Option<ResponseHead> {
    let mut lines = Lines(bytes);
    let line = lines.next()?.strip_prefix(b"HTTP/1.")?;
    let [minor, b' ', status @ ..] = line else { return None };
    let (digits, rest) = status.split_at_checked(3)?;
    let known = minor.is_ascii_digit() && digits.iter().all(u8::is_ascii_digit);
    if !known || !matches!(rest.first(), None | Some(b' ' | b'\t')) {
        return None;
    }
    let status = digits.iter().fold(0u16, |sum, d| sum * 10 + u16::from(d - b'0'));
    if !(100..1000).contains(&status) {
        return None;
    }
    let mut body = FramingReader::default();
    let mut head =
        ResponseHead { status, framing: Framing::Unreadable, event_stream: false, trailers: false };
    for (name, value) in lines.filter_map(split_header) {
        if body.read(name, value) {
        } else if name.eq_ignore_ascii_case(b"content-type") {
            let essence = memchr(b';', value).map_or(value, |at| &value[..at]);
            head.event_stream = essence.trim_ascii().eq_ignore_ascii_case(b"text/event-stream");
        } else if name.eq_ignore_ascii_case(b"trailer") {
            head.trailers = true;
        }
    }
    if complete {
        head.framing = body.framing();
    }
    Some(head)
}

/// The lines of a head without their ends; stops at the empty line. A line without an end is cut off, not a line.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let end = memchr(b'\n', self.0)?;
        let (line, rest) = (&self.0[..end], &self.0[end + 1..]);
        self.0 = rest;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        (!line.is_empty()).then_some(line)
    }
}

fn split_request_line(line: &[u8]) -> Result<(&[u8], &[u8], u8), BadLine> {
    let line = line.trim_ascii_end();
    let (Some(first), Some(last)) = (memchr(b' ', line), memrchr(b' ', line)) else {
        return Err(BadLine::Malformed);
    };
    let (method, version) = (&line[..first], &line[last + 1..]);
    let target = line[first..last].trim_ascii();
    match version {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'0'..=b'9']
            if is_method(method) && !target.is_empty() =>
        {
            Ok((method, target, minor - b'0'))
        }
        b"HTTP/2.0" if method == b"PRI" && target == b"*" => Err(BadLine::Http2),
        _ => Err(BadLine::Malformed),
    }
}

/// The method of a request of which that much is there.
pub fn method_of(bytes: &[u8]) -> Option<Method> {
    Method::parse(&bytes[..memchr(b' ', bytes)?])
}

/// A request line whose end is not there. Its target will do if what is missing of it is not part of the path.
fn split_cut_line(line: &[u8]) -> Result<(&[u8], &[u8]), BadLine> {
    let (method, target) = memchr(b' ', line).map(|at| line.split_at(at)).ok_or(BadLine::Malformed)?;
    let target = target.trim_ascii_start();
    let target = memchr(b' ', target).map_or(target, |end| &target[..end + 1]);
    let settled = target.iter().any(|b| matches!(b, b'?' | b'#' | b' '));
    if is_method(method) && target.len() > 1 && settled {
        Ok((method, target.trim_ascii_end()))
    } else {
        Err(BadLine::Malformed)
    }
}

fn split_header(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = memchr(b':', line)?;
    Some((&line[..colon], line[colon + 1..].trim_ascii()))
}

/// A token (RFC 9110, 5.6.2) of a sensible length.
fn is_method(bytes: &[u8]) -> bool {
    let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    !bytes.is_empty() && bytes.len() <= METHOD_MAX && bytes.iter().all(token)
}

fn path(target: &[u8]) -> Box<str> {
    let cut = target.iter().position(|b| matches!(b, b'?' | b'#')).unwrap_or(target.len());
    let mut bytes = &target[..cut];
    let scheme = bytes.iter().position(|b| !b.is_ascii_alphanumeric() && !b"+-.".contains(b));
    if let Some(after) = scheme.filter(|at| *at > 0).and_then(|at| bytes[at..].strip_prefix(b"://")) {
        bytes = memchr(b'/', after).map_or(b"/", |at| &after[at..]);
    }
    // Three bytes more than are kept, so that a character across the limit is whole when the text is cut.
    let bytes = &bytes[..bytes.len().min(PATH_MAX + 3)];
    let mut text = String::from_utf8_lossy(bytes);
    if text.chars().any(char::is_control) {
        text = text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    }
    text[..text.floor_char_boundary(PATH_MAX)].into()
}

/// Collects the headers that delimit a body.
#[derive(Default)]
struct FramingReader {
    length: Option<u64>,
    bad: bool,
    /// Whether the last transfer coding is `chunked`.
    coding: Option<bool>,
}

impl FramingReader {
    /// Takes the header if it is one of those.
    fn read(&mut self, name: &[u8], value: &[u8]) -> bool {
        if name.eq_ignore_ascii_case(b"content-length") {
            // A list of equal numbers is one number (RFC 9110, 8.6).
            for item in value.split(|b| *b == b',') {
                let number = number(item.trim_ascii());
                self.bad |= number.is_none() || self.length.is_some_and(|known| Some(known) != number);
                self.length = number;
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let last = memrchr(b',', value).map_or(value, |at| &value[at + 1..]);
            self.coding = Some(last.trim_ascii().eq_ignore_ascii_case(b"chunked"));
        } else {
            return false;
        }
        true
    }

    fn framing(&self) -> Framing {
        match (self.coding, self.length) {
            // A transfer coding overrides any length (RFC 9112, 6.3).
            (Some(true), _) => Framing::Chunked,
            (Some(false), _) => Framing::Coded,
            (None, _) if self.bad => Framing::Unreadable,
            (None, Some(length)) => Framing::Length(length),
            (None, None) => Framing::Unsaid,
        }
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    let digit = |b: &u8| b.is_ascii_digit().then(|| u64::from(b - b'0'));
    let add = |sum: u64, b: &u8| sum.checked_mul(10)?.checked_add(digit(b)?);
    (!digits.is_empty()).then(|| digits.iter().try_fold(0, add)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing(headers: &str) -> Framing {
        let head = format!("POST / HTTP/1.1\r\n{headers}\r\n");
        parse_request(head.as_bytes(), true).expect("a request").framing
    }

    /// The cases of RFC 9112, 6.3.
    #[test]
    fn framing_of_a_body() {
        assert_eq!(framing(""), Framing::Unsaid);
        assert_eq!(framing("content-LENGTH:  12 \r\n"), Framing::Length(12));
        assert_eq!(framing("Content-Length: 7\r\nContent-Length: 7\r\n"), Framing::Length(7));
        assert_eq!(framing("Content-Length: 7, 8\r\n"), Framing::Unreadable);
        for bad in ["", "+7", "-1", "0x10", "7 7", "18446744073709551616"] {
            assert_eq!(framing(&format!("Content-Length: {bad}\r\n")), Framing::Unreadable, "{bad}");
        }
        assert_eq!(framing("Content-Length: 7\r\nTransfer-Encoding: Chunked\r\n"), Framing::Chunked);
        assert_eq!(framing("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"), Framing::Chunked);
        assert_eq!(framing("Transfer-Encoding: chunked, gzip\r\n"), Framing::Coded);
        assert_eq!(
            parse_request(b"POST / HTTP/1.1\r\nContent-Le", false).map(|h| h.framing),
            Ok(Framing::Unreadable)
        );
    }

    #[test]
    fn end_of_a_head() {
        for (head, length) in [("a\r\n\r\nb", 5), ("a\n\nb", 3), ("a\n\r\nb", 4), ("a\r\n\nb", 4)] {
            assert_eq!(end(head.as_bytes(), 0), Some(length), "{head:?}");
        }
        for head in ["", "a\r\n", "a\r\n\r", "a\r\nb\r\n", "a\r\r\n"] {
            assert_eq!(end(head.as_bytes(), 0), None, "{head:?}");
        }
    }

    #[test]
    fn status_lines() {
        let status =
            |line: &str| parse_response(format!("{line}\r\n\r\n").as_bytes(), true).map(|head| head.status);
        assert_eq!(status("HTTP/1.1 200 OK"), Some(200));
        assert_eq!(status("HTTP/1.0 404"), Some(404));
        assert_eq!(status("HTTP/1.1 999 Odd"), Some(999));
        for bad in [
            "HTTP/1.1 20",
            "HTTP/1.1 2000 OK",
            "HTTP/1.1 099 x",
            "HTTP/2 200 OK",
            "HTTP/1.1  200",
            "ICY 200 OK",
        ] {
            assert_eq!(status(bad), None, "{bad}");
        }
    }
}
