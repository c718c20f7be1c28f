//! Random servers against the correlator. A server here knows which request each of its samples was taken in; the
//! correlator sees only the records.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;

use super::stage::{CHUNKED, GET, OK, Stage};
use profiler_common::flags;

/// How the servers are built.
#[derive(Clone, Copy, Debug)]
struct Design {
    /// Requests that one thread keeps open at a time.
    at_once: usize,
    /// Of 100 records of connections, so many are lost.
    lost: u64,
}

const PROCESSES: u32 = 2;
const THREADS: u32 = 4;
const FDS: u32 = 7;
const STEPS: usize = 1500;

/// What is left to do for a transfer's requests.
#[derive(Clone, Copy, Debug)]
enum Step {
    Work,
    Body,
    Write(&'static str),
    /// The response is over: the next of a pipelined row.
    Next,
    /// What an upgraded connection carries, and work for it.
    Frame,
    /// The request is another thread's by now; its own goes on with what is no request.
    Elsewhere,
    Close,
    /// Another thread closes.
    Reap,
}

/// The owner of samples that are no request's.
const NOBODY: usize = usize::MAX;

struct Job {
    pid: u32,
    tid: u32,
    fd: u32,
    /// In reverse.
    steps: Vec<Step>,
    /// The requests, first one being worked on.
    requests: Vec<usize>,
    /// They are worked on in any order.
    mixed: bool,
}

impl Job {
    /// Whether a response is still to be finished; what remains then is a tail.
    fn answers(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Next | Step::Reap))
    }
}

/// A request as the server knows it.
#[derive(Default)]
struct Truth {
    samples: Vec<u64>,
    pid: u32,
    /// Work for something else, or by another thread, may be among its samples: nothing is to be attributed.
    shared: bool,
}

struct World {
    stage: Stage,
    state: u64,
    design: Design,
    jobs: Vec<Job>,
    truth: Vec<Truth>,
    /// Which request each sample was taken in, or after.
    owner: HashMap<u64, usize>,
    open: HashMap<(u32, u32), bool>,
}

impl World {
    /// SplitMix64.
    fn random(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }

    fn loses(&mut self) -> bool {
        (self.random(100) as u64) < self.design.lost
    }

    fn begin(&mut self, pid: u32, tid: u32) {
        if self.random(6) == 0 {
            // It accepts a connection that stays silent, and goes on with what is no request.
            self.stage.accept_by(pid, tid, FDS + tid);
            self.share(tid);
            return self.idle(pid, tid);
        }
        let fd = self.random(FDS as usize) as u32;
        if self.jobs.iter().any(|job| (job.pid, job.fd) == (pid, fd)) {
            return;
        }
        if !self.open.get(&(pid, fd)).copied().unwrap_or_default() {
            self.open.insert((pid, fd), true);
            if self.loses() {
                self.stage.known(pid, fd).lose(pid, fd);
            } else {
                self.stage.accept_by(pid, tid, fd);
            }
        }
        let row = if self.random(5) == 0 { 1 + self.random(3) } else { 1 };
        let mut requests = Vec::new();
        let mut steps = vec![];
        for at in 0..row {
            let index = self.truth.len();
            // Of those that arrive together, the server may work on any.
            self.truth.push(Truth { pid, shared: row > 1, ..Truth::default() });
            requests.push(index);
            let posts = row == 1 && self.random(4) == 0;
            let head = if posts {
                format!("POST /{index} HTTP/1.1\r\nContent-Length: 5\r\n\r\n")
            } else {
                GET.replace("PATH", &format!("/{index}"))
            };
            let new = if at == 0 { flags::NEW_ACTIVATION } else { 0 };
            let split =
                if row == 1 && self.random(4) == 0 { 1 + self.random(head.len() - 1) } else { head.len() };
            let mut bits = new;
            for part in [&head[..split], &head[split..]] {
                if part.is_empty() {
                    continue;
                }
                if self.loses() {
                    if bits == 0 {
                        self.stage.lose(pid, fd);
                    } else {
                        self.stage.begins_unseen(pid, tid, fd);
                    }
                } else {
                    self.stage.input(pid, tid, fd, part, bits);
                }
                bits = 0;
            }
            if posts {
                steps.extend([Step::Work, Step::Body]);
            }
            if row == 1 && self.random(8) == 0 {
                self.truth[index].shared = true;
                steps.extend([Step::Elsewhere, Step::Reap]);
                break;
            }
            if row == 1 && self.random(8) == 0 {
                let upgrade = Step::Write("HTTP/1.1 101 Switching Protocols\r\n\r\n");
                steps.extend([
                    Step::Work,
                    upgrade,
                    Step::Next,
                    Step::Frame,
                    Step::Frame,
                    Step::Frame,
                    Step::Close,
                ]);
                break;
            }
            steps.push(Step::Work);
            // In a row only responses whose end is certain: see `Connection::looks_over`.
            match self.random(if row == 1 { 4 } else { 2 }) {
                0 => steps.push(Step::Write(OK)),
                1 => steps.extend([
                    Step::Write("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc"),
                    Step::Work,
                    Step::Write("def"),
                ]),
                2 => steps.extend([
                    Step::Write(CHUNKED),
                    Step::Work,
                    Step::Write("3\r\nabc\r\n"),
                    Step::Work,
                    Step::Write("0\r\n\r\n"),
                ]),
                _ => steps.extend([
                    Step::Write("HTTP/1.1 200 OK\r\n\r\nabc"),
                    Step::Work,
                    Step::Write("def"),
                    Step::Close,
                ]),
            }
            steps.push(Step::Next);
        }
        let mixed = row > 1 && self.random(2) == 0;
        if mixed {
            // All the work first, then all the answers.
            steps.sort_by_key(|step| !matches!(step, Step::Work));
        }
        if !matches!(steps.last(), Some(Step::Reap | Step::Close)) {
            steps.push(Step::Work);
            if self.random(3) == 0 {
                steps.push(Step::Close);
            }
        }
        steps.reverse();
        self.jobs.push(Job { pid, tid, fd, steps, requests, mixed });
        let answering = |job: &&Job| job.tid == tid && job.answers();
        if self.jobs.iter().filter(answering).count() > 1 {
            for index in self.jobs.iter().filter(answering).flat_map(|job| &job.requests) {
                self.truth[*index].shared = true;
            }
        }
    }

    fn step(&mut self, may_begin: bool) {
        let thread = self.random((PROCESSES * THREADS) as usize) as u32;
        let (pid, tid) = (1 + thread / THREADS, 10 + thread);
        let mine: Vec<usize> = (0..self.jobs.len()).filter(|i| self.jobs[*i].tid == tid).collect();
        if mine.len() < self.design.at_once && may_begin && (mine.is_empty() || self.random(4) == 0) {
            return self.begin(pid, tid);
        }
        if mine.is_empty() {
            return;
        }
        let at = mine[self.random(mine.len())];
        let (fd, step) = (self.jobs[at].fd, self.jobs[at].steps.pop());
        match step {
            None => {
                self.jobs.swap_remove(at);
            }
            // What an event loop does for a request after its response cannot be told from work for the next.
            Some(Step::Work) if self.design.at_once > 1 && !self.jobs[at].answers() => {}
            Some(Step::Work) => {
                for _ in 0..self.random(4) {
                    let mark = self.stage.mark(tid);
                    let number = self.stage.sample(pid, tid, mark, 0);
                    let due = self.jobs[at].requests.len();
                    let which = if self.jobs[at].mixed { self.random(due) } else { 0 };
                    let job = &self.jobs[at];
                    self.owner.insert(number, job.requests[which]);
                    if job.answers() {
                        self.truth[job.requests[which]].samples.push(number);
                    }
                }
            }
            Some(Step::Body) if self.loses() => {
                self.stage.lose(pid, fd);
            }
            Some(Step::Body) => {
                self.stage.hidden(pid, tid, fd, "hello");
            }
            Some(Step::Write(_)) if self.loses() => {
                self.stage.lose(pid, fd);
            }
            Some(Step::Write(bytes)) => {
                self.stage.output(pid, tid, fd, bytes);
            }
            Some(Step::Frame) => {
                let begins = self.random(4) == 0;
                match (self.loses(), begins) {
                    (true, true) => self.stage.begins_unseen(pid, tid, fd),
                    (true, false) => self.stage.lose(pid, fd),
                    (false, true) => self.stage.input(pid, tid, fd, "PING", flags::NEW_ACTIVATION),
                    (false, false) if self.random(2) == 0 => self.stage.output(pid, tid, fd, "frame"),
                    (false, false) => self.stage.hidden(pid, tid, fd, "frame"),
                };
                self.share(tid);
                self.idle(pid, tid);
            }
            Some(Step::Elsewhere) => self.idle(pid, tid),
            Some(Step::Reap) => {
                if self.open.insert((pid, fd), false) == Some(true) && !self.loses() {
                    self.stage.close(pid, 1, fd);
                }
            }
            Some(Step::Next) => unreachable!("taken with the step before"),
            Some(Step::Close) => {
                if self.open.insert((pid, fd), false) == Some(true) && !self.loses() {
                    self.stage.close(pid, tid, fd);
                }
            }
        }
        // The end of a response is the step that writes it.
        if let Some(job) = self.jobs.get_mut(at)
            && let Some(Step::Next) = job.steps.last()
        {
            job.steps.pop();
            if job.requests.len() > 1 {
                job.requests.remove(0);
            }
        }
    }

    /// The thread does something else while it has requests open.
    fn share(&mut self, tid: u32) {
        for job in self.jobs.iter().filter(|job| job.tid == tid && job.answers()) {
            self.truth[job.requests[0]].shared = true;
        }
    }

    /// Work that is no request's.
    fn idle(&mut self, pid: u32, tid: u32) {
        for _ in 0..self.random(4) {
            let mark = self.stage.mark(tid);
            let number = self.stage.sample(pid, tid, mark, 0);
            self.owner.insert(number, NOBODY);
        }
    }

    fn run(seed: u64, design: Design) -> Self {
        let (state, stage) = (seed, Stage::new());
        let mut world = Self {
            stage,
            state,
            design,
            jobs: Vec::new(),
            truth: Vec::new(),
            owner: HashMap::new(),
            open: HashMap::new(),
        };
        for _ in 0..STEPS {
            world.step(true);
        }
        while !world.jobs.is_empty() {
            world.step(false);
        }
        world.stage.wait(600_000_000).finish();
        world
    }

    /// Samples of each finished request that the correlator calls attributed: by the request's number, which is its
    /// path, or (without a head) none.
    fn attributed(&self) -> BTreeMap<usize, Vec<u64>> {
        let mut all = BTreeMap::new();
        for done in self.stage.finished.iter().filter(|done| done.attributed) {
            let samples = self.stage.samples.get(&done.key).cloned().unwrap_or_default();
            let Some(head) = &done.exchange.head else {
                let owners: BTreeSet<_> = samples.iter().map(|n| self.owner[n]).collect();
                assert!(owners.len() < 2, "samples of several requests: {owners:?}");
                continue;
            };
            let index: usize = head.path[1..].parse().expect("a number");
            assert_eq!(done.pid, self.truth[index].pid);
            assert!(all.insert(index, samples).is_none(), "request {index} twice");
        }
        all
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_sample_finds_its_request(seed: u64) {
        let world = World::run(seed, Design { at_once: 1, lost: 0 });
        let attributed = world.attributed();
        prop_assert_eq!(world.stage.finished.len(), world.truth.len());
        for (index, truth) in world.truth.iter().enumerate() {
            let expected = (!truth.shared).then_some(&truth.samples);
            prop_assert_eq!(attributed.get(&index), expected, "request {}", index);
        }
        let counters = world.stage.counters();
        let inside: usize = world.truth.iter().filter(|t| !t.shared).map(|truth| truth.samples.len()).sum();
        prop_assert_eq!(counters.samples as usize, world.owner.len());
        prop_assert_eq!(counters.samples_attributed as usize, inside);
    }

    #[test]
    fn losses_give_no_sample_to_another_request(seed: u64, lost in 1..40u64) {
        let world = World::run(seed, Design { at_once: 1, lost });
        for (index, samples) in world.attributed() {
            for number in samples {
                prop_assert_eq!(world.owner[&number], index);
            }
        }
    }

    #[test]
    fn event_loops_get_nothing(seed: u64, at_once in 2..4usize) {
        let world = World::run(seed, Design { at_once, lost: 0 });
        for (index, samples) in world.attributed() {
            for number in samples {
                prop_assert_eq!(world.owner[&number], index);
            }
        }
        for done in &world.stage.finished {
            let index: usize = done.exchange.head.as_ref().expect("nothing is lost").path[1..].parse().unwrap();
            prop_assert!(!(done.attributed && world.truth[index].shared), "request {}", index);
        }
    }
}
