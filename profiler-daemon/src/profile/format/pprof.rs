//! pprof's protocol buffer, gzipped: for `go tool pprof` and the continuous profilers that take it.
//!
//! In: a profile. Out: one sample per node and line with time of its own, leaf first, with the values samples, CPU
//! time and (in the wall view) wall time, and the request as labels. The messages are written out here by hand, only
//! the fields in use: <https://github.com/google/pprof/blob/main/proto/profile.proto>.
//!
//! A location is a function and the *current* line, so `-list` and `-lines` tell lines apart. A node knows the lines
//! it was called from, not which of them belongs to which sample below it; samples take from these in turn, the line
//! with the most time left first. So a caller's lines add up as measured, to within one sample each, and are exact
//! wherever a callee is called from one line, which is the usual case.

use std::collections::HashMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;

use super::super::{Cost, FrameKind, LineCost, NodeRef, Profile};
use super::{Subject, View};

pub fn render(profile: &Profile, subject: &Subject, view: View) -> Vec<u8> {
    let bytes = message(profile, subject, view).encode_to_vec();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&bytes).and_then(|()| gzip.finish()).expect("writing to memory does not fail")
}

fn message(profile: &Profile, subject: &Subject, view: View) -> proto::Profile {
    let profile = &*profile.in_view(view);
    let mut strings = Strings::default();
    let mut value_type = |kind, unit| proto::ValueType { r#type: strings.id(kind), unit: strings.id(unit) };
    let cpu = value_type("cpu", "nanoseconds");
    let mut sample_type = vec![value_type("samples", "count"), cpu];
    if view == View::Wall {
        sample_type.push(value_type("wall", "nanoseconds"));
    }
    let labels = labels(subject, &mut strings);

    let mut locations = Locations::default();
    let mut callers = Callers::new(profile);
    let mut sample = Vec::new();
    for node in std::iter::once(profile.root()).chain(profile.walk().map(|(_, node)| node)) {
        for LineCost { line, cost } in with_rest(node.own_lines(), node.own()) {
            let mut location_id = Vec::new();
            let mut at = (node, line);
            while let Some(parent) = at.0.parent() {
                location_id.push(locations.id(at.0.function_id(), at.1));
                at = (parent, callers.take(at.0, cost.ns));
            }
            let cpu = if node.kind() == FrameKind::Wait { 0 } else { cost.ns };
            let value = [cost.samples, cpu, cost.ns];
            sample.push(proto::Sample {
                location_id,
                value: value[..sample_type.len()].iter().map(|v| signed(*v)).collect(),
                label: labels.clone(),
            });
        }
    }
    let function = profile
        .functions()
        .iter()
        .zip(0..)
        .skip(1)
        .map(|(function, id)| proto::Function {
            id,
            name: strings.id(&function.name),
            filename: strings.id(&function.file),
            start_line: function.first_line.into(),
        })
        .collect();
    let period = profile.nodes().filter(|n| n.kind() != FrameKind::Wait).map(|n| n.own().ns).sum::<u64>();
    proto::Profile {
        default_sample_type: strings.id(if view == View::Wall { "wall" } else { "cpu" }),
        comment: vec![strings.id(&subject.title)],
        sample_type,
        sample,
        location: locations.all,
        function,
        time_nanos: subject.start,
        duration_nanos: signed(profile.duration_ns()),
        period_type: Some(cpu),
        // What one sample stands for on average; nobody promises more of `period`.
        period: signed(period.checked_div(profile.samples()).unwrap_or(0)),
        string_table: strings.all,
    }
}

fn labels(subject: &Subject, strings: &mut Strings) -> Vec<proto::Label> {
    let texts = [
        ("service", Some(subject.service.as_str())),
        ("http.route", Some(subject.route.as_str())),
        ("http.method", Some(subject.method.as_str())),
        ("request_id", subject.request_id.as_deref()),
        ("trace_id", subject.trace_id.as_deref()),
    ];
    let mut labels = Vec::new();
    for (key, value) in texts {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            labels.push(proto::Label { key: strings.id(key), str: strings.id(value), num: 0 });
        }
    }
    if let Some(status) = subject.status {
        labels.push(proto::Label { key: strings.id("http.status"), str: 0, num: status.into() });
    }
    labels
}

/// The lines of a cost, and what is missing to it as line 0.
fn with_rest(lines: &[LineCost], whole: Cost) -> impl Iterator<Item = LineCost> {
    let mut rest = whole;
    for LineCost { cost, .. } in lines {
        rest.ns = rest.ns.saturating_sub(cost.ns);
        rest.samples = rest.samples.saturating_sub(cost.samples);
    }
    lines
        .iter()
        .copied()
        .chain(std::iter::once(LineCost { line: 0, cost: rest }))
        .filter(|entry| entry.cost != Cost::default())
}

/// pprof counts with a sign.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// From which line of its parent each node's samples still have to be said to come.
struct Callers {
    /// By node: (line, ns left).
    left: Vec<Vec<(u32, u64)>>,
}

impl Callers {
    fn new(profile: &Profile) -> Self {
        let left = profile
            .nodes()
            .map(|node| {
                with_rest(node.call_lines(), node.total()).map(|entry| (entry.line, entry.cost.ns)).collect()
            })
            .collect();
        Self { left }
    }

    fn take(&mut self, node: NodeRef<'_>, ns: u64) -> u32 {
        match self.left[node.index()].iter_mut().max_by_key(|(_, left)| *left) {
            Some((line, left)) => {
                *left = left.saturating_sub(ns);
                *line
            }
            None => 0,
        }
    }
}

/// The string table; "" comes first.
struct Strings {
    ids: HashMap<String, i64>,
    all: Vec<String>,
}

impl Default for Strings {
    fn default() -> Self {
        Self { ids: HashMap::from([(String::new(), 0)]), all: vec![String::new()] }
    }
}

impl Strings {
    fn id(&mut self, text: &str) -> i64 {
        if let Some(&id) = self.ids.get(text) {
            return id;
        }
        let id = self.all.len() as i64;
        self.all.push(text.to_string());
        self.ids.insert(text.to_string(), id);
        id
    }
}

#[derive(Default)]
struct Locations {
    ids: HashMap<(usize, u32), u64>,
    all: Vec<proto::Location>,
}

impl Locations {
    fn id(&mut self, function: usize, line: u32) -> u64 {
        *self.ids.entry((function, line)).or_insert_with(|| {
            let id = self.all.len() as u64 + 1;
            let line = proto::Line { function_id: function as u64, line: line.into() };
            self.all.push(proto::Location { id, line: vec![line] });
            id
        })
    }
}

/// The fields in use of `perftools.profiles`. `Function.system_name` is left unset on purpose: where it equals the
/// name, pprof takes the name for a mangled one and strips `<genexpr>` like template arguments.
mod proto {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Profile {
        #[prost(message, repeated, tag = "1")]
        pub sample_type: Vec<ValueType>,
        #[prost(message, repeated, tag = "2")]
        pub sample: Vec<Sample>,
        #[prost(message, repeated, tag = "4")]
        pub location: Vec<Location>,
        #[prost(message, repeated, tag = "5")]
        pub function: Vec<Function>,
        #[prost(string, repeated, tag = "6")]
        pub string_table: Vec<String>,
        #[prost(int64, tag = "9")]
        pub time_nanos: i64,
        #[prost(int64, tag = "10")]
        pub duration_nanos: i64,
        #[prost(message, optional, tag = "11")]
        pub period_type: Option<ValueType>,
        #[prost(int64, tag = "12")]
        pub period: i64,
        #[prost(int64, repeated, tag = "13")]
        pub comment: Vec<i64>,
        #[prost(int64, tag = "14")]
        pub default_sample_type: i64,
    }

    #[derive(Clone, Copy, PartialEq, Message)]
    pub struct ValueType {
        #[prost(int64, tag = "1")]
        pub r#type: i64,
        #[prost(int64, tag = "2")]
        pub unit: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Sample {
        #[prost(uint64, repeated, tag = "1")]
        pub location_id: Vec<u64>,
        #[prost(int64, repeated, tag = "2")]
        pub value: Vec<i64>,
        #[prost(message, repeated, tag = "3")]
        pub label: Vec<Label>,
    }

    #[derive(Clone, Copy, PartialEq, Message)]
    pub struct Label {
        #[prost(int64, tag = "1")]
        pub key: i64,
        #[prost(int64, tag = "2")]
        pub str: i64,
        #[prost(int64, tag = "3")]
        pub num: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Location {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(message, repeated, tag = "4")]
        pub line: Vec<Line>,
    }

    #[derive(Clone, Copy, PartialEq, Message)]
    pub struct Line {
        #[prost(uint64, tag = "1")]
        pub function_id: u64,
        #[prost(int64, tag = "2")]
        pub line: i64,
    }

    #[derive(Clone, Copy, PartialEq, Message)]
    pub struct Function {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(int64, tag = "2")]
        pub name: i64,
        #[prost(int64, tag = "4")]
        pub filename: i64,
        #[prost(int64, tag = "5")]
        pub start_line: i64,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Builder;
    use super::super::super::testing::{py, stack};
    use super::*;

    /// Samples as text: `name:line` from the leaf, then the values.
    fn samples(message: &proto::Profile) -> Vec<(String, Vec<i64>)> {
        let text = |sample: &proto::Sample| {
            let frames: Vec<String> = sample
                .location_id
                .iter()
                .map(|id| {
                    let line = message.location[*id as usize - 1].line[0];
                    let function = message.function[line.function_id as usize - 1];
                    format!("{}:{}", message.string_table[function.name as usize], line.line)
                })
                .collect();
            frames.join(" ")
        };
        message.sample.iter().map(|sample| (text(sample), sample.value.clone())).collect()
    }

    #[test]
    fn samples_are_leaf_first_with_current_lines() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 100);
        b.add(&stack(&[py("main", 4), py("a", 11)]), 40);
        b.add(&stack(&[py("main", 5), py("b", 0)]), 20);
        b.add(&[], 1);
        let message = message(&b.finish(200), &Subject::default(), View::Wall);
        assert_eq!(
            samples(&message),
            [
                (String::new(), vec![1, 1, 1]),
                ("a:10 main:3".into(), vec![1, 100, 100]),
                ("a:11 main:4".into(), vec![1, 40, 40]),
                ("b:0 main:5".into(), vec![1, 20, 20]),
                ("[unsampled]:0".into(), vec![0, 0, 39]),
            ]
        );
        assert_eq!(message.string_table[0], "");
        assert_eq!(message.string_table[message.default_sample_type as usize], "wall");
        assert_eq!(message.period, 161 / 4);
        assert_eq!(message.function[0].start_line, 1);
    }

    #[test]
    fn the_request_is_in_the_labels() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3)]), 100);
        let subject = Subject {
            route: "/o/{id}".into(),
            method: "GET".into(),
            status: Some(404),
            request_id: Some("abc".into()),
            start: 17,
            ..Subject::default()
        };
        let message = message(&b.finish(100), &subject, View::Cpu);
        let text = |id: i64| message.string_table[id as usize].as_str();
        let labels: Vec<_> =
            message.sample[0].label.iter().map(|l| (text(l.key), text(l.str), l.num)).collect();
        assert_eq!(
            labels,
            [
                ("http.route", "/o/{id}", 0),
                ("http.method", "GET", 0),
                ("request_id", "abc", 0),
                ("http.status", "", 404)
            ]
        );
        assert_eq!((message.time_nanos, message.duration_nanos, message.sample_type.len()), (17, 100, 2));
    }
}
