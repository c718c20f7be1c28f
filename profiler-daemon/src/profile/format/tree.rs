//! The call tree as JSON, for programs.
//!
//! Every node is `{name, file, line, kind, self_ns, total_ns, samples, children}`, children hottest first. `samples`
//! counts those that saw the function anywhere on the stack, as `total_ns` does. `line` is the line of the function
//! with the largest total; `first_line` is where the function begins and `lines` has the total of each line, ns.
//! Unknown lines are 0. The root is the request: its name is the subject's title, and it also says `unit`, `view`,
//! `requests`, `duration_ns` and what else the subject knows.
//!
//! Written without recursion, since a tree can be as deep as a stack.

use serde_json::{Value, json};

use super::super::tree::hottest;
use super::super::{FrameKind, NodeRef, Profile};
use super::{Subject, View};

pub fn render(profile: &Profile, subject: &Subject, view: View) -> Vec<u8> {
    let profile = profile.in_view(view);
    let root = profile.root();
    let mut head = json!({
        "name": subject.title,
        "file": "",
        "line": 0,
        "first_line": 0,
        "kind": kind(root.kind()),
        "self_ns": root.own().ns,
        "total_ns": root.total().ns,
        "samples": root.total().samples,
        "lines": {},
        "unit": "ns",
        "view": view.name(),
        "requests": profile.requests(),
        "duration_ns": profile.duration_ns(),
        "truncated_samples": profile.truncated_samples(),
        "service": subject.service,
        "route": subject.route,
        "method": subject.method,
    });
    for (key, value) in [
        ("status", subject.status.map(Value::from)),
        ("request_id", subject.request_id.clone().map(Value::from)),
        ("trace_id", subject.trace_id.clone().map(Value::from)),
        ("requests_with_samples", subject.with_samples.map(Value::from)),
    ] {
        if let Some(value) = value {
            head[key] = value;
        }
    }
    let mut out = String::new();
    open(&mut out, &head);
    let mut before = 0;
    for (depth, node) in profile.walk() {
        if depth > before {
            // The first child: its parent's list has just been opened.
        } else {
            for _ in depth..=before {
                out.push_str("]}");
            }
            out.push(',');
        }
        open(&mut out, &object(node));
        before = depth;
    }
    for _ in 0..=before {
        out.push_str("]}");
    }
    out.push('\n');
    out.into_bytes()
}

/// Writes an object and leaves it open within its `children`.
fn open(out: &mut String, object: &Value) {
    let text = object.to_string();
    out.push_str(text.strip_suffix('}').unwrap_or(&text));
    out.push_str(",\"children\":[");
}

fn object(node: NodeRef<'_>) -> Value {
    let lines = node.lines();
    let function = node.function();
    json!({
        "name": &*function.name,
        "file": &*function.file,
        "line": hottest(&lines).unwrap_or(function.first_line),
        "first_line": function.first_line,
        "kind": kind(function.kind),
        "self_ns": node.own().ns,
        "total_ns": node.total().ns,
        "samples": node.total().samples,
        "lines": lines.iter().map(|(line, totals)| (line.to_string(), Value::from(totals.total_ns))).collect::<serde_json::Map<_, _>>(),
    })
}

pub fn kind(kind: FrameKind) -> &'static str {
    match kind {
        FrameKind::Python => "python",
        FrameKind::Native => "native",
        FrameKind::Kernel => "kernel",
        FrameKind::Wait => "wait",
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Builder;
    use super::super::super::testing::{py, stack};
    use super::*;

    #[test]
    fn the_tree_is_as_worked_by_hand() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 100);
        b.add(&stack(&[py("main", 4), py("a", 11), py("b", 7)]), 150);
        b.add(&stack(&[py("main", 5)]), 1);
        let subject = Subject {
            title: "GET / \"200\"".into(),
            route: "/".into(),
            method: "GET".into(),
            service: "shop".into(),
            status: Some(200),
            ..Subject::default()
        };
        let bytes = render(&b.finish(300), &subject, View::Wall);
        let tree: Value = serde_json::from_slice(&bytes).expect("JSON");
        let expected: Value = serde_json::from_str(
            r#"{
            "name": "GET / \"200\"", "file": "", "line": 0, "first_line": 0, "kind": "native", "lines": {},
            "self_ns": 0, "total_ns": 300, "samples": 3, "unit": "ns", "view": "wall", "requests": 1,
            "duration_ns": 300, "truncated_samples": 0, "service": "shop", "route": "/", "method": "GET",
            "status": 200,
            "children": [
                {"name": "main", "file": "/srv/shop/views.py", "line": 4, "first_line": 1, "kind": "python",
                 "self_ns": 1, "total_ns": 251, "samples": 3, "lines": {"3": 100, "4": 150, "5": 1},
                 "children": [
                    {"name": "a", "file": "/srv/shop/views.py", "line": 11, "first_line": 1, "kind": "python",
                     "self_ns": 100, "total_ns": 250, "samples": 2, "lines": {"10": 100, "11": 150},
                     "children": [
                        {"name": "b", "file": "/srv/shop/views.py", "line": 7, "first_line": 1,
                         "kind": "python", "self_ns": 150, "total_ns": 150, "samples": 1, "lines": {"7": 150},
                         "children": []}]}]},
                {"name": "[unsampled]", "file": "", "line": 0, "first_line": 0, "kind": "wait", "self_ns": 49,
                 "total_ns": 49, "samples": 0, "lines": {}, "children": []}
            ]
        }"#,
        )
        .expect("JSON");
        assert_eq!(tree, expected);
    }

    #[test]
    fn brackets_close_where_depth_falls_by_more_than_one() {
        let mut b = Builder::default();
        b.add(&stack(&[py("a", 1), py("b", 1), py("c", 1), py("d", 1)]), 9);
        b.add(&stack(&[py("a", 1), py("e", 1)]), 5);
        b.add(&stack(&[py("f", 1)]), 1);
        let tree: Value =
            serde_json::from_slice(&render(&b.finish(0), &Subject::default(), View::Cpu)).expect("JSON");
        assert_eq!(tree["children"][0]["children"][1]["name"], "e");
        assert_eq!(tree["children"][1]["name"], "f");
        let empty: Value =
            serde_json::from_slice(&render(&Profile::default(), &Subject::default(), View::Cpu))
                .expect("JSON");
        assert_eq!(empty["children"], json!([]));
    }
}
