//! An engine, a clock, and the part of the kernel side that marks threads: events in, what came of them out.

use std::collections::{BTreeMap, HashMap, HashSet};

use profiler_common::{ConnId, DIR_IN, DIR_OUT, Data, Header, Sample, flags};

use crate::correlate::{Counters, Engine, Finished, Output, ProcessEvent, RequestKey};
use crate::decode::{Event, SampleEvent};

pub const GET: &str = "GET PATH HTTP/1.1\r\nHost: x\r\n\r\n";
pub const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
pub const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

#[derive(Default)]
pub struct Stage {
    pub engine: Engine,
    pub time: u64,
    connections: HashMap<(u32, u32), ConnId>,
    /// Records of a connection that were lost since the last one.
    missing: HashMap<(u32, u32), u32>,
    lossy: bool,
    /// The marks of connections and threads.
    begun: HashMap<(u32, u32), u64>,
    active: HashMap<u32, u64>,
    /// Connections for whose latest request a context was made.
    told: HashSet<(u32, u32)>,
    /// Numbers of the samples of each request, as attributed.
    pub samples: BTreeMap<RequestKey, Vec<u64>>,
    pub finished: Vec<Finished>,
    pub processes: Vec<ProcessEvent>,
    pub left: Vec<(u32, u32)>,
    /// What the kernel side counts: requests it saw begin, and of them those whose record was lost.
    kernel_begun: u64,
    kernel_lost: u64,
    next_sample: u64,
}

impl Stage {
    pub fn new() -> Self {
        Self { time: 1_000_000_000, ..Self::default() }
    }

    fn event(&mut self, event: &Event<'_>) -> &mut Self {
        self.act(|engine, sink| engine.event(event, sink))
    }

    fn act(&mut self, act: impl FnOnce(&mut Engine, &mut dyn FnMut(Output<'_>))) -> &mut Self {
        let Self { engine, samples, finished, processes, left, .. } = self;
        act(engine, &mut |output| match output {
            Output::Sample { key, event } => samples.entry(key).or_default().push(event.sample.weight),
            Output::Revoke { key } => {
                samples.remove(&key);
            }
            Output::Discard { key } => {
                samples.remove(&key);
            }
            Output::Finished(done) => {
                assert!(done.attributed || !samples.contains_key(&done.key), "samples left: {done:?}");
                finished.push(*done);
            }
            Output::Process(event) => processes.push(event),
            Output::Left(id) => left.push((id.pid, id.fd)),
            Output::Protocol { .. } => {}
        });
        let c = self.counters();
        assert_eq!(
            c.samples,
            c.samples_attributed
                + c.samples_after_response
                + c.samples_interleaved
                + c.samples_unknown
                + c.samples_revoked,
            "every sample is in exactly one counter: {c:?}"
        );
        assert_eq!(
            self.kernel_begun + c.requests_pipelined,
            self.finished.len() as u64
                + self.engine.open_requests() as u64
                + self.kernel_lost
                + c.requests_discarded,
            "begun + pipelined = finished + open + lost + discarded: {c:?}"
        );
        self
    }

    fn header(&mut self, pid: u32, tid: u32) -> Header {
        self.time += 1000;
        Header { time: self.time, pid, tid, ..Header::default() }
    }

    /// As the kernel side begins to follow a connection, which nothing reports.
    pub fn known(&mut self, pid: u32, fd: u32) -> &mut Self {
        self.time += 1000;
        self.connections.insert((pid, fd), ConnId { generation: self.time, pid, fd });
        self.missing.remove(&(pid, fd));
        self
    }

    pub fn accept(&mut self, pid: u32, fd: u32) -> &mut Self {
        self.accept_by(pid, 1, fd)
    }

    pub fn accept_by(&mut self, pid: u32, tid: u32, fd: u32) -> &mut Self {
        self.known(pid, fd);
        let header = self.header(pid, tid);
        let conn = self.connection(pid, fd);
        self.event(&Event::Accept(header, conn))
    }

    pub fn connection(&self, pid: u32, fd: u32) -> ConnId {
        self.connections[&(pid, fd)]
    }

    pub fn close(&mut self, pid: u32, tid: u32, fd: u32) -> &mut Self {
        let mut header = self.header(pid, tid);
        header.lost = self.missing.remove(&(pid, fd)).unwrap_or_default();
        header.flags = if self.told.contains(&(pid, fd)) { flags::BY_CONTEXT } else { 0 };
        let conn = self.connection(pid, fd);
        self.event(&Event::Close(header, conn))
    }

    pub fn close_as(&mut self, tid: u32, conn: ConnId) -> &mut Self {
        let header = self.header(conn.pid, tid);
        self.event(&Event::Close(header, conn))
    }

    /// A record of this connection is lost.
    pub fn lose(&mut self, pid: u32, fd: u32) -> &mut Self {
        *self.missing.entry((pid, fd)).or_default() += 1;
        self.lossy = true;
        self
    }

    fn data(&mut self, pid: u32, tid: u32, fd: u32, out: bool, bytes: &str, bits: u16) -> Data {
        let mut header = self.header(pid, tid);
        header.flags = bits;
        header.lost = self.missing.remove(&(pid, fd)).unwrap_or_default();
        let mut tail = [0; 8];
        let len = if out { bytes.len().min(8) } else { 0 };
        tail[..len].copy_from_slice(&bytes.as_bytes()[bytes.len() - len..]);
        Data {
            header,
            conn: self.connection(pid, fd),
            activation: self.begun.get(&(pid, fd)).copied().unwrap_or_default(),
            advance: bytes.len() as u64,
            direction: if out { DIR_OUT } else { DIR_IN },
            tail,
            tail_len: len as u32,
            ..Data::default()
        }
    }

    /// The kernel side sees the beginning of a request.
    fn begins(&mut self, pid: u32, tid: u32, fd: u32) {
        self.time += 1000;
        self.begun.insert((pid, fd), self.time);
        self.active.insert(tid, self.time);
        self.kernel_begun += 1;
    }

    /// The same, and its record is lost.
    pub fn begins_unseen(&mut self, pid: u32, tid: u32, fd: u32) -> &mut Self {
        self.begins(pid, tid, fd);
        self.kernel_lost += 1;
        self.lose(pid, fd)
    }

    pub fn input(&mut self, pid: u32, tid: u32, fd: u32, bytes: &str, bits: u16) -> &mut Self {
        if bits & flags::NEW_ACTIVATION != 0 {
            self.begins(pid, tid, fd);
        }
        let data = self.data(pid, tid, fd, false, bytes, bits);
        self.event(&Event::Data { data, captured: bytes.as_bytes() })
    }

    /// As `request`, but the clock interrupts between its record and its mark, and the sample's record comes second.
    pub fn request_interrupted(&mut self, pid: u32, tid: u32, fd: u32, path: &str) -> &mut Self {
        let mark = self.mark(tid);
        let header = self.header(pid, tid);
        self.request(pid, tid, fd, path);
        let sample = Sample { header, activation: mark, ..Sample::default() };
        self.event(&Event::Sample(SampleEvent::bare(sample)))
    }

    /// What follows when more pieces were in a transfer than the kernel side looks at.
    pub fn blind(&mut self, pid: u32, tid: u32, fd: u32, out: bool, len: u64) -> &mut Self {
        let mut data = self.data(pid, tid, fd, out, "", flags::PIPELINE_OVERFLOW);
        data.advance = len;
        self.event(&Event::Data { data, captured: &[] })
    }

    /// A beginning whose bytes could not be read.
    pub fn unreadable(&mut self, pid: u32, tid: u32, fd: u32, len: u64) -> &mut Self {
        self.begins(pid, tid, fd);
        let mut data = self.data(pid, tid, fd, false, "", flags::NEW_ACTIVATION | flags::HEAD_FAULT);
        data.advance = len;
        self.event(&Event::Data { data, captured: &[] })
    }

    /// The daemon finds by itself that what had this pid ended before `before`.
    pub fn gone(&mut self, pid: u32, before: u64) -> &mut Self {
        let now = self.time;
        self.act(|engine, sink| engine.process_gone(pid, before, now, sink))
    }

    /// Received bytes that are not captured.
    pub fn hidden(&mut self, pid: u32, tid: u32, fd: u32, bytes: &str) -> &mut Self {
        let data = self.data(pid, tid, fd, false, bytes, 0);
        self.event(&Event::Data { data, captured: &[] })
    }

    pub fn request(&mut self, pid: u32, tid: u32, fd: u32, path: &str) -> &mut Self {
        self.input(pid, tid, fd, &GET.replace("PATH", path), flags::NEW_ACTIVATION | flags::HEAD_END)
    }

    /// In the same transfer as the request before.
    pub fn pipelined(&mut self, pid: u32, tid: u32, fd: u32, path: &str) -> &mut Self {
        self.input(pid, tid, fd, &GET.replace("PATH", path), flags::HEAD_END)
    }

    /// A write; heads are captured, bodies are not.
    pub fn output(&mut self, pid: u32, tid: u32, fd: u32, bytes: &str) -> &mut Self {
        self.output_entered(pid, tid, fd, bytes, 0)
    }

    /// A write whose thread did not wait, `entered` at this time.
    pub fn output_entered(&mut self, pid: u32, tid: u32, fd: u32, bytes: &str, entered: u64) -> &mut Self {
        let bits = if self.told.contains(&(pid, fd)) { flags::BY_CONTEXT } else { 0 };
        let data = Data { entered, ..self.data(pid, tid, fd, true, bytes, bits) };
        let head = bytes.starts_with("HTTP/1.1 ");
        let end = bytes.find("\r\n\r\n").map_or(bytes.len(), |at| at + 4);
        let captured = if head { &bytes.as_bytes()[..end] } else { &[] };
        self.event(&Event::Data { data, captured })
    }

    pub fn fails(&mut self, pid: u32, tid: u32, fd: u32, errno: i32) -> &mut Self {
        let mut data = self.data(pid, tid, fd, true, "", 0);
        data.errno = errno as u32;
        self.event(&Event::Data { data, captured: &[] })
    }

    /// As `output`, by a call on the descriptor's former connection that returns late.
    pub fn output_as(&mut self, tid: u32, conn: ConnId, bytes: &str) -> &mut Self {
        let data = Data { conn, ..self.data(conn.pid, tid, conn.fd, true, bytes, 0) };
        self.event(&Event::Data { data, captured: &[] })
    }

    pub fn mark(&self, tid: u32) -> u64 {
        self.active.get(&tid).copied().unwrap_or_default()
    }

    /// Takes samples of a thread; their numbers go into their weights.
    pub fn samples(&mut self, pid: u32, tid: u32, n: u64) -> &mut Self {
        let mark = self.mark(tid);
        self.samples_as(pid, tid, mark, n)
    }

    pub fn samples_as(&mut self, pid: u32, tid: u32, activation: u64, n: u64) -> &mut Self {
        for _ in 0..n {
            self.sample(pid, tid, activation, 0);
        }
        self
    }

    /// A sample before which others were lost.
    pub fn lost_samples(&mut self, pid: u32, tid: u32, lost: u32) -> &mut Self {
        let mark = self.mark(tid);
        self.sample(pid, tid, mark, lost);
        self
    }

    /// Returns the sample's number.
    pub fn sample(&mut self, pid: u32, tid: u32, activation: u64, lost: u32) -> u64 {
        self.next_sample += 1;
        let mut header = self.header(pid, tid);
        header.lost = lost;
        let weight = self.next_sample;
        let sample = Sample { header, activation, weight, ..Sample::default() };
        self.event(&Event::Sample(SampleEvent::bare(sample)));
        weight
    }

    /// A request on a connection that an event loop waits for.
    pub fn looped(&mut self, pid: u32, tid: u32, fd: u32, path: &str) -> &mut Self {
        self.told.insert((pid, fd));
        let bits = flags::NEW_ACTIVATION | flags::HEAD_END | flags::BY_CONTEXT;
        self.input(pid, tid, fd, &GET.replace("PATH", path), bits)
    }

    /// The same where no context is made for the request.
    pub fn looped_by_one_task(&mut self, pid: u32, tid: u32, fd: u32, path: &str) -> &mut Self {
        self.looped(pid, tid, fd, path);
        self.told.remove(&(pid, fd));
        self
    }

    /// The mark of what a connection received last.
    pub fn mark_of(&self, pid: u32, fd: u32) -> u64 {
        self.begun[&(pid, fd)]
    }

    /// Samples of a thread in a context that works for this mark.
    pub fn in_context(&mut self, pid: u32, tid: u32, activation: u64, n: u64) -> &mut Self {
        for _ in 0..n {
            self.next_sample += 1;
            let mut header = self.header(pid, tid);
            header.flags = flags::BY_CONTEXT;
            let sample = Sample { header, activation, weight: self.next_sample, ..Sample::default() };
            self.event(&Event::Sample(SampleEvent::bare(sample)));
        }
        self
    }

    pub fn fork(&mut self, pid: u32, child: u32) -> &mut Self {
        let header = self.header(pid, pid);
        self.event(&Event::Fork { header, child })
    }

    pub fn exec(&mut self, pid: u32, tid: u32) -> &mut Self {
        let header = self.header(pid, tid);
        self.event(&Event::Exec(header))
    }

    pub fn exit(&mut self, pid: u32, tid: u32, live: u32) -> &mut Self {
        let header = self.header(pid, tid);
        self.active.remove(&tid);
        self.event(&Event::Exit { header, live })
    }

    pub fn wait(&mut self, ns: u64) -> &mut Self {
        let end = self.time + ns;
        while self.time < end {
            self.time += 100_000_000;
            let now = self.time;
            self.act(|engine, sink| engine.tick(now, sink));
        }
        self
    }

    /// Asks after the silent connections; these descriptors are open.
    pub fn audit(&mut self, open: &[u32]) -> &mut Self {
        let now = self.time;
        self.act(|engine, sink| engine.audit(now, &mut |conn| open.contains(&conn.fd), sink))
    }

    pub fn finish(&mut self) -> &mut Self {
        let (now, whole) = (self.time, !self.lossy);
        self.act(|engine, sink| engine.finish(now, whole, sink))
    }

    pub fn reject(&mut self, pid: u32) -> &mut Self {
        self.act(|engine, sink| engine.reject(pid, sink))
    }

    pub fn counters(&self) -> Counters {
        self.engine.counters()
    }

    fn path(done: &Finished) -> String {
        done.exchange.head.as_ref().map_or("?".into(), |head| head.path.to_string())
    }

    fn of(&self, path: &str) -> &Finished {
        self.finished.iter().find(|done| Self::path(done) == path).expect("a request with this path")
    }

    pub fn lost(&self, path: &str) -> u64 {
        self.of(path).lost
    }

    /// First and last byte of the response, ns after the start.
    pub fn times(&self, path: &str) -> (Option<u64>, u64) {
        let exchange = &self.of(path).exchange;
        let after = |time: u64| time.checked_sub(exchange.start).expect("not before the start");
        (exchange.first_out.map(after), after(exchange.end))
    }

    pub fn note(&self, path: &str) -> Option<&'static str> {
        self.of(path).exchange.note
    }

    /// What has finished, by path: outcome, samples, samples after the response; `none` = not attributed.
    #[track_caller]
    pub fn gives(&self, lines: &[&str]) {
        let mut got: Vec<String> = self
            .finished
            .iter()
            .map(|done| {
                let samples = match done.attributed {
                    true => {
                        let n = self.samples.get(&done.key).map_or(0, Vec::len);
                        format!("{n} after {}", done.tail_samples)
                    }
                    false => "none".into(),
                };
                format!("{} {:?} {samples}", Self::path(done), done.exchange.outcome)
            })
            .collect();
        got.sort();
        let mut expected: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        expected.sort();
        assert_eq!(got, expected);
    }
}
