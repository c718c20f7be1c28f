//! Taking the secrets out of captured bytes.
//!
//! In: what was captured of one direction of a connection, piece by piece. Out: the same number of bytes, of which only
//! what the pipeline needs keeps its letters. A head may be cut anywhere, so where a piece left off is remembered.

use std::collections::HashMap;

/// Headers whose values frame a message or link it to a trace, and hold nothing secret.
const KEPT: [&[u8]; 7] = [
    b"content-length",
    b"transfer-encoding",
    b"connection",
    b"content-type",
    b"expect",
    b"upgrade",
    b"traceparent",
];
/// No kept name is longer; of a longer one the rest does not matter.
const NAME_MAX: usize = 24;
/// Directions remembered to be within a head. Heads are nearly always whole; what is forgotten is blanked.
const OPEN_MAX: usize = 4096;

/// Connection, and whether incoming.
pub type Stream = ([u8; 16], bool);

/// Where a piece left off within a head.
#[derive(Clone, Debug)]
enum Within {
    /// In the first line, of which nothing more is kept.
    First,
    /// In a header's name, or in a line that is none.
    Name(Vec<u8>),
    /// In a header's value.
    Value { kept: bool },
}

/// The state of every stream that is within a head.
#[derive(Default)]
pub struct Blanks(HashMap<Stream, Within>);

impl Blanks {
    /// Blanks the next bytes of a stream.
    pub fn blank(&mut self, stream: Stream, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut within = self.0.remove(&stream);
        for line in bytes.split_inclusive_mut(|b| *b == b'\n') {
            let ended = line.last() == Some(&b'\n');
            let empty = matches!(&*line, b"\r\n" | b"\n");
            within = match within {
                None if empty => None, // before a first line
                None => first_line(line),
                Some(Within::Name(name)) if empty && name.is_empty() => None,
                Some(state) => header(line, state),
            };
            if ended && within.is_some() {
                within = Some(Within::Name(Vec::new()));
            }
        }
        if let Some(within) = within
            && self.0.len() < OPEN_MAX
        {
            self.0.insert(stream, within);
        }
    }
}

fn hide(bytes: &mut [u8]) {
    bytes.iter_mut().filter(|b| !matches!(b, b'\r' | b'\n')).for_each(|b| *b = b'x');
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Blanks a first line, or the part of it that is there; `None` when what follows is another first line.
fn first_line(line: &mut [u8]) -> Option<Within> {
    if line.starts_with(b"HTTP/1.") {
        // The version, the code and the space that must follow it.
        let end = line.len().min(13);
        hide(&mut line[end..]);
        return Some(Within::First);
    }
    if line.starts_with(b"PRI * HTTP/2.0") {
        return Some(Within::First);
    }
    for start in [&b"PROXY TCP"[..], b"PROXY UNKNOWN"] {
        if line.starts_with(start) {
            hide(&mut line[start.len()..]);
            return None;
        }
    }
    if let [0x16, 0x03, rest @ ..] = line {
        hide(rest); // TLS
        return Some(Within::First);
    }
    let method = line.iter().take_while(|b| b.is_ascii_uppercase() || matches!(b, b'-' | b'_')).count();
    let target = method + 1;
    let whole = line.last() == Some(&b'\n');
    let version = line.windows(7).rposition(|window| window == b" HTTP/1");
    let plausible = matches!(line.get(target), Some(b'/' | b'*')) || version.is_some();
    if method == 0 || line.get(method) != Some(&b' ') || !plausible || (whole && version.is_none()) {
        // No request line, or nothing but a part of a method.
        if method < line.len() || method > 7 {
            hide(line);
        }
        return Some(Within::First);
    }
    let end = version.unwrap_or(line.len()).max(target);
    let target = &mut line[target..end];
    // What an absolute target says before its path may be a password.
    if let Some(scheme) = find(target, b"://").filter(|at| !target[..*at].contains(&b'/')) {
        let path =
            target[scheme + 3..].iter().position(|b| *b == b'/').map_or(target.len(), |at| scheme + 3 + at);
        hide(&mut target[scheme + 3..path]);
    }
    if let Some(query) = target.iter().position(|b| matches!(b, b'?' | b'#')) {
        hide(&mut target[query + 1..]);
    }
    Some(Within::First)
}

/// Blanks a line behind the first, or the part of it that is there.
fn header(line: &mut [u8], state: Within) -> Option<Within> {
    let mut name = match state {
        Within::First => {
            // The rest of the first line; its end is needed where it was cut before the version.
            let end = line.windows(7).rposition(|window| window == b" HTTP/1").unwrap_or(line.len());
            hide(&mut line[..end]);
            return Some(Within::First);
        }
        Within::Value { kept } => {
            if !kept {
                hide(line);
            }
            return Some(Within::Value { kept });
        }
        Within::Name(name) => name,
    };
    if name.is_empty() && line == b"\r" {
        // Perhaps of the empty line.
        return Some(Within::Name(name));
    }
    let colon = line.iter().position(|b| *b == b':');
    let part = &line[..colon.unwrap_or(line.len())];
    let room = NAME_MAX.saturating_sub(name.len());
    name.extend_from_slice(&part[..part.len().min(room)]);
    let Some(colon) = colon else {
        // A word of no header may be anything, and so may a header's name that is not known.
        if !KEPT.iter().any(|kept| kept.get(..name.len()).is_some_and(|b| b.eq_ignore_ascii_case(&name))) {
            hide(line);
        }
        return Some(Within::Name(name));
    };
    let kept = KEPT.iter().any(|kept| kept.eq_ignore_ascii_case(&name));
    if !kept {
        let (name, value) = line.split_at_mut(colon);
        hide(name);
        hide(&mut value[1..]);
    }
    Some(Within::Value { kept })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "POST http://user:geheim1@host/shop/items;v=1?token=geheim2&a=b HTTP/1.1\r\nHost: x\r\n\
        Cookie: session=geheim3\r\n folded geheim4\r\nX-Key:geheim5\r\nContent-Length: 12\r\nTraceparent: 00-ab\r\n\
        geheim6 no header\r\nX: y\r\n geheim7:folded\r\ngeheim8: name\r\n\r\n";

    fn blanked(parts: &[&[u8]]) -> String {
        let mut blanks = Blanks::default();
        let mut all = Vec::new();
        for part in parts {
            let mut part = part.to_vec();
            blanks.blank(([0; 16], true), &mut part);
            all.extend(part);
        }
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn what_frames_is_kept_and_the_rest_is_not() {
        let text = blanked(&[HEAD.as_bytes()]);
        assert_eq!(text.len(), HEAD.len());
        assert!(!text.contains("geheim"), "{text}");
        for kept in
            ["POST http://", "/shop/items;v=1?", " HTTP/1.1\r\n", "\r\nContent-Length: 12\r\n", "00-ab"]
        {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        assert!(text.ends_with("\r\n\r\n"));
    }

    #[test]
    fn an_end_that_is_cut_is_an_end() {
        let parts: [&[u8]; 2] = [b"GET /a HTTP/1.1\r\nContent-Length: 0\r\n\r", b"\nGET /b HTTP/1.1\r\n\r\n"];
        assert_eq!(blanked(&parts), "GET /a HTTP/1.1\r\nContent-Length: 0\r\n\r\nGET /b HTTP/1.1\r\n\r\n");
    }

    #[test]
    fn bodies_taken_for_heads_are_hidden() {
        for body in
            ["PASSWORD=geheim", "TOKEN geheim\r\n", "GEHEIMGEHEIM", "GET geheim\r\n", "\r\nPIN: 1geheim"]
        {
            let text = blanked(&[body.as_bytes()]).to_ascii_lowercase();
            assert!(!text.contains("geheim"), "{text}");
        }
        assert_eq!(blanked(&[b"HTTP/1.1 200 geheim\r\n\r\n"]), "HTTP/1.1 200 xxxxxx\r\n\r\n");
        assert_eq!(
            blanked(&[b"PROXY TCP4 10.0.0.1 9\r\nGET /a?b HTTP/1.1\r\n\r\n"]),
            "PROXY TCPxxxxxxxxxxxx\r\nGET /a?x HTTP/1.1\r\n\r\n"
        );
    }

    proptest! {
        /// However a head is cut, no secret longer than the shortest of them gets through, and framing survives.
        #[test]
        fn cuts_let_nothing_through(cuts in proptest::collection::btree_set(1..HEAD.len(), 0..6)) {
            let cuts: Vec<usize> = cuts.into_iter().chain([HEAD.len()]).collect();
            let mut start = 0;
            let mut parts = Vec::new();
            for cut in cuts {
                parts.push(&HEAD.as_bytes()[start..cut]);
                start = cut;
            }
            let text = blanked(&parts);
            prop_assert_eq!(text.len(), HEAD.len());
            for secret in ["geheim1", "geheim2", "geheim3", "geheim4", "geheim5", "geheim6", "geheim7", "geheim8"] {
                prop_assert!(!text.contains(secret), "{}", text);
            }
            prop_assert!(text.contains("\r\nContent-Length: 12\r\n"), "{}", text);
        }
    }
}
