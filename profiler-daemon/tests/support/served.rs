//! The server with a store of its own and everything else of the daemon made up, so that it needs no kernel.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use profiler_daemon::cli::client::ClientOptions;
use profiler_daemon::profile::{Builder, Frame, FrameKind, Profile};
use profiler_daemon::record::{Attribution, Boundary, Outcome, RequestRecord};
use profiler_daemon::serve::{self, Context, Metrics};
use profiler_daemon::store::{Config, Entry, Store};
use serde_json::{Value, json};

pub type Answer = Arc<Mutex<Result<(), String>>>;

/// A server with a store of its own; everything else of the daemon is made up.
pub struct Served {
    pub store: Store,
    pub metrics: Arc<Metrics>,
    pub address: SocketAddr,
    pub reload: Answer,
    pub ready: Answer,
    // Dropped last: the server, then the directory.
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Served {
    pub fn start() -> Self {
        Self::start_with(Arc::new(|| json!({"version": "0.0.0"})))
    }

    pub fn start_with(status: serve::Report) -> Self {
        Self::build(status, true)
    }

    /// As `record` serves: a reload is refused, and the metrics do not tell of it.
    pub fn of_recording() -> Self {
        let served = Self::build(Arc::new(|| json!({})), false);
        *served.reload.lock().unwrap() = Err("a recording keeps its settings".to_owned());
        served
    }

    fn build(status: serve::Report, noted: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Config::new(dir.path().join("state"))).unwrap();
        let metrics = Arc::new(Metrics::new().unwrap());
        let reload = Arc::new(Mutex::new(Ok(())));
        let ready = Arc::new(Mutex::new(Ok(())));
        let answer = |state: &Answer| -> serve::Check {
            let state = Arc::clone(state);
            Arc::new(move || state.lock().unwrap().clone())
        };
        let asked = answer(&reload);
        let context = Context {
            store: store.reader(),
            metrics: Arc::clone(&metrics),
            refresh: {
                let metrics = Arc::clone(&metrics);
                let refreshed = AtomicU64::new(0);
                // A total that only this sets, and that tells how often.
                Arc::new(move || {
                    let times = refreshed.fetch_add(1, Relaxed) + 1;
                    metrics.set_events_lost("test", "refreshed", times);
                })
            },
            status,
            targets: Arc::new(|| json!([{"pid": 100, "service": "shop\u{1b}[2J", "runtime": null}])),
            ready: answer(&ready),
            reload: if noted { serve::noted(Arc::clone(&metrics), move || asked()) } else { asked },
            hosts: Vec::new(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            serve::serve(listener, context, std::future::pending()).await.unwrap();
        });
        Self { store, metrics, address, reload, ready, _runtime: runtime, _dir: dir }
    }

    pub fn add(&self, record: RequestRecord, profile: bool) {
        self.metrics.observe(&record);
        let sampled = profile.then(|| one_sample(record.duration_ns));
        self.put(record, sampled);
    }

    pub fn put(&self, record: RequestRecord, profile: Option<Profile>) {
        let profile = profile.map(|profile| profile.encode());
        assert!(self.store.sender().try_send(Entry { record, sampled_cpu_ns: Some(10), profile }));
        self.store.flush();
    }

    pub fn options(&self) -> ClientOptions {
        ClientOptions { url: format!("http://{}", self.address), json: false, color: false }
    }

    /// Sends this head as it is; the status, the head and the body of the answer.
    pub fn raw(&self, head: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let head = format!("{}\r\nconnection: close\r\n\r\n", head.replace('\n', "\r\n"));
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    pub fn get(&self, path: &str) -> (u16, String, String) {
        self.raw(&format!("GET {path} HTTP/1.1\nhost: {}", self.address))
    }

    pub fn json(&self, path: &str) -> Value {
        let (status, _, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    pub fn error(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.get(path);
        (status, code(&body))
    }
}

/// The profile of one request that one sample hit.
fn one_sample(duration_ns: u64) -> Profile {
    let (name, file) = (Arc::from("order_detail"), Arc::from("/srv/shop/views.py"));
    let frame = Frame { name, file, line: 12, first_line: 10, kind: FrameKind::Python };
    let mut builder = Builder::default();
    builder.add(&[Arc::new(frame)], duration_ns);
    builder.finish(duration_ns)
}

pub fn code(body: &str) -> String {
    let error: Value = serde_json::from_str(body).unwrap();
    assert!(!error["error"]["message"].as_str().unwrap().is_empty());
    error["error"]["code"].as_str().unwrap().to_owned()
}

pub fn record(n: u64) -> RequestRecord {
    let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap();
    RequestRecord {
        id: format!("{n:024x}"),
        pid: 100,
        tid: 101,
        service: "shop".into(),
        method: Some("GET".into()),
        path: Some(format!("/orders/{n}")),
        route: Some("/orders/{id}".into()),
        status: Some(200),
        start: now - 60_000_000_000 + n as i64,
        duration_ns: 20_000_000 * n,
        ttfb_ns: None,
        request_bytes: 100,
        response_bytes: 200,
        on_cpu_ns: None,
        runqueue_ns: None,
        off_cpu_ns: None,
        samples: 2,
        tail_samples: 0,
        lost_events: 0,
        boundary: Boundary::Uprobe,
        attribution: Attribution::Thread,
        outcome: Outcome::Complete,
        note: None,
        trace_id: None,
        profile: false,
    }
}
