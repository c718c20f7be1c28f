//! Which trace a request belongs to, by its headers.
//!
//! In: headers of a request. Out: the trace id, so that a profile can be found from its trace and the other way round. W3C's
//! `traceparent` goes before Zipkin's `b3` in one header, and that before `X-B3-TraceId`. A header that comes twice says
//! nothing, as W3C's document wants it, and does not let another one speak: somebody forged one of them.

use std::fmt;

/// A trace id: 32 lower-case hexadecimal digits, not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Lower-case hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0u128, |sum, b| {
        let digit = match b {
            b'0'..=b'9' => b - b'0',
            b'a'..=b'f' => b - b'a' + 10,
            _ => return None,
        };
        Some(sum << 4 | u128::from(digit))
    })
}

impl TraceId {
    /// From the value of a `traceparent` header (W3C Trace Context, 3.2).
    fn of_traceparent(value: &[u8]) -> Option<Self> {
        let version = hex(value.get(0..2)?)?;
        let length_fits = match version {
            0 => value.len() == 55,
            0xff => false,
            // A later version may append fields.
            _ => value.len() == 55 || value.get(55) == Some(&b'-'),
        };
        let dashes = [2, 35, 52].iter().all(|at| value.get(*at) == Some(&b'-'));
        let (trace, parent) = (hex(value.get(3..35)?)?, hex(value.get(36..52)?)?);
        hex(value.get(53..55)?)?;
        (length_fits && dashes && parent != 0).then_some(())?;
        Self::new(trace)
    }

    /// From the value of a `b3` header (openzipkin/b3-propagation): trace, span, and maybe whether it is sampled and the
    /// parent. A lone `0` or `1` names no trace.
    fn of_b3(value: &[u8]) -> Option<Self> {
        let mut fields = value.split(|b| *b == b'-');
        let trace = fields.next()?;
        let span = fields.next()?;
        let sampled = fields.next();
        let parent = fields.next();
        let id = |id: &[u8]| id.len() == 16 && hex(id).is_some_and(|id| id != 0);
        let rest_fits = sampled.is_none_or(|flag| matches!(flag, b"0" | b"1" | b"d"))
            && parent.is_none_or(id)
            && fields.next().is_none();
        if id(span) && rest_fits { Self::of_b3_trace(trace) } else { None }
    }

    /// From the value of an `X-B3-TraceId` header: 16 digits, or 32.
    fn of_b3_trace(value: &[u8]) -> Option<Self> {
        if matches!(value.len(), 16 | 32) { Self::new(hex(value)?) } else { None }
    }

    fn new(id: u128) -> Option<Self> {
        (id != 0).then(|| Self(id.to_be_bytes()))
    }
}

/// A way to read a header's value.
type Read = fn(&[u8]) -> Option<TraceId>;

/// The headers that are read, the most trusted first.
const HEADERS: [(&[u8], Read); 3] = [
    (b"traceparent", TraceId::of_traceparent),
    (b"b3", TraceId::of_b3),
    (b"x-b3-traceid", TraceId::of_b3_trace),
];

/// Reads a head's headers, one after the other.
#[derive(Debug, Default)]
pub struct TraceReader {
    /// What each of them said, and how often it came.
    said: [(u32, Option<TraceId>); HEADERS.len()],
}

impl TraceReader {
    /// Whether it was one of them.
    pub fn read(&mut self, name: &[u8], value: &[u8]) -> bool {
        let Some(at) = HEADERS.iter().position(|(header, _)| name.eq_ignore_ascii_case(header)) else {
            return false;
        };
        let (times, said) = &mut self.said[at];
        *times += 1;
        *said = HEADERS[at].1(value);
        true
    }

    pub fn trace_id(&self) -> Option<TraceId> {
        let (times, said) = self.said.iter().find(|(times, _)| *times > 0)?;
        said.filter(|_| *times == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn of(headers: &[(&str, &str)]) -> Option<String> {
        let mut reader = TraceReader::default();
        assert!(headers.iter().all(|(name, value)| reader.read(name.as_bytes(), value.as_bytes())));
        reader.trace_id().map(|id| id.to_string())
    }

    /// The example and the rules of W3C Trace Context, 3.2.
    #[test]
    fn traceparent() {
        let valid = format!("00-{TRACE}-00f067aa0ba902b7-01");
        let id = |value: &str| of(&[("Traceparent", value)]);
        let expected = Some(TRACE.to_owned());
        assert_eq!(id(&valid), expected);
        assert_eq!(id(&valid.replace("00-4", "cc-4")), expected, "a later version");
        assert_eq!(id(&format!("{}-more", valid.replace("00-4", "cc-4"))), expected);
        for bad in [
            format!("{valid}-more"),
            format!("{}x", valid.replace("00-4", "cc-4")),
            valid.replace("00-4", "ff-4"),
            valid.to_uppercase(),
            valid.replace(TRACE, &"0".repeat(32)),
            valid.replace("00f067aa0ba902b7", &"0".repeat(16)),
            valid[..54].to_owned(),
            valid.replace("-01", "_01"),
            String::new(),
        ] {
            assert_eq!(id(&bad), None, "{bad}");
        }
        assert_eq!(of(&[("traceparent", &valid), ("Traceparent", &valid)]), None);
    }

    /// The examples of openzipkin/b3-propagation.
    #[test]
    fn b3_in_one_header() {
        let long = "80f198ee56343ba864fe8b2a57d3eff7";
        let id = |value: &str| of(&[("B3", value)]);
        for valid in ["", "-1", "-0", "-d", "-1-05e3ac9a4f6e3b90"] {
            assert_eq!(id(&format!("{long}-e457b5a2e4d86bd1{valid}")).as_deref(), Some(long), "{valid}");
        }
        let short = "0000000000000000a3ce929d0e0e4736";
        assert_eq!(id("a3ce929d0e0e4736-e457b5a2e4d86bd1-1").as_deref(), Some(short));
        for bad in [
            "0",
            "1",
            "d",
            "",
            long,
            &format!("{long}-e457b5a2e4d86bd1-2"),
            &format!("{long}-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90-1"),
            &format!("{long}-e457b5a2e4d86bd1-1-05e3"),
            &format!("{long}-0000000000000000-1"),
            &format!("{}-e457b5a2e4d86bd1-1", "0".repeat(32)),
            &format!("{}-e457b5a2e4d86bd1-1", long.to_uppercase()),
            "80f198ee56343ba864fe-e457b5a2e4d86bd1-1",
        ] {
            assert_eq!(id(bad), None, "{bad}");
        }
    }

    #[test]
    fn b3_in_several_headers() {
        assert_eq!(of(&[("X-B3-TraceId", TRACE)]).as_deref(), Some(TRACE));
        assert_eq!(
            of(&[("x-b3-traceid", "a3ce929d0e0e4736")]).as_deref(),
            Some("0000000000000000a3ce929d0e0e4736")
        );
        assert_eq!(of(&[("X-B3-TraceId", "463ac35c9f6413ad4")]), None);
        assert!(!TraceReader::default().read(b"X-B3-SpanId", b"a2fb4a1d1a96d312"));
    }

    #[test]
    fn the_first_of_them_speaks_alone() {
        let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
        let other = "80f198ee56343ba864fe8b2a57d3eff7";
        let b3 = format!("{other}-e457b5a2e4d86bd1-1");
        assert_eq!(of(&[("b3", &b3), ("traceparent", &parent)]).as_deref(), Some(TRACE));
        assert_eq!(of(&[("X-B3-TraceId", TRACE), ("b3", &b3)]).as_deref(), Some(other));
        assert_eq!(of(&[("traceparent", "damaged"), ("b3", &b3)]), None);
        assert_eq!(of(&[]), None);
    }
}
