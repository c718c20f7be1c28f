//! Distribution builds of CPython that this machine's own distribution does not have: newer and older ones, from other
//! suites of Debian, each with the C library that it was built for.
//!
//! In: Debian's archive. Out: a folder for each suite below `target/pythons`, in which its packages are unpacked. Nothing
//! is installed: tests run these interpreters through their own dynamic loader.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::{apt, sh};

/// A suite and what is wanted of it.
struct Wanted {
    suite: &'static str,
    /// With their headers, and where a version is named with `shared`, its library.
    versions: &'static [&'static str],
    shared: &'static [&'static str],
    /// What else they can do then: TLS.
    besides: &'static [&'static str],
}

const WANTED: [Wanted; 2] = [
    Wanted { suite: "bullseye", versions: &["3.9"], shared: &[], besides: &[] },
    Wanted {
        suite: "sid",
        versions: &["3.13", "3.14"],
        shared: &["3.14"],
        besides: &["libssl3t64", "libzstd1"],
    },
];
/// What all of them need to run; that of GCC, for threads that end.
const LIBRARIES: [&str; 4] = ["libc6", "libexpat1", "libgcc-s1", "zlib1g"];

/// Unpacks what is not there yet. Returns what cannot be had, each with the reason.
pub fn ensure() -> Vec<(String, String)> {
    let folder = sh::root().join("target/pythons");
    let failure = |wanted: &Wanted| {
        let error = ensure_suite(wanted, &folder).err()?;
        Some((
            format!("CPython {} of Debian {}", wanted.versions.join(" and "), wanted.suite),
            format!("{error:#}"),
        ))
    };
    WANTED.iter().filter_map(failure).collect()
}

fn ensure_suite(wanted: &Wanted, folder: &Path) -> Result<()> {
    let packages = packages(wanted);
    let (root, stamp) = (folder.join(wanted.suite), folder.join(format!("{}.stamp", wanted.suite)));
    let list = packages.join("\n");
    if fs::read_to_string(&stamp).is_ok_and(|have| have == list) {
        return Ok(());
    }
    println!("unpacking CPython {} of Debian {}", wanted.versions.join(" and "), wanted.suite);
    // What an interrupted attempt left is no use.
    let _ = fs::remove_dir_all(&root);
    let state = folder.join(format!("{}.apt", wanted.suite));
    apt::unpack_all(&packages, wanted.suite, &state, &root)?;
    fs::write(&stamp, list).with_context(|| format!("writing {}", stamp.display()))
}

fn packages(wanted: &Wanted) -> Vec<String> {
    let of_version = |version: &&str| {
        let names = ["python%-minimal", "libpython%-minimal", "libpython%-stdlib", "libpython%-dev"];
        names.map(|name| name.replace('%', version))
    };
    let mut packages: Vec<String> = LIBRARIES.map(String::from).to_vec();
    packages.extend(wanted.versions.iter().flat_map(of_version));
    packages.extend(wanted.besides.iter().map(|package| package.to_string()));
    packages.extend(wanted.shared.iter().map(|version| format!("libpython{version}")));
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_those_of_each_version() {
        let packages = packages(&WANTED[1]);
        assert_eq!(packages.len(), LIBRARIES.len() + 2 * 4 + 2 + 1);
        for name in ["libc6", "python3.13-minimal", "libpython3.14-dev", "libpython3.14"] {
            assert!(packages.iter().any(|package| package == name), "{packages:?}");
        }
    }
}
