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
    #[error("{}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{}: not a directory (a symbolic link is not followed)", path.display())]
    NotADirectory { path: PathBuf },
    #[error("{}: belongs to user {uid}; it must belong to root or to the user that runs reqprof", path.display())]
    Owner { path: PathBuf, uid: u32 },
    #[error("{}: mode {mode:04o} lets others write to it; remedy: chmod go-w", path.display())]
    Writable { path: PathBuf, mode: u32 },
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
        let temporary = CString::new(format!(".reqprof-{}-{number}.tmp", std::process::id()))?;
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
