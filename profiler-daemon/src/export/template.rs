//! File name templates in Python's format syntax: `{path}.{duration:06d}ms.{time}`.
//!
//! In: a template, checked once at the start. Out: names with nothing in them but `[A-Za-z0-9._-]`. Of Python's
//! format specification the part that makes sense in a file name is understood: fill and alignment, zero padding,
//! width, precision, and the types `s`, `d`, `x` and `f`, with Python's own rules for which type takes which.
//! Source: the "Format Specification Mini-Language" in the documentation of Python's `string` module.

use std::str::FromStr;

use crate::record::RequestRecord;

/// Widths and precisions beyond this only make names that are cut.
const WIDTH_MAX: usize = 180;

/// What is wrong with a template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("the template is empty")]
    Empty,
    #[error("single `{0}` in the template; a brace itself is not allowed in a file name")]
    Brace(char),
    #[error("{0:?} is not allowed in a file name here; only letters, digits, `.`, `_` and `-` are")]
    Character(char),
    #[error("unknown field `{{{0}}}`; fields are {names}", names = field_names())]
    Field(String),
    #[error("format specification `{spec}` of `{{{field}}}`: {reason}")]
    Spec { field: String, spec: String, reason: &'static str },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Path,
    Duration,
    Time,
    Method,
    Route,
    Status,
    Pid,
    Service,
    Id,
}

const FIELDS: [(&str, Field); 9] = [
    ("path", Field::Path),
    ("duration", Field::Duration),
    ("time", Field::Time),
    ("method", Field::Method),
    ("route", Field::Route),
    ("status", Field::Status),
    ("pid", Field::Pid),
    ("service", Field::Service),
    ("id", Field::Id),
];

fn field_names() -> String {
    FIELDS.map(|(name, _)| name).join(", ")
}

impl Field {
    fn is_text(self) -> bool {
        matches!(self, Self::Path | Self::Method | Self::Route | Self::Service | Self::Id)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Align {
    Left,
    Right,
    Center,
    /// Padding after the sign. Our numbers have none, so it is the same as right.
    AfterSign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Decimal,
    Hex,
    Fixed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Spec {
    fill: char,
    align: Align,
    width: usize,
    precision: Option<usize>,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Field(Field, Spec),
}

/// A checked template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

impl Default for Template {
    fn default() -> Self {
        Self::DEFAULT.parse().expect("a constant that a test parses too")
    }
}

fn allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn safe(text: &str) -> String {
    text.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal(&mut pieces, &rest[..at])?;
            let Some(field) = rest[at..].strip_prefix('{') else { return Err(TemplateError::Brace('}')) };
            let Some((field, after)) = field.split_once('}') else { return Err(TemplateError::Brace('{')) };
            if field.contains('{') {
                return Err(TemplateError::Brace('{'));
            }
            let (name, spec) = field.split_once(':').unwrap_or((field, ""));
            let known = FIELDS.iter().find(|(known, _)| *known == name);
            let (_, known) = known.ok_or_else(|| TemplateError::Field(name.to_owned()))?;
            let spec = Spec::parse(spec, known.is_text()).map_err(|reason| TemplateError::Spec {
                field: name.to_owned(),
                spec: spec.to_owned(),
                reason,
            })?;
            pieces.push(Piece::Field(*known, spec));
            rest = after;
        }
        literal(&mut pieces, rest)?;
        if pieces.is_empty() { Err(TemplateError::Empty) } else { Ok(Self { pieces }) }
    }
}

fn literal(pieces: &mut Vec<Piece>, text: &str) -> Result<(), TemplateError> {
    if let Some(c) = text.chars().find(|c| !allowed(*c)) {
        return Err(TemplateError::Character(c));
    }
    if !text.is_empty() {
        pieces.push(Piece::Literal(text.to_owned()));
    }
    Ok(())
}

impl Template {
    /// As people know it.
    pub const DEFAULT: &str = "{path}.{duration:06d}ms.{time}";

    /// The name for a request: ASCII of the allowed characters only, of any length.
    pub(super) fn expand(&self, record: &RequestRecord) -> String {
        let mut name = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Literal(text) => name.push_str(text),
                Piece::Field(field, spec) => {
                    let ms = record.duration_ns / 1_000_000;
                    let end = record.start.saturating_add_unsigned(record.duration_ns);
                    name.push_str(&match field {
                        Field::Path => spec.text(&known(record.path.as_deref(), dotted)),
                        Field::Route => spec.text(&known(record.route.as_deref(), dotted)),
                        Field::Method => spec.text(&known(record.method.as_deref(), safe)),
                        Field::Service => spec.text(&safe(&record.service)),
                        Field::Id => spec.text(&safe(&record.id)),
                        Field::Duration => spec.number(ms),
                        // When the file is made, as people know it: the end of the request, in seconds.
                        Field::Time => spec.number(u64::try_from(end / 1_000_000_000).unwrap_or(0)),
                        Field::Status => spec.number(record.status.unwrap_or(0).into()),
                        Field::Pid => spec.number(record.pid.into()),
                    });
                }
            }
        }
        safe(&name)
    }
}

/// What was not seen has no name that could pass for one that was.
fn known(text: Option<&str>, name: impl Fn(&str) -> String) -> String {
    text.map_or_else(|| "unknown".to_owned(), name)
}

/// A path or route as part of a name: `/` becomes `.`, nothing becomes `root`. A query string should not be here;
/// it is cut all the same, because it holds tokens and names and a file name is no place for them.
fn dotted(path: &str) -> String {
    let path = path.split(['?', '#']).next().unwrap_or("");
    let path = path.trim_matches('/');
    if path.is_empty() { "root".to_owned() } else { safe(&path.replace('/', ".")) }
}

impl Spec {
    fn parse(spec: &str, is_text: bool) -> Result<Self, &'static str> {
        let aligned = |c: char| match c {
            '<' => Some(Align::Left),
            '>' => Some(Align::Right),
            '^' => Some(Align::Center),
            '=' => Some(Align::AfterSign),
            _ => None,
        };
        let mut chars = spec.chars();
        let first = chars.clone().next().and_then(aligned);
        let second = chars.clone().nth(1).and_then(aligned);
        let mut fill = None;
        let mut align = None;
        if second.is_some() {
            fill = chars.next();
            align = second;
            chars.next();
        } else if first.is_some() {
            align = first;
            chars.next();
        }
        let rest = chars.as_str();
        let zero = rest.starts_with('0');
        let rest = rest.strip_prefix('0').unwrap_or(rest);
        let (width, rest) = number(rest)?;
        let (precision, rest) = match rest.strip_prefix('.') {
            Some(rest) => match number(rest)? {
                (Some(precision), rest) => (Some(precision), rest),
                (None, _) => return Err("digits are missing after `.`"),
            },
            None => (None, rest),
        };
        let kind = match (rest, is_text) {
            ("", true) | ("s", true) => Kind::Text,
            ("", false) | ("d", false) => Kind::Decimal,
            ("x", false) => Kind::Hex,
            ("f", false) => Kind::Fixed,
            ("d" | "x" | "f", true) => return Err("this type is for numbers, and the field is text"),
            ("s", false) => return Err("type `s` is for text, and the field is a number"),
            _ => return Err("not understood; the form is [[fill]<|>|^|=][0][width][.precision][s|d|x|f]"),
        };
        if is_text && align == Some(Align::AfterSign) {
            return Err("alignment `=` is for numbers, and the field is text");
        }
        if precision.is_some() && matches!(kind, Kind::Decimal | Kind::Hex) {
            return Err("an integer has no precision");
        }
        if fill.is_some_and(|c| !allowed(c)) {
            return Err("the fill character is not allowed in a file name");
        }
        // Since Python 3.10 a `0` before the width pads text with zeros but leaves it at the left.
        let default_align = match (is_text, zero) {
            (true, _) => Align::Left,
            (false, true) => Align::AfterSign,
            (false, false) => Align::Right,
        };
        Ok(Self {
            fill: fill.unwrap_or(if zero { '0' } else { ' ' }),
            align: align.unwrap_or(default_align),
            width: width.unwrap_or(0),
            precision,
            kind,
        })
    }

    fn text(&self, text: &str) -> String {
        let kept = text.chars().take(self.precision.unwrap_or(usize::MAX));
        self.pad(kept.collect())
    }

    fn number(&self, value: u64) -> String {
        self.pad(match self.kind {
            Kind::Text | Kind::Decimal => value.to_string(),
            Kind::Hex => format!("{value:x}"),
            Kind::Fixed => match self.precision.unwrap_or(6) {
                0 => value.to_string(),
                places => format!("{value}.{}", "0".repeat(places)),
            },
        })
    }

    fn pad(&self, text: String) -> String {
        let missing = self.width.saturating_sub(text.chars().count());
        let left = match self.align {
            Align::Left => 0,
            Align::Right | Align::AfterSign => missing,
            Align::Center => missing / 2,
        };
        let fill = |n: usize| std::iter::repeat_n(self.fill, n);
        fill(left).chain(text.chars()).chain(fill(missing - left)).collect()
    }
}

fn number(text: &str) -> Result<(Option<usize>, &str), &'static str> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    if digits.is_empty() {
        return Ok((None, rest));
    }
    match digits.parse() {
        Ok(n) if n <= WIDTH_MAX => Ok((Some(n), rest)),
        _ => Err("a width or precision of more than 180"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::export::tests::record;

    fn expand(template: &str) -> String {
        let record = record("GET", "/a/b", 42);
        template.parse::<Template>().expect(template).expand(&record)
    }

    fn error(template: &str) -> String {
        template.parse::<Template>().expect_err(template).to_string()
    }

    #[test]
    fn the_default_is_the_template_that_people_know() {
        assert_eq!("{path}.{duration:06d}ms.{time}".parse(), Ok(Template::default()));
        // start 1700000000.5 and 42.999999 ms
        assert_eq!(expand("{path}.{duration:06d}ms.{time}"), "a.b.000042ms.1700000000");
    }

    /// The right sides are what Python 3.11 prints for `format(value, spec)`, spaces written as `_`.
    #[test]
    fn specifications_mean_what_they_mean_in_python() {
        for (template, python) in [
            ("{duration}", "42"),
            ("{duration:d}", "42"),
            ("{duration:5}", "___42"),
            ("{duration:05}", "00042"),
            ("{duration:<5}", "42___"),
            ("{duration:^5}", "_42__"),
            ("{duration:x<5}", "42xxx"),
            ("{duration:-^6d}", "--42--"),
            ("{duration:<05}", "42000"),
            ("{duration:.=8d}", "......42"),
            ("{duration:x}", "2a"),
            ("{duration:04x}", "002a"),
            ("{duration:f}", "42.000000"),
            ("{duration:.1f}", "42.0"),
            ("{duration:.0f}", "42"),
            ("{duration:08.2f}", "00042.00"),
            ("{path:5}", "a.b__"),
            ("{path:>5s}", "__a.b"),
            ("{path:_^6}", "_a.b__"),
            ("{path:.1}", "a"),
            ("{path:05}", "a.b00"),
            ("{path:x>6.2}", "xxxxa."),
            ("{method}-{status}-{pid}-{service}-{route}", "GET-200-4711-shop-orders._id_"),
            ("{id}", "0123456789abcdef01234567"),
        ] {
            assert_eq!(expand(template), python, "{template}");
        }
    }

    #[test]
    fn a_wrong_template_says_what_is_wrong() {
        assert_eq!(error(""), "the template is empty");
        assert_eq!(
            error("{user}"),
            "unknown field `{user}`; fields are path, duration, time, method, route, status, pid, service, id"
        );
        assert!(error("a/{path}").starts_with("'/' is not allowed in a file name here"));
        assert!(error("{path} x").starts_with("' ' is not allowed"));
        assert!(error("{path").starts_with("single `{`"));
        assert!(error("path}").starts_with("single `}`"));
        assert!(error("{{path}}").starts_with("single `{`"));
        assert_eq!(
            error("{path:d}"),
            "format specification `d` of `{path}`: this type is for numbers, and the field is text"
        );
        assert!(error("{duration:s}").ends_with("type `s` is for text, and the field is a number"));
        assert!(error("{duration:.3d}").ends_with("an integer has no precision"));
        assert!(error("{path:=5}").ends_with("alignment `=` is for numbers, and the field is text"));
        assert!(error("{path:/<5}").ends_with("the fill character is not allowed in a file name"));
        assert!(error("{duration:9999}").ends_with("a width or precision of more than 180"));
        assert!(error("{duration:5.}").ends_with("digits are missing after `.`"));
        assert!(error("{duration:,}").contains("not understood"));
        assert!(error("{path!r}").starts_with("unknown field"));
    }

    #[test]
    fn what_was_not_seen_is_unknown() {
        let record = RequestRecord { method: None, path: None, route: None, ..record("GET", "/a", 1) };
        let template: Template = "{method}-{path}-{route}".parse().expect("a template");
        assert_eq!(template.expand(&record), "unknown-unknown-unknown");
    }

    #[test]
    fn a_query_string_never_gets_into_a_name() {
        assert_eq!(dotted("/login?token=secret"), "login");
        assert_eq!(dotted("/?token=secret"), "root");
    }

    proptest! {
        #[test]
        fn names_hold_only_safe_characters(path in "\\PC{0,80}", method in "\\PC{0,10}", template in "[{}a-z:0-9.<>^=_-]{0,40}") {
            let record = record(&method, &path, 7);
            let ok = |name: &str| name.chars().all(allowed);
            prop_assert!(ok(&Template::default().expand(&record)));
            if let Ok(template) = template.parse::<Template>() {
                prop_assert!(ok(&template.expand(&record)));
            }
        }
    }
}
