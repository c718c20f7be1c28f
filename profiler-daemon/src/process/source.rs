//! Where the transfers of a process are seen: in its C library, or at its system calls.
//!
//! In: the program, what it maps, what the user wishes. Out: a [`Source`]. Probes in the library cost only those who call
//! the probed functions; while system calls are looked at, all of the host pay for each of theirs (docs/overhead.md).

use super::maps::{Mapping, Maps};
use super::program::Program;
use crate::config::BoundarySource;

/// See the module.
#[derive(Debug, PartialEq)]
pub enum Source<'a> {
    /// Its C library; if that cannot be probed, system calls, unless the user will not have them.
    Library { mapping: &'a Mapping, or_calls: bool },
    /// System calls, for this reason.
    Calls(&'static str),
    /// The process is still starting.
    Later,
    /// None, for this reason.
    Nowhere(&'static str),
}

const UNREADABLE: &str = "its program's file cannot be read, or is not for x86-64";

/// `program`: `None` where its file could not be read.
pub fn choose<'a>(wish: BoundarySource, program: Option<&Program>, maps: &'a Maps) -> Source<'a> {
    let by_itself = if program.is_some_and(|program| program.go.is_some()) {
        Some("Go makes its system calls by itself")
    } else if program.is_some_and(|program| !program.linked) {
        Some("a static program")
    } else if maps.iter().any(|m| m.executable && m.file_name().starts_with("ld-musl")) {
        Some("musl's C library has no sites that are known")
    } else if maps.iter().any(|m| m.executable && m.file_name().starts_with("libpthread-2.")) {
        Some("before glibc 2.34 programs with threads call libpthread's functions")
    } else {
        None
    };
    let library = maps.iter().find(|m| m.executable && m.is_glibc());
    match (wish, by_itself, library) {
        // Numbers of system calls are those of x86-64.
        (BoundarySource::Syscall, ..) if program.is_none() => Source::Nowhere(UNREADABLE),
        (BoundarySource::Syscall, ..) => Source::Calls("as configured"),
        (BoundarySource::Auto, Some(reason), _) => Source::Calls(reason),
        (BoundarySource::Uprobe, Some(reason), _) => Source::Nowhere(reason),
        (_, None, Some(mapping)) => {
            Source::Library { mapping, or_calls: wish == BoundarySource::Auto && program.is_some() }
        }
        (_, None, None) => Source::Later,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINKED: Program = Program { linked: true, go: None };

    fn maps(files: &[&str]) -> Maps {
        let line = |(n, path): (usize, &&str)| format!("{n}000-{n}fff r-xp 00000000 08:01 {n}     {path}\n");
        let text: String = files.iter().enumerate().map(|(n, path)| line((n + 1, path))).collect();
        Maps::parse(text.as_bytes())
    }

    #[test]
    fn a_library_where_there_is_one_and_else_system_calls() {
        let glibc = maps(&["/srv/app", "/usr/lib/x86_64-linux-gnu/libc.so.6"]);
        let auto = |program: &Program, maps: &Maps| {
            format!("{:?}", choose(BoundarySource::Auto, Some(program), maps))
        };
        assert!(auto(&LINKED, &glibc).contains("libc.so.6"));
        let go = Program { go: Some(None), ..LINKED };
        assert!(auto(&go, &glibc).contains("Go"), "though it maps a C library");
        let own = maps(&["/srv/app"]);
        assert!(auto(&Program { linked: false, go: None }, &own).contains("static"));
        assert_eq!(auto(&LINKED, &own), "Later");
        assert!(auto(&LINKED, &maps(&["/srv/app", "/lib/ld-musl-x86_64.so.1"])).contains("musl"));
        let old = maps(&["/usr/bin/python3", "/lib/libc-2.31.so", "/lib/libpthread-2.31.so"]);
        assert!(auto(&LINKED, &old).contains("2.34"));
        // A program whose file cannot be read may still map a library, but what its system calls are is not known.
        assert!(matches!(
            choose(BoundarySource::Auto, None, &glibc),
            Source::Library { or_calls: false, .. }
        ));
        assert_eq!(choose(BoundarySource::Syscall, None, &glibc), Source::Nowhere(UNREADABLE));
    }

    #[test]
    fn a_wish_is_obeyed() {
        let glibc = maps(&["/usr/lib/x86_64-linux-gnu/libc.so.6"]);
        let of = |wish, program: &Program| format!("{:?}", choose(wish, Some(program), &glibc));
        assert_eq!(of(BoundarySource::Syscall, &LINKED), "Calls(\"as configured\")");
        assert!(of(BoundarySource::Uprobe, &LINKED).ends_with("or_calls: false }"));
        let own = Program { linked: false, go: None };
        assert_eq!(of(BoundarySource::Uprobe, &own), "Nowhere(\"a static program\")");
    }
}
