//! An HTTP/1.1 client that knows what it did: bytes sent, bytes received, and when, by the clock that the kernel uses.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde::Deserialize;

use super::tls::Trust;

/// For a tree of the greatest depth there is, in a build without optimisation.
const STACK: usize = 64 << 20;

/// What a request and its answer were, as the client saw it.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub method: String,
    /// As sent, with its query string.
    pub target: String,
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// Without the framing of chunks.
    pub body: Vec<u8>,
    /// Head and body as they went over the wire.
    pub sent: u64,
    pub received: u64,
    /// CLOCK_MONOTONIC, ns: before the first byte was written, after the last was read.
    pub start: u64,
    pub end: u64,
}

impl Exchange {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// A header that is a number.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        let value = self.header(name).and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("{} has no number {name}", self.target))
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        // Call trees are nested as deep as stacks, and are read with recursion.
        let parse = || {
            let mut reader = serde_json::Deserializer::from_slice(&self.body);
            reader.disable_recursion_limit();
            serde_json::Value::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value))
        };
        let value = std::thread::scope(|scope| {
            let roomy = std::thread::Builder::new().stack_size(STACK);
            roomy.spawn_scoped(scope, parse).expect("a thread").join().expect("no panic")
        });
        value.unwrap_or_else(|e| panic!("{}: {e}: {}", self.target, self.text()))
    }
}

/// Bytes that wait at the other end of a connection of this machine: `/proc/net/tcp` lists, in hexadecimal,
/// `sl local rem st tx_queue:rx_queue`.
pub fn unread(stream: &TcpStream) -> Option<u64> {
    let port = |address: std::net::SocketAddr| format!("0100007F:{:04X}", address.port());
    let (here, there) = (port(stream.local_addr().ok()?), port(stream.peer_addr().ok()?));
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.get(1) == Some(&&*there) && row.get(2) == Some(&&*here))?;
    u64::from_str_radix(row.get(4)?.split(':').nth(1)?, 16).ok()
}

/// CLOCK_MONOTONIC, ns.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A client of one server: keeps its connection as long as the server does.
pub struct Client {
    port: u16,
    tls: Option<Trust>,
    stream: Option<Box<dyn Wire>>,
    unread: Vec<u8>,
}

/// A connection, in clear text or not.
trait Wire: Read + Write + Send {}
impl<T: Read + Write + Send> Wire for T {}

impl Client {
    pub fn new(port: u16) -> Self {
        Self::trusting(port, None)
    }

    /// One that speaks TLS if there is somebody to trust. Exchanges are of the clear text.
    pub fn trusting(port: u16, tls: Option<Trust>) -> Self {
        Self { port, tls, stream: None, unread: Vec::new() }
    }

    /// One that goes on with a connection.
    pub fn on(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let port = stream.peer_addr()?.port();
        Ok(Self { stream: Some(Box::new(stream)), ..Self::new(port) })
    }

    /// Sends a request and reads the whole answer. After an error the next request has a new connection.
    pub fn request(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Exchange> {
        let mut message = format!("{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n", self.port);
        if !body.is_empty() {
            message.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        message.push_str("\r\n");
        let mut message = message.into_bytes();
        message.extend_from_slice(body);
        self.send(method, target, &message)
    }

    /// Sends these bytes, which are a request of this method and target, and reads the whole answer.
    pub fn send(&mut self, method: &str, target: &str, message: &[u8]) -> io::Result<Exchange> {
        let exchange = self.exchange(method, target, message);
        if exchange.is_err() {
            self.stream = None;
        }
        exchange
    }

    fn exchange(&mut self, method: &str, target: &str, message: &[u8]) -> io::Result<Exchange> {
        if self.stream.is_none() {
            let stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(super::process::PATIENCE))?;
            self.stream = Some(match &self.tls {
                Some(trust) => Box::new(trust.over(stream)?),
                None => Box::new(stream),
            });
            self.unread.clear();
        }
        let start = monotonic_ns();
        self.stream()?.write_all(message)?;
        let mut exchange = Exchange {
            method: method.to_owned(),
            target: target.to_owned(),
            status: 0,
            headers: Vec::new(),
            body: Vec::new(),
            sent: message.len() as u64,
            received: 0,
            start,
            end: 0,
        };
        self.head(&mut exchange)?;
        self.body(&mut exchange)?;
        exchange.end = monotonic_ns();
        if exchange.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.stream = None;
        }
        Ok(exchange)
    }

    fn stream(&mut self) -> io::Result<&mut dyn Wire> {
        self.stream.as_deref_mut().map(|wire| wire as &mut dyn Wire).ok_or(io::ErrorKind::NotConnected.into())
    }

    /// Reads more into `unread`; 0 = the server has closed.
    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 65_536];
        let n = self.stream()?.read(&mut buffer)?;
        self.unread.extend_from_slice(&buffer[..n]);
        Ok(n)
    }

    /// Takes `n` bytes off the wire.
    fn take(&mut self, n: usize, exchange: &mut Exchange) -> io::Result<Vec<u8>> {
        while self.unread.len() < n {
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        exchange.received += n as u64;
        Ok(self.unread.drain(..n).collect())
    }

    fn line(&mut self, exchange: &mut Exchange) -> io::Result<String> {
        loop {
            if let Some(at) = self.unread.windows(2).position(|two| two == b"\r\n") {
                let line = self.take(at + 2, exchange)?;
                return Ok(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn head(&mut self, exchange: &mut Exchange) -> io::Result<()> {
        let malformed = |line: &str| io::Error::new(io::ErrorKind::InvalidData, line.to_owned());
        let status_line = self.line(exchange)?;
        let status = status_line.split(' ').nth(1).and_then(|status| status.parse().ok());
        exchange.status = status.ok_or_else(|| malformed(&status_line))?;
        loop {
            let line = self.line(exchange)?;
            if line.is_empty() {
                return Ok(());
            }
            let (name, value) = line.split_once(':').ok_or_else(|| malformed(&line))?;
            exchange.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    fn body(&mut self, exchange: &mut Exchange) -> io::Result<()> {
        if exchange.method == "HEAD" || matches!(exchange.status, 100..=199 | 204 | 304) {
            return Ok(());
        }
        if exchange.header("transfer-encoding").is_some_and(|value| value == "chunked") {
            loop {
                let line = self.line(exchange)?;
                let size = usize::from_str_radix(line.trim(), 16)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                let chunk = self.take(size + 2, exchange)?;
                exchange.body.extend_from_slice(&chunk[..size]);
                if size == 0 {
                    return Ok(());
                }
            }
        }
        if exchange.header("content-length").is_some() {
            let length = exchange.number("content-length") as usize;
            exchange.body = self.take(length, exchange)?;
            return Ok(());
        }
        // The server ends it by closing.
        while self.fill()? > 0 {}
        exchange.body = self.take(self.unread.len(), exchange)?;
        self.stream = None;
        Ok(())
    }
}
