//! The exports, read by the programs they are made for.
//!
//! Each test writes an export of a hand-built profile into a temporary directory and runs a real consumer on it:
//! `go tool pprof`, speedscope's JSON schema and its importer (npm), flame graph readers, a headless Chromium.
//! Expected figures are worked by hand from the profile below. A consumer that is not installed is named as skipped.
//!
//! `REQPROF_TOOLS_DIR` names the directory that has `speedscope`, `ajv` and `playwright-core` in its `node_modules`.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use profiler_daemon::profile::format::{Format, Subject, View, render};
use profiler_daemon::profile::{Builder, Frame, FrameKind, Profile};
use support::browser::{chromium, node, run};

const MS: u64 = 1_000_000;

fn frame(kind: FrameKind, name: &str, file: &str, line: u32, first_line: u32) -> Arc<Frame> {
    Arc::new(Frame { name: Arc::from(name), file: Arc::from(file), line, first_line, kind })
}

/// 120 ms: `order_detail` 100 ms (line 12: 70, line 14: 30), of which `load` 70 ms (own 20, `inflate` 50),
/// `<genexpr>` 25 ms and own 5 ms; the kernel below `get_response` 10 ms; 10 ms without samples.
fn profile() -> Profile {
    let base = "/opt/venv/lib/python3.11/site-packages/django/core/handlers/base.py";
    let respond = |line| frame(FrameKind::Python, "BaseHandler.get_response", base, line, 130);
    let view = |line| frame(FrameKind::Python, "order_detail", "/srv/shop/views.py", line, 10);
    let load = |line| frame(FrameKind::Python, "Order.load", "/srv/shop/models.py", line, 30);
    let inflate = frame(FrameKind::Native, "inflate", "/usr/lib/libz.so.1.2.13", 0, 0);
    let genexpr = frame(FrameKind::Python, "total.<locals>.<genexpr>", "/srv/shop/views.py", 21, 21);
    let kernel = frame(FrameKind::Kernel, "tcp_sendmsg", "", 0, 0);
    let mut builder = Builder::default();
    for _ in 0..5 {
        builder.add(&[respond(140), view(12), load(33), inflate.clone()], 10 * MS);
    }
    for _ in 0..2 {
        builder.add(&[respond(140), view(12), load(31)], 10 * MS);
    }
    builder.add(&[respond(140), view(14), genexpr], 25 * MS);
    builder.add(&[respond(140), view(14)], 5 * MS);
    builder.add(&[respond(141), kernel], 10 * MS);
    builder.finish(120 * MS)
}

fn subject() -> Subject {
    Subject {
        title: "GET /orders/{id} 200 - 120.0 ms".into(),
        service: "shop".into(),
        route: "/orders/{id}".into(),
        method: "GET".into(),
        status: Some(200),
        request_id: Some("0123456789abcdef01234567".into()),
        trace_id: Some("4bf92f3577b34da6a3ce929d0e0e4736".into()),
        start: 1_700_000_000_000_000_000,
        with_samples: None,
    }
}

fn export(directory: &Path, format: Format, view: View) -> PathBuf {
    let path = directory.join(format!("export.{}", format.extension()));
    std::fs::write(&path, render(&profile(), &subject(), format, view, false)).expect("write the export");
    path
}

fn pprof(test: &str, directory: &Path, file: &Path, arguments: &[&str]) -> Option<String> {
    let mut go = Command::new("go");
    go.args(["tool", "pprof"]).args(arguments).arg(file);
    // pprof and go keep settings and caches somewhere; not in the user's home.
    go.env("HOME", directory).env("GOCACHE", directory).env("GOTOOLCHAIN", "local");
    run(test, &mut go).map(|text| squeeze(&text))
}

fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn assert_all(text: &str, expected: &[&str]) {
    for part in expected {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn go_tool_pprof_reads_functions_and_times() {
    let test = "go_tool_pprof_reads_functions_and_times";
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = export(directory.path(), Format::Pprof, View::Wall);
    let arguments = ["-top", "-unit=ms", "-nodefraction=0"];
    let Some(top) = pprof(test, directory.path(), &file, &arguments) else { return };
    // flat, flat %, sum %, cumulative, cumulative %
    assert_all(
        &top,
        &[
            "Type: wall",
            "of 120ms total",
            "50ms 41.67% 41.67% 50ms 41.67% inflate",
            "25ms 20.83% 62.50% 25ms 20.83% total.<locals>.<genexpr>",
            "20ms 16.67% 79.17% 70ms 58.33% Order.load",
            "5ms 4.17% 100% 100ms 83.33% order_detail",
            "110ms 91.67% BaseHandler.get_response",
        ],
    );
    let cpu = pprof(test, directory.path(), &file, &["-top", "-unit=ms", "-sample_index=cpu"]);
    assert_all(&cpu.expect("it ran before"), &["of 110ms total"]);
    let count = pprof(test, directory.path(), &file, &["-top", "-sample_index=samples"]);
    assert_all(&count.expect("it ran before"), &["of 10 total"]);
}

#[test]
fn go_tool_pprof_reads_lines_and_labels() {
    let test = "go_tool_pprof_reads_lines_and_labels";
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = export(directory.path(), Format::Pprof, View::Cpu);
    let arguments = ["-top", "-lines", "-cum", "-unit=ms", "-nodefraction=0"];
    let Some(top) = pprof(test, directory.path(), &file, &arguments) else { return };
    assert_all(
        &top,
        &[
            "Type: cpu",
            "of 110ms total",
            "70ms 63.64% order_detail /srv/shop/views.py:12",
            "30ms 27.27% order_detail /srv/shop/views.py:14",
            "50ms 45.45% Order.load /srv/shop/models.py:33",
            "20ms 18.18% Order.load /srv/shop/models.py:31",
            "100ms 90.91% BaseHandler.get_response /opt/venv/lib/python3.11/site-packages/django/core/handlers/base.py:140",
        ],
    );
    let tags = pprof(test, directory.path(), &file, &["-tags", "-unit=ms"]).expect("it ran before");
    assert_all(
        &tags,
        &[
            "http.route: Total 110.0ms 110.0ms ( 100%): /orders/{id}",
            "http.method: Total 110.0ms 110.0ms ( 100%): GET",
            "http.status: Total 110.0ms 110.0ms ( 100%): 200",
            "request_id: Total 110.0ms 110.0ms ( 100%): 0123456789abcdef01234567",
            "trace_id: Total 110.0ms 110.0ms ( 100%): 4bf92f3577b34da6a3ce929d0e0e4736",
        ],
    );
}

#[test]
fn speedscope_files_obey_their_schema() {
    let test = "speedscope_files_obey_their_schema";
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = export(directory.path(), Format::Speedscope, View::Wall);
    let script = r##"
        const fs = require("fs");
        const Ajv = require("ajv");
        const schema = JSON.parse(fs.readFileSync("node_modules/speedscope/dist/release/file-format-schema.json"));
        const check = new (Ajv.default || Ajv)({ strict: false }).compile(schema);
        const file = JSON.parse(fs.readFileSync(process.argv[1]));
        if (!check(file)) { console.error(check.errors); process.exit(1); }
        file.activeProfileIndex = "none";
        console.log(check(file) ? "accepts anything" : "valid");
    "##;
    let Some(said) = node(test, &["speedscope", "ajv"], script, &[&file]) else { return };
    assert_eq!(said.trim(), "valid");
}

#[test]
fn speedscope_imports_every_format_that_it_knows() {
    let test = "speedscope_imports_every_format_that_it_knows";
    let directory = tempfile::tempdir().expect("temporary directory");
    let files = [Format::Speedscope, Format::Pprof, Format::Folded]
        .map(|format| export(directory.path(), format, View::Wall));
    let Some(browser) = chromium(test) else { return };
    let mut arguments = vec![browser.as_path(), directory.path()];
    arguments.extend(files.iter().map(PathBuf::as_path));
    let script = include_str!("formats/speedscope.js");
    let Some(said) = node(test, &["speedscope", "playwright-core"], script, &arguments) else { return };
    let tables: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    // Total, own time, name; as in the comment on `profile`, sorted by own time.
    let rows = |table: &str, name: &str| -> Vec<String> {
        let rows = tables[table].as_array().expect("a table");
        let found = rows
            .iter()
            .find(|row| row[2].as_str().is_some_and(|text| text.starts_with(name)))
            .unwrap_or_else(|| panic!("no {name} in {tables}"));
        (0..2).map(|i| found[i].as_str().expect("text").to_string()).collect()
    };
    for table in ["export.speedscope.json", "export.pb.gz"] {
        assert_eq!(rows(table, "inflate"), ["50.00ms (42%)", "50.00ms (42%)"], "{table}");
        assert_eq!(rows(table, "Order.load"), ["70.00ms (58%)", "20.00ms (17%)"], "{table}");
        assert_eq!(rows(table, "order_detail"), ["100.00ms (83%)", "5.00ms (4.2%)"], "{table}");
        assert_eq!(rows(table, "total.<locals>.<genexpr>"), ["25.00ms (21%)", "25.00ms (21%)"], "{table}");
        assert_eq!(rows(table, "[unsampled]"), ["10.00ms (8.3%)", "10.00ms (8.3%)"], "{table}");
    }
    let folded = "export.folded";
    assert_eq!(rows(folded, "inflate (libz.so.1.2.13)"), ["50,000 (42%)", "50,000 (42%)"]);
    assert_eq!(rows(folded, "Order.load (/srv/shop/models.py:30)"), ["70,000 (58%)", "20,000 (17%)"]);
    assert_eq!(rows(folded, "tcp_sendmsg_[k]"), ["10,000 (8.3%)", "10,000 (8.3%)"]);
}

#[test]
fn rows_outside_the_application_are_folded_in_the_flame_graph() {
    let test = "rows_outside_the_application_are_folded_in_the_flame_graph";
    let directory = tempfile::tempdir().expect("temporary directory");
    let library =
        |name: &str| frame(FrameKind::Python, name, "/v/lib/python3.11/site-packages/gunicorn/x.py", 1, 1);
    let app = |name: &str| frame(FrameKind::Python, name, "/srv/shop/views.py", 1, 1);
    let mut outer: Vec<_> = ["run", "serve", "handle", "handle", "wsgi"].map(library).into();
    let mut builder = Builder::default();
    builder.add(&[outer.clone(), vec![library("log")]].concat(), 10 * MS);
    outer.push(app("view"));
    builder.add(&[outer, vec![library("render"), app("tag")]].concat(), 30 * MS);
    let path = directory.path().join("deep.svg");
    std::fs::write(&path, render(&builder.finish(50 * MS), &subject(), Format::Svg, View::Wall, false))
        .expect("write the graph");
    let Some(browser) = chromium(test) else { return };
    let Some(said) = node(test, &["playwright-core"], include_str!("formats/outer.js"), &[&browser, &path])
    else {
        return;
    };
    let seen: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let title = "GET /orders/{id} 200 - 120.0 ms";
    // Name and row. What leads to the application is hidden, what is beside it is not.
    let folded = serde_json::json!([
        [title, 0],
        ["view", 1],
        ["render", 2],
        ["tag", 3],
        ["log", 1],
        ["[unsampled]", 1]
    ]);
    assert_eq!(seen["start"], folded);
    assert_eq!(seen["control"], "Show 5 outer rows");
    assert_eq!(seen["walked"], "tag", "down from the root, over the hidden rows");
    assert_eq!(
        seen["shown"],
        serde_json::json!([
            [title, 0],
            ["run", 1],
            ["serve", 2],
            ["handle", 3],
            ["handle", 4],
            ["wsgi", 5],
            ["view", 6],
            ["render", 7],
            ["tag", 8],
            ["log", 6],
            ["[unsampled]", 1]
        ])
    );
    assert_eq!(seen["again"], folded);
}

#[test]
fn the_flame_graph_works_from_disk_and_embedded() {
    let test = "the_flame_graph_works_from_disk_and_embedded";
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = export(directory.path(), Format::Svg, View::Wall);
    let Some(browser) = chromium(test) else { return };
    let script = include_str!("formats/svg.js");
    let Some(said) = node(test, &["playwright-core"], script, &[&browser, &file]) else { return };
    let seen: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(seen["errors"], serde_json::json!([]));
    // Widths are percent of the window, of which 98 are for the graph: 98 * 100 / 120 = 81.7 and so on.
    let start = serde_json::json!([
        ["GET /orders/{id} 200 - 120.0 ms", "98.0"],
        ["BaseHandler.get_response", "89.8"],
        ["order_detail", "81.7"],
        ["Order.load", "57.2"],
        ["inflate", "40.8"],
        ["total.<locals>.<genexpr>", "20.4"],
        ["tcp_sendmsg", "8.2"],
        ["[unsampled]", "8.2"],
    ]);
    for way in ["disk", "embedded"] {
        let seen = &seen[way];
        assert_eq!(seen["start"], start, "{way}");
        assert_eq!(seen["reset"], start, "{way}");
        assert_eq!(
            seen["zoomed"],
            serde_json::json!([
                ["GET /orders/{id} 200 - 120.0 ms", "98.0"],
                ["BaseHandler.get_response", "98.0"],
                ["order_detail", "98.0"],
                ["Order.load", "98.0"],
                ["inflate", "70.0"],
            ]),
            "{way}"
        );
        assert_eq!(
            seen["tip"],
            serde_json::json!([
                "Order.load",
                "/srv/shop/models.py:33",
                "total  70.0 ms · 58.3 % · 7 samples",
                "self  20.0 ms · 16.7 %",
                "lines  33: 50.0 ms,  31: 20.0 ms",
            ]),
            "{way}"
        );
        // `order_detail` and, inside it, `Order.load`: the outer one counts.
        assert_eq!(seen["search"], "83.3 % · 100.0 ms · 2 frames", "{way}");
        assert_eq!(seen["hits"], 2, "{way}");
        assert_eq!(seen["regex"], "83.3 % · 100.0 ms · 1 frame", "{way}");
        assert_eq!(seen["badRegex"], "not a regular expression", "{way}");
        assert_eq!(seen["cleared"], serde_json::json!(["", ""]), "{way}");
        assert_eq!(
            seen["keyboard"],
            serde_json::json!([
                ["GET /orders/{id} 200 - 120.0 ms", "98.0"],
                ["BaseHandler.get_response", "98.0"],
                ["tcp_sendmsg", "98.0"],
            ]),
            "{way}"
        );
        // Four rows of 20 px below the root.
        assert_eq!(seen["flipped"], 80, "{way}");
    }
}
