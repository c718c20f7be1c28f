//! Routes: a name of low cardinality for a request's path.
//!
//! In: a service and a path without its query string, as the client sent it and so hostile. Out: a route such as
//! `/orders/{id}`, safe as a metric label and in a table. The user's own patterns are asked first; the rest is a
//! heuristic over single segments, in [`segment`]. A service has at most [`ROUTES_PER_SERVICE`] routes of the
//! heuristic; what exceeds them is [`OTHER`], which the metrics count, so that a scanner that tries a million words costs
//! neither memory nor label sets.

mod segment;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The route of everything beyond a bound.
pub const OTHER: &str = "_OTHER";
/// Distinct routes of one service that the heuristic may make. Sites have tens of routes; 200 leaves room and keeps
/// a histogram per route, method and status affordable for Prometheus.
pub const ROUTES_PER_SERVICE: usize = 200;
/// Services that may have routes of their own. A service is a program or a unit of this host: hundreds at most.
pub const SERVICES: usize = 512;
/// Segments of a path that are looked at; the rest is `{*}`.
const SEGMENTS: usize = 10;
/// Answers remembered in each of the two halves of the memo. With keys of at most [`MEMO_KEY`] bytes this is
/// 2 x 4,096 x about 0.4 KiB, 3 MiB at the very most.
const MEMO_HALF: usize = 4096;
/// Longer keys are not remembered: they are rare, and repeated ones are rarer.
const MEMO_KEY: usize = 256;

/// Why a text is not a pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("a route pattern begins with `/`, as in `/orders/{{id}}`")]
    NoSlash,
    #[error("a route pattern has at most {max} bytes", max = Pattern::MAX_BYTES)]
    TooLong,
    #[error(
        "`{0}`: a placeholder is a whole segment, `{{name}}` or `{{*name}}`, its name of letters, digits and `_`"
    )]
    Placeholder(String),
    #[error("`{{*{0}}}` stands for the rest of the path and must be the last segment")]
    RestNotLast(String),
    #[error("a route pattern holds printable ASCII without spaces, quotes and backslashes, not {0:?}")]
    Character(char),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    One,
    Rest,
}

/// A user's pattern: `{x}` matches one segment, `{*rest}` at the end matches what is left, also nothing.
///
/// A trailing slash of the path is ignored unless the pattern has one too, because sites that redirect to the
/// slashed form serve both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: Arc<str>,
    parts: Vec<Part>,
    slash: bool,
}

impl Pattern {
    /// Patterns become labels; a route of more than 200 bytes is a mistake.
    const MAX_BYTES: usize = 200;

    /// Whether `path` is one of this pattern's.
    pub fn matches(&self, path: &str) -> bool {
        if self.slash && !path.ends_with('/') {
            return false;
        }
        let Some(path) = path.strip_prefix('/') else { return false };
        let path = path.strip_suffix('/').unwrap_or(path);
        let mut segments = path.split('/').filter(|s| !s.is_empty());
        for part in &self.parts {
            match part {
                Part::Rest => return true,
                Part::One => {
                    if segments.next().is_none() {
                        return false;
                    }
                }
                Part::Literal(text) => {
                    if segments.next() != Some(text.as_str()) {
                        return false;
                    }
                }
            }
        }
        segments.next().is_none()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let body = text.strip_prefix('/').ok_or(PatternError::NoSlash)?;
        if text.len() > Self::MAX_BYTES {
            return Err(PatternError::TooLong);
        }
        if let Some(c) = text.chars().find(|c| !c.is_ascii_graphic() || matches!(c, '"' | '\'' | '\\' | '`'))
        {
            return Err(PatternError::Character(c));
        }
        let mut parts = Vec::new();
        let mut rest = None;
        for segment in body.split('/').filter(|s| !s.is_empty()) {
            if let Some(name) = rest.take() {
                return Err(PatternError::RestNotLast(name));
            }
            let inner = segment.strip_prefix('{').and_then(|s| s.strip_suffix('}'));
            parts.push(match inner {
                Some(inner) => {
                    let name = inner.strip_prefix('*').unwrap_or(inner);
                    let valid = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
                    if !valid || inner.is_empty() {
                        return Err(PatternError::Placeholder(segment.to_owned()));
                    }
                    if inner.starts_with('*') {
                        rest = Some(name.to_owned());
                        Part::Rest
                    } else {
                        Part::One
                    }
                }
                None if segment.contains(['{', '}']) => {
                    return Err(PatternError::Placeholder(segment.to_owned()));
                }
                None => Part::Literal(segment.to_owned()),
            });
        }
        Ok(Self { text: text.into(), slash: body.ends_with('/') && rest.is_none(), parts })
    }
}

/// A pattern and the service it is for; `None` = every service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePattern {
    pub service: Option<String>,
    pub pattern: Pattern,
}

/// Names routes and keeps their number bounded. One per pipeline.
pub struct Router {
    patterns: Vec<ServicePattern>,
    services: HashMap<Box<str>, HashSet<Arc<str>>>,
    /// Two halves: answers are sought in both and written to `recent`; when that is full it becomes `older`, whose
    /// entries are forgotten. So what is asked for often stays, and the size has a bound.
    recent: HashMap<Box<str>, Arc<str>>,
    older: HashMap<Box<str>, Arc<str>>,
    key: String,
    other: Arc<str>,
}

impl Router {
    pub fn new(patterns: Vec<ServicePattern>) -> Self {
        Self {
            patterns,
            services: HashMap::new(),
            recent: HashMap::new(),
            older: HashMap::new(),
            key: String::new(),
            other: OTHER.into(),
        }
    }

    /// Takes other patterns, after a reload. Routes that are known already keep their place.
    pub fn set_patterns(&mut self, patterns: Vec<ServicePattern>) {
        self.patterns = patterns;
        self.recent.clear();
        self.older.clear();
    }

    /// The route of `path`, which has no query string.
    pub fn route(&mut self, service: &str, path: &str) -> Arc<str> {
        let memorable = service.len() + path.len() < MEMO_KEY;
        if memorable {
            self.key.clear();
            self.key.push_str(service);
            // NUL is in no service name, so that two pairs never share a key.
            self.key.push('\0');
            self.key.push_str(path);
            if let Some(route) = self.recall() {
                return route;
            }
        }
        let route = match self.patterned(service, path) {
            Some(route) => route,
            None => self.admit(service, segment::generalise(path, SEGMENTS)),
        };
        // The overflow is not remembered: those paths are the ones that never come again.
        if memorable && !Arc::ptr_eq(&route, &self.other) {
            self.remember(Arc::clone(&route));
        }
        route
    }

    fn recall(&mut self) -> Option<Arc<str>> {
        if let Some(route) = self.recent.get(self.key.as_str()) {
            return Some(Arc::clone(route));
        }
        let route = self.older.remove(self.key.as_str())?;
        self.remember(Arc::clone(&route));
        Some(route)
    }

    fn remember(&mut self, route: Arc<str>) {
        if self.recent.len() >= MEMO_HALF {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(self.key.as_str().into(), route);
    }

    fn patterned(&self, service: &str, path: &str) -> Option<Arc<str>> {
        let of_service = |p: &&ServicePattern| p.service.as_deref().is_none_or(|s| s == service);
        let found = self.patterns.iter().filter(of_service).find(|p| p.pattern.matches(path))?;
        Some(Arc::clone(&found.pattern.text))
    }

    fn admit(&mut self, service: &str, route: String) -> Arc<str> {
        if !self.services.contains_key(service) {
            if self.services.len() >= SERVICES {
                return Arc::clone(&self.other);
            }
            self.services.insert(service.into(), HashSet::new());
        }
        let Some(routes) = self.services.get_mut(service) else { return Arc::clone(&self.other) };
        if let Some(known) = routes.get(route.as_str()) {
            return Arc::clone(known);
        }
        if routes.len() >= ROUTES_PER_SERVICE {
            return Arc::clone(&self.other);
        }
        let route: Arc<str> = route.into();
        routes.insert(Arc::clone(&route));
        route
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().expect("a valid pattern")
    }

    fn any(text: &str) -> ServicePattern {
        ServicePattern { service: None, pattern: pattern(text) }
    }

    #[test]
    fn placeholders_match_one_segment_or_the_rest() {
        let one = pattern("/orders/{id}");
        assert!(one.matches("/orders/17") && one.matches("/orders/17/") && one.matches("/orders/x"));
        assert!(!one.matches("/orders") && !one.matches("/orders/") && !one.matches("/orders/1/lines"));
        let rest = pattern("/files/{*path}");
        assert!(rest.matches("/files") && rest.matches("/files/a") && rest.matches("/files/a/b/"));
        assert!(!rest.matches("/file/a"));
        let slashed = pattern("/orders/{id}/");
        assert!(slashed.matches("/orders/17/") && !slashed.matches("/orders/17"));
        let root = pattern("/");
        assert!(root.matches("/") && !root.matches("/a"));
    }

    #[test]
    fn a_wrong_pattern_says_what_is_wrong() {
        let error = |text: &str| text.parse::<Pattern>().expect_err(text);
        assert_eq!(error("orders"), PatternError::NoSlash);
        assert_eq!(error("/{*a}/b"), PatternError::RestNotLast("a".into()));
        assert_eq!(error("/a{id}"), PatternError::Placeholder("a{id}".into()));
        assert_eq!(error("/{}"), PatternError::Placeholder("{}".into()));
        assert_eq!(error("/{a-b}"), PatternError::Placeholder("{a-b}".into()));
        assert_eq!(error("/a b"), PatternError::Character(' '));
        assert_eq!(error("/a\"b"), PatternError::Character('"'));
        assert_eq!(error(&format!("/{}", "a".repeat(200))), PatternError::TooLong);
        assert_eq!(
            error("/a{id}").to_string(),
            "`a{id}`: a placeholder is a whole segment, `{name}` or `{*name}`, its name of letters, digits and `_`"
        );
    }

    #[test]
    fn the_first_pattern_of_the_service_wins_over_the_heuristic() {
        let mut router = Router::new(vec![
            ServicePattern { service: Some("shop".into()), pattern: pattern("/u/{name}") },
            any("/u/{*rest}"),
        ]);
        assert_eq!(&*router.route("shop", "/u/alice"), "/u/{name}");
        assert_eq!(&*router.route("shop", "/u/alice/x"), "/u/{*rest}");
        assert_eq!(&*router.route("blog", "/u/alice"), "/u/{*rest}");
        assert_eq!(&*router.route("blog", "/v/17"), "/v/{id}");
    }

    #[test]
    fn new_patterns_apply_to_remembered_paths() {
        let mut router = Router::new(Vec::new());
        assert_eq!(&*router.route("s", "/u/alice"), "/u/alice");
        router.set_patterns(vec![any("/u/{name}")]);
        assert_eq!(&*router.route("s", "/u/alice"), "/u/{name}");
    }

    #[test]
    fn the_excess_is_other() {
        let mut router = Router::new(vec![any("/pattern/{x}")]);
        let letters =
            |n: usize| format!("/{}{}", (b'g' + (n / 20) as u8) as char, (b'g' + (n % 20) as u8) as char);
        for n in 0..ROUTES_PER_SERVICE {
            assert_eq!(*router.route("s", &letters(n)), letters(n));
        }
        assert_eq!(&*router.route("s", "/one-more"), OTHER);
        assert_eq!(&*router.route("s", "/one-more"), OTHER);
        assert_eq!(&*router.route("s", &letters(3)), letters(3), "known routes stay");
        assert_eq!(&*router.route("s", "/pattern/1"), "/pattern/{x}", "the user's patterns are not capped");
        assert_eq!(&*router.route("t", "/one-more"), "/one-more", "each service has its own room");
    }

    #[test]
    fn services_are_bounded_too() {
        let mut router = Router::new(Vec::new());
        for n in 0..SERVICES {
            assert_eq!(&*router.route(&format!("service-{n}"), "/a"), "/a");
        }
        assert_eq!(&*router.route("one-more", "/a"), OTHER);
        assert_eq!(&*router.route("service-0", "/b"), "/b");
        assert_eq!(router.services.len(), SERVICES);
    }

    #[test]
    fn a_million_distinct_urls_take_bounded_memory() {
        let mut router = Router::new(Vec::new());
        let mut routes = HashSet::new();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for n in 0..1_000_000_u64 {
            // xorshift64: words of letters that no rule generalises, the worst case.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let word: String = (0..9).map(|i| (b'g' + ((state >> (i * 5)) % 20) as u8) as char).collect();
            routes.insert(router.route("s", &format!("/{word}/{n}")));
        }
        assert_eq!(routes.len(), ROUTES_PER_SERVICE + 1);
        assert_eq!(router.services["s"].len(), ROUTES_PER_SERVICE);
        assert!(router.recent.len() <= MEMO_HALF && router.older.len() <= MEMO_HALF);
    }

    #[test]
    fn the_memo_is_bounded_and_gives_the_same_answers() {
        let mut router = Router::new(Vec::new());
        for n in 0..20_000_u64 {
            assert_eq!(&*router.route("s", &format!("/orders/{n}")), "/orders/{id}");
            assert_eq!(&*router.route("s", "/often"), "/often");
            assert!(router.recent.len() <= MEMO_HALF && router.older.len() <= MEMO_HALF);
        }
        assert!(router.recent.contains_key("s\0/often"), "what is asked for often stays");
        const { assert!(MEMO_HALF * 2 < 20_000, "the test overflows the memo") };
    }

    proptest! {
        #[test]
        fn any_path_gives_a_safe_and_stable_route(service in "[a-z]{1,8}", path in "\\PC{0,200}|(/[ -~]{0,20}){0,30}") {
            let mut router = Router::new(Vec::new());
            let route = router.route(&service, &path);
            prop_assert_eq!(&router.route(&service, &path), &route);
            prop_assert!(route.len() <= 500, "{}", route);
            prop_assert!(route.starts_with('/') || &*route == "*");
            prop_assert!(route.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b'<' | b'>' | b'?')), "{}", route);
            prop_assert!(route.split('/').count() <= SEGMENTS + 3);
        }
    }
}
