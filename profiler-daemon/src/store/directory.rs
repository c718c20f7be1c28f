//! The state directory: made private, checked, and locked for one daemon.
//!
//! A daemon that runs as root and writes where others can write could be led to overwrite any file, so such a
//! directory is refused rather than repaired.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::OpenError;

/// Keeps other daemons out of the directory until it is dropped. The kernel releases it however we end.
pub(super) struct Lock(#[expect(dead_code, reason = "the open file is the lock")] File);

/// Creates the directory if there is none, checks that only we can write there, and locks it. Returns its path
/// without symbolic links.
pub(super) fn claim(dir: &Path) -> Result<(PathBuf, Lock), OpenError> {
    let io = |source| OpenError::Io { path: dir.to_path_buf(), source };
    // An existing directory is an error of this call only if `recursive` is false; it is checked below.
    DirBuilder::new().recursive(true).mode(0o700).create(dir).or_else(|e| match dir.symlink_metadata() {
        Ok(_) => Ok(()),
        Err(_) => Err(io(e)),
    })?;
    check(dir)?;
    let real = dir.canonicalize().map_err(io)?;
    for parent in real.ancestors().skip(1) {
        check_parent(&real, parent)?;
    }
    let lock = lock(&real)?;
    Ok((real, lock))
}

fn check(dir: &Path) -> Result<(), OpenError> {
    let meta = dir.symlink_metadata().map_err(|source| OpenError::Io { path: dir.to_path_buf(), source })?;
    if meta.is_symlink() {
        return Err(OpenError::Symlink(dir.to_path_buf()));
    }
    if !meta.is_dir() {
        return Err(OpenError::NotADirectory(dir.to_path_buf()));
    }
    // SAFETY: geteuid takes nothing, touches no memory and cannot fail.
    let us = unsafe { libc::geteuid() };
    if meta.uid() != us && meta.uid() != 0 {
        return Err(OpenError::Owner { path: dir.to_path_buf(), owner: meta.uid(), us });
    }
    if meta.mode() & 0o022 != 0 {
        return Err(OpenError::Writable { path: dir.to_path_buf(), mode: meta.mode() & 0o7777 });
    }
    Ok(())
}

/// Who may rename what is in a parent can put another directory in place of ours.
fn check_parent(dir: &Path, parent: &Path) -> Result<(), OpenError> {
    let meta = parent.metadata().map_err(|source| OpenError::Io { path: parent.to_path_buf(), source })?;
    let (path, parent) = (dir.to_path_buf(), parent.to_path_buf());
    // SAFETY: geteuid takes nothing, touches no memory and cannot fail.
    let us = unsafe { libc::geteuid() };
    // Who has become root by sudo can do as root anyway.
    let sudo = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    if meta.uid() != us && meta.uid() != 0 && Some(meta.uid()) != sudo {
        return Err(OpenError::ParentOwner { path, parent, owner: meta.uid() });
    }
    // Where the sticky bit is set, as in /tmp, only the owner can rename it.
    if meta.mode() & 0o022 != 0 && meta.mode() & libc::S_ISVTX == 0 {
        return Err(OpenError::ParentWritable { path, parent, mode: meta.mode() & 0o7777 });
    }
    Ok(())
}

fn lock(dir: &Path) -> Result<Lock, OpenError> {
    let path = dir.join("lock");
    let io = |source| OpenError::Io { path: path.clone(), source };
    let mut file = private_file(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // The holder writes at most 10 digits and a newline; anything longer is not a pid.
            let read = (&file).take(16).read_to_string(&mut text);
            let holder = match (read, text.trim().parse::<u32>()) {
                (Ok(_), Ok(pid)) => format!("pid {pid}"),
                _ => "its pid is unknown".to_owned(),
            };
            return Err(OpenError::Locked { path: dir.to_path_buf(), holder });
        }
        Err(TryLockError::Error(e)) => return Err(io(e)),
    }
    file.set_len(0).map_err(io)?;
    file.rewind().map_err(io)?;
    match writeln!(file, "{}", std::process::id()) {
        // A full disk must not keep a daemon with old data from starting: the lock holds without its text.
        Err(e) if e.kind() == io::ErrorKind::StorageFull => {}
        other => other.map_err(io)?,
    }
    Ok(Lock(file))
}

/// Opens a file of ours for reading and writing, creating it with mode 0600. Anything but a regular file is refused.
pub(super) fn private_file(path: &Path) -> Result<File, OpenError> {
    let io = |source| OpenError::Io { path: path.to_path_buf(), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // Non-blocking, or a FIFO that someone put here would hold us for ever.
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ELOOP | libc::EISDIR | libc::ENXIO) => OpenError::Planted(path.to_path_buf()),
            _ => io(e),
        })?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(OpenError::Planted(path.to_path_buf()));
    }
    Ok(file)
}
