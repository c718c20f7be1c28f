//! Whose code a frame is: the application's, a library's, native, the kernel's. What is short enough to show of its
//! path follows from the same.
//!
//! In: a function's kind and file. Out: an [`Origin`], used for colours and for folding library frames. It is a guess
//! by path, from where Python's installers put packages (`site-packages`, Debian's `dist-packages`) and where the
//! standard library lives (`lib/python3.X`).

use super::super::{FrameKind, Function};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Python code that is not installed as a package.
    App,
    /// An installed Python package or the standard library.
    Library,
    Native,
    Kernel,
    Wait,
}

impl Origin {
    pub fn of(function: &Function) -> Self {
        match function.kind {
            FrameKind::Native => Self::Native,
            FrameKind::Kernel => Self::Kernel,
            FrameKind::Wait => Self::Wait,
            FrameKind::Python if installed(&function.file).is_some() => Self::Library,
            FrameKind::Python => Self::App,
        }
    }

    /// Whether views that fold hide it when it is only on the way.
    pub fn folds(self) -> bool {
        matches!(self, Self::Library | Self::Native | Self::Kernel)
    }
}

/// What follows the directory of installed code, if the file is there: `django/db/models/query.py`.
fn installed(file: &str) -> Option<&str> {
    for directory in ["/site-packages/", "/dist-packages/"] {
        if let Some(at) = file.rfind(directory) {
            return Some(&file[at + directory.len()..]);
        }
    }
    // `<frozen importlib._bootstrap>` and the like are the interpreter's own. `<string>` and templates are not.
    if file.starts_with("<frozen ") {
        return Some(file);
    }
    if let Some(at) = file.rfind("/lib/python") {
        let rest = &file[at + "/lib/python".len()..];
        let version = rest.find('/')?;
        if rest[..version].bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Some(rest[version + 1..].trim_start_matches("lib-dynload/"));
        }
    }
    // A console script, such as `/opt/venv/bin/gunicorn`.
    let (directory, name) = file.rsplit_once('/')?;
    (directory.ends_with("/bin") && !name.contains('.')).then_some(name)
}

/// The name of the package, module or library that a function belongs to; empty = unknown.
pub fn package(function: &Function) -> &str {
    match function.kind {
        FrameKind::Kernel => "kernel",
        FrameKind::Wait => "",
        FrameKind::Native if is_source(&function.file) => "native",
        FrameKind::Native => base_name(&function.file),
        FrameKind::Python => {
            let inside = installed(&function.file).unwrap_or_else(|| base_name(&function.file));
            let inside = inside.strip_prefix("<frozen ").map_or(inside, |name| name.trim_end_matches('>'));
            let first = inside.split('/').next().unwrap_or(inside);
            let first = first.strip_suffix(".py").unwrap_or(first);
            if inside.starts_with(first) && function.file.starts_with("<frozen ") {
                first.split('.').next().unwrap_or(first)
            } else {
                first
            }
        }
    }
}

/// Whether a native function's file is source, which debug information named, and not the library or program that it is
/// in: `typeobject.c` is nobody's name for the interpreter.
fn is_source(file: &str) -> bool {
    let extension = base_name(file).rsplit_once('.').map_or("", |(_, extension)| extension);
    matches!(extension, "c" | "h" | "cc" | "cpp" | "cxx" | "hpp" | "S" | "s" | "rs" | "go" | "pyx")
}

/// The part of the path that tells a reader where to look: inside the package for installed code, the file's name
/// for native code, else the whole.
pub fn short_file(function: &Function) -> &str {
    match function.kind {
        FrameKind::Python => installed(&function.file).unwrap_or(&function.file),
        _ => base_name(&function.file),
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn function(kind: FrameKind, file: &str) -> Function {
        Function { name: Arc::from("f"), file: Arc::from(file), first_line: 1, kind }
    }

    #[test]
    fn paths_tell_whose_code_it_is() {
        use FrameKind::{Kernel, Native, Python, Wait};
        for (kind, file, origin, name, short) in [
            (Python, "/srv/shop/views.py", Origin::App, "views", "/srv/shop/views.py"),
            (
                Python,
                "/opt/v/lib/python3.11/site-packages/django/db/models/query.py",
                Origin::Library,
                "django",
                "django/db/models/query.py",
            ),
            (Python, "/usr/lib/python3/dist-packages/six.py", Origin::Library, "six", "six.py"),
            (Python, "/usr/lib/python3.11/json/decoder.py", Origin::Library, "json", "json/decoder.py"),
            (Python, "/usr/lib/python3.11/socket.py", Origin::Library, "socket", "socket.py"),
            (
                Python,
                "<frozen importlib._bootstrap>",
                Origin::Library,
                "importlib",
                "<frozen importlib._bootstrap>",
            ),
            (Python, "/opt/v/bin/gunicorn", Origin::Library, "gunicorn", "gunicorn"),
            (Python, "/srv/bin/tool.py", Origin::App, "tool", "/srv/bin/tool.py"),
            (Python, "/srv/lib/pythonic/x.py", Origin::App, "x", "/srv/lib/pythonic/x.py"),
            (Python, "<string>", Origin::App, "<string>", "<string>"),
            (Python, "", Origin::App, "", ""),
            (Native, "/usr/lib/libz.so.1", Origin::Native, "libz.so.1", "libz.so.1"),
            (Native, "/build/Objects/typeobject.c", Origin::Native, "native", "typeobject.c"),
            (Native, "/usr/bin/python3.11", Origin::Native, "python3.11", "python3.11"),
            (Kernel, "", Origin::Kernel, "kernel", ""),
            (Wait, "", Origin::Wait, "", ""),
        ] {
            let f = function(kind, file);
            assert_eq!((Origin::of(&f), package(&f), short_file(&f)), (origin, name, short), "{file}");
        }
    }
}
