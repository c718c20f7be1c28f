//! The memory map of a process, and the files behind it.
//!
//! In: `/proc/PID/maps`. Out: the mappings that can hold code or belong to a file, sorted, and a way to open the
//! file of one without trusting anything its path says: the path is the target's (in its own mount namespace, with
//! its own symbolic links), and what lies there may be a FIFO, a device or another file by now.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::identity::{read_bounded, via};

/// One line of the map.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// Offset in the file.
    pub offset: u64,
    pub executable: bool,
    /// `(major, minor)` as the kernel prints it. On overlay file systems `stat` reports another device, so this
    /// identifies a file only among mappings.
    pub dev: (u32, u32),
    pub inode: u64,
    /// As the target sees it, or a name in brackets (`[vdso]`), or empty for anonymous memory. Escapes undone.
    pub path: Arc<Path>,
    /// The file was unlinked (or replaced by an upgrade) since.
    pub deleted: bool,
}

impl Mapping {
    /// Whether there is a file behind it.
    pub fn is_file(&self) -> bool {
        self.inode != 0
    }

    /// Whether it is glibc: `libc.so.6`, or `libc-2.31.so` as it was called before 2.34.
    pub fn is_glibc(&self) -> bool {
        let name = self.file_name();
        name == "libc.so.6" || (name.starts_with("libc-2.") && name.ends_with(".so"))
    }

    /// The last component of the path, for display.
    pub fn file_name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }
}

/// The mappings of a process that are executable or belong to a file, by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    mappings: Vec<Mapping>,
}

/// Linux's default `vm.max_map_count` is 65,530: a process has to be raised by root to have more.
const LINES_MAX: usize = 65_536;
/// 65,536 lines of 256 bytes, longer than nearly any real line.
const BYTES_MAX: u64 = 16 << 20;

impl Maps {
    /// Reads the map of a process.
    pub fn read(pid: u32) -> io::Result<Self> {
        Ok(Self::parse(&Self::text(pid)?))
    }

    /// What [`Self::parse`] takes; to be compared with an earlier one, which is cheaper than parsing it.
    pub fn text(pid: u32) -> io::Result<Vec<u8>> {
        read_bounded(&format!("/proc/{}/maps", via(pid)), BYTES_MAX)
    }

    /// Lines that are not understood are skipped, as is everything beyond the limit.
    pub fn parse(text: &[u8]) -> Self {
        let mut maps = Self::default();
        let mut last: Arc<Path> = Arc::from(Path::new(""));
        for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()).take(LINES_MAX) {
            let Some(mapping) = parse_line(line, &mut last) else { continue };
            if mapping.executable || mapping.is_file() || mapping.path.as_os_str() == super::vdso::NAME {
                maps.mappings.push(mapping);
            }
        }
        // The kernel prints them in order; a lookup must not depend on that.
        maps.mappings.sort_by_key(|m| m.start);
        maps
    }

    /// The mapping that holds an address.
    pub fn lookup(&self, address: u64) -> Option<&Mapping> {
        let n = self.mappings.partition_point(|m| m.start <= address);
        self.mappings[..n].last().filter(|m| address < m.end)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter()
    }

    /// The executable address ranges of which what is mapped differs between two maps.
    pub fn changed(&self, other: &Self) -> Vec<Range<u64>> {
        let code = |maps: &Self| maps.mappings.iter().filter(|m| m.executable).cloned().collect::<Vec<_>>();
        let (ours, theirs) = (code(self), code(other));
        let lacks = |all: &[Mapping], one: &Mapping| {
            all.binary_search_by_key(&one.start, |m| m.start).map_or(true, |n| all[n] != *one)
        };
        let gone = ours.iter().filter(|m| lacks(&theirs, m));
        let new = theirs.iter().filter(|m| lacks(&ours, m));
        gone.chain(new).map(|m| m.start..m.end).collect()
    }
}

/// `start-end perms offset major:minor inode   path`, numbers hexadecimal except the inode.
fn parse_line(line: &[u8], last: &mut Arc<Path>) -> Option<Mapping> {
    let mut fields = line.splitn(6, |&b| b == b' ');
    let mut text = || fields.next().and_then(|f| std::str::from_utf8(f).ok());
    let (start, end) = text()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let executable = text()?.as_bytes().get(2) == Some(&b'x');
    let offset = u64::from_str_radix(text()?, 16).ok()?;
    let (major, minor) = text()?.split_once(':')?;
    let dev = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = text()?.parse().ok()?;
    if start >= end {
        return None;
    }
    let mut path = fields.next().unwrap_or_default().trim_ascii_start();
    let mut deleted = false;
    if inode != 0
        && let Some(rest) = path.strip_suffix(b" (deleted)")
    {
        (path, deleted) = (rest, true);
    }
    let unescaped;
    if memchr::memchr(b'\\', path).is_some() {
        unescaped = unescape(path);
        path = &unescaped;
    }
    if last.as_os_str().as_bytes() != path {
        *last = Arc::from(Path::new(OsStr::from_bytes(path)));
    }
    Some(Mapping { start, end, offset, executable, dev, inode, path: last.clone(), deleted })
}

/// The kernel writes a newline as `\012` (fs/proc/task_mmu.c); a backslash itself stays as it is.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&first, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            out.push(b'\n');
            rest = tail;
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

/// Why a mapped file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("no file is mapped there")]
    Anonymous,
    #[error("{path} was deleted, and /proc/PID/map_files needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE")]
    Deleted { path: String },
    #[error("{path} is not a regular file")]
    NotRegular { path: String },
    #[error("{path} is another file by now")]
    Changed { path: String },
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
}

/// Opens the file behind a mapping for reading. Never opens anything but a regular file; only a file system in user
/// space can make it wait (see `patience`).
///
/// `/proc/PID/map_files` leads to the very file that is mapped, deleted or not, in whatever namespace. Without the
/// privilege for it the path is looked up below the target's own root, where no link can lead out.
pub fn open(pid: u32, mapping: &Mapping) -> Result<File, OpenError> {
    if !mapping.is_file() {
        return Err(OpenError::Anonymous);
    }
    let name = || mapping.path.to_string_lossy().into_owned();
    let pid = via(pid);
    let direct = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    if let Ok(handle) = open_path(&direct) {
        return reopen_regular(handle, name).map(|(file, _)| file);
    }
    if mapping.deleted {
        return Err(OpenError::Deleted { path: name() });
    }
    let io_error = |source| OpenError::Io { path: name(), source };
    let root = open_path(&format!("/proc/{pid}/root")).map_err(io_error)?;
    let handle = open_in_root(&root, &mapping.path, 0).map_err(io_error)?;
    let (file, inode) = reopen_regular(handle, name)?;
    // An overlay with `xino` puts the layer's number into the high bits of what `stat` says.
    if inode & 0xffff_ffff != mapping.inode & 0xffff_ffff {
        return Err(OpenError::Changed { path: name() });
    }
    Ok(file)
}

/// Whether a program serves the file (FUSE): it can say anything of it, and let every read of it wait.
pub fn in_user_space(file: &File) -> bool {
    /// include/uapi/linux/magic.h
    const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
    // SAFETY: an all-zero `statfs` is valid, and only written by the call.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `about` outlives the call.
    let failed = unsafe { libc::fstatfs(file.as_raw_fd(), &mut about) };
    failed != 0 || about.f_type == FUSE_SUPER_MAGIC
}

/// A handle that is neither readable nor able to block.
pub(crate) fn open_path(path: &str) -> io::Result<OwnedFd> {
    let path = CString::new(path)?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
    owned(fd.into())
}

/// Looks a path up as the target would, with its root as the root. `rules`: of `RESOLVE_*`, those besides.
pub(crate) fn open_in_root(root: &OwnedFd, path: &Path, rules: u64) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: an all-zero `open_how` is valid: no flags, no mode, no resolution rules.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS | rules;
    // SAFETY: the path is NUL-terminated, `how` is a valid structure of the size given, and both outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &how as *const libc::open_how,
            size_of::<libc::open_how>(),
        )
    };
    owned(fd)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel just returned this descriptor, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn reopen_regular(handle: OwnedFd, name: impl Fn() -> String) -> Result<(File, u64), OpenError> {
    let io_error = |source| OpenError::Io { path: name(), source };
    let handle = File::from(handle);
    let meta = handle.metadata().map_err(io_error)?;
    if !meta.is_file() {
        return Err(OpenError::NotRegular { path: name() });
    }
    // Reopening through our own descriptor cannot lead to another file than the one just checked.
    let file = File::open(format!("/proc/self/fd/{}", handle.as_raw_fd())).map_err(io_error)?;
    Ok((file, meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const TEXT: &[u8] = b"\
55d0c0a00000-55d0c0a02000 r--p 00000000 08:01 1234                       /usr/bin/cat
55d0c0a02000-55d0c0a07000 r-xp 00002000 08:01 1234                       /usr/bin/cat
55d0c1000000-55d0c1021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 r-xp 00000000 00:00 0
7f0000002000-7f0000003000 r-xp 00001000 fd:0a 77 /tmp/a\\012b\\134 c.so (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
7ffd000fe000-7ffd00100000 r-xp 00000000 00:00 0                          [vdso]
nonsense
5-4 r-xp 0 0:0 0
";

    #[test]
    fn keeps_files_and_code() {
        let maps = Maps::parse(TEXT);
        let names: Vec<_> = maps.iter().map(|m| m.path.to_str().unwrap()).collect();
        assert_eq!(names, ["/usr/bin/cat", "/usr/bin/cat", "", "/tmp/a\nb\\134 c.so", "[vdso]"]);
        let cat = maps.lookup(0x55d0_c0a0_6fff).unwrap();
        assert_eq!((cat.offset, cat.inode, cat.dev, cat.executable), (0x2000, 1234, (8, 1), true));
        assert_eq!(maps.lookup(0x55d0_c0a0_7000), None);
        assert_eq!(maps.lookup(0), None);
        assert_eq!(maps.lookup(u64::MAX), None);
        let gone = maps.lookup(0x7f00_0000_2000).unwrap();
        assert!(gone.deleted);
        assert_eq!((gone.dev, gone.file_name().as_str()), ((0xfd, 0x0a), "a\nb\\134 c.so"));
    }

    #[test]
    fn what_changed_is_code_that_came_went_or_was_replaced() {
        let old = Maps::parse(
            b"\
1000-2000 r-xp 00000000 08:01 7 /a
3000-4000 r-xp 00000000 08:01 8 /b
5000-6000 r--p 00000000 08:01 9 /data
7000-8000 r-xp 00000000 08:01 7 /a
",
        );
        let new = Maps::parse(
            b"\
1000-2000 r-xp 00000000 08:01 7 /a
3000-4000 r-xp 00000000 08:01 10 /c
5000-6000 r--p 00000000 08:01 11 /other data
9000-a000 r-xp 00000000 08:01 7 /a
",
        );
        let mut changed = old.changed(&new);
        changed.sort_by_key(|range| range.start);
        changed.dedup();
        assert_eq!(changed, [0x3000..0x4000, 0x7000..0x8000, 0x9000..0xa000]);
        assert!(old.changed(&old).is_empty());
    }

    #[test]
    fn a_deleted_file_is_opened_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gone.so");
        std::fs::write(&path, [7; 4096]).unwrap();
        let file = File::open(&path).unwrap();
        // SAFETY: a fresh private mapping of an open file.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        assert_ne!(address, libc::MAP_FAILED);
        std::fs::remove_file(&path).unwrap();
        let maps = Maps::read(std::process::id()).unwrap();
        let mapping = maps.lookup(address as u64).unwrap();
        assert!(mapping.deleted && *mapping.path == *path);
        match open(std::process::id(), mapping) {
            Ok(found) => assert_eq!(found.metadata().unwrap().ino(), file.metadata().unwrap().ino()),
            Err(error) => {
                crate::skip::skip("opens_the_file_that_is_mapped", "map_files is not permitted here");
                assert!(matches!(error, OpenError::Deleted { .. }));
            }
        }
        // SAFETY: the page mapped above, which nothing refers to any more.
        unsafe { libc::munmap(address, 4096) };
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed(text in "[0-9a-f:\\-rwxp \\\\/\n()deleted]{0,300}") {
            for mapping in Maps::parse(text.as_bytes()).iter() {
                assert!(mapping.start < mapping.end);
            }
        }
    }

    #[test]
    fn the_number_of_lines_is_bounded() {
        let line = b"1000-2000 r-xp 00000000 00:00 0\n";
        assert_eq!(Maps::parse(&line.repeat(LINES_MAX)).iter().count(), LINES_MAX);
        assert_eq!(Maps::parse(&line.repeat(LINES_MAX + 1)).iter().count(), LINES_MAX);
    }

    #[test]
    fn opens_the_file_that_is_mapped() {
        let maps = Maps::read(std::process::id()).unwrap();
        let here = maps.lookup(opens_the_file_that_is_mapped as *const () as u64).unwrap();
        let file = open(std::process::id(), here).unwrap();
        let exe = std::fs::metadata("/proc/self/exe").unwrap();
        assert_eq!((file.metadata().unwrap().ino(), file.metadata().unwrap().len()), (exe.ino(), exe.len()));
    }

    /// A mapping that is in no process, so that only the path can lead to the file.
    fn by_path(path: &Path, inode: u64) -> Result<File, OpenError> {
        let mapping = Mapping {
            start: 0x1000,
            end: 0x2000,
            offset: 0,
            executable: true,
            dev: (0, 0),
            inode,
            path: Arc::from(path),
            deleted: false,
        };
        open(std::process::id(), &mapping)
    }

    #[test]
    fn a_path_leads_only_to_the_regular_file_that_was_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let (real, fifo, link) =
            (dir.path().join("a.so"), dir.path().join("fifo.so"), dir.path().join("link.so"));
        std::fs::write(&real, b"x").unwrap();
        let inode = std::fs::metadata(&real).unwrap().ino();
        symlink(&real, &link).unwrap();
        let c = CString::new(fifo.as_os_str().as_bytes()).unwrap();
        // SAFETY: a NUL-terminated path.
        assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);

        assert!(by_path(&real, inode).is_ok());
        assert!(by_path(&link, inode).is_ok());
        assert!(matches!(by_path(&real, inode + 1), Err(OpenError::Changed { .. })));
        // Opening a FIFO for reading would wait for a writer for ever.
        assert!(matches!(by_path(&fifo, 1), Err(OpenError::NotRegular { .. })));
        assert!(matches!(by_path(Path::new("/dev/zero"), 1), Err(OpenError::NotRegular { .. })));
        assert!(matches!(by_path(Path::new("/proc/self/exe"), 1), Err(OpenError::Io { .. })));
        assert!(matches!(by_path(&real, 0), Err(OpenError::Anonymous)));
    }
}
