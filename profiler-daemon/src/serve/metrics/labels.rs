//! Label values of requests, from bounded sets.
//!
//! Every distinct combination is a time series for ever, here and in Prometheus, and the words come from targets and
//! their clients. What exceeds a limit is counted under `_OTHER`, the name that OpenTelemetry gives such things.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::correlate::route::OTHER;
use crate::record::RequestRecord;

/// Services on one host that are worth a name of their own.
const MAX_SERVICES: usize = 100;
/// Routes of one service.
const MAX_ROUTES: usize = 200;
/// Combinations of all labels; each is a histogram, some 1.5 kB in an answer.
const MAX_SERIES: usize = 4_000;
/// A longer name is cut: labels are sent with every bucket of every answer.
const MAX_LEN: usize = 200;
/// The methods of RFC 9110 and PATCH (RFC 5789), which OpenTelemetry names known.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Service, method, route, status.
pub(super) type Labels = [String; 4];

/// Decides on the labels of requests and remembers what it has admitted.
#[derive(Default)]
pub(super) struct Admission {
    services: FxHashMap<String, FxHashSet<String>>,
    series: FxHashSet<Labels>,
}

impl Admission {
    /// The labels of a request, and whether a limit changed them.
    pub(super) fn admit(&mut self, record: &RequestRecord) -> (Labels, bool) {
        let service = cut(&record.service);
        let route = record.route.as_deref().map_or_else(|| OTHER.to_owned(), cut);
        let method = METHODS
            .iter()
            .find(|m| Some(**m) == record.method.as_deref())
            .map_or(OTHER.to_owned(), |&m| m.to_owned());
        let status = match record.status {
            None => String::new(),
            Some(status @ 100..=599) => status.to_string(),
            Some(_) => OTHER.to_owned(),
        };
        let full = self.services.len() >= MAX_SERVICES;
        let (service, mut over) = if full && !self.services.contains_key(&service) {
            (OTHER.to_owned(), true)
        } else {
            (service, false)
        };
        let routes = self.services.entry(service.clone()).or_default();
        let route = if routes.len() < MAX_ROUTES || routes.contains(&route) {
            routes.insert(route.clone());
            route
        } else {
            over = true;
            OTHER.to_owned()
        };
        let labels = [service, method, route, status];
        if self.series.len() < MAX_SERIES || self.series.contains(&labels) {
            self.series.insert(labels.clone());
            return (labels, over);
        }
        (std::array::from_fn(|_| OTHER.to_owned()), true)
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_LEN)].to_owned()
}
