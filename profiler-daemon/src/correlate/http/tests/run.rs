//! One connection under test: transfers in, exchanges out.

use super::super::kernel::{Captured, Kernel};
use super::super::{Connection, Direction, Event, Exchange};

pub const THREAD: u32 = 7;

/// One connection and what came out of it. The clock advances by 10 with every transfer, from 10.
pub struct Run {
    pub connection: Connection,
    pub kernel: Kernel,
    pub time: u64,
    pub done: Vec<Exchange>,
    /// Everything but `Finished`, in short.
    pub log: Vec<String>,
}

impl Run {
    pub fn new() -> Self {
        Self::on(Connection::accepted())
    }

    pub fn on(connection: Connection) -> Self {
        Self { connection, kernel: Kernel::default(), time: 0, done: Vec::new(), log: Vec::new() }
    }

    pub fn act(&mut self, act: impl FnOnce(&mut Connection, &mut dyn FnMut(Event))) -> &mut Self {
        let (done, log) = (&mut self.done, &mut self.log);
        act(&mut self.connection, &mut |event| match event {
            Event::Started { seq, time, activation, .. } => {
                log.push(format!("start {seq} at {time} in {activation}"))
            }
            Event::Discarded { seq } => log.push(format!("discard {seq}")),
            Event::Activation { seq, activation } => log.push(format!("activation {seq} {activation}")),
            Event::Unseen => log.push("unseen".into()),
            Event::Unowned => log.push("unowned".into()),
            Event::Verdict(protocol) => log.push(format!("{protocol:?}")),
            Event::Finished(exchange) => done.push(exchange),
        });
        self
    }

    pub fn feed(&mut self, pieces: Vec<Captured>) -> &mut Self {
        for piece in pieces {
            self.act(|connection, sink| connection.piece(&piece.piece(), sink));
        }
        self
    }

    pub fn transfer(&mut self, direction: Direction, bytes: &[u8], tid: u32) -> &mut Self {
        self.time += 10;
        let pieces = self.kernel.transfer(direction, bytes, self.time, tid);
        self.feed(pieces)
    }

    pub fn input(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.transfer(Direction::In, bytes.as_ref(), THREAD)
    }

    pub fn output(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.transfer(Direction::Out, bytes.as_ref(), THREAD)
    }

    /// As `input` or `output`, of which the record is lost; the next one says so.
    pub fn lose(&mut self, direction: Direction, bytes: &str) -> &mut Self {
        self.time += 10;
        let lost = self.kernel.transfer(direction, bytes.as_bytes(), self.time, THREAD).len();
        self.time += 10;
        let next = match direction {
            Direction::In => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            Direction::Out => "GET /next HTTP/1.1\r\n\r\n",
        };
        let other = if direction == Direction::In { Direction::Out } else { Direction::In };
        let mut pieces = self.kernel.transfer(other, next.as_bytes(), self.time, THREAD);
        pieces[0].lost = lost as u32;
        self.feed(pieces)
    }

    pub fn close(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.close(time, sink))
    }

    pub fn reset(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.reset(time, sink))
    }

    pub fn exit(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.exit(time, sink))
    }

    pub fn stop(&mut self) -> &mut Self {
        self.time += 10;
        let time = self.time;
        self.act(|connection, sink| connection.stop(time, sink))
    }

    pub fn idle(&mut self) -> &mut Self {
        self.act(Connection::idle)
    }

    /// `METHOD path status outcome start..end` of what is finished.
    pub fn lines(&self) -> Vec<String> {
        let line = |x: &Exchange| {
            let head =
                x.head.as_ref().map_or("?".to_owned(), |h| format!("{} {}", h.method.as_str(), h.path));
            let status = x.status.map_or("-".to_owned(), |s| s.to_string());
            format!("{head} {status} {} {}..{}", x.outcome.name(), x.start, x.end)
        };
        self.done.iter().map(line).collect()
    }

    #[track_caller]
    pub fn gives(&self, lines: &[&str]) {
        assert_eq!(self.lines(), lines);
    }
}

pub const GET: &str = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";
pub const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
