//! A directory held open, into which files are put that nobody else can have prepared.
//!
//! In: a path at the start, then names and bytes. Out: files that are whole or absent. Every step after the check
//! goes through the directory's descriptor, so what was checked is what is written to, whatever happens to the path.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a directory is not used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error(
        "{}: {source}; name a directory with --prof-path whose parent exists, on a disk that can be written", path.display()
    )]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "{}: not a directory, and a symbolic link is not followed; name the directory itself with --prof-path",
        path.display()
    )]
    NotADirectory { path: PathBuf },
    #[error(
        "{}: belongs to user {uid}, who could put files in place of ours; chown it to root or to the user that runs \
         reqprof, or name another one with --prof-path",
        path.display()
    )]
    Owner { path: PathBuf, uid: u32 },
    #[error("{}: mode {mode:04o} lets others write to it; run `chmod go-w {}`", path.display(), path.display())]
    Writable { path: PathBuf, mode: u32 },
}

/// The name of a file that is not whole yet.
fn temporary_name(pid: u32, number: u64) -> String {
    format!(".reqprof-{pid}-{number}.tmp")
}

/// The process that such a file belongs to.
fn owner_of_temporary(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(".reqprof-")?.strip_suffix(".tmp")?.split_once('-')?;
    let pid = pid.parse().ok()?;
    (temporary_name(pid, number.parse().ok()?) == name).then_some(pid)
}

/// Removes what a reqprof that was killed has left: it takes room, and its names are ours when the pid comes again.
/// Best effort: what cannot be removed is reported when its name is needed.
fn forget_temporaries(path: &Path) {
    let Ok(entries) = std::fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        let owner = entry.file_name().to_str().and_then(owner_of_temporary);
        // Another reqprof may be writing here; we have not begun to.
        let dead =
            |pid| pid == std::process::id() || std::fs::symlink_metadata(format!("/proc/{pid}")).is_err();
        if owner.is_some_and(dead) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[derive(Debug)]
pub(super) struct Directory {
    fd: File,
    path: PathBuf,
    temporaries: AtomicU64,
}

impl Directory {
    pub(super) fn open(path: &Path) -> Result<Self, DirectoryError> {
        let path = path.to_owned();
        if let Err(source) = std::fs::DirBuilder::new().mode(0o700).create(&path)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(DirectoryError::Open { path, source });
        }
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path);
        let fd = match opened {
            Ok(fd) => fd,
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
                return Err(DirectoryError::NotADirectory { path });
            }
            Err(source) => return Err(DirectoryError::Open { path, source }),
        };
        let meta = match fd.metadata() {
            Ok(meta) => meta,
            Err(source) => return Err(DirectoryError::Open { path, source }),
        };
        // SAFETY: no arguments, cannot fail.
        let ours = unsafe { libc::geteuid() };
        if meta.uid() != 0 && meta.uid() != ours {
            return Err(DirectoryError::Owner { path, uid: meta.uid() });
        }
        if meta.mode() & 0o022 != 0 {
            return Err(DirectoryError::Writable { path, mode: meta.mode() & 0o7777 });
        }
        forget_temporaries(&path);
        Ok(Self { fd, path, temporaries: AtomicU64::new(0) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `name`, which must not exist, with these bytes.
    ///
    /// No fsync: a profile is worth less than the disk time of one flush per request. A killed daemon leaves the
    /// file whole or absent; after a power failure the last seconds' files may be empty.
    pub(super) fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = CString::new(temporary_name(std::process::id(), number))?;
        let name = CString::new(name)?;
        let mut file = self.create_exclusively(&temporary)?;
        let result = file.write_all(bytes).and_then(|()| self.rename(&temporary, &name));
        if result.is_err() {
            self.unlink(&temporary);
        }
        result
    }

    fn create_exclusively(&self, name: &CString) -> io::Result<File> {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: the descriptor is open and the name NUL-terminated; both outlive the call.
        let fd = unsafe { libc::openat(self.fd.as_raw_fd(), name.as_ptr(), flags, 0o600) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: openat has just given us this descriptor and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
    }

    /// Renames without ever replacing.
    fn rename(&self, from: &CString, to: &CString) -> io::Result<()> {
        let dir = self.fd.as_raw_fd();
        // SAFETY: the descriptor is open and both names are NUL-terminated; all outlive the call.
        if unsafe { libc::renameat2(dir, from.as_ptr(), dir, to.as_ptr(), libc::RENAME_NOREPLACE) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        // NFS and others do not know the flag. A hard link does not replace either.
        // SAFETY: as above.
        if unsafe { libc::linkat(dir, from.as_ptr(), dir, to.as_ptr(), 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.unlink(from);
        Ok(())
    }

    /// Best effort: it only tidies up after an error that is reported anyway.
    fn unlink(&self, name: &CString) {
        // SAFETY: the descriptor is open and the name NUL-terminated; both outlive the call.
        unsafe { libc::unlinkat(self.fd.as_raw_fd(), name.as_ptr(), 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_has_left_is_removed_and_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str| std::fs::write(dir.path().join(name), "half").unwrap();
        let ours = temporary_name(std::process::id(), 0);
        // The largest pid is 4,194,304, so nobody has this one; pid 1 is alive.
        let (dead, alive) = (temporary_name(9_999_999, 7), temporary_name(1, 7));
        let others =
            [alive.as_str(), ".reqprof-x-1.tmp", ".reqprof-5.tmp", "report.tmp", ".reqprof-05-1.tmp"];
        for name in others.iter().chain([&ours.as_str(), &dead.as_str()]) {
            put(name);
        }
        let directory = Directory::open(dir.path()).unwrap();
        directory.create("first.txt", b"whole").unwrap();
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        let mut expected: Vec<String> = others.iter().map(ToString::to_string).collect();
        expected.push("first.txt".into());
        expected.sort_unstable();
        assert_eq!(names, expected);
    }
}
