//! One file per request in a directory, as people who come from a per-request profiler expect.
//!
//! In: a finished request and its profile. Out: a file in each wanted format, named by a template. The names are
//! made from what clients send, so they hold only `[A-Za-z0-9._-]`, and they end in the request's id, so that two
//! requests never share one. The folder is held open and checked once ([`directory`]); files appear whole or not
//! at all.

mod directory;
mod template;

use std::io;
use std::path::{Path, PathBuf};

pub use directory::DirectoryError;
pub use template::{Template, TemplateError};

use crate::profile::Profile;
use crate::profile::format::{Format, Subject, View, render};
use crate::record::RequestRecord;
use directory::Directory;

/// Most bytes of a name before the id. Linux allows 255; the id takes 25 and the longest extension 20.
const STEM_MAX: usize = 180;

/// A file could not be written. The request's other files may be there.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{path}: {source}", path = path.display())]
    Write { path: PathBuf, source: io::Error },
    /// The id is not what ids look like, so no file name is made of it.
    #[error("`{}` is not a request id", .0.escape_debug())]
    BadId(String),
}

/// A directory that takes one file per request and format.
#[derive(Debug)]
pub struct ProfileDir {
    directory: Directory,
    template: Template,
    formats: Vec<Format>,
}

impl ProfileDir {
    /// Opens `path`, creating its last component with mode 0700 where it is missing. The directory must belong to
    /// root or to us, and nobody else may be able to write to it.
    pub fn open(path: &Path, template: Template, formats: Vec<Format>) -> Result<Self, DirectoryError> {
        Ok(Self { directory: Directory::open(path)?, template, formats })
    }

    /// Writes the request's files, with mode 0600, and tells their paths.
    pub fn write(&self, record: &RequestRecord, profile: &Profile) -> Result<Vec<PathBuf>, ExportError> {
        let stem = stem(&self.template, record)?;
        let subject = Subject::of(record);
        self.formats
            .iter()
            .map(|format| {
                let bytes = render(profile, &subject, *format, View::Wall, false);
                self.create(&format!("{stem}.{}", format.extension()), &bytes)
            })
            .collect()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, ExportError> {
        let path = self.directory.path().join(name);
        match self.directory.create(name, bytes) {
            Ok(()) => Ok(path),
            Err(source) => Err(ExportError::Write { path, source }),
        }
    }
}

/// The file's name without its extension.
fn stem(template: &Template, record: &RequestRecord) -> Result<String, ExportError> {
    let id = &record.id;
    if id.is_empty() || id.len() > 32 || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(ExportError::BadId(id.chars().take(64).collect()));
    }
    let mut stem = template.expand(record);
    stem.truncate(STEM_MAX);
    // A leading dot would hide the file, a leading hyphen make it an option to `rm` and `cat`.
    if stem.starts_with(['.', '-']) {
        stem.replace_range(..1, "_");
    }
    Ok(format!("{stem}.{id}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;
    use crate::record::{Attribution, Boundary, Outcome};

    pub(crate) fn record(method: &str, path: &str, duration_ms: u64) -> RequestRecord {
        RequestRecord {
            id: "0123456789abcdef01234567".into(),
            pid: 4711,
            tid: 4712,
            service: "shop".into(),
            method: Some(method.into()),
            path: Some(path.into()),
            route: Some("/orders/{id}".into()),
            status: Some(200),
            // 2023-11-14T22:13:20Z and a half.
            start: 1_700_000_000_500_000_000,
            duration_ns: duration_ms * 1_000_000 + 999_999,
            ttfb_ns: None,
            request_bytes: 0,
            response_bytes: 0,
            on_cpu_ns: None,
            runqueue_ns: None,
            off_cpu_ns: None,
            samples: 0,
            tail_samples: 0,
            lost_events: 0,
            boundary: Boundary::Uprobe,
            attribution: Attribution::Thread,
            outcome: Outcome::Complete,
            note: None,
            trace_id: None,
            profile: true,
        }
    }

    fn private_dir() -> tempfile::TempDir {
        tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir()
            .expect("a temporary directory")
    }

    fn open(path: &Path) -> Result<ProfileDir, DirectoryError> {
        ProfileDir::open(path, Template::default(), vec![Format::Text])
    }

    #[test]
    fn names_are_those_of_the_template_with_the_id() {
        let name = |path: &str| stem(&Template::default(), &record("GET", path, 42)).expect("a name");
        let id = "0123456789abcdef01234567";
        assert_eq!(name("/"), format!("root.000042ms.1700000000.{id}"));
        assert_eq!(name("/orders/17/"), format!("orders.17.000042ms.1700000000.{id}"));
        assert_eq!(name("/.env"), format!("_env.000042ms.1700000000.{id}"));
        assert_eq!(name("/-rf"), format!("_rf.000042ms.1700000000.{id}"));
        assert_eq!(name("/../../etc/passwd"), format!("_.....etc.passwd.000042ms.1700000000.{id}"));
        assert_eq!(name("/a b\n\u{1b}[1m/é"), format!("a_b___1m._.000042ms.1700000000.{id}"));
    }

    #[test]
    fn long_paths_are_cut_and_still_do_not_collide() {
        let mut one = record("GET", &format!("/{}", "é".repeat(1000)), 1);
        let name = stem(&Template::default(), &one).expect("a name");
        assert_eq!(name.len(), STEM_MAX + 1 + 24);
        one.id = "1123456789abcdef01234567".into();
        assert_ne!(stem(&Template::default(), &one).expect("a name"), name);
    }

    #[test]
    fn an_id_that_is_a_path_makes_no_file() {
        let mut bad = record("GET", "/", 1);
        for id in ["", "../x", "a/b", "a\0", &"a".repeat(33)] {
            bad.id = id.into();
            assert!(matches!(stem(&Template::default(), &bad), Err(ExportError::BadId(_))), "{id:?}");
        }
    }

    #[test]
    fn a_request_becomes_one_private_file_and_nothing_else() {
        let dir = private_dir();
        let target = open(dir.path()).expect("an open directory");
        let record = record("GET", "/orders/17", 5);
        let paths = target.write(&record, &Profile::default()).expect("a written file");
        assert_eq!(paths.len(), 1);
        assert_eq!(fs::metadata(&paths[0]).expect("the file").mode() & 0o7777, 0o600);
        let expected = render(&Profile::default(), &Subject::of(&record), Format::Text, View::Wall, false);
        assert_eq!(fs::read(&paths[0]).expect("the file"), expected);
        assert_eq!(fs::read_dir(dir.path()).expect("the directory").count(), 1, "no temporary file is left");
    }

    #[test]
    fn an_existing_file_or_link_is_never_written_to() {
        let dir = private_dir();
        let target = open(dir.path()).expect("an open directory");
        let outside = dir.path().join("outside");
        std::os::unix::fs::symlink(&outside, dir.path().join("planted")).expect("a link");
        fs::write(dir.path().join("there"), "before").expect("a file");
        for name in ["planted", "there"] {
            let error = target.create(name, b"after").expect_err(name);
            let ExportError::Write { source, .. } = error else { panic!("{error}") };
            assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
        }
        assert!(!outside.exists());
        assert_eq!(fs::read(dir.path().join("there")).expect("the file"), b"before");
        assert_eq!(fs::read_dir(dir.path()).expect("the directory").count(), 2, "no temporary file is left");
    }

    #[test]
    fn the_directory_must_be_ours_alone() {
        let parent = private_dir();
        let dir = parent.path().join("profiles");
        drop(open(&dir).expect("created where it is missing"));
        assert_eq!(fs::metadata(&dir).expect("the directory").mode() & 0o7777, 0o700);
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).expect("chmod");
        assert!(matches!(open(&dir), Err(DirectoryError::Writable { mode: 0o770, .. })));
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("chmod");
        drop(open(&dir).expect("others may read the names"));
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).expect("a link");
        assert!(matches!(open(&link), Err(DirectoryError::NotADirectory { .. })));
        fs::write(parent.path().join("file"), "").expect("a file");
        assert!(matches!(open(&parent.path().join("file")), Err(DirectoryError::NotADirectory { .. })));
        assert!(matches!(open(&parent.path().join("no/such")), Err(DirectoryError::Open { .. })));
    }

    #[test]
    fn somebody_elses_directory_is_refused() {
        // Only root can give a directory away.
        let dir = private_dir();
        if let Err(error) = std::os::unix::fs::chown(dir.path(), Some(65_534), None) {
            crate::skip::skip("somebody_elses_directory_is_refused", error);
            return;
        }
        assert!(matches!(open(dir.path()), Err(DirectoryError::Owner { uid: 65_534, .. })));
    }

    #[test]
    fn the_title_has_the_route_and_not_the_path() {
        let title = Subject::of(&record("GET", "/orders/17", 123)).title;
        assert_eq!(title, "GET /orders/{id} 200 - 123.9 ms");
    }
}
