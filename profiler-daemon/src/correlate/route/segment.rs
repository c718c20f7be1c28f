//! The heuristic: which segments of a path name a place in the application and which name a thing in its data.
//!
//! In: a path. Out: the path with each identifier replaced by `{id}`. Every rule looks at one segment alone, so the
//! answer does not depend on the order of requests. A wrong `{id}` loses some detail; a missed one costs a place
//! among the service's routes, which is why the rules lean towards `{id}`.

/// An identifier.
const ID: &str = "{id}";
/// The rest of the path, whatever it is.
const REST: &str = "{*}";
/// No word of a route is longer. 40 lets `password-reset-confirmation-complete` through.
const WORD_MAX: usize = 40;

/// Endings of files that a site serves as they are. Their routes differ in nothing that matters here.
const ASSETS: &[&str] = &[
    "avif", "css", "eot", "gif", "ico", "jpeg", "jpg", "js", "map", "mjs", "mp3", "mp4", "otf", "png", "svg",
    "ttf", "wasm", "webm", "webp", "woff", "woff2",
];

/// The route of `path` by rules alone, of at most `max` segments and then `{*}`.
pub(super) fn generalise(path: &str, max: usize) -> String {
    if path == "*" {
        return path.to_owned();
    }
    let Some(path) = origin_form(path) else { return format!("/{REST}") };
    let slash = path.ends_with('/');
    let mut segments = path.split('/').filter(|s| !s.is_empty()).peekable();
    let mut route = String::with_capacity(path.len().min(64));
    let mut count = 0;
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        route.push('/');
        if count == max {
            route.push_str(REST);
            return route;
        }
        if count == 0 && !last && is_asset(path) {
            route.push_str(if is_identifier(segment) { ID } else { segment });
            route.push('/');
            route.push_str(REST);
            return route;
        }
        route.push_str(if is_identifier(segment) { ID } else { segment });
        count += 1;
    }
    if slash || route.is_empty() {
        route.push('/');
    }
    route
}

/// The path of a request target: itself, or what follows the authority of an absolute URI (as sent to a proxy).
/// `None` for the authority alone, as in CONNECT.
fn origin_form(target: &str) -> Option<&str> {
    if target.starts_with('/') {
        return Some(target);
    }
    let (_, rest) = target.split_once("://")?;
    Some(rest.find('/').map_or("/", |at| &rest[at..]))
}

fn is_asset(path: &str) -> bool {
    let Some((_, extension)) = path.rsplit_once('.') else { return false };
    ASSETS.iter().any(|a| a.eq_ignore_ascii_case(extension))
}

fn is_identifier(segment: &str) -> bool {
    let bytes = segment.as_bytes();
    // What is not a plain word: escapes, non-ASCII, e-mail addresses, quotes. It is data, and unsafe in a label.
    if bytes.len() > WORD_MAX
        || !bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-._~!$()*+,;=:".contains(b))
    {
        return true;
    }
    is_hex(bytes) || has_number(bytes) || is_token(bytes)
}

/// 8 or more hexadecimal digits, with the hyphens of a UUID between them or none.
fn is_hex(bytes: &[u8]) -> bool {
    let digits = bytes.iter().filter(|b| b.is_ascii_hexdigit()).count();
    let hyphens = bytes.iter().filter(|b| **b == b'-').count();
    digits + hyphens == bytes.len() && (hyphens == 0 && digits >= 8 || hyphens == 4 && digits == 32)
}

/// A number: the whole segment, a part of two or more digits between separators (`order-12`, `2024-01-31`), three
/// digits at the segment's end (`user123`) or four anywhere. `v1`, `oauth2`, `utf-8` and `base64` are words.
fn has_number(bytes: &[u8]) -> bool {
    if !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_')) {
        return bytes.iter().any(u8::is_ascii_digit);
    }
    let parts = bytes.split(|b| !b.is_ascii_alphanumeric());
    if parts.clone().any(|p| p.len() >= 2 && p.iter().all(u8::is_ascii_digit)) {
        return true;
    }
    let run = |run: usize, b: &u8| if b.is_ascii_digit() { run + 1 } else { 0 };
    let at_end = bytes.iter().fold(0, run);
    let longest = bytes
        .iter()
        .scan(0, |r, b| {
            *r = run(*r, b);
            Some(*r)
        })
        .max()
        .unwrap_or(0);
    at_end >= 3 || longest >= 4
}

/// A random token, such as `dQw4w9WgXcQ`: ten or more characters that change between letters and digits at least
/// three times, or, without digits, twenty or more that change between upper and lower case at least eight times
/// (`XkqPLmWtzRvBnHyJcGdSfK`). Words in camel case stay below both.
fn is_token(bytes: &[u8]) -> bool {
    let changes = |class: fn(&u8) -> bool| {
        let letters = bytes.iter().filter(|b| b.is_ascii_alphanumeric()).collect::<Vec<_>>();
        letters.windows(2).filter(|w| class(w[0]) != class(w[1])).count()
    };
    bytes.len() >= 10 && changes(u8::is_ascii_digit) >= 3
        || bytes.len() >= 20 && changes(u8::is_ascii_uppercase) >= 8
}

#[cfg(test)]
mod tests {
    use super::generalise;

    fn route(path: &str) -> String {
        generalise(path, 10)
    }

    #[test]
    fn words_stay() {
        for path in [
            "/",
            "/orders",
            "/orders/",
            "/api/v1/orders",
            "/api/v2.1/orders",
            "/oauth2/token",
            "/i18n/setlang/",
            "/accounts/password_reset/done/",
            "/getUserById",
            "/-/healthy",
            "/.well-known/acme-challenge",
            "/favicon.ico",
            "/robots.txt",
            "/base64",
            "/page2",
            "/encode/utf-8",
            "/cafe",
            "/RegistrationServiceV2/GetAll",
        ] {
            assert_eq!(route(path), path);
        }
    }

    #[test]
    fn identifiers_do_not() {
        for (path, expected) in [
            ("/orders/1", "/orders/{id}"),
            ("/orders/1/", "/orders/{id}/"),
            ("/orders/-1", "/orders/{id}"),
            ("/at/52.52/13.40", "/at/{id}/{id}"),
            ("/u/3fa85f64-5717-4562-b3fc-2c963f66afa6/edit", "/u/{id}/edit"),
            ("/u/3fa85f6457174562b3fc2c963f66afa6", "/u/{id}"),
            ("/commit/deadbeef", "/commit/{id}"),
            ("/2024-01-31/report", "/{id}/report"),
            ("/2024/01/31/", "/{id}/{id}/{id}/"),
            ("/order-12345", "/{id}"),
            ("/user123/posts", "/{id}/posts"),
            ("/posts/12-my-first-post", "/posts/{id}"),
            ("/watch/dQw4w9WgXcQ", "/watch/{id}"),
            ("/customers/cus_9s6XKzkNRiz8i3", "/customers/{id}"),
            ("/t/XkqPLmWtzRvBnHyJcGdSfK", "/t/{id}"),
            ("/u/alice@example.org", "/u/{id}"),
            ("/tags/caf%C3%A9", "/tags/{id}"),
            ("/tags/café", "/tags/{id}"),
            ("/posts/how-to-bake-a-really-nice-cake-without-eggs", "/posts/{id}"),
            ("/x/\"><script>", "/x/{id}"),
        ] {
            assert_eq!(route(path), expected, "{path}");
        }
    }

    #[test]
    fn assets_fall_into_one_route_per_folder() {
        assert_eq!(route("/static/css/app.3f2a9c.css"), "/static/{*}");
        assert_eq!(route("/static/logo.PNG"), "/static/{*}");
        assert_eq!(route("/17/logo.png"), "/{id}/{*}");
        assert_eq!(route("/logo.png"), "/logo.png");
    }

    #[test]
    fn odd_targets_have_routes_too() {
        assert_eq!(route("*"), "*");
        assert_eq!(route(""), "/{*}");
        assert_eq!(route("example.org:443"), "/{*}");
        assert_eq!(route("http://example.org/orders/1"), "/orders/{id}");
        assert_eq!(route("http://example.org"), "/");
        assert_eq!(route("//a//b"), "/a/b");
    }

    #[test]
    fn deep_paths_end_in_the_rest() {
        assert_eq!(route("/a/b/c/d/e/f/g/h/i/j"), "/a/b/c/d/e/f/g/h/i/j");
        assert_eq!(route("/a/b/c/d/e/f/g/h/i/j/k/l/m"), "/a/b/c/d/e/f/g/h/i/j/{*}");
    }
}
