//! Which files of a process may have OpenSSL in them.
//!
//! In: what it maps, and its program. Out: mappings to be examined. Its library goes by its name, also where a package
//! brings one of its own; else it may be linked into the program.

use std::path::Path;

use super::maps::{Mapping, Maps};

/// A process has the system's, and here and there a package's own.
const FILES_MAX: usize = 4;

/// Libraries that are OpenSSL by their names.
pub fn libraries(maps: &Maps) -> Vec<&Mapping> {
    let is = |m: &&Mapping| {
        let name = m.file_name();
        m.executable && (name.starts_with("libssl.so") || name.starts_with("libssl-"))
    };
    maps.iter().filter(is).take(FILES_MAX).collect()
}

/// Whether all that calls OpenSSL in such a process returns on the stack that it was called on: CPython (greenlets switch
/// between calls), Node and nginx. See `bpf::openssl`.
pub fn comes_back(runtime: &str, exe: Option<&Path>) -> bool {
    let name = exe.and_then(Path::file_name).and_then(|name| name.to_str());
    runtime == "python" || name.is_some_and(|name| matches!(name, "node" | "nodejs" | "nginx"))
}

/// What to say of others.
pub const UNSURE: &str = "it maps OpenSSL, which is probed in CPython, Node and nginx: a program that switches stacks within it would crash";

/// The program itself.
pub fn program<'a>(maps: &'a Maps, exe: Option<&Path>) -> Option<&'a Mapping> {
    maps.iter().find(|m| m.executable && Some(&*m.path) == exe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_library_goes_by_its_name() {
        let maps = Maps::parse(
            b"1000-2000 r-xp 00000000 08:01 1     /usr/bin/python3.11\n\
              3000-4000 r--p 00000000 08:01 2     /usr/lib/x86_64-linux-gnu/libssl.so.3\n\
              4000-5000 r-xp 00001000 08:01 2     /usr/lib/x86_64-linux-gnu/libssl.so.3\n\
              6000-7000 r-xp 00000000 08:01 3     /srv/venv/psycopg2_binary.libs/libssl-81ffa89e.so.3\n\
              8000-9000 r-xp 00000000 08:01 4     /usr/lib/libsslcommon.so\n",
        );
        let found: Vec<u64> = libraries(&maps).iter().map(|m| m.start).collect();
        assert_eq!(found, [0x4000, 0x6000]);
        let python = program(&maps, Some(Path::new("/usr/bin/python3.11"))).expect("it maps itself");
        assert_eq!(python.start, 0x1000);
        assert!(comes_back("python", None) && comes_back("native", Some(Path::new("/usr/bin/node"))));
        assert!(!comes_back("native", Some(Path::new("/usr/bin/amqproxy"))));
        assert!(program(&maps, Some(Path::new("/usr/bin/node"))).is_none() && program(&maps, None).is_none());
    }
}
