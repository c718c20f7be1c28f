//! The HTTP API, the metrics and the client, on a real socket and a real store, without a kernel.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};

use profiler_daemon::cli::client::{self, ClientError, ClientOptions, RequestsQuery};
use profiler_daemon::profile::Profile;
use profiler_daemon::record::{Attribution, Boundary, Outcome, RequestRecord};
use profiler_daemon::serve::{self, Context, Metrics};
use profiler_daemon::store::{Config, Entry, Store};
use serde_json::{Value, json};

type Answer = Arc<Mutex<Result<(), String>>>;

/// A server with a store of its own; everything else of the daemon is made up.
struct Daemon {
    store: Store,
    metrics: Arc<Metrics>,
    address: SocketAddr,
    reload: Answer,
    ready: Answer,
    // Dropped last: the server, then the directory.
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        Self::start_with(Arc::new(|| json!({"version": "0.0.0"})))
    }

    fn start_with(status: serve::Report) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Config::new(dir.path().join("state"))).unwrap();
        let metrics = Arc::new(Metrics::new().unwrap());
        let reload = Arc::new(Mutex::new(Ok(())));
        let ready = Arc::new(Mutex::new(Ok(())));
        let answer = |state: &Answer| -> serve::Check {
            let state = Arc::clone(state);
            Arc::new(move || state.lock().unwrap().clone())
        };
        let context = Context {
            store: store.reader(),
            metrics: Arc::clone(&metrics),
            status,
            targets: Arc::new(|| json!([{"pid": 100, "service": "shop\u{1b}[2J", "runtime": null}])),
            ready: answer(&ready),
            reload: answer(&reload),
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

    fn add(&self, record: RequestRecord, profile: bool) {
        self.metrics.observe(&record);
        let profile = profile.then(|| Profile::default().encode());
        assert!(self.store.sender().try_send(Entry { record, sampled_cpu_ns: Some(10), profile }));
        self.store.flush();
    }

    fn options(&self) -> ClientOptions {
        ClientOptions { url: format!("http://{}", self.address), ..ClientOptions::default() }
    }

    /// Sends this head as it is; the status, the head and the body of the answer.
    fn raw(&self, head: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let head = format!("{}\r\nconnection: close\r\n\r\n", head.replace('\n', "\r\n"));
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    fn get(&self, path: &str) -> (u16, String, String) {
        self.raw(&format!("GET {path} HTTP/1.1\nhost: {}", self.address))
    }

    fn json(&self, path: &str) -> Value {
        let (status, _, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    fn error(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.get(path);
        (status, code(&body))
    }
}

fn code(body: &str) -> String {
    let error: Value = serde_json::from_str(body).unwrap();
    assert!(!error["error"]["message"].as_str().unwrap().is_empty());
    error["error"]["code"].as_str().unwrap().to_owned()
}

fn record(n: u64) -> RequestRecord {
    let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap();
    RequestRecord {
        id: format!("{n:024x}"),
        pid: 100,
        tid: 101,
        service: "shop".into(),
        method: "GET".into(),
        path: format!("/orders/{n}"),
        route: "/orders/{id}".into(),
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

#[test]
fn requests_are_listed_filtered_and_paged() {
    let daemon = Daemon::start();
    for n in 1..=5 {
        daemon.add(record(n), false);
    }
    let ids = |answer: &Value| -> Vec<u64> {
        let rows = answer["requests"].as_array().unwrap();
        rows.iter().map(|r| u64::from_str_radix(r["id"].as_str().unwrap(), 16).unwrap()).collect()
    };
    assert_eq!(ids(&daemon.json("/api/v1/requests")), [5, 4, 3, 2, 1]);
    let first = daemon.json("/api/v1/requests?sort=-duration&limit=2");
    assert_eq!(ids(&first), [5, 4]);
    let cursor = first["next"].as_str().unwrap();
    let last = daemon.json(&format!("/api/v1/requests?sort=-duration&limit=3&cursor={cursor}"));
    assert_eq!((ids(&last), &last["next"]), (vec![3, 2, 1], &Value::Null));
    let slow =
        daemon.json("/api/v1/requests?min_duration=80ms&since=5m&route=%2Forders%2F%7Bid%7D&status=2xx");
    assert_eq!(ids(&slow), [5, 4]);
    assert_eq!(ids(&daemon.json("/api/v1/requests?since=1s")), [0; 0]);

    let mut expected = serde_json::to_value(record(3)).unwrap();
    let mut one = daemon.json("/api/v1/requests/000000000000000000000003");
    // The two records were made at different moments.
    assert!(one["start"].as_str().unwrap().ends_with('Z'));
    (one["start"], expected["start"]) = (Value::Null, Value::Null);
    assert_eq!(one, expected);
    assert_eq!(one["on_cpu_ns"], Value::Null);
}

#[test]
fn routes_targets_and_status_have_the_shape_of_the_contract() {
    let daemon = Daemon::start();
    for n in 1..=4 {
        daemon.add(RequestRecord { status: Some(if n == 1 { 500 } else { 200 }), ..record(n) }, n == 2);
    }
    let routes = daemon.json("/api/v1/routes");
    let route = &routes["routes"][0];
    assert_eq!((&route["service"], &route["route"]), (&json!("shop"), &json!("/orders/{id}")));
    assert_eq!((&route["count"], &route["errors"]), (&json!(4), &json!(1)));
    assert_eq!((&route["p50_ns"], &route["p99_ns"]), (&json!(40_000_000), &json!(80_000_000)));
    assert_eq!((&route["on_cpu_ns"], &route["off_cpu_ns"]), (&Value::Null, &Value::Null));
    assert_eq!((&route["profiles"], &routes["next"]), (&json!(1), &Value::Null));
    assert_eq!(daemon.json("/api/v1/targets")["targets"][0]["pid"], 100);
    let status = daemon.json("/api/v1/status");
    assert_eq!((&status["version"], &status["ready"]), (&json!("0.0.0"), &json!(true)));
    assert_eq!((&status["store"]["state"], &status["store"]["written"]), (&json!("ok"), &json!(4)));
    assert_eq!(status["store"]["dropped"]["queue_full"], 0);
}

#[test]
fn bad_questions_get_an_error_that_says_what_is_wrong() {
    let daemon = Daemon::start();
    daemon.add(record(1), false);
    for (path, status, code) in [
        ("/nothing", 404, "not_found"),
        ("/api/v1/requests/..%2Fx", 400, "invalid_id"),
        ("/api/v1/requests/%00", 400, "invalid_id"),
        ("/api/v1/requests/%ff", 400, "invalid_id"),
        ("/api/v1/requests/0000000000000000000000AB", 400, "invalid_id"),
        ("/api/v1/requests/0000000000000000000000ff", 404, "not_found"),
        ("/api/v1/requests/..%2Fx/profile", 400, "invalid_id"),
        ("/api/v1/requests?min_duraton=1s", 400, "unknown_parameter"),
        ("/api/v1/requests?cursor=1234", 400, "invalid_cursor"),
        ("/api/v1/requests?limit=100000", 400, "invalid_parameter"),
        ("/api/v1/requests?since=soon", 400, "invalid_parameter"),
        ("/api/v1/status?x=1", 400, "unknown_parameter"),
        ("/api/v1/profile?format=docx", 400, "unknown_format"),
        ("/api/v1/profile?format=pstats", 400, "format_unavailable"),
        ("/api/v1/profile?view=offcpu", 409, "view_unavailable"),
        ("/api/v1/requests/000000000000000000000001/profile?view=offcpu", 409, "view_unavailable"),
    ] {
        assert_eq!(daemon.error(path), (status, code.to_owned()), "{path}");
    }
    let (status, _, body) =
        daemon.raw(&format!("DELETE /api/v1/requests HTTP/1.1\nhost: {}", daemon.address));
    assert_eq!((status, code(&body).as_str()), (405, "method_not_allowed"));
}

#[test]
fn strangers_are_kept_out() {
    let daemon = Daemon::start();
    let (status, _, body) = daemon.raw("GET /api/v1/requests HTTP/1.1\nhost: rebound.example");
    assert_eq!((status, code(&body).as_str()), (400, "host_not_allowed"));
    let absolute = format!("GET http://rebound.example/ HTTP/1.1\nhost: {}", daemon.address);
    assert_eq!(code(&daemon.raw(&absolute).2), "host_not_allowed");
    let post = format!("POST /-/reload HTTP/1.1\nhost: {}", daemon.address);
    let forged = format!("{post}\norigin: http://evil.example\ncontent-length: 0");
    assert_eq!(code(&daemon.raw(&forged).2), "origin_not_allowed");
    assert_eq!(daemon.raw(&format!("{post}\ncontent-length: 1000000")).0, 413);

    let (_, head, _) = daemon.get("/api/v1/requests");
    for header in [
        "content-security-policy: default-src 'none';",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
    ] {
        assert!(head.contains(header), "{header} in {head}");
    }
    assert!(!head.contains("access-control-allow"));
}

#[test]
fn health_readiness_and_reload() {
    let daemon = Daemon::start();
    assert_eq!(daemon.get("/-/healthy").0, 200);
    assert_eq!(daemon.get("/-/ready").0, 200);
    *daemon.ready.lock().unwrap() = Err("no probe is attached".into());
    let (status, _, body) = daemon.get("/-/ready");
    assert_eq!((status, code(&body).as_str()), (503, "not_ready"));
    assert!(body.contains("no probe is attached"));
    assert_eq!(daemon.get("/-/healthy").0, 200);

    let reload =
        || daemon.raw(&format!("POST /-/reload HTTP/1.1\nhost: {}\ncontent-length: 0", daemon.address));
    let metric = || {
        let text = daemon.get("/metrics").2;
        let line = text.lines().find(|l| l.starts_with("reqprof_config_last_reload_successful "));
        line.unwrap().split(' ').next_back().unwrap().to_owned()
    };
    assert_eq!((reload().0, metric()), (200, "1".to_owned()));
    *daemon.reload.lock().unwrap() = Err("reqprof.yml:3: unknown key".into());
    let (status, _, body) = reload();
    assert_eq!((status, metric()), (409, "0".to_owned()));
    assert!(body.contains("reqprof.yml:3"));
    assert_eq!(daemon.get("/-/reload").0, 405);
}

#[test]
fn the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline() {
    let daemon = Daemon::start();
    let (status, head, html) = daemon.get("/");
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/html") && head.contains("script-src 'self'"));
    assert!(!head.contains("unsafe-inline"));
    for forbidden in ["http://", "https://", "onclick=", "style=", "<style", "javascript:"] {
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    let script = daemon.get("/app.js").2;
    for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "https://"] {
        assert!(!script.contains(forbidden), "{forbidden}");
    }
    assert_eq!(daemon.get("/icon.svg").0, 200);
    assert_eq!(daemon.get("/style.css").0, 200);
}

#[test]
fn too_many_questions_at_once_are_refused_and_health_is_not() {
    let (release, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let daemon = Daemon::start_with(Arc::new(move || {
        // Ends when the sender is dropped.
        let _ = gate.lock().unwrap().recv();
        json!({})
    }));
    let (statuses, answers) = mpsc::channel();
    // Nobody is answered but those who are refused: the others hold their slots.
    for _ in 0..65 {
        let statuses = statuses.clone();
        let mut stream = TcpStream::connect(daemon.address).unwrap();
        write!(stream, "GET /api/v1/status HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .unwrap();
        std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).unwrap();
            statuses.send(line.split(' ').nth(1).unwrap().to_owned()).unwrap();
        });
    }
    assert_eq!(answers.recv().unwrap(), "429");
    assert_eq!(daemon.get("/-/healthy").0, 200);
    drop(release);
    for _ in 0..64 {
        assert_eq!(answers.recv().unwrap(), "200");
    }
}

/// Fills every family, with labels that need escaping.
fn fill(daemon: &Daemon) {
    let trace_id = Some("0af7651916cd43dd8448eb211c80319c".to_owned());
    daemon.add(RequestRecord { trace_id, ..record(1) }, false);
    daemon.add(RequestRecord { duration_ns: 60_000_000_000, method: "BREW".into(), ..record(2) }, false);
    let route = "/a\"b\\c\nd".into();
    daemon.add(RequestRecord { status: None, outcome: Outcome::Exit, route, ..record(3) }, false);
    let m = &daemon.metrics;
    m.set_samples(1_000);
    m.set_samples_unattributed("idle", 30);
    m.set_events_lost("ring", "full", 2);
    m.set_unwind_errors("python", "truncated", 1);
    m.set_map("ACTIVE", 10, 1_024);
    m.set_probe_seconds("sampler", 0.25);
    m.set_sample_rate(99.0);
}

#[test]
fn promtool_finds_nothing_wrong_with_the_metrics() {
    let daemon = Daemon::start();
    fill(&daemon);
    let (status, head, text) = daemon.get("/metrics");
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/plain; version=0.0.4"));
    let duration = |suffix: &str, method: &str, route: &str, status: &str, le: &str, n: u32| {
        format!(
            "http_server_request_duration_seconds_{suffix}{{service_name=\"shop\",http_request_method=\"{method}\",\
             http_route=\"{route}\",http_response_status_code=\"{status}\"{le}}} {n}"
        )
    };
    for line in [
        duration("bucket", "GET", "/orders/{id}", "200", ",le=\"0.01\"", 0),
        // A boundary belongs to its bucket: this request took 20 ms, the next one a minute.
        duration("bucket", "GET", "/orders/{id}", "200", ",le=\"0.025\"", 1),
        duration("bucket", "_OTHER", "/orders/{id}", "200", ",le=\"10\"", 0),
        duration("bucket", "_OTHER", "/orders/{id}", "200", ",le=\"+Inf\"", 1),
        duration("count", "GET", r#"/a\"b\\c\nd"#, "", "", 1),
        r#"reqprof_requests_total{outcome="complete"} 2"#.to_owned(),
        r#"reqprof_requests_total{outcome="exit"} 1"#.to_owned(),
        "reqprof_samples_total 1000".to_owned(),
        r#"reqprof_samples_unattributed_total{reason="idle"} 30"#.to_owned(),
        r#"reqprof_events_lost_total{stage="ring",reason="full"} 2"#.to_owned(),
        r#"reqprof_unwind_errors_total{kind="python",reason="truncated"} 1"#.to_owned(),
        r#"reqprof_map_entries{map="ACTIVE"} 10"#.to_owned(),
        r#"reqprof_map_capacity{map="ACTIVE"} 1024"#.to_owned(),
        r#"reqprof_store_dropped_total{reason="disk_full"} 0"#.to_owned(),
        r#"reqprof_probe_seconds_total{probe="sampler"} 0.25"#.to_owned(),
        "reqprof_effective_sample_rate_hertz 99".to_owned(),
        format!("reqprof_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    assert!(text.lines().any(|l| l.starts_with("process_resident_memory_bytes ")));

    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match promtool.spawn() {
        Ok(child) => child,
        Err(e) => {
            println!(
                "SKIPPED promtool_finds_nothing_wrong_with_the_metrics: promtool (Debian's package prometheus) does not run: {e}"
            );
            return;
        }
    };
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn openmetrics_carries_exemplars() {
    let daemon = Daemon::start();
    fill(&daemon);
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2";
    let head = format!("GET /metrics HTTP/1.1\nhost: {}\naccept: {accept}", daemon.address);
    let (_, head, text) = daemon.raw(&head);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"));
    assert!(text.ends_with("\n# EOF\n"));
    assert!(text.contains("# TYPE reqprof_requests counter\n"));
    assert!(text.contains("\nreqprof_requests_total{outcome=\"complete\"} 2.0\n"));
    let (_, exemplar) = text
        .lines()
        .filter(|l| l.contains("\"GET\"") && l.contains("le=\"0.025\""))
        .find_map(|l| l.split_once(" 1 # "))
        .unwrap_or_else(|| panic!("no exemplar in {text}"));
    let expected =
        r#"{trace_id="0af7651916cd43dd8448eb211c80319c",request_id="000000000000000000000001"} 0.02 "#;
    assert!(exemplar.starts_with(expected), "{exemplar}");
    let beyond = text.lines().find(|l| l.contains("_OTHER") && l.contains("le=\"+Inf\"")).unwrap();
    assert!(beyond.contains(r#" 1 # {request_id="000000000000000000000002"} 60.0 "#), "{beyond}");
}

#[test]
fn labels_stay_few_whatever_comes() {
    let metrics = Metrics::new().unwrap();
    let mut hostile = record(1);
    for n in 0..1_000 {
        hostile.route = format!("/{n}");
        metrics.observe(&hostile);
    }
    for n in 0..1_000 {
        hostile.service = format!("service-{n}");
        metrics.observe(&hostile);
    }
    let text = metrics.encode(serve::metrics::Encoding::Prometheus, None);
    let count = |needle: &str| {
        text.lines().filter(|l| l.contains("duration_seconds_count{") && l.contains(needle)).count()
    };
    // 200 routes and _OTHER.
    assert_eq!(count("service_name=\"shop\""), 201);
    // 99 more services, one route each.
    assert_eq!(count("service_name=\"service-"), 99);
    assert_eq!(count("service_name=\"_OTHER\""), 1);
    // 800 routes and 901 services too many.
    assert!(text.lines().any(|l| l == "reqprof_routes_overflow_total 1701"));
}

/// A route that the router could not name any more, before any limit of labels.
#[test]
fn routes_beyond_the_routers_bound_are_counted() {
    let metrics = Metrics::new().unwrap();
    for route in ["/named", "_OTHER", "_OTHER"] {
        metrics.observe(&RequestRecord { route: route.into(), ..record(1) });
    }
    let text = metrics.encode(serve::metrics::Encoding::Prometheus, None);
    assert!(text.lines().any(|l| l == "reqprof_routes_overflow_total 2"), "{text}");
}

#[test]
fn the_client_shows_tables_and_passes_json_on() {
    let daemon = Daemon::start();
    daemon.add(RequestRecord { path: "/\u{1b}]0;owned\u{7}".into(), ..record(1) }, false);
    let options = daemon.options();
    let text = |bytes: Result<Vec<u8>, ClientError>| String::from_utf8(bytes.unwrap()).unwrap();
    let query = RequestsQuery { since: Some("5m".into()), ..RequestsQuery::default() };
    let table = text(client::requests(&options, &query));
    assert!(table.starts_with("start "), "{table}");
    assert!(table.contains(r"/\u{1b}]0;owned\u{7}") && !table.contains('\u{1b}'), "{table}");
    assert!(text(client::routes(&options, &query)).contains("/orders/{id}      1    0  20.0 ms"));
    assert!(text(client::targets(&options)).contains(r"shop\u{1b}[2J"));
    let id = "000000000000000000000001";
    assert!(text(client::show(&options, id, "wall")).contains("duration        20.0 ms"));
    let json = ClientOptions { json: true, ..daemon.options() };
    let record: Value = serde_json::from_slice(&client::show(&json, id, "wall").unwrap()).unwrap();
    assert_eq!(record["id"], id);
    let bad = RequestsQuery { status: Some("ok".into()), ..RequestsQuery::default() };
    let error = client::requests(&options, &bad).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("status=\"ok\""), "{error}");
    assert!(!client::show(&options, "0000000000000000000000ff", "wall").unwrap_err().is_usage());
}
