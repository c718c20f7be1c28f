//! The web page, used by a headless Chromium as a person would.
//!
//! In: a server with records made here. Out: what the browser showed. A browser that is not installed is named as
//! skipped.

mod support;

use std::path::Path;
use std::sync::Arc;

use profiler_daemon::profile::{Builder, Frame, FrameKind, Profile};
use profiler_daemon::record::RequestRecord;
use serde_json::{Value, json};
use support::browser::{chromium, node};
use support::served::{Served, record};

const MS: u64 = 1_000_000;

fn profile(duration_ns: u64) -> Profile {
    let frame = |name: &str, line| {
        let (name, file) = (Arc::from(name), Arc::from("/srv/shop/views.py"));
        Arc::new(Frame { name, file, line, first_line: 1, kind: FrameKind::Python })
    };
    let mut builder = Builder::default();
    builder.add(&[frame("order_detail", 12), frame("load", 30)], 10 * MS);
    builder.finish(duration_ns)
}

#[test]
fn the_page_shows_requests_routes_graphs_and_errors() {
    let test = "the_page_shows_requests_routes_graphs_and_errors";
    let served = Served::start();
    // 101 requests are more than a page. The slowest is the third; only that one and the fifth have a profile, which the
    // ninth should have too. Of the eleventh it is not known what it asked for.
    for n in 1..=101 {
        let duration_ns = if n == 3 { 900 * MS } else { n * MS };
        let has = n == 3 || n == 5;
        let mut record = RequestRecord { duration_ns, samples: u64::from(has || n == 9), ..record(n) };
        if n == 11 {
            (record.method, record.path, record.route) = (None, None, None);
        }
        served.put(record, has.then(|| profile(duration_ns)));
    }
    let Some(browser) = chromium(test) else { return };
    let address = format!("http://{}/", served.address);
    let arguments = [browser.as_path(), Path::new(&address)];
    let Some(said) = node(test, &["playwright-core"], include_str!("page/page.js"), &arguments) else {
        return;
    };
    let seen: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(seen["errors"], json!([]));

    let deep = &seen["deep"];
    assert_eq!(deep["title"], "GET /orders/{id} 200");
    assert_eq!(deep["graph"], json!(["GET /orders/{id} 200 - 900.0 ms", "order_detail", "load"]));
    assert_eq!(deep["view"], "CPU time", "what samples show comes first");
    assert_eq!(deep["reloaded"], deep["title"]);
    assert_eq!(deep["closed"], json!([true, "#requests"]));

    // The other view adds what no sample covers, and is still chosen after a reload.
    assert_eq!(seen["wall"]["graph"].as_array().map(Vec::len), Some(4));
    assert_eq!(seen["wall"]["view"], "wall time");

    let unknown = seen["unknown"].as_str().expect("a text");
    assert!(unknown.contains("there is no request 0000000000000000000000ff"), "{unknown}");
    let missed = &seen["missed"];
    assert_eq!(missed["graph"], json!(["GET /orders/{id} 200 - 7.0 ms", "[unsampled]"]));
    assert!(missed["remark"].as_str().is_some_and(|text| text.starts_with("No sample hit")), "{missed}");
    let without = seen["without"].as_str().expect("a text");
    assert!(without.contains("No profile is stored"), "{without}");

    let remark = "What these requests asked for was not seen.";
    assert_eq!(seen["unseen"], json!({"title": "shop –", "remark": remark, "links": 0}));

    // 101 rows are two pages: the server sorts, and what it cannot sort by is no button.
    assert_eq!(seen["sorted"]["first"], "900.0 ms");
    assert_eq!(seen["sorted"]["buttons"], json!(["start", "duration ↓"]));
    assert_eq!(seen["sorted"]["paused"], "paused, because more than one page is shown");
    let all = &seen["sorted"]["all"];
    assert!(all.as_array().is_some_and(|all| all.len() > 5 && all.contains(&json!("path"))), "{all}");

    let route = &seen["route"];
    assert_eq!(route["title"], "shop /orders/{id}");
    // 97 requests had no sample and count all the same.
    // The name goes on after a comma, where the script stops reading: `, 2 with samples`.
    assert_eq!(route["graph"][0], "/orders/{id} - 99 requests");
    assert_eq!(route["link"], "#requests?service=shop&route=%2Forders%2F%7Bid%7D");
    assert_eq!(route["filtered"], json!(["shop", "/orders/{id}"]));

    let bad = seen["bad"].as_str().expect("a text");
    assert!(bad.contains("slower than") && !bad.contains("min_duration"), "{bad}");
    assert_eq!(
        seen["keys"],
        json!([true, true]),
        "Escape closes the details and the row has the focus again"
    );
    assert_eq!(seen["narrow"], json!([390, 390]), "nothing is wider than a phone");
}
