//! Connections, bounded in number, in idleness and in the time a request head may take, so that slow or many clients
//! cannot exhaust our descriptors or keep others out.
//!
//! When all places are taken, a new connection takes that of the one that has been idle the longest, as long as any
//! waits for its client; a connection whose request is being answered is never ended.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, Sleep, sleep};

/// Open connections; more wait in the kernel's backlog. Well below the usual limit of 1,024 descriptors.
const CONNECTIONS: usize = 256;
/// A connection on which nothing moves for so long is closed. Longer than the longest answer takes.
const IDLE: Duration = Duration::from_secs(60);
/// From the first byte of a request to the end of its head, however often a byte comes.
const HEAD: Duration = Duration::from_secs(10);
/// How often a newcomer looks for a place when nobody is idle.
const RETRY: Duration = Duration::from_millis(100);

/// A TCP listener with these bounds.
pub(super) struct Bounded {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    /// Of the open connections, and of closed ones until the next is accepted; at most [`CONNECTIONS`] and a few.
    open: Vec<Place>,
    head: Duration,
}

/// What the listener knows of a connection.
struct Place {
    state: Arc<Mutex<State>>,
    /// Tells it to end. Taken when that has been done.
    end: Option<oneshot::Sender<()>>,
}

/// What a connection waits for.
#[derive(Clone, Copy)]
enum State {
    /// Its client: for a request, since then.
    Idle(Instant),
    /// Its client: for the rest of a head that began then. How much of the empty line at its end has been seen.
    Head { since: Instant, seen: usize },
    /// Us.
    Busy,
}

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self::with(listener, CONNECTIONS, HEAD)
    }

    fn with(listener: TcpListener, connections: usize, head: Duration) -> Self {
        Self { listener, slots: Arc::new(Semaphore::new(connections)), open: Vec::new(), head }
    }

    /// A place for a new connection: a free one, or that of the connection that has waited for its client the longest.
    async fn slot(&mut self) -> Option<OwnedSemaphorePermit> {
        loop {
            if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
                return Some(slot);
            }
            let waiting = |place: &&mut Place| {
                place.end.is_some().then(|| match *lock(&place.state) {
                    State::Idle(since) | State::Head { since, .. } => Some(since),
                    State::Busy => None,
                })?
            };
            let longest = self.open.iter_mut().filter(|p| waiting(p).is_some()).min_by_key(waiting);
            if let Some(end) = longest.and_then(|place| place.end.take()) {
                // Fails when it has just ended by itself.
                let _ = end.send(());
            }
            let free = Arc::clone(&self.slots).acquire_owned();
            if let Ok(slot) = tokio::time::timeout(RETRY, free).await {
                // An error would mean that the semaphore is closed, which nobody does.
                return slot.ok();
            }
        }
    }
}

impl Listener for Bounded {
    type Io = Watched;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Watched, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let slot = self.slot().await;
        self.open.retain(|place| Arc::strong_count(&place.state) > 1);
        let state = Arc::new(Mutex::new(State::Idle(Instant::now())));
        let (end, ended) = oneshot::channel();
        self.open.push(Place { state: Arc::clone(&state), end: Some(end) });
        let clock = Box::pin(sleep(IDLE));
        (Watched { stream, state, ended, clock, head: self.head, _slot: slot }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that fails when nothing moves for [`IDLE`], when a head takes longer than [`HEAD`], or when its place is
/// needed.
pub(super) struct Watched {
    stream: TcpStream,
    state: Arc<Mutex<State>>,
    ended: oneshot::Receiver<()>,
    clock: Pin<Box<Sleep>>,
    head: Duration,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Watched {
    /// These bytes came.
    fn received(&mut self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        let now = Instant::now();
        let (since, mut seen) = match *state {
            State::Busy => return,
            State::Idle(_) => (now, 0),
            State::Head { since, seen } => (since, seen),
        };
        const END: &[u8] = b"\r\n\r\n";
        for byte in bytes {
            seen = match *byte == END[seen] {
                true => seen + 1,
                false => usize::from(*byte == END[0]),
            };
            if seen == END.len() {
                *state = State::Busy;
                self.clock.as_mut().reset(now + IDLE);
                return;
            }
        }
        *state = State::Head { since, seen };
        self.clock.as_mut().reset(since + self.head);
    }

    /// Bytes of an answer went out: from now on, what comes next is up to the client.
    fn sent(&mut self) {
        let now = Instant::now();
        *lock(&self.state) = State::Idle(now);
        self.clock.as_mut().reset(now + IDLE);
    }

    /// What to say when there is no progress: nothing, or that it has come to an end.
    fn stalled<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        // The other end also goes when nobody can want this place any more; then the clock decides.
        if let Poll::Ready(Ok(())) = Pin::new(&mut self.ended).poll(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        match self.clock.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A client that never stops sending a head never stalls either, so its clock is looked at first.
        if matches!(*lock(&self.state), State::Head { .. }) && self.clock.is_elapsed() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {
                self.received(&buf.filled()[before..]);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => self.stalled(cx),
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, buf) {
            Poll::Ready(Ok(n)) => {
                self.sent();
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => self.stalled(cx),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpStream as Client;

    use super::*;

    async fn listener(connections: usize, head: Duration) -> (Bounded, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (Bounded::with(listener, connections, head), address)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    async fn read(connection: &mut Watched, buffer: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(buffer);
        std::future::poll_fn(|cx| Pin::new(&mut *connection).poll_read(cx, &mut buffer)).await?;
        Ok(buffer.filled().len())
    }

    /// Reads from an accepted connection until it ends; how.
    async fn drain(mut connection: Watched) -> io::ErrorKind {
        let mut buffer = [0; 64];
        loop {
            match read(&mut connection, &mut buffer).await {
                Ok(0) => return io::ErrorKind::UnexpectedEof,
                Ok(_) => {}
                Err(e) => return e.kind(),
            }
        }
    }

    #[test]
    fn a_head_that_trickles_in_does_not_keep_its_connection() {
        runtime().block_on(async {
            let (mut bounded, address) = listener(4, Duration::from_millis(50)).await;
            let mut client = Client::connect(address).unwrap();
            let (connection, _) = bounded.accept().await;
            let ended = tokio::spawn(drain(connection));
            // A byte now and then, more often than any idle limit, for ever.
            while client.write_all(b"x").is_ok() && !ended.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(ended.await.unwrap(), io::ErrorKind::TimedOut);
        });
    }

    #[test]
    fn when_all_places_are_taken_the_longest_idle_goes_and_the_busy_stay() {
        runtime().block_on(async {
            let (mut bounded, address) = listener(3, Duration::from_secs(3_600)).await;
            let mut clients = Vec::new();
            let mut ends = Vec::new();
            // The first is busy, the second has sent half a head, the third nothing.
            for sent in ["GET / HTTP/1.1\r\n\r\n", "GET / HT", ""] {
                let mut client = Client::connect(address).unwrap();
                let (mut connection, _) = bounded.accept().await;
                if !sent.is_empty() {
                    client.write_all(sent.as_bytes()).unwrap();
                    // So few bytes on loopback come as one.
                    let mut buffer = vec![0; sent.len()];
                    assert_eq!(read(&mut connection, &mut buffer).await.unwrap(), sent.len());
                }
                clients.push(client);
                ends.push(tokio::spawn(drain(connection)));
            }
            for gone in [1, 2] {
                clients.push(Client::connect(address).unwrap());
                let (connection, _) = bounded.accept().await;
                let kind = (&mut ends[gone]).await.unwrap();
                assert_eq!(kind, io::ErrorKind::ConnectionAborted, "{gone}");
                // The newcomers are busy at once.
                *lock(&connection.state) = State::Busy;
                ends.push(tokio::spawn(drain(connection)));
            }
            assert!(!ends[0].is_finished());
            // All are busy: the next waits until one ends.
            clients.push(Client::connect(address).unwrap());
            let waits = tokio::time::timeout(3 * RETRY, bounded.accept()).await;
            assert!(waits.is_err());
            assert!([0, 3, 4].iter().all(|n| !ends[*n].is_finished()));
        });
    }
}
