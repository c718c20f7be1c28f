//! What every request passes before it is answered, and every response on its way out.
//!
//! The listener is on loopback, but a browser on this host runs strangers' code, which must neither read profiles
//! (DNS rebinding: the `Host` header gives it away) nor change anything (the `Origin` header). Too much at once is
//! refused, too slow is ended, and responses tell browsers to load and run nothing else.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::Semaphore;

use super::error::ApiError;

/// Requests in progress; a person's browser needs six. Health and metrics are not counted.
const CONCURRENCY: usize = 64;
/// The longest an answer may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

/// For everything but the page and flame graphs.
const NOTHING: &str = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
/// Our own files and our own flame graphs.
pub(super) const PAGE: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    frame-src 'self'; img-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
/// A flame graph carries its script and style and needs nothing else. The sandbox gives it an origin of its own, so
/// that even its script could not read the API.
pub(super) const GRAPH: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
    frame-ancestors 'self'; base-uri 'none'; form-action 'none'; sandbox allow-scripts";

/// What the guard needs to know.
pub(super) struct Guard {
    listen: SocketAddr,
    hosts: Vec<String>,
    slots: Arc<Semaphore>,
}

impl Guard {
    pub(super) fn new(listen: SocketAddr, hosts: Vec<String>) -> Self {
        Self { listen, hosts, slots: Arc::new(Semaphore::new(CONCURRENCY)) }
    }

    /// A name that DNS cannot point here: a loopback name, a loopback address or the address we listen on. When
    /// that is every address, any address will do, since a browser that shows one was not led here by a name. Other
    /// names only the configuration can allow.
    fn allows(&self, authority: &str) -> bool {
        let Ok(authority) = authority.parse::<Authority>() else { return false };
        let host = authority.host();
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        match bare.parse::<IpAddr>() {
            Ok(ip) => ip.is_loopback() || ip == self.listen.ip() || self.listen.ip().is_unspecified(),
            Err(_) => {
                let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
                name == "localhost" || name.ends_with(".localhost") || self.hosts.contains(&name)
            }
        }
    }

    fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let named = one(headers, header::HOST)
            .ok_or_else(|| ApiError::bad_request("host_missing", "exactly one Host header is needed"))?;
        if !self.allows(named) || uri.authority().is_some_and(|a| !self.allows(a.as_str())) {
            return Err(ApiError::bad_request(
                "host_not_allowed",
                format!(
                    "the Host header ({named:?}) names neither this machine's loopback nor the address listened on; \
                     if this host is reached by that name, add it to `allow_hosts` in the configuration"
                ),
            ));
        }
        if matches!(*method, Method::GET | Method::HEAD) || !headers.contains_key(header::ORIGIN) {
            return Ok(());
        }
        let origin = one(headers, header::ORIGIN).and_then(|origin| origin.strip_prefix("http://"));
        if origin.is_none_or(|origin| !origin.eq_ignore_ascii_case(named)) {
            return Err(ApiError::bad_request(
                "origin_not_allowed",
                "a page of another origin may not change anything here",
            ));
        }
        Ok(())
    }
}

fn one(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// The middleware around all routes.
pub(super) async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let mut response = match guard.check(request.method(), request.uri(), request.headers()) {
        Err(e) => e.into_response(),
        Ok(()) => answer(&guard, request, next).await,
    };
    let headers = response.headers_mut();
    let default = |headers: &mut HeaderMap, name: HeaderName, value| {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    };
    default(headers, header::CONTENT_SECURITY_POLICY, NOTHING);
    default(headers, header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    default(headers, header::REFERRER_POLICY, "no-referrer");
    default(headers, header::CACHE_CONTROL, "no-store");
    default(headers, HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    response
}

async fn answer(guard: &Guard, request: Request, next: Next) -> Response {
    // Those who watch the daemon must see it best when it is busy.
    let watched = request.uri().path().starts_with("/-/") || request.uri().path() == "/metrics";
    let slot = if watched { None } else { Some(guard.slots.try_acquire()) };
    if let Some(Err(_)) = slot {
        return ApiError::too_many().into_response();
    }
    match tokio::time::timeout(TIMEOUT, next.run(request)).await {
        // The layer that counts the bytes says so in plain text.
        Ok(response) if response.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::too_large().into_response()
        }
        Ok(response) => response,
        Err(_) => ApiError::unavailable("timeout", "the answer took too long").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(listen: &str, method: Method, headers: &[(HeaderName, &str)]) -> Option<&'static str> {
        let guard = Guard::new(listen.parse().unwrap(), vec!["profiler.shop.example".into()]);
        let headers: HeaderMap =
            headers.iter().map(|(n, v)| (n.clone(), HeaderValue::from_str(v).unwrap())).collect();
        guard.check(&method, &"/".parse().unwrap(), &headers).err().map(|e| e.code)
    }

    #[test]
    fn only_hosts_that_cannot_be_rebound_are_answered() {
        let host = |listen, name| code(listen, Method::GET, &[(header::HOST, name)]);
        for good in
            ["localhost", "LOCALHOST:9977", "a.localhost", "127.0.0.1:9977", "127.8.8.8", "[::1]:9977"]
        {
            assert_eq!(host("127.0.0.1:9977", good), None, "{good}");
        }
        for bad in [
            "evil.example",
            "localhost.evil.example",
            "notlocalhost",
            "10.0.0.5",
            "",
            "a b",
            "127.0.0.1.evil",
        ] {
            assert_eq!(host("127.0.0.1:9977", bad), Some("host_not_allowed"), "{bad}");
        }
        assert_eq!(host("10.0.0.5:80", "10.0.0.5"), None);
        assert_eq!(host("0.0.0.0:80", "10.0.0.5"), None);
        assert_eq!(host("0.0.0.0:80", "evil.example"), Some("host_not_allowed"));
        for good in ["profiler.shop.example", "Profiler.Shop.Example.:9977"] {
            assert_eq!(host("0.0.0.0:80", good), None, "{good}");
        }
        for bad in ["shop.example", "x.profiler.shop.example"] {
            assert_eq!(host("0.0.0.0:80", bad), Some("host_not_allowed"), "{bad}");
        }
        assert_eq!(code("127.0.0.1:1", Method::GET, &[]), Some("host_missing"));
    }

    #[test]
    fn other_origins_change_nothing() {
        let post = |origin| {
            code(
                "127.0.0.1:9977",
                Method::POST,
                &[(header::HOST, "localhost:9977"), (header::ORIGIN, origin)],
            )
        };
        assert_eq!(post("http://localhost:9977"), None);
        for bad in ["http://evil.example", "null", "https://localhost:9977", "http://localhost:1", ""] {
            assert_eq!(post(bad), Some("origin_not_allowed"), "{bad}");
        }
        assert_eq!(code("127.0.0.1:9977", Method::POST, &[(header::HOST, "localhost")]), None);
    }
}
