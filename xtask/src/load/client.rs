//! A small HTTP/1.1 client for loopback: one connection, one request at a time, reused while both sides agree.
//!
//! It exists so that the load generator knows exactly what it sent and when the last byte arrived, and so that
//! xtask needs no HTTP library. It understands what servers under test answer: Content-Length, chunked bodies,
//! bodies that end with the connection, and responses without a body.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Far above any head or body of the sites under test; a server gone wild must not fill the memory.
const MAX_HEAD_BYTES: u64 = 64 << 10;
const MAX_BODY_BYTES: u64 = 64 << 20;

pub struct Client {
    addr: SocketAddr,
    keep_alive: bool,
    timeout: Duration,
    connection: Option<BufReader<TcpStream>>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub body: Vec<u8>,
    /// Whether the connection can carry another request.
    reusable: bool,
}

impl Client {
    pub fn new(addr: SocketAddr, keep_alive: bool, timeout: Duration) -> Self {
        Self { addr, keep_alive, timeout, connection: None }
    }

    /// Sends one request and reads its whole response.
    ///
    /// A server may close an idle connection at any moment, so a reused connection that ends without a single
    /// byte of response is no error: the request goes out once more on a new one (RFC 9112, section 9.3.1).
    pub fn send(&mut self, method: &str, target: &str) -> io::Result<Response> {
        if let Some(connection) = self.connection.take() {
            match self.exchange(connection, method, target) {
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                outcome => return outcome,
            }
        }
        let stream = TcpStream::connect_timeout(&self.addr, self.timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        self.exchange(BufReader::new(stream), method, target)
    }

    fn exchange(
        &mut self,
        mut connection: BufReader<TcpStream>,
        method: &str,
        target: &str,
    ) -> io::Result<Response> {
        let persistence = if self.keep_alive { "keep-alive" } else { "close" };
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: {}\r\nConnection: {persistence}\r\n\r\n", self.addr);
        connection.get_mut().write_all(request.as_bytes()).map_err(unanswered)?;
        if connection.fill_buf().map_err(unanswered)?.is_empty() {
            return Err(unanswered(ErrorKind::ConnectionReset.into()));
        }
        let response = read_response(&mut connection, method == "HEAD")?;
        if self.keep_alive && response.reusable {
            self.connection = Some(connection);
        }
        Ok(response)
    }
}

/// One GET on a connection of its own, for the questions xtask asks servers.
pub fn get(addr: SocketAddr, target: &str) -> io::Result<Response> {
    Client::new(addr, false, Duration::from_secs(10)).send("GET", target)
}

/// Marks the end of a connection that came before the first byte of a response.
fn unanswered(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            io::Error::new(ErrorKind::ConnectionAborted, "the server closed without answering")
        }
        _ => error,
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("not a valid HTTP response: {what}"))
}

fn read_response(stream: &mut impl BufRead, bodiless_request: bool) -> io::Result<Response> {
    loop {
        let head = read_head(stream)?;
        // Interim responses announce a final one (RFC 9110, section 15.2).
        if (100..200).contains(&head.status) && head.status != 101 {
            continue;
        }
        let mut body = Vec::new();
        let mut reusable = head.reusable;
        if bodiless_request || matches!(head.status, 101 | 204 | 304) {
            // No body, whatever the header fields say.
        } else if head.chunked {
            read_chunks(stream, &mut body)?;
        } else if let Some(length) = head.length {
            read_exactly(stream, length, &mut body)?;
        } else {
            stream.take(MAX_BODY_BYTES).read_to_end(&mut body)?;
            reusable = false;
        }
        return Ok(Response { status: head.status, body, reusable });
    }
}

struct Head {
    status: u16,
    length: Option<u64>,
    chunked: bool,
    reusable: bool,
}

fn read_head(stream: &mut impl BufRead) -> io::Result<Head> {
    let mut limited = stream.take(MAX_HEAD_BYTES);
    let first = read_line(&mut limited)?;
    if first.is_empty() {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, "the connection ended before the response"));
    }
    let (version, rest) = first.split_once(' ').ok_or_else(|| invalid("status line"))?;
    let status =
        rest.get(..3).and_then(|digits| digits.parse().ok()).ok_or_else(|| invalid("status code"))?;
    let mut head = Head { status, length: None, chunked: false, reusable: version == "HTTP/1.1" };
    loop {
        let line = read_line(&mut limited)?;
        let field = line.trim_end();
        if line.is_empty() {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the response ended inside its head"));
        }
        if field.is_empty() {
            return Ok(head);
        }
        let (name, value) = field.split_once(':').ok_or_else(|| invalid("header field"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            head.length = Some(value.parse().map_err(|_| invalid("Content-Length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            head.chunked = value.to_ascii_lowercase().ends_with("chunked");
        } else if name.eq_ignore_ascii_case("connection") {
            head.reusable &= !value.eq_ignore_ascii_case("close");
        }
    }
}

/// A line with its end, empty only at the end of the stream.
fn read_line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line)?;
    String::from_utf8(line).map_err(|_| invalid("bytes that are not UTF-8 in the head"))
}

fn read_exactly(stream: &mut impl BufRead, length: u64, body: &mut Vec<u8>) -> io::Result<()> {
    if body.len() as u64 + length > MAX_BODY_BYTES {
        return Err(invalid("body too large"));
    }
    let read = stream.take(length).read_to_end(body)?;
    if (read as u64) < length {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, "the response ended inside its body"));
    }
    Ok(())
}

fn read_chunks(stream: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let line = read_line(&mut stream.take(MAX_HEAD_BYTES))?;
        if line.is_empty() {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the response ended before its last chunk"));
        }
        let digits = line.trim_end().split(';').next().unwrap_or_default();
        let length = u64::from_str_radix(digits, 16).map_err(|_| invalid("chunk size"))?;
        if length == 0 {
            // Trailers, if any, up to the empty line.
            while !read_line(&mut stream.take(MAX_HEAD_BYTES))?.trim_end().is_empty() {}
            return Ok(());
        }
        read_exactly(stream, length, body)?;
        if read_line(&mut stream.take(2))?.trim_end() != "" {
            return Err(invalid("chunk longer than announced"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &str, bodiless: bool) -> io::Result<(Response, usize)> {
        let mut stream = bytes.as_bytes();
        let response = read_response(&mut stream, bodiless)?;
        Ok((response, stream.len()))
    }

    #[test]
    fn a_length_leaves_the_next_response_alone() {
        let (response, rest) =
            read("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1", false).unwrap();
        assert_eq!(
            (response.status, response.body.as_slice(), response.reusable),
            (200, &b"hello"[..], true)
        );
        assert_eq!(rest, "HTTP/1.1".len());
    }

    #[test]
    fn chunks_with_extensions_and_trailers() {
        let wire = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=y\r\nwiki\r\nA\r\n0123456789\r\n0\r\nT: v\r\n\r\n!";
        let (response, rest) = read(wire, false).unwrap();
        assert_eq!(response.body, b"wiki0123456789");
        assert_eq!(rest, 1);
    }

    #[test]
    fn responses_without_a_body_in_spite_of_their_length() {
        for (wire, head_request) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true),
            ("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", false),
            ("HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", false),
        ] {
            let (response, rest) = read(wire, head_request).unwrap();
            assert_eq!((response.body.len(), response.reusable, rest), (0, true, 0), "{wire}");
        }
    }

    #[test]
    fn connections_that_must_not_be_reused() {
        for wire in [
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nuntil the end",
        ] {
            assert!(!read(wire, false).unwrap().0.reusable, "{wire}");
        }
    }

    #[test]
    fn truncated_and_malformed_responses_are_errors() {
        for (wire, kind) in [
            ("", ErrorKind::UnexpectedEof),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", ErrorKind::UnexpectedEof),
            ("HTTP/1.1 200 OK\r\nContent-Le", ErrorKind::InvalidData),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n", ErrorKind::UnexpectedEof),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ErrorKind::InvalidData),
            ("SSH-2.0-OpenSSH_9.2\r\n", ErrorKind::InvalidData),
            ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", ErrorKind::InvalidData),
        ] {
            assert_eq!(read(wire, false).unwrap_err().kind(), kind, "{wire}");
        }
    }
}
