//! The file format: YAML. The only module that knows it, so that another could take its place.
//!
//! In: a path. Out: a [`RawConfig`], or an error that names the file, the line, the column and the reason; also
//! for values that are out of range, for unknown keys and for rules that only the whole configuration can break.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::ConfigError;
use super::raw::RawConfig;

/// Thousands of route patterns fit; a device or a log file given by mistake does not.
const MAX_BYTES: u64 = 1 << 20;

/// A file's text and where it came from.
pub(super) struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let error = |source: io::Error| ConfigError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(error)?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(error)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ConfigError::TooLarge { path: path.to_owned(), max: MAX_BYTES });
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Self { path: path.to_owned(), text }),
            Err(e) => {
                let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
                let line = valid.iter().filter(|b| **b == b'\n').count() + 1;
                let column = valid.iter().rev().take_while(|b| **b != b'\n').count() + 1;
                let reason = "not UTF-8 text".to_owned();
                Err(ConfigError::At { path: path.to_owned(), line, column, reason })
            }
        }
    }

    /// An empty file says nothing, and so do keys without a value.
    pub(super) fn parse(&self) -> Result<RawConfig, ConfigError> {
        match serde_yaml::from_str::<Option<RawConfig>>(&self.text) {
            Ok(raw) => Ok(raw.unwrap_or_default()),
            Err(e) => {
                let reason = reason(&e);
                // A key that stands there twice is noticed when the mapping ends; the second is the one to show.
                match reason.strip_prefix("duplicate field `").and_then(|r| r.strip_suffix('`')) {
                    Some(key) => Err(self.locate(key, 2, reason.clone())),
                    None => Err(self.error(&e, &explain(&reason))),
                }
            }
        }
    }

    /// An error about a top-level key of this file.
    pub(super) fn error_at(&self, key: &str, reason: String) -> ConfigError {
        self.locate(key, 1, reason)
    }

    /// An error at the nth occurrence of a top-level key.
    fn locate(&self, key: &str, nth: usize, reason: String) -> ConfigError {
        let found = Locate { key, left: Cell::new(nth) };
        match found.deserialize(serde_yaml::Deserializer::from_str(&self.text)) {
            Err(e) => self.error(&e, &reason),
            Ok(()) => ConfigError::File { path: self.path.clone(), reason },
        }
    }

    fn error(&self, e: &serde_yaml::Error, reason: &str) -> ConfigError {
        let (path, reason) = (self.path.clone(), reason.to_owned());
        match e.location() {
            Some(at) => ConfigError::At { path, line: at.line(), column: at.column(), reason },
            // The parser says where for everything but a second document.
            None => ConfigError::At { path, line: self.second_document(), column: 1, reason },
        }
    }

    /// The line where a second document begins; 1 where there is none.
    fn second_document(&self) -> usize {
        let mut content = false;
        for (number, line) in (1..).zip(self.text.lines()) {
            let marker =
                line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
            if marker && content {
                return number;
            }
            let silent =
                line.trim().is_empty() || line.trim_start().starts_with('#') || line.starts_with('%');
            content |= marker || !silent;
        }
        1
    }
}

/// The parser's message without the location at its end.
fn reason(e: &serde_yaml::Error) -> String {
    let text = e.to_string();
    let Some(at) = e.location() else { return text };
    let suffix = format!(" at line {} column {}", at.line(), at.column());
    // The parser's own messages go on with a context that has a location of its own.
    text.replacen(&suffix, "", 1)
}

/// Says an unknown key in our own words: which keys are meant, not all that there are.
fn explain(reason: &str) -> String {
    let unknown = reason.split_once("unknown field `").and_then(|(place, rest)| {
        let (key, known) = rest.split_once("`, expected ")?;
        Some((place, key, known))
    });
    let Some((prefix, key, rest)) = unknown else { return one_line(reason) };
    // Quoted words at odd places: expected one of `a`, `b`.
    let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    let mut near: Vec<(usize, &str)> = known.iter().map(|k| (distance(key, k), *k)).collect();
    near.sort();
    near.retain(|(d, k)| {
        *d <= 2 && *d < key.len() || key.len() >= 3 && (k.starts_with(key) || key.starts_with(k))
    });
    near.truncate(3);
    let listed = |names: &[&str]| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    let help = if near.is_empty() {
        format!("keys are {}", listed(&known))
    } else {
        format!("did you mean {}?", listed(&near.into_iter().map(|(_, k)| k).collect::<Vec<_>>()))
    };
    let place = prefix.trim_end_matches([':', ' ']);
    let key = one_line(key);
    // At the top level the parser names the key itself as the place.
    if place.is_empty() || place == key {
        format!("unknown key `{key}`; {help}")
    } else {
        format!("unknown key `{key}` in `{}`; {help}", one_line(place))
    }
}

fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] })
        .take(500)
        .collect()
}

/// Edits that turn one word into the other (Levenshtein). Keys are short, so the table is too.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Walks to a key and fails there, so that the parser tells where it is.
struct Locate<'a> {
    key: &'a str,
    /// Occurrences to go.
    left: Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(FailAt(&self))?.is_some() {
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

struct FailAt<'a>(&'a Locate<'a>);

impl<'de> DeserializeSeed<'de> for FailAt<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for FailAt<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<(), E> {
        let Locate { key: wanted, left } = self.0;
        if key == *wanted {
            left.set(left.get().saturating_sub(1));
            if left.get() == 0 {
                return Err(E::custom("here"));
            }
        }
        Ok(())
    }
}
