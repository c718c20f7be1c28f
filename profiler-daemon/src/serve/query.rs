//! Query strings, strictly: each parameter is known, comes once and means something, or the answer is 400.
//!
//! A misspelt filter that is silently ignored shows the wrong requests, which is worse than an error.

use axum::extract::Query;
use axum::http::Uri;

use super::error::ApiError;
use crate::profile::format::{Format, View, planned};
use crate::store::{Filter, MAX_ROWS, Sort};

/// Rows of a list when nothing else is asked for.
const DEFAULT_LIMIT: usize = 100;
pub(super) const FILTERS: [&str; 9] =
    ["service", "route", "method", "status", "pid", "min_duration", "max_duration", "since", "until"];

/// The parameters of one request, to be taken out one by one.
#[derive(Debug)]
pub(super) struct Params(Vec<(String, String)>);

impl Params {
    /// Fails on a parameter that is not `known`, or that comes twice.
    pub(super) fn parse(uri: &Uri, known: &[&[&str]]) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|e| ApiError::bad_request("invalid_query", e.to_string()))?;
        for (i, (name, _)) in pairs.iter().enumerate() {
            if !known.iter().any(|set| set.contains(&name.as_str())) {
                let known = known.concat().join(", ");
                let known = if known.is_empty() { "none".to_owned() } else { known };
                return Err(ApiError::bad_request(
                    "unknown_parameter",
                    format!("unknown parameter {name:?}; known are: {known}"),
                ));
            }
            if pairs[..i].iter().any(|(earlier, _)| earlier == name) {
                return Err(ApiError::bad_request(
                    "duplicate_parameter",
                    format!("parameter {name:?} comes twice"),
                ));
            }
        }
        Ok(Self(pairs))
    }

    /// An empty value counts as not given: that is what an empty form field sends.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str()).filter(|v| !v.is_empty())
    }

    fn parsed<T>(
        &self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        match parse(text) {
            Some(value) => Ok(Some(value)),
            None => Err(ApiError::bad_request(
                "invalid_parameter",
                format!("{name}={text:?}: expected {expected}"),
            )),
        }
    }

    /// `now`: ns since the epoch, for times relative to it.
    pub(super) fn filter(&self, now: i64) -> Result<Filter, ApiError> {
        let text = |name| self.get(name).map(str::to_owned);
        let duration = |name| self.parsed(name, "a duration such as 500ms or 1s", nanoseconds);
        let time =
            |name| self.parsed(name, "an RFC 3339 time, or an age such as 5m", |text| moment(text, now));
        Ok(Filter {
            service: text("service"),
            route: text("route"),
            method: text("method"),
            status: self
                .parsed("status", "a status such as 404, or a class such as 5xx", |t| t.parse().ok())?,
            pid: self.parsed("pid", "a process id", |text| text.parse().ok())?,
            min_duration: duration("min_duration")?,
            max_duration: duration("max_duration")?,
            since: time("since")?,
            until: time("until")?,
        })
    }

    pub(super) fn sort(&self) -> Result<Sort, ApiError> {
        let expected = format!("one of {}", Sort::NAMES.join(", "));
        Ok(self.parsed("sort", &expected, |text| text.parse().ok())?.unwrap_or_default())
    }

    pub(super) fn limit(&self) -> Result<usize, ApiError> {
        let valid = |text: &str| text.parse().ok().filter(|n| (1..=MAX_ROWS).contains(n));
        let expected = format!("a number from 1 to {MAX_ROWS}");
        Ok(self.parsed("limit", &expected, valid)?.unwrap_or(DEFAULT_LIMIT))
    }

    pub(super) fn cursor(&self) -> Option<&str> {
        self.get("cursor")
    }

    /// Whether `text` has ANSI colours.
    pub(super) fn color(&self) -> Result<bool, ApiError> {
        Ok(self.parsed("color", "true or false", |text| text.parse().ok())?.unwrap_or(false))
    }

    pub(super) fn format(&self) -> Result<Format, ApiError> {
        let name = self.get("format").unwrap_or("tree");
        if let Some(format) = Format::from_name(name) {
            return Ok(format);
        }
        Err(if planned(name) == Some(name) {
            ApiError::bad_request(
                "format_unavailable",
                format!("the format {name:?} is planned, not in this version"),
            )
        } else {
            ApiError::bad_request(
                "unknown_format",
                format!("unknown format {name:?}; known are: {}", Format::ALL.map(Format::name).join(", ")),
            )
        })
    }

    pub(super) fn view(&self) -> Result<View, ApiError> {
        match self.get("view").unwrap_or("wall") {
            "wall" => Ok(View::Wall),
            "cpu" => Ok(View::Cpu),
            "offcpu" => Err(ApiError::conflict(
                "view_unavailable",
                "this build has no off-CPU data yet; the views it can show are wall and cpu",
            )),
            other => Err(ApiError::bad_request(
                "unknown_view",
                format!("unknown view {other:?}; known are: wall, cpu, offcpu"),
            )),
        }
    }
}

/// `500ms`, `1s`, `1m 30s`.
fn nanoseconds(text: &str) -> Option<u64> {
    humantime::parse_duration(text).ok().and_then(|d| u64::try_from(d.as_nanos()).ok())
}

/// RFC 3339, or how long ago.
fn moment(text: &str, now: i64) -> Option<i64> {
    if let Some(age) = nanoseconds(text) {
        return now.checked_sub(i64::try_from(age).ok()?);
    }
    let time: jiff::Timestamp = text.parse().ok()?;
    i64::try_from(time.as_nanosecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StatusFilter;

    const NOW: i64 = 1_767_225_600_000_000_000; // 2026-01-01T00:00:00Z

    fn params(query: &str) -> Result<Params, ApiError> {
        let uri = format!("/x?{query}").parse().unwrap();
        Params::parse(&uri, &[&FILTERS, &["sort", "limit", "cursor", "format", "view"]])
    }

    #[test]
    fn a_full_filter_is_understood() {
        let query = "service=shop&route=%2Forders%2F%7Bid%7D&method=GET&status=5xx&pid=7&min_duration=500ms\
                     &max_duration=1s&since=5m&until=2025-12-31T23:59:59.5Z";
        let expected = Filter {
            service: Some("shop".into()),
            route: Some("/orders/{id}".into()),
            method: Some("GET".into()),
            status: Some(StatusFilter::Class(5)),
            pid: Some(7),
            min_duration: Some(500_000_000),
            max_duration: Some(1_000_000_000),
            since: Some(NOW - 300_000_000_000),
            until: Some(NOW - 500_000_000),
        };
        assert_eq!(params(query).unwrap().filter(NOW).unwrap(), expected);
        assert_eq!(params("service=&since=").unwrap().filter(NOW).unwrap(), Filter::default());
    }

    #[test]
    fn what_means_nothing_is_an_error() {
        assert_eq!(params("servce=shop").unwrap_err().code, "unknown_parameter");
        assert_eq!(params("pid=1&pid=2").unwrap_err().code, "duplicate_parameter");
        for bad in [
            "pid=-1",
            "pid=x",
            "status=ok",
            "min_duration=5",
            "max_duration=fast",
            "since=yesterday",
            "until=-5m",
        ] {
            assert_eq!(params(bad).unwrap().filter(NOW).unwrap_err().code, "invalid_parameter", "{bad}");
        }
        for bad in ["limit=0", "limit=1001", "limit=x"] {
            assert_eq!(params(bad).unwrap().limit().unwrap_err().code, "invalid_parameter", "{bad}");
        }
        assert!(params("sort=name").unwrap().sort().is_err());
        assert_eq!(params("limit=1000").unwrap().limit(), Ok(1_000));
        assert_eq!(params("sort=-duration").unwrap().sort(), Ok(Sort::Slowest));
    }

    #[test]
    fn formats_and_views_that_cannot_be_served_say_why() {
        let format = |name: &str| params(&format!("format={name}")).unwrap().format();
        assert_eq!(format("docx").unwrap_err().code, "unknown_format");
        assert!(format("docx").unwrap_err().message.contains("speedscope"));
        for planned in ["html", "callgrind", "pstats", "pyisession", "firefox", "chrome", "otlp"] {
            assert_eq!(format(planned).unwrap_err().code, "format_unavailable");
        }
        let view = |name: &str| params(&format!("view={name}")).unwrap().view();
        assert_eq!(view("cpu"), Ok(View::Cpu));
        assert_eq!(view("").unwrap(), View::Wall);
        assert_eq!(view("offcpu").unwrap_err().code, "view_unavailable");
        assert_eq!(view("offcpu").unwrap_err().status.as_u16(), 409);
        let message = view("offcpu").unwrap_err().message;
        assert!(message.contains("no off-CPU data yet") && message.contains("wall and cpu"), "{message}");
        assert_eq!(view("sideways").unwrap_err().code, "unknown_view");
    }
}
