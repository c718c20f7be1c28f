//! The server of `apps/nesting`, and the ways down a call tree.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::http::Client;
use super::process::{Group, free_port, wait_for};

/// A function on the stack, as the interpreter knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    pub name: String,
    pub file: String,
    pub first_line: u64,
    /// Where it was when the leaf was reached.
    pub line: u64,
    pub lines: Vec<u64>,
}

impl Known {
    pub fn of(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().expect("a text").to_owned();
        let number = |value: &Value| value.as_u64().expect("a number");
        Self {
            name: text("name"),
            file: text("file"),
            first_line: number(&value["first_line"]),
            line: number(&value["line"]),
            lines: value["lines"].as_array().expect("an array").iter().map(number).collect(),
        }
    }

    pub fn is(&self, node: &Value) -> bool {
        node["name"] == self.name.as_str()
            && node["file"] == self.file.as_str()
            && node["first_line"] == self.first_line
    }
}

pub struct Server {
    pub port: u16,
    pub group: Group,
}

impl Server {
    pub fn start(command: Command) -> Self {
        Self::start_with(command, &[])
    }

    pub fn start_with(mut command: Command, arguments: &[&Path]) -> Self {
        let port = free_port();
        let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/nesting/nesting.py");
        command
            .arg("-B")
            .arg(app)
            .arg(port.to_string())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let group = Group::spawn(&mut command);
        wait_for("the server to answer", || Client::new(port).request("GET", "/calls/0", b"").ok());
        println!("PROFILED http.server");
        Self { port, group }
    }

    /// The chain of a route, outermost first.
    pub fn truth(&self, route: &str) -> Vec<Known> {
        let answer =
            Client::new(self.port).request("GET", &format!("/truth/{route}"), b"").expect("the truth");
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json().as_array().expect("an array").iter().map(Known::of).collect()
    }
}

pub fn children(node: &Value) -> impl Iterator<Item = &Value> {
    node["children"].as_array().into_iter().flatten()
}

#[track_caller]
pub fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is no number in {value:#}"))
}

/// The ways down to where samples ended, and how many did.
pub fn paths(tree: &Value) -> Vec<(Vec<&Value>, u64)> {
    let (mut found, mut open) = (Vec::new(), vec![(Vec::new(), tree)]);
    while let Some((path, node)) = open.pop() {
        for child in children(node) {
            let mut path = path.clone();
            path.push(child);
            open.push((path, child));
        }
        let below: u64 = children(node).map(|child| number(child, "samples")).sum();
        if number(node, "samples") > below {
            found.push((path, number(node, "samples") - below));
        }
    }
    found
}

/// The names of the Python functions on them.
pub fn python_paths(tree: &Value) -> Vec<(Vec<&str>, u64)> {
    let mut found = Vec::new();
    for (path, samples) in paths(tree) {
        let python = path.iter().filter(|node| node["kind"] == "python");
        let names: Vec<&str> = python.filter_map(|node| node["name"].as_str()).collect();
        if !names.is_empty() {
            found.push((names, samples));
        }
    }
    found
}
