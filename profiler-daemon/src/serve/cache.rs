//! Answers that took long to compute, kept for a moment.
//!
//! Pages that are left open ask the same again and again, and a flame graph is fetched twice, first to see whether it
//! can be shown at all. An answer is given again for ten times as long as it took, so that no question, however often
//! it is asked, takes more than a tenth of a core; what is cheap is as good as always fresh.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};

/// How much longer than it took an answer is kept.
const FACTOR: u32 = 10;
/// Nobody wants to see older figures.
const LONGEST: Duration = Duration::from_secs(5);
/// Answers kept: a few open pages, each with a list and a graph.
const ENTRIES: usize = 16;
/// Bytes of all answers that are kept; a large flame graph has a few million.
const BYTES: usize = 32 << 20;

/// An answer that can be given more than once.
#[derive(Clone)]
pub(super) struct Document {
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl IntoResponse for Document {
    fn into_response(self) -> Response {
        (self.headers, self.body).into_response()
    }
}

#[derive(Default)]
pub(super) struct Cache {
    /// The oldest first.
    entries: Mutex<Vec<Entry>>,
}

struct Entry {
    question: String,
    until: Instant,
    document: Document,
}

impl Cache {
    /// The answer to the same question, if it is new enough.
    pub(super) fn get(&self, question: &str) -> Option<Document> {
        let now = Instant::now();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|entry| entry.until > now);
        entries.iter().find(|entry| entry.question == question).map(|entry| entry.document.clone())
    }

    /// Keeps an answer that took so long.
    pub(super) fn put(&self, question: String, took: Duration, document: Document) {
        let now = Instant::now();
        let until = now + took.saturating_mul(FACTOR).min(LONGEST);
        let size = |entry: &Entry| entry.question.len() + entry.document.body.len();
        let new = Entry { question, until, document };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|entry| entry.until > now && entry.question != new.question);
        let mut bytes = entries.iter().map(size).sum::<usize>() + size(&new);
        while !entries.is_empty() && (bytes > BYTES || entries.len() >= ENTRIES) {
            bytes -= size(&entries.remove(0));
        }
        if bytes <= BYTES {
            entries.push(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(bytes: usize) -> Document {
        Document { headers: HeaderMap::new(), body: vec![b'x'; bytes].into() }
    }

    #[test]
    fn what_took_long_is_given_again_and_what_did_not_is_not() {
        let cache = Cache::default();
        cache.put("slow".into(), Duration::from_secs(3_600), document(1));
        cache.put("fast".into(), Duration::ZERO, document(2));
        assert_eq!(cache.get("slow").map(|d| d.body.len()), Some(1));
        assert!(cache.get("fast").is_none() && cache.get("other").is_none());
        let entries = cache.entries.lock().unwrap();
        assert!(entries[0].until <= Instant::now() + LONGEST);
    }

    #[test]
    fn number_and_size_are_bounded_and_the_oldest_go() {
        let cache = Cache::default();
        let hour = Duration::from_secs(3_600);
        for n in 0..100 {
            cache.put(n.to_string(), hour, document(10));
        }
        assert_eq!(cache.entries.lock().unwrap().len(), ENTRIES);
        assert!(cache.get("83").is_none() && cache.get("84").is_some());
        cache.put("large".into(), hour, document(BYTES - 100));
        assert_eq!(cache.get("large").map(|d| d.body.len()), Some(BYTES - 100));
        assert!(cache.entries.lock().unwrap().len() < 12);
        cache.put("larger".into(), hour, document(BYTES + 1));
        assert!(cache.get("larger").is_none());
    }
}
