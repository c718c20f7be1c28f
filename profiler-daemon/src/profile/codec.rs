//! The stored form of a profile.
//!
//! One version byte, then LEB128 varints throughout: requests, duration, truncated samples; the strings (length and
//! bytes); the functions but the root's (name, file, first line, kind); the nodes but the root (distance back to the
//! parent, function, own cost, own lines, call lines), the root's own cost before them. Lines are sorted and stored as
//! differences. Totals are derived, so they are not stored. The store compresses the whole.
//!
//! The bytes come from a disk that others may have written, so decoding trusts nothing: every count is checked
//! against the bounds of a profile before memory is taken for it, and there is no recursion.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use super::tree::{Cost, Function, LineCost, Lines, MAX_DEPTH, MAX_LINES, MAX_NAME, MAX_NODES, Node};
use super::{FrameKind, Profile};

const VERSION: u8 = 1;

/// What a function and a node mostly take, bytes; the names are half of it.
const ENCODED_FUNCTION: usize = 64;
const ENCODED_NODE: usize = 16;

/// Stored bytes that are not a profile.
#[derive(Debug, thiserror::Error)]
#[error("not a stored profile: {0}")]
pub struct DecodeError(pub String);

impl Profile {
    /// Uncompressed binary form with a version byte first; the store compresses it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(ENCODED_FUNCTION * self.functions.len() + ENCODED_NODE * self.nodes.len());
        out.push(VERSION);
        for value in [self.requests, self.duration_ns, self.truncated_samples] {
            put(&mut out, value);
        }
        let mut ids: FxHashMap<&str, u64> = FxHashMap::default();
        let mut strings: Vec<&str> = Vec::new();
        for function in &self.functions[1..] {
            for text in [&*function.name, &*function.file] {
                ids.entry(text).or_insert_with(|| {
                    strings.push(text);
                    strings.len() as u64 - 1
                });
            }
        }
        put(&mut out, strings.len() as u64);
        for text in strings {
            put(&mut out, text.len() as u64);
            out.extend_from_slice(text.as_bytes());
        }
        put(&mut out, self.functions.len() as u64 - 1);
        for function in &self.functions[1..] {
            put(&mut out, ids[&*function.name]);
            put(&mut out, ids[&*function.file]);
            put(&mut out, function.first_line.into());
            out.push(kind_code(function.kind));
        }
        put_cost(&mut out, self.nodes[0].own);
        put(&mut out, self.nodes.len() as u64 - 1);
        for (node, index) in self.nodes.iter().zip(0u32..).skip(1) {
            put(&mut out, (index - node.parent).into());
            put(&mut out, node.function.into());
            put_cost(&mut out, node.own);
            put_lines(&mut out, &node.own_lines);
            put_lines(&mut out, &node.call_lines);
        }
        out
    }

    /// The inverse of [`Profile::encode`]. Any other bytes are an error, never a panic.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader { bytes };
        match from.byte()? {
            VERSION => {}
            other => return Err(DecodeError(format!("version {other}, this program knows {VERSION}"))),
        }
        let mut profile = Profile {
            requests: from.number()?,
            duration_ns: from.number()?,
            truncated_samples: from.number()?,
            ..Profile::default()
        };
        let strings = from.strings()?;
        from.functions(&strings, &mut profile)?;
        profile.nodes[0].own = from.cost()?;
        from.nodes(&mut profile)?;
        if !from.bytes.is_empty() {
            return Err(DecodeError(format!("{} bytes too many", from.bytes.len())));
        }
        profile.derive_totals();
        Ok(profile)
    }
}

fn kind_code(kind: FrameKind) -> u8 {
    match kind {
        FrameKind::Python => 0,
        FrameKind::Native => 1,
        FrameKind::Kernel => 2,
        FrameKind::Wait => 3,
    }
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_cost(out: &mut Vec<u8>, cost: Cost) {
    put(out, cost.ns);
    put(out, cost.samples);
}

fn put_lines(out: &mut Vec<u8>, lines: &[LineCost]) {
    put(out, lines.len() as u64);
    let mut before = 0;
    for LineCost { line, cost } in lines {
        put(out, (line - before).into());
        put_cost(out, *cost);
        before = *line;
    }
}

/// What is left to decode.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) =
            self.bytes.split_at_checked(len).ok_or_else(|| DecodeError("it ends too early".into()))?;
        self.bytes = rest;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(DecodeError("a number is too large".into()))
    }

    /// A number that must not exceed `most`.
    fn upto(&mut self, most: usize, what: &str) -> Result<usize, DecodeError> {
        let value = self.number()?;
        usize::try_from(value)
            .ok()
            .filter(|value| *value <= most)
            .ok_or_else(|| DecodeError(format!("{what} {value}, at most {most} here")))
    }

    fn line(&mut self) -> Result<u32, DecodeError> {
        Ok(self.upto(u32::MAX as usize, "line")? as u32)
    }

    fn cost(&mut self) -> Result<Cost, DecodeError> {
        Ok(Cost { ns: self.number()?, samples: self.number()? })
    }

    fn strings(&mut self) -> Result<Vec<Arc<str>>, DecodeError> {
        let count = self.upto(2 * MAX_NODES, "strings")?;
        let mut strings = Vec::new();
        for _ in 0..count {
            let len = self.upto(MAX_NAME, "length of a string")?;
            let text = std::str::from_utf8(self.take(len)?)
                .map_err(|_| DecodeError("a string is not UTF-8".into()))?;
            strings.push(Arc::from(text));
        }
        Ok(strings)
    }

    fn functions(&mut self, strings: &[Arc<str>], into: &mut Profile) -> Result<(), DecodeError> {
        let count = self.upto(MAX_NODES, "functions")?;
        let mut seen = FxHashSet::default();
        for _ in 0..count {
            let mut text = || {
                let at = self.upto(strings.len().saturating_sub(1), "string")?;
                strings.get(at).cloned().ok_or_else(|| DecodeError("no strings".into()))
            };
            let (name, file) = (text()?, text()?);
            let first_line = self.line()?;
            let kind = match self.byte()? {
                0 => FrameKind::Python,
                1 => FrameKind::Native,
                2 => FrameKind::Kernel,
                3 => FrameKind::Wait,
                other => return Err(DecodeError(format!("kind {other}"))),
            };
            let function = Function { name, file, first_line, kind };
            if !seen.insert(function.clone()) {
                return Err(DecodeError("a function twice".into()));
            }
            into.functions.push(function);
        }
        Ok(())
    }

    fn nodes(&mut self, into: &mut Profile) -> Result<(), DecodeError> {
        let count = self.upto(MAX_NODES - 1, "nodes")?;
        let mut seen = FxHashSet::default();
        let mut depths = vec![0usize];
        let mut line_entries = 0;
        for index in 1..=count {
            let back = self.upto(index, "distance to the parent")?;
            let function = self.upto(into.functions.len() - 1, "function")?;
            if back == 0 || function == 0 {
                return Err(DecodeError("a node has no parent or no function".into()));
            }
            let parent = index - back;
            // One more than frames may have: a `[truncated]` below the deepest.
            if depths[parent] > MAX_DEPTH {
                return Err(DecodeError("the tree is too deep".into()));
            }
            depths.push(depths[parent] + 1);
            if !seen.insert((parent, function)) {
                return Err(DecodeError("a node has two children for one function".into()));
            }
            let mut node = Node::new(function as u32, parent as u32);
            node.own = self.cost()?;
            node.own_lines = self.lines(&mut line_entries)?;
            node.call_lines = self.lines(&mut line_entries)?;
            into.nodes[parent].children.push(index as u32);
            into.nodes.push(node);
        }
        Ok(())
    }

    fn lines(&mut self, entries: &mut usize) -> Result<Lines, DecodeError> {
        let count = self.upto(MAX_LINES - *entries, "lines")?;
        *entries += count;
        let mut lines = Lines::new();
        let mut before = 0u32;
        for _ in 0..count {
            let step = self.line()?;
            let line = before
                .checked_add(step)
                .filter(|line| *line > before)
                .ok_or_else(|| DecodeError("lines out of order".into()))?;
            lines.push(LineCost { line, cost: self.cost()? });
            before = line;
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{frame, py, stack};
    use super::super::{Builder, Frame};
    use super::*;

    #[test]
    fn the_bytes_are_as_documented() {
        let mut b = Builder::default();
        b.add(&stack(&[py("f", 300)]), 5);
        let mut expected = vec![1, 1, 200, 1, 0]; // version, 1 request, 200 ns, none truncated
        expected.extend([2, 1, b'f', 18]); // two strings
        expected.extend(b"/srv/shop/views.py");
        expected.extend([1, 0, 1, 1, 0]); // one function: name 0, file 1, line 1, python
        expected.extend([0, 0]); // the root's own cost
        expected.extend([1, 1, 1, 5, 1]); // one node: parent 1 back, function 1, 5 ns, 1 sample
        expected.extend([1, 0xac, 0x02, 5, 1]); // one line: 300
        expected.extend([0]); // no call lines
        assert_eq!(b.finish(200).encode(), expected);
    }

    #[test]
    fn every_prefix_and_every_extension_is_refused() {
        let mut b = Builder::default();
        b.add(&stack(&[py("f", 300), py("g", 2)]), 5);
        b.add(&stack(&[py("f", 301), py("h", 2)]), 5);
        let bytes = b.finish(1).encode();
        for len in 0..bytes.len() {
            assert!(Profile::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert!(Profile::decode(&[&bytes[..], &[0]].concat()).is_err());
        assert!(Profile::decode(&bytes).is_ok());
    }

    #[test]
    fn an_endless_chain_of_nodes_is_refused() {
        let mut bytes = vec![1, 0, 0, 0, 1, 1, b'f', 1, 0, 0, 0, 0, 0, 0];
        put(&mut bytes, MAX_DEPTH as u64 + 10);
        for _ in 0..MAX_DEPTH + 10 {
            bytes.extend([1, 1, 0, 0, 0, 0]);
        }
        let error = Profile::decode(&bytes).expect_err("too deep");
        assert!(error.0.contains("deep"), "{error}");
    }

    #[test]
    fn huge_counts_take_no_memory() {
        for position in [4usize, 7] {
            let mut bytes = vec![1, 0, 0, 0, 1, 1, b'f'];
            bytes.truncate(position);
            put(&mut bytes, u64::MAX);
            assert!(Profile::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_number_of_more_than_64_bits_is_refused() {
        let mut bytes = vec![1];
        bytes.extend([0xff; 9]);
        bytes.push(0x02);
        assert!(Profile::decode(&bytes).is_err());
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let kinds = [FrameKind::Python, FrameKind::Native, FrameKind::Kernel, FrameKind::Wait];
        (prop::sample::select(kinds.to_vec()), "[a-cé\u{0}<]{0,2}", "[xy]{0,1}", 0u32..4, 0u32..2)
            .prop_map(|(kind, name, file, line, first)| frame(kind, &name, &file, line, first))
    }

    fn profiles() -> impl Strategy<Value = Profile> {
        let samples =
            prop::collection::vec((prop::collection::vec(frames(), 0..6), prop::num::u64::ANY), 0..30);
        (samples, prop::num::u64::ANY).prop_map(|(samples, duration)| {
            let mut b = Builder::default();
            for (frames, weight) in samples {
                b.add(&stack(&frames), weight);
            }
            b.finish(duration)
        })
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(profile in profiles()) {
            prop_assert_eq!(Profile::decode(&profile.encode()).expect("own bytes decode"), profile);
        }

        #[test]
        fn merging_commutes_with_storing(a in profiles(), b in profiles()) {
            let mut direct = a.clone();
            direct.merge(&b);
            let mut stored = Profile::decode(&a.encode()).expect("own bytes decode");
            stored.merge(&Profile::decode(&b.encode()).expect("own bytes decode"));
            prop_assert_eq!(direct.samples(), a.samples() + b.samples());
            prop_assert_eq!(direct, stored);
        }

        #[test]
        fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Profile::decode(&bytes);
            if let Some(first) = bytes.first_mut() { *first = VERSION; }
            if let Ok(profile) = Profile::decode(&bytes) {
                prop_assert_eq!(Profile::decode(&profile.encode()).expect("own bytes decode"), profile);
            }
        }

        #[test]
        fn flipped_bytes_never_panic(profile in profiles(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut bytes = profile.encode();
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok(mut profile) = Profile::decode(&bytes) {
                profile.merge(&profile.clone());
            }
        }
    }
}
