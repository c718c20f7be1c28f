//! The request record: what is known about one HTTP request.
//!
//! Made by `correlate` when a request ends, completed by `symbolize` with its sample counts, kept by `store`, shown
//! by `serve`. Its JSON is a contract with users. What cannot be measured is `None`, never invented.

use serde::{Deserialize, Serialize};

/// One HTTP request that a process on this host served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// 24 lower-case hexadecimal digits; sorts by start.
    pub id: String,
    pub pid: u32,
    /// The thread that received the request's first byte.
    pub tid: u32,
    pub service: String,
    /// `None` when no request line was seen, and so are `path` and `route`.
    pub method: Option<String>,
    /// Without its query string; at most 1,024 bytes, invalid UTF-8 and control characters replaced.
    pub path: Option<String>,
    pub route: Option<String>,
    /// `None` when no response head was seen.
    pub status: Option<u16>,
    /// When the first byte was received. Nanoseconds since the Unix epoch; RFC 3339 in JSON.
    #[serde(with = "rfc3339")]
    pub start: i64,
    /// From the first byte received to the last response byte written, ns.
    pub duration_ns: u64,
    /// From the first byte received to the first response byte written, ns.
    pub ttfb_ns: Option<u64>,
    /// Bytes of the request, head and body.
    pub request_bytes: u64,
    /// Bytes of the response, head and body.
    pub response_bytes: u64,
    pub on_cpu_ns: Option<u64>,
    pub runqueue_ns: Option<u64>,
    pub off_cpu_ns: Option<OffCpu>,
    /// CPU samples attributed to this request.
    pub samples: u64,
    /// CPU samples taken after the last response byte, while the thread was still busy with this request. They are
    /// not part of the profile.
    pub tail_samples: u64,
    /// Samples and boundary events of this request that are known to be lost. Not 0 = the profile has gaps.
    pub lost_events: u64,
    pub boundary: Boundary,
    pub attribution: Attribution,
    pub outcome: Outcome,
    /// Why `outcome` is not `complete`, or another remark, in a few words.
    pub note: Option<String>,
    pub trace_id: Option<String>,
    /// Whether a profile is stored.
    pub profile: bool,
}

/// The `note` of a request that has samples, but no profile because it was too short.
pub const TOO_SHORT: &str = "profile left out: shorter than min_duration";

impl RequestRecord {
    /// Whether it counts as an error.
    pub fn is_error(&self) -> bool {
        is_error(self.status, self.outcome)
    }
}

/// What counts as an error, wherever errors are counted: a server's error (5xx), or no whole response. A client's
/// error (4xx) is an answer, and so is a change of protocol.
pub fn is_error(status: Option<u16>, outcome: Outcome) -> bool {
    matches!(status, Some(500..=599))
        || matches!(outcome, Outcome::Aborted | Outcome::Exit | Outcome::Incomplete)
}

/// Off-CPU time by reason, ns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffCpu {
    pub network: u64,
    pub disk: u64,
    pub lock: u64,
    pub gil: u64,
    pub sleep: u64,
    pub other: u64,
}

/// How the request's boundaries were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boundary {
    Uprobe,
    Usdt,
    Syscall,
    Tls,
}

/// How samples were matched to the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attribution {
    /// One thread received, worked and answered.
    Thread,
    /// Tasks, callbacks and threads of an event loop worked in contexts that were made for it.
    Context,
    /// Samples could not be matched without guessing, so none are.
    None,
}

/// How the request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The whole response was written.
    Complete,
    /// The connection ended before the response was whole.
    Aborted,
    /// 101 or CONNECT: the connection is no longer HTTP.
    Upgraded,
    /// The process exited.
    Exit,
    /// The end could not be told: records were lost, the framing was unreadable, or profiling stopped before it.
    Incomplete,
}

macro_rules! names {
    ($type:ty { $($variant:ident => $name:literal),+ $(,)? }) => {
        impl $type {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name used in JSON, in the store and as a label.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
            /// The inverse of [`Self::name`].
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}
names!(Boundary { Uprobe => "uprobe", Usdt => "usdt", Syscall => "syscall", Tls => "tls" });
names!(Attribution { Thread => "thread", Context => "context", None => "none" });
names!(Outcome {
    Complete => "complete", Aborted => "aborted", Upgraded => "upgraded", Exit => "exit",
    Incomplete => "incomplete",
});

/// `start` in JSON: RFC 3339 with nanoseconds, UTC.
mod rfc3339 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(ns: &i64, s: S) -> Result<S::Ok, S::Error> {
        let t = jiff::Timestamp::from_nanosecond(i128::from(*ns)).map_err(serde::ser::Error::custom)?;
        s.serialize_str(&format!("{t:.9}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
        let text = String::deserialize(d)?;
        let t: jiff::Timestamp = text.parse().map_err(D::Error::custom)?;
        i64::try_from(t.as_nanosecond()).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::{Outcome, is_error};

    #[test]
    fn errors_are_what_the_server_did_not_do() {
        for (status, outcome, error) in [
            (Some(200), Outcome::Complete, false),
            (Some(404), Outcome::Complete, false),
            (Some(500), Outcome::Complete, true),
            (Some(599), Outcome::Complete, true),
            (Some(600), Outcome::Complete, false),
            (Some(101), Outcome::Upgraded, false),
            (Some(200), Outcome::Aborted, true),
            (None, Outcome::Exit, true),
            (Some(200), Outcome::Incomplete, true),
        ] {
            assert_eq!(is_error(status, outcome), error, "{status:?} {outcome:?}");
        }
    }
}
