//! speedscope's own JSON format, for <https://www.speedscope.app> and what else reads it.
//!
//! A "sampled" profile in whole nanoseconds: root-first stacks of frame numbers and their weights, one per node with
//! time of its own. A frame is a function, its `line` the function's first. Schema: speedscope's `file-format-schema`.

use serde_json::{Map, Value, json};

use super::super::Profile;
use super::{Subject, View, printable};

pub fn render(profile: &Profile, subject: &Subject, view: View) -> Vec<u8> {
    let profile = profile.in_view(view);
    // The root has no frame, so numbers are one lower than our own.
    let frames: Vec<Value> = profile.functions()[1..]
        .iter()
        .map(|function| {
            let mut frame = Map::new();
            frame.insert("name".into(), printable(&function.name).into());
            if !function.file.is_empty() {
                frame.insert("file".into(), printable(&function.file).into());
            }
            if function.first_line != 0 {
                frame.insert("line".into(), function.first_line.into());
            }
            frame.into()
        })
        .collect();
    let mut samples: Vec<Vec<usize>> = Vec::new();
    let mut weights: Vec<u64> = Vec::new();
    if profile.root().own().ns > 0 {
        samples.push(Vec::new());
        weights.push(profile.root().own().ns);
    }
    let mut stack: Vec<usize> = Vec::new();
    for (depth, node) in profile.walk() {
        stack.truncate(depth - 1);
        stack.push(node.function_id() - 1);
        if node.own().ns > 0 {
            samples.push(stack.clone());
            weights.push(node.own().ns);
        }
    }
    json!({
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "exporter": concat!("reqprof ", env!("CARGO_PKG_VERSION")),
        "name": subject.title,
        "activeProfileIndex": 0,
        "shared": { "frames": frames },
        "profiles": [{
            "type": "sampled",
            "name": subject.title,
            "unit": "nanoseconds",
            "startValue": 0,
            "endValue": profile.root().total().ns,
            "samples": samples,
            "weights": weights,
        }],
    })
    .to_string()
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::super::Builder;
    use super::super::super::testing::{py, stack};
    use super::*;

    #[test]
    fn samples_are_root_first_and_add_up() {
        let mut b = Builder::default();
        b.add(&stack(&[py("main", 3), py("a", 10)]), 100);
        b.add(&stack(&[py("main", 3)]), 20);
        let bytes =
            render(&b.finish(150), &Subject { title: "GET /".into(), ..Subject::default() }, View::Wall);
        let file: Value = serde_json::from_slice(&bytes).expect("JSON");
        let profile = &file["profiles"][0];
        assert_eq!(profile["samples"], json!([[0], [0, 1], [2]]));
        assert_eq!(profile["weights"], json!([20, 100, 30]));
        assert_eq!(profile["endValue"], 150);
        assert_eq!(
            file["shared"]["frames"][1],
            json!({"name": "a", "file": "/srv/shop/views.py", "line": 1})
        );
        assert_eq!(file["shared"]["frames"][2], json!({"name": "[unsampled]"}));
    }
}
