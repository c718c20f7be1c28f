//! What the tests need beyond Rust: the servers and readers that they are held against, from Debian's packages, and the
//! JavaScript ones from npm.
//!
//! In: this machine. Out: what is missing installed, and for everything that cannot be had a reason. A test that misses it
//! says so and is counted as skipped; the reason printed here says why it is missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{apt, sh};

/// Something and the Debian package that has it. Only the thing counts: it may have come another way.
struct Need {
    /// A program on `PATH`, or an absolute path.
    thing: &'static str,
    package: &'static str,
}

const NEEDS: [Need; 15] = [
    // libFuzzer is C++.
    Need { thing: "c++", package: "g++" },
    // `go tool pprof` reads our pprof files.
    Need { thing: "go", package: "golang-go" },
    // Flame graphs are used in it as a person would; speedscope, which is a web page, opens our files in it.
    Need { thing: "chromium", package: "chromium" },
    Need { thing: "node", package: "nodejs" },
    Need { thing: "npm", package: "npm" },
    // Its promtool judges our metrics.
    Need { thing: "promtool", package: "prometheus" },
    Need { thing: "nginx", package: "nginx-light" },
    Need { thing: "wrk", package: "wrk" },
    Need { thing: "/usr/bin/uwsgi-core", package: "uwsgi-core" },
    Need { thing: "/usr/lib/uwsgi/plugins/python311_plugin.so", package: "uwsgi-plugin-python3" },
    // The interpreter whose frames are read, how its environments are made, and its own account of its structures.
    Need { thing: "/usr/bin/python3.11", package: "python3.11" },
    Need { thing: "/usr/lib/python3.11/ensurepip/__init__.py", package: "python3.11-venv" },
    Need { thing: "/usr/include/python3.11/internal/pycore_frame.h", package: "python3.11-dev" },
    // They read their completions.
    Need { thing: "zsh", package: "zsh" },
    Need { thing: "fish", package: "fish" },
];

/// Exact versions: a new release of theirs must not fail our tests. playwright-core's is the last one for Node 18, which
/// is Debian 12's.
const NODE_MODULES: [(&str, &str); 3] =
    [("speedscope", "1.25.0"), ("ajv", "8.20.0"), ("playwright-core", "1.61.1")];
/// What all of them run on.
const OLDEST_NODE: u32 = 18;

/// An interpreter of pyenv's is used where Debian has none.
const PYTHON_REMEDY: &str =
    "of Debian's releases only 12 has CPython 3.11. Remedy elsewhere: `pyenv install 3.11`";

impl Need {
    fn is_met(&self) -> bool {
        if self.thing.starts_with('/') {
            Path::new(self.thing).exists()
        } else {
            sh::on_path(self.thing).is_some()
        }
    }

    fn unmet(&self, error: &anyhow::Error) -> (&'static str, String) {
        let remedy = if self.package.starts_with("python3.11") { PYTHON_REMEDY } else { "" };
        let separator = if remedy.is_empty() { "" } else { "; " };
        (self.package, format!("{error:#}{separator}{remedy}"))
    }
}

/// Installs what is missing from Debian's archive. Returns what could not be installed, each with the reason.
pub fn packages() -> Vec<(&'static str, String)> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !need.is_met()).collect();
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let state = sh::root().join("target/apt");
    if packages.is_empty() || apt::install(&packages, &state).is_ok() {
        return Vec::new();
    }
    // One that cannot be had must not cost the others.
    let alone = |need: &&Need| apt::install(&[need.package], &state).err().map(|error| need.unmet(&error));
    missing.iter().filter_map(alone).collect()
}

/// Installs the JavaScript readers of our formats under `target/tools` and returns that folder.
pub fn node_modules() -> Result<PathBuf> {
    let folder = sh::root().join("target/tools");
    let node = sh::capture(Command::new("node").arg("--version"))?;
    ensure!(
        node_major(&node).is_some_and(|major| major >= OLDEST_NODE),
        "node is {}, and they need {OLDEST_NODE} or newer. Remedy: put such a node on PATH",
        node.trim()
    );
    if NODE_MODULES.iter().all(|(name, version)| has_module(&folder, name, version)) {
        return Ok(folder);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // With a package.json of its own, npm does not look for one in the folders above.
    fs::write(folder.join("package.json"), "{\"private\": true}\n")?;
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--no-save"])
        .args(NODE_MODULES.map(|(name, version)| format!("{name}@{version}")))
        .current_dir(&folder);
    sh::capture(&mut npm)?;
    for (name, version) in NODE_MODULES {
        ensure!(has_module(&folder, name, version), "npm installed no {name} {version}");
    }
    Ok(folder)
}

/// `v18.20.4`
fn node_major(version: &str) -> Option<u32> {
    version.trim().strip_prefix('v')?.split('.').next()?.parse().ok()
}

fn has_module(folder: &Path, name: &str, version: &str) -> bool {
    let manifest = fs::read_to_string(folder.join("node_modules").join(name).join("package.json"));
    let manifest: serde_json::Value =
        manifest.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    manifest["version"] == version
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_node_is_read() {
        assert_eq!(node_major("v18.20.4\n"), Some(18));
        assert_eq!(node_major("v9.1.0"), Some(9));
        assert_eq!(node_major("18"), None);
    }

    #[test]
    fn what_cannot_be_had_names_the_remedy() {
        let unmet = |package| Need { thing: "/nonexistent", package }.unmet(&anyhow::anyhow!("no candidate"));
        assert_eq!(unmet("zsh"), ("zsh", "no candidate".to_owned()));
        assert_eq!(unmet("python3.11-dev").1, format!("no candidate; {PYTHON_REMEDY}"));
        assert!(!Need { thing: "/nonexistent", package: "zsh" }.is_met());
        assert!(
            Need { thing: "sh", package: "dash" }.is_met() && Need { thing: "/proc", package: "" }.is_met()
        );
    }

    #[test]
    fn a_module_counts_only_in_its_version() {
        let folder = std::env::temp_dir().join(format!("reqprof-needs-{}", std::process::id()));
        let module = folder.join("node_modules/ajv");
        fs::create_dir_all(&module).unwrap();
        fs::write(module.join("package.json"), "{\"name\": \"ajv\", \"version\": \"8.20.0\"}").unwrap();
        assert!(has_module(&folder, "ajv", "8.20.0"));
        assert!(!has_module(&folder, "ajv", "8.21.0"));
        assert!(!has_module(&folder, "speedscope", "8.20.0"));
        fs::remove_dir_all(folder).unwrap();
    }
}
