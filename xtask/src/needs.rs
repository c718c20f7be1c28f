//! What the tests need beyond Rust: the servers and readers that they are held against, from Debian's packages, and the
//! JavaScript ones from npm.
//!
//! In: this machine. Out: what is missing installed, and for everything that cannot be had a reason. A test whose program
//! is missing skips itself; the reason printed here says why it is missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{apt, sh};

/// A program and the Debian package that has it. Only the program counts: it may have come another way.
struct Need {
    program: &'static str,
    package: &'static str,
}

const NEEDS: [Need; 8] = [
    // `go tool pprof` reads our pprof files.
    Need { program: "go", package: "golang-go" },
    // Flame graphs and the web page are used in it as a person would.
    Need { program: "chromium", package: "chromium" },
    Need { program: "node", package: "nodejs" },
    Need { program: "npm", package: "npm" },
    // It scrapes us, and its promtool judges our metrics.
    Need { program: "promtool", package: "prometheus" },
    Need { program: "nginx", package: "nginx-light" },
    Need { program: "wrk", package: "wrk" },
    Need { program: "python3", package: "python3" },
];

/// Exact versions: a new release of theirs must not fail our tests.
const NODE_MODULES: [(&str, &str); 3] =
    [("speedscope", "1.25.0"), ("ajv", "8.20.0"), ("playwright-core", "1.65.1")];

/// Installs what is missing from Debian's archive. Returns what could not be installed, each with the reason.
pub fn programs() -> Vec<(&'static str, String)> {
    let missing = || NEEDS.iter().filter(|need| sh::on_path(need.program).is_none());
    let packages: Vec<&str> = missing().map(|need| need.package).collect();
    let state = sh::root().join("target/apt");
    if packages.is_empty() || apt::install(&packages, &state).is_ok() {
        return Vec::new();
    }
    // One that cannot be had must not cost the others.
    let alone = |need: &Need| apt::install(&[need.package], &state).err();
    missing().filter_map(|need| alone(need).map(|error| (need.package, format!("{error:#}")))).collect()
}

/// Installs the JavaScript readers of our formats under `target/tools` and returns that folder.
pub fn node_modules() -> Result<PathBuf> {
    let folder = sh::root().join("target/tools");
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
