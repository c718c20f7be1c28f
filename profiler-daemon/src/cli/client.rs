//! The subcommands that ask a running daemon: `requests`, `routes`, `targets`, `show`, `export`.
//!
//! In: plain arguments. Out: aligned tables, or the daemon's JSON as it came, as bytes for standard output. Words that
//! come from targets are shown without their control characters, or a path could move the cursor of the terminal.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::table::{duration, printable, table, text};
use crate::profile::format::{Format, planned};
use crate::store::RequestId;

/// The server gives up after half of it.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Larger than any answer of the daemon, small enough to hold in memory.
const MAX_ANSWER: u64 = 256 << 20;

/// What all these commands have in common.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    pub url: String,
    /// The daemon's JSON instead of a table.
    pub json: bool,
    /// ANSI colours in `show`; the caller knows about terminals and `NO_COLOR`.
    pub color: bool,
}

/// Filters as the user wrote them; the daemon checks them, so that there is one grammar.
#[derive(Clone, Debug, Default)]
pub struct RequestsQuery {
    pub service: Option<String>,
    pub route: Option<String>,
    pub method: Option<String>,
    pub status: Option<String>,
    pub pid: Option<u32>,
    pub min_duration: Option<String>,
    pub max_duration: Option<String>,
    pub since: Option<String>,
    pub until: Option<String>,
    /// Not for `routes`.
    pub sort: Option<String>,
    /// Not for `routes`.
    pub limit: Option<u32>,
    /// Not for `routes`.
    pub cursor: Option<String>,
}

impl RequestsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let Self {
            service,
            route,
            method,
            status,
            pid,
            min_duration,
            max_duration,
            since,
            until,
            sort,
            limit,
            cursor,
        } = self;
        let all = [
            ("service", service.clone()),
            ("route", route.clone()),
            ("method", method.clone()),
            ("status", status.clone()),
            ("pid", pid.map(|n| n.to_string())),
            ("min_duration", min_duration.clone()),
            ("max_duration", max_duration.clone()),
            ("since", since.clone()),
            ("until", until.clone()),
            ("sort", sort.clone()),
            ("limit", limit.map(|n| n.to_string())),
            ("cursor", cursor.clone()),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// Whose profile to export.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in a run of the program")]
pub enum ExportSource {
    Request(String),
    /// The merged profile of all requests that match, usually by route.
    Matching(RequestsQuery),
}

/// What `export` writes and where.
#[derive(Clone, Debug)]
pub struct ExportQuery {
    pub source: ExportSource,
    /// `None`: by the extension of `output`.
    pub format: Option<String>,
    pub view: &'static str,
    /// `-`: standard output.
    pub output: PathBuf,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no daemon answers at {url} ({reason}); start one with `reqprof daemon`, or name another with --url"
    )]
    NotRunning { url: String, reason: String },
    #[error("{url}: {source}")]
    Http { url: String, source: Box<ureq::Error> },
    /// The daemon said no; its own words.
    #[error("{message}")]
    Refused { status: u16, code: String, message: String },
    #[error("{url} answered something that is not a reqprof daemon's answer: {reason}")]
    Unexpected { url: String, reason: String },
    #[error("{0:?} is not a request id: 24 lower-case hexadecimal digits")]
    InvalidId(String),
    #[error("the format cannot be told from the file name; name it with -f")]
    UnknownFormat,
    #[error("the format `{0}` is planned, not in this version")]
    PlannedFormat(&'static str),
    #[error("{path}: {source}")]
    Write { path: PathBuf, source: io::Error },
}

impl ClientError {
    /// Whether the user's arguments are at fault (exit code 2) rather than the circumstances.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::InvalidId(_) | Self::UnknownFormat | Self::PlannedFormat(_) => true,
            Self::Refused { status, .. } => *status == 400,
            _ => false,
        }
    }
}

/// The table of requests; one line below it tells how to see more.
pub fn requests(options: &ClientOptions, query: &RequestsQuery) -> Result<Vec<u8>, ClientError> {
    listing(options, "/api/v1/requests", &query.pairs(), |answer| {
        let rows = rows(answer, "requests")?;
        let cells = rows.iter().map(|r| {
            vec![
                text(r, "start").get(..19).map_or_else(|| text(r, "start"), |t| t.replace('T', " ")),
                text(r, "id"),
                text(r, "service"),
                text(r, "method"),
                text(r, "path"),
                text(r, "route"),
                text(r, "status"),
                duration(r.get("duration_ns")),
                text(r, "samples"),
                text(r, "outcome"),
            ]
        });
        let headers =
            ["start", "id", "service", "method", "path", "route", "status", "duration", "samples", "outcome"];
        let mut out = table(&headers, &cells.collect::<Vec<_>>());
        if let Some(cursor) = answer.get("next").and_then(Value::as_str) {
            out.push_str(&format!("more: --cursor {}\n", printable(cursor)));
        }
        Some(out)
    })
}

/// The table of routes.
pub fn routes(options: &ClientOptions, query: &RequestsQuery) -> Result<Vec<u8>, ClientError> {
    listing(options, "/api/v1/routes", &query.pairs(), routes_table)
}

/// `answer`: the object that `/api/v1/routes` returns.
fn routes_table(answer: &Value) -> Option<String> {
    let cells = rows(answer, "routes")?.iter().map(|r| {
        vec![
            text(r, "service"),
            text(r, "route"),
            text(r, "count"),
            text(r, "errors"),
            duration(r.get("p50_ns")),
            duration(r.get("p95_ns")),
            duration(r.get("p99_ns")),
            duration(r.get("total_ns")),
            duration(r.get("sampled_cpu_ns")),
        ]
    });
    let headers = ["service", "route", "count", "err", "p50", "p95", "p99", "total", "cpu (sampled)"];
    Some(table(&headers, &cells.collect::<Vec<_>>()))
}

/// The table of watched processes, then what does not work on them.
pub fn targets(options: &ClientOptions) -> Result<Vec<u8>, ClientError> {
    listing(options, "/api/v1/targets", &[], targets_table)
}

/// The object that `/api/v1/targets` returns.
pub fn target_list(options: &ClientOptions) -> Result<Value, ClientError> {
    parse(options, &fetch(options, "/api/v1/targets", &[])?)
}

/// `answer`: the object that `/api/v1/targets` returns.
fn targets_table(answer: &Value) -> Option<String> {
    const FEATURES: [(&str, &str); 3] =
        [("requests", "boundary"), ("native", "native_stacks"), ("interpreter", "interpreter_stacks")];
    let rows = rows(answer, "targets")?;
    let mut remarks = String::new();
    let mut cells = Vec::new();
    for row in rows {
        let list = |name: &str| {
            let all = row.get(name).and_then(Value::as_array).into_iter().flatten();
            let all: Vec<_> =
                all.map(|v| v.as_str().map_or_else(|| printable(&v.to_string()), printable)).collect();
            if all.is_empty() { "-".to_owned() } else { all.join(",") }
        };
        let runtime = |name: &str| row.get("runtime").and_then(|runtime| runtime.get(name));
        let word = |value: Option<&Value>| value.and_then(Value::as_str).map(printable);
        let mut line =
            vec![text(row, "pid"), text(row, "service"), text(row, "comm"), text(row, "exe"), list("ports")];
        let name = word(runtime("name")).unwrap_or_else(|| "-".to_owned());
        line.push(
            word(runtime("version")).map_or_else(|| name.clone(), |version| format!("{name} {version}")),
        );
        for (column, field) in FEATURES {
            let feature = row.get(field);
            let works = feature.and_then(|f| f.get("works")).and_then(Value::as_bool);
            line.push(match works {
                Some(true) => "yes".to_owned(),
                Some(false) => "no".to_owned(),
                None => "-".to_owned(),
            });
            let why = word(feature.and_then(|f| f.get("detail")));
            if let (Some(false), Some(why)) = (works, why) {
                // Writing to a string cannot fail.
                let _ = writeln!(remarks, "{} {column}: {why}", text(row, "pid"));
            }
        }
        line.push(list("other_protocols"));
        cells.push(line);
    }
    let headers = [
        "pid",
        "service",
        "name",
        "exe",
        "ports",
        "runtime",
        "requests",
        "native",
        "interpreter",
        "also speaks",
    ];
    Some(table(&headers, &cells) + &remarks)
}

/// One request as a text tree, with its profile if there is one; with `--json` the record.
pub fn show(options: &ClientOptions, id: &str, view: &str) -> Result<Vec<u8>, ClientError> {
    let id = valid(id)?;
    let path = format!("/api/v1/requests/{id}");
    let raw = fetch(options, &path, &[])?;
    if options.json {
        return Ok(raw);
    }
    let record = parse(options, &raw)?;
    let out = facts(&record);
    let mut out = out.into_bytes();
    // Without a sample there is a tree too: all of the time is `[unsampled]`.
    if record["profile"] == true || record["samples"] == 0 {
        let pairs =
            [("format", "text".to_owned()), ("view", view.to_owned()), ("color", options.color.to_string())];
        let tree = fetch(options, &format!("{path}/profile"), &pairs)?;
        out.push(b'\n');
        out.extend(tree);
    }
    Ok(out)
}

/// The record's order in `show`; a field that a later version adds comes after these.
const FACTS_FIRST: [&str; 9] =
    ["id", "service", "method", "path", "route", "status", "outcome", "start", "duration_ns"];

/// A record, a field per line. What is unknown, or says that nothing special happened, is left out.
fn facts(record: &Value) -> String {
    let mut out = String::new();
    let names = record.as_object().into_iter().flat_map(|fields| fields.keys().map(String::as_str));
    for name in FACTS_FIRST.into_iter().chain(names.filter(|name| !FACTS_FIRST.contains(name))) {
        let value = &record[name];
        let silent = match name {
            "lost_events" | "tail_samples" => value == 0,
            "profile" => value == true,
            _ => value.is_null(),
        };
        if silent {
            continue;
        }
        let label = name.strip_suffix("_ns").unwrap_or(name).replace('_', " ");
        let shown = match value {
            Value::Object(parts) => {
                let each =
                    parts.iter().map(|(part, ns)| format!("{} {}", printable(part), duration(Some(ns))));
                each.collect::<Vec<_>>().join(", ")
            }
            _ if name.ends_with("_ns") => duration(Some(value)),
            _ => text(record, name),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{:<16}{shown}", printable(&label));
    }
    out
}

/// Writes a profile to a file, or returns it for standard output.
pub fn export(options: &ClientOptions, query: &ExportQuery) -> Result<Vec<u8>, ClientError> {
    let file = Some(query.output.as_path()).filter(|path| *path != Path::new("-"));
    if query.format.is_none()
        && let Some(name) = file.and_then(|path| planned(path.file_name()?.to_str()?))
    {
        return Err(ClientError::PlannedFormat(name));
    }
    let format = match (&query.format, file) {
        (Some(name), _) => name.clone(),
        (None, Some(path)) => Format::from_path(path).ok_or(ClientError::UnknownFormat)?.name().to_owned(),
        (None, None) => return Err(ClientError::UnknownFormat),
    };
    let (path, mut pairs) = match &query.source {
        ExportSource::Request(id) => (format!("/api/v1/requests/{}/profile", valid(id)?), Vec::new()),
        ExportSource::Matching(filter) => ("/api/v1/profile".to_owned(), filter.pairs()),
    };
    pairs.extend([("format", format), ("view", query.view.to_owned())]);
    let profile = fetch(options, &path, &pairs)?;
    let Some(path) = file else { return Ok(profile) };
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        // A profile tells what a service does; it is its owner's business.
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(&profile))
        .map_err(|source| ClientError::Write { path: path.to_path_buf(), source })?;
    Ok(Vec::new())
}

fn valid(id: &str) -> Result<RequestId, ClientError> {
    id.parse().map_err(|_| ClientError::InvalidId(id.to_owned()))
}

fn listing(
    options: &ClientOptions,
    path: &str,
    pairs: &[(&str, String)],
    draw: impl FnOnce(&Value) -> Option<String>,
) -> Result<Vec<u8>, ClientError> {
    let raw = fetch(options, path, pairs)?;
    if options.json {
        return Ok(raw);
    }
    let drawn = draw(&parse(options, &raw)?);
    drawn.map(String::into_bytes).ok_or_else(|| unexpected(options, "it lacks the list asked for"))
}

fn unexpected(options: &ClientOptions, reason: impl ToString) -> ClientError {
    ClientError::Unexpected { url: options.url.clone(), reason: reason.to_string() }
}

fn parse(options: &ClientOptions, raw: &[u8]) -> Result<Value, ClientError> {
    serde_json::from_slice(raw).map_err(|e| unexpected(options, e))
}

fn fetch(options: &ClientOptions, path: &str, pairs: &[(&str, String)]) -> Result<Vec<u8>, ClientError> {
    let url = format!("{}{path}", options.url.trim_end_matches('/'));
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .http_status_as_error(false)
        // Never by way of a proxy: the daemon is on this host, or named outright.
        .proxy(None)
        .max_redirects(0)
        .build()
        .into();
    let request = pairs.iter().fold(agent.get(&url), |request, (name, value)| request.query(name, value));
    let mut response = request.call().map_err(|e| failed(options, e))?;
    let status = response.status().as_u16();
    let body = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
    let body = body.map_err(|e| failed(options, e))?;
    if status == 200 {
        return Ok(body);
    }
    let answer = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let field = |name: &str| answer.pointer(&format!("/error/{name}")).and_then(Value::as_str).map(printable);
    match (field("code"), field("message")) {
        (Some(code), Some(message)) => Err(ClientError::Refused { status, code, message }),
        _ => Err(unexpected(options, format!("status {status}"))),
    }
}

fn failed(options: &ClientOptions, error: ureq::Error) -> ClientError {
    let url = options.url.clone();
    match error {
        ureq::Error::Io(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            ClientError::NotRunning { url, reason: "connection refused".to_owned() }
        }
        ureq::Error::ConnectionFailed | ureq::Error::HostNotFound | ureq::Error::Timeout(_) => {
            ClientError::NotRunning { url, reason: error.to_string() }
        }
        other => ClientError::Http { url, source: Box::new(other) },
    }
}

fn rows<'a>(answer: &'a Value, name: &str) -> Option<&'a Vec<Value>> {
    answer.get(name)?.as_array()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn routes_show_what_is_unknown_as_a_dash() {
        let answer = json!({"routes": [{
            "service": "shop", "route": "/\u{1b}[2J\n", "count": 3, "errors": 1, "p50_ns": 1_500_000,
            "p95_ns": 2_000_000_000_u64, "p99_ns": 900, "total_ns": 1_000_000, "sampled_cpu_ns": null,
        }]});
        let shown = routes_table(&answer).unwrap();
        let cells: Vec<_> = shown.lines().nth(1).unwrap().split("  ").map(str::trim).collect();
        let cells: Vec<_> = cells.into_iter().filter(|c| !c.is_empty()).collect();
        assert_eq!(cells, ["shop", "/\\u{1b}[2J\\n", "3", "1", "1.5 ms", "2.0 s", "0.9 µs", "1.0 ms", "-"]);
    }

    #[test]
    fn a_record_shows_what_is_known_and_what_is_special() {
        let record = json!({
            "id": "a1", "path": "/x\u{1b}", "duration_ns": 20_000_000, "off_cpu_ns": {"disk": 1_500_000, "sleep": 0},
            "trace_id": null, "lost_events": 0, "tail_samples": 2, "profile": true,
        });
        let expected = "\
id              a1
path            /x\\u{1b}
duration        20.0 ms
off cpu         disk 1.5 ms, sleep 0.0 µs
tail samples    2
";
        assert_eq!(facts(&record), expected);
    }

    #[test]
    fn targets_say_what_works_and_why_the_rest_does_not() {
        let answer = json!({"targets": [{
            "pid": 7, "ppid": 1, "service": "shop", "comm": "gunicorn", "exe": "/usr/bin/python3.12",
            "ports": [80, 81], "runtime": {"name": "python", "version": "3.12"},
            "boundary": {"works": true, "detail": "uprobe"}, "native_stacks": {"works": true, "detail": "x"},
            "interpreter_stacks": {"works": false, "detail": "Python 3.12 is not supported yet\u{1b}"},
            "other_protocols": ["TLS"],
        }]});
        let shown = targets_table(&answer).unwrap();
        let lines: Vec<_> = shown.lines().collect();
        let cells: Vec<_> = lines[1].split("  ").map(str::trim).filter(|c| !c.is_empty()).collect();
        let expected = [
            "7",
            "shop",
            "gunicorn",
            "/usr/bin/python3.12",
            "80,81",
            "python 3.12",
            "yes",
            "yes",
            "no",
            "TLS",
        ];
        assert_eq!(cells, expected);
        assert_eq!(lines[2..], ["7 interpreter: Python 3.12 is not supported yet\\u{1b}"]);
        assert_eq!(targets_table(&json!({"routes": []})), None);
    }

    #[test]
    fn a_daemon_that_is_not_there_is_named() {
        // Bound and closed: nobody listens there.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let options = ClientOptions { url: format!("http://{free}"), json: false, color: false };
        let error = routes(&options, &RequestsQuery::default()).unwrap_err();
        assert!(matches!(error, ClientError::NotRunning { .. }), "{error:?}");
        assert!(error.to_string().contains("reqprof daemon"));
        assert!(matches!(show(&options, "../x", "wall").unwrap_err(), ClientError::InvalidId(_)));
    }
}
