//! The HTTP API, the metrics and the client, on a real socket and a real store, without a kernel.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use profiler_daemon::cli::client::{self, ClientError, ClientOptions, RequestsQuery};
use profiler_daemon::profile::{Builder, Frame, FrameKind};
use profiler_daemon::record::{Outcome, RequestRecord};
use profiler_daemon::serve::{self, Metrics};
use profiler_daemon::store::Entry;
use serde_json::{Value, json};
use support::served::{Served as Daemon, code, record};

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
fn a_merged_profile_counts_the_requests_that_no_sample_hit() {
    let daemon = Daemon::start();
    for n in 1..=10 {
        daemon.add(RequestRecord { duration_ns: 1_000_000, samples: u64::from(n == 4), ..record(n) }, n == 4);
    }
    let (status, head, body) = daemon.get("/api/v1/profile?route=%2Forders%2F%7Bid%7D");
    assert_eq!(status, 200, "{body}");
    for line in ["reqprof-requests: 10", "reqprof-merged: 1", "reqprof-truncated: false"] {
        assert!(head.contains(line), "{head}");
    }
    let tree: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&tree["requests"], &tree["requests_with_samples"]), (&json!(10), &json!(1)));
    assert_eq!(
        (&tree["total_ns"], &tree["name"]),
        (&json!(10_000_000), &json!("/orders/{id} - 10 requests, 1 with samples"))
    );
    let (status, _, body) = daemon.get("/api/v1/profile?route=%2Forders%2F%7Bid%7D&until=1s&min_duration=1ms&pid=100&since=5m&service=shop&method=GET&status=2xx&max_duration=1ms&format=text");
    assert_eq!(status, 200, "{body}");
    assert!(
        body.contains("10.0 ms in 10 requests, 1.00 ms each on average; 1 of them with samples"),
        "{body}"
    );
    let (status, _, body) = daemon.get("/api/v1/profile?service=other");
    assert_eq!((status, code(&body)), (404, "not_found".to_owned()));
}

#[test]
fn cheap_answers_do_not_wait_for_merged_profiles() {
    let daemon = Daemon::start();
    for n in 1..=200 {
        let frames: Vec<_> = (0..200).map(|i| (format!("f{n}_{i}"), i)).collect();
        let mut builder = Builder::default();
        for (name, line) in frames {
            let (name, file) = (Arc::from(name), Arc::from("/srv/shop/views.py"));
            let frame = Frame { name, file, line, first_line: 1, kind: FrameKind::Python };
            builder.add(&[Arc::new(frame)], 1_000_000);
        }
        let record = RequestRecord { samples: 200, ..record(n) };
        assert!(daemon.store.sender().try_send(Entry {
            sampled_cpu_ns: Some(200_000_000),
            profile: Some(builder.finish(record.duration_ns).encode()),
            record,
        }));
    }
    daemon.store.flush();
    let merges = 8;
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for n in 0..merges {
            let (daemon, done) = (&daemon, &done);
            scope.spawn(move || {
                // Each a question of its own.
                let (status, _, body) =
                    daemon.get(&format!("/api/v1/profile?format=tree&min_duration={n}ns"));
                done.fetch_add(1, Ordering::Relaxed);
                assert_eq!(status, 200, "{body}");
            });
        }
        // All merges have been asked for when the first of them is there; they are computed one by one.
        while done.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        daemon.json("/api/v1/requests?limit=1");
        let done = done.load(Ordering::Relaxed);
        assert!(done <= 3, "the list was answered after {done} merges");
    });
}

#[test]
fn bad_questions_get_an_error_that_says_what_is_wrong() {
    let daemon = Daemon::start();
    daemon.add(record(1), false);
    for (path, status, code) in [
        ("/nothing", 404, "not_found"),
        ("/api/v1/requests/..%2Fx", 400, "invalid_id"),
        ("/api/v1/requests/../x", 400, "invalid_id"),
        ("/api/v1/requests/../x/profile", 400, "invalid_id"),
        ("/api/v1/requests/", 400, "invalid_id"),
        ("/api/v1/requests/000000000000000000000001/x", 404, "not_found"),
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
        ("/api/v1/diff?a=x&b=y", 404, "endpoint_unavailable"),
        ("/api/v1/captures", 404, "endpoint_unavailable"),
        ("/api/v1/captures/1", 404, "endpoint_unavailable"),
        ("/api/v1/profile?view=offcpu", 409, "view_unavailable"),
        ("/api/v1/requests/000000000000000000000001/profile?view=offcpu", 409, "view_unavailable"),
    ] {
        assert_eq!(daemon.error(path), (status, code.to_owned()), "{path}");
    }
    // An id is named as it was given, however it was written, and no more of it than a person needs.
    for (path, named) in [
        ("../x", "\"../x\""),
        ("../x/profile", "\"../x\""),
        ("..%2Fx", "\"../x\""),
        ("..%2Fx/profile", "\"../x\""),
        ("%ff/profile", "\"%ff\""),
        (&"z".repeat(5_000), &format!("\"{}\"…", "z".repeat(48))),
    ] {
        let (_, _, body) = daemon.get(&format!("/api/v1/requests/{path}"));
        let body: Value = serde_json::from_str(&body).unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.starts_with(&format!("{named} is not a request id")), "{path}: {message}");
    }
    let (status, _, body) =
        daemon.raw(&format!("DELETE /api/v1/requests HTTP/1.1\nhost: {}", daemon.address));
    assert_eq!((status, code(&body).as_str()), (405, "method_not_allowed"));
}

#[test]
fn a_request_without_samples_has_a_tree_and_one_without_a_profile_a_reason() {
    let daemon = Daemon::start();
    daemon.add(RequestRecord { samples: 0, ..record(1) }, false);
    daemon.add(RequestRecord { note: Some(profiler_daemon::record::TOO_SHORT.into()), ..record(2) }, false);
    daemon.add(record(3), false);
    let path = |n: u64| format!("/api/v1/requests/{n:024x}/profile");
    let tree = daemon.json(&path(1));
    assert_eq!((&tree["duration_ns"], &tree["samples"]), (&json!(20_000_000), &json!(0)));
    let only = &tree["children"][0];
    assert_eq!((&only["name"], &only["self_ns"]), (&json!("[unsampled]"), &json!(20_000_000)));
    for (n, reason) in [(2, "was shorter than min_duration"), (3, "or the store had no room")] {
        let (status, _, body) = daemon.get(&path(n));
        assert_eq!((status, code(&body).as_str()), (404, "not_found"));
        assert!(body.contains(reason), "{body}");
    }
    let text = client::show(&daemon.options(), &format!("{:024x}", 1), "wall").unwrap();
    assert!(String::from_utf8(text).unwrap().contains("[unsampled]"));
}

#[test]
fn requests_that_asked_for_nothing_known_are_a_group_of_their_own() {
    let daemon = Daemon::start();
    let unseen = |n| RequestRecord {
        method: None,
        path: None,
        route: None,
        outcome: Outcome::Incomplete,
        ..record(n)
    };
    daemon.add(record(1), false);
    daemon.add(unseen(2), false);
    daemon.add(unseen(3), false);
    let one = daemon.json(&format!("/api/v1/requests/{:024x}", 2));
    assert_eq!((&one["method"], &one["path"], &one["route"]), (&Value::Null, &Value::Null, &Value::Null));
    let routes = daemon.json("/api/v1/routes");
    assert_eq!((&routes["routes"][0]["route"], &routes["routes"][0]["count"]), (&Value::Null, &json!(2)));
    assert_eq!((&routes["routes"][0]["errors"], &routes["routes"][1]["errors"]), (&json!(2), &json!(0)));
    let table = client::routes(&daemon.options(), &RequestsQuery::default()).unwrap();
    let table = String::from_utf8(table).unwrap();
    assert!(table.lines().any(|line| line.split_whitespace().take(3).eq(["shop", "-", "2"])), "{table}");
    let series = "http_request_method=\"_OTHER\",http_route=\"_OTHER\",http_response_status_code=\"200\"";
    let count = format!("duration_seconds_count{{service_name=\"shop\",{series}}} 2");
    assert!(daemon.get("/metrics").2.contains(&count));
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
    let (status, head, body) = daemon.raw(&format!("{post}\ncontent-length: 1000000"));
    assert_eq!((status, code(&body).as_str()), (413, "body_too_large"));
    assert!(head.contains("content-type: application/json"), "{head}");

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

/// An alert asks whether the configuration in the file is the one in force; a recording has none to reload.
#[test]
fn a_recording_refuses_to_reload_and_has_failed_at_nothing() {
    let recording = Daemon::of_recording();
    let post = format!("POST /-/reload HTTP/1.1\nhost: {}\ncontent-length: 0", recording.address);
    let (status, _, body) = recording.raw(&post);
    assert_eq!((status, code(&body).as_str()), (409, "reload_failed"));
    assert!(body.contains("a recording keeps its settings"), "{body}");
    let metrics = recording.get("/metrics").2;
    assert!(metrics.lines().any(|l| l == "reqprof_config_last_reload_successful 1"), "{metrics}");
}

#[test]
fn metrics_are_brought_up_to_date_before_they_are_shown() {
    let daemon = Daemon::start();
    for times in 1..=2 {
        let expected = format!("reqprof_events_lost_total{{stage=\"test\",reason=\"refreshed\"}} {times}");
        let text = daemon.get("/metrics").2;
        assert!(text.lines().any(|l| l == expected), "{text}");
    }
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
    daemon
        .add(RequestRecord { duration_ns: 60_000_000_000, method: Some("BREW".into()), ..record(2) }, false);
    let route = Some("/a\"b\\c\nd".into());
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
        r#"reqprof_requests_total{outcome="upgraded"} 0"#.to_owned(),
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
            support::skip(
                "promtool_finds_nothing_wrong_with_the_metrics",
                format!("promtool (Debian's package prometheus) does not run: {e}"),
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
        hostile.route = Some(format!("/{n}"));
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
        metrics.observe(&RequestRecord { route: Some(route.into()), ..record(1) });
    }
    let text = metrics.encode(serve::metrics::Encoding::Prometheus, None);
    assert!(text.lines().any(|l| l == "reqprof_routes_overflow_total 2"), "{text}");
}

#[test]
fn the_client_shows_tables_and_passes_json_on() {
    let daemon = Daemon::start();
    daemon.add(RequestRecord { path: Some("/\u{1b}]0;owned\u{7}".into()), ..record(1) }, false);
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
