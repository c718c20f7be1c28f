//! Call trees as the API gives them, and what the interpreter says must be in them.

use std::collections::{BTreeSet, HashMap};
use std::process::Command;

use serde_json::Value;

use super::python::{Python, app_dir};

/// The functions of the application, by qualified name and first line, with their lines.
pub struct Oracle {
    pub file: String,
    functions: HashMap<(String, u64), BTreeSet<u64>>,
}

impl Oracle {
    /// Asks the interpreter itself.
    pub fn ask(python: &Python) -> Self {
        let path = app_dir().join("truth.py");
        let output =
            Command::new(&python.program).arg(&path).arg("--oracle").output().expect("the interpreter");
        let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let mut functions = HashMap::new();
        let mut file = None;
        for function in said["functions"].as_array().expect("an array") {
            let name = function["co_qualname"].as_str().expect("a name").to_owned();
            let first = function["co_firstlineno"].as_u64().expect("a line");
            let lines =
                function["lines"].as_array().expect("an array").iter().filter_map(Value::as_u64).collect();
            file = function["co_filename"].as_str().map(str::to_owned);
            functions.insert((name, first), lines);
        }
        Self { file: file.expect("a file"), functions }
    }

    /// Whether this is a frame of the application.
    pub fn owns(&self, node: &Value) -> bool {
        node["kind"] == "python" && node["file"] == self.file.as_str()
    }

    /// The frame is a function of the application, and every line it was seen on is one of its own.
    #[track_caller]
    pub fn check(&self, node: &Value) {
        let name = node["name"].as_str().expect("a name").to_owned();
        let first = node["first_line"].as_u64().expect("a line");
        let lines = self.functions.get(&(name.clone(), first));
        let lines = lines.unwrap_or_else(|| panic!("the application has no {name} at line {first}"));
        let mut known = 0;
        for (line, total) in node["lines"].as_object().expect("an object") {
            let number: u64 = line.parse().expect("a number");
            assert!(lines.contains(&number), "{name} has no line {number}, only {lines:?}");
            known += total.as_u64().expect("a time");
        }
        assert_eq!(known, node["total_ns"].as_u64().expect("a time"), "{name} was seen on unknown lines");
    }
}

/// Visits every node with its ancestors, the outermost first.
pub fn walk<'a>(root: &'a Value, visit: &mut impl FnMut(&[&'a Value], &'a Value)) {
    fn descend<'a>(
        path: &mut Vec<&'a Value>,
        node: &'a Value,
        visit: &mut impl FnMut(&[&'a Value], &'a Value),
    ) {
        visit(path, node);
        path.push(node);
        for child in node["children"].as_array().into_iter().flatten() {
            descend(path, child, visit);
        }
        path.pop();
    }
    let mut path = Vec::new();
    for child in root["children"].as_array().into_iter().flatten() {
        descend(&mut path, child, visit);
    }
}
