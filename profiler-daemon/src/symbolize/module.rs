//! The files that native code comes from.
//!
//! In: a mapping of a process. Out: a [`Module`]: one per distinct file on this host, whoever maps it. Files are
//! told apart by device, inode, size and time, not by build id: a target could forge the build id of libc and then
//! name other processes' frames.
//!
//! blazesym maps the files it reads, and whoever may write to a file can truncate it meanwhile, which ends the
//! reader with SIGBUS. So a file that anyone but this host's root could change is copied first. It also opens whatever
//! a file names as the place of its debug information, and a FIFO there would hold it for ever: names are followed
//! only for files that root put where nobody else could put anything.
//!
//! A file system in user space can make every read wait, so files are opened and read through `process::patience`.

use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::rc::Rc;

use rustc_hash::FxHashMap;

use super::reason::Reason;
use crate::process::anonymous;
use crate::process::elf::{ElfFile, FileId};
use crate::process::maps::{Mapping, in_user_space, open};
use crate::process::patience::{FILES, PATIENCE};
use crate::process::vdso;

/// A file with code.
#[derive(Debug)]
pub(super) struct Module {
    /// Unique in this daemon's life.
    pub(super) id: u32,
    /// The file's name without its directories.
    pub(super) name: String,
    pub(super) elf: ElfFile,
    /// Where blazesym finds the bytes, as long as this module lives.
    pub(super) path: PathBuf,
    /// Whether its debug information may be read.
    pub(super) debug: bool,
    /// Bytes held in memory by the copy.
    copied: u64,
}

/// Files open at once. A Python process maps 50 to 200.
const MODULES_MAX: usize = 1024;
/// Largest file that is copied, and the sum of all copies: copies are memory.
const COPY_MAX: u64 = 64 << 20;
const COPIES_MAX: u64 = 256 << 20;
/// Largest file whose debug information is read, and most bytes that it may inflate to.
const DEBUG_MAX: u64 = 512 << 20;

/// All modules in use.
#[derive(Debug, Default)]
pub(super) struct Modules {
    known: FxHashMap<FileId, Rc<Module>>,
    vdso: Option<Rc<Module>>,
    next: u32,
}

impl Modules {
    /// The module behind a mapping.
    pub(super) fn get(&mut self, pid: u32, mapping: &Mapping) -> Result<Rc<Module>, Reason> {
        if !mapping.is_file() {
            let vdso = mapping.path.as_os_str() == vdso::NAME;
            return if vdso { self.vdso() } else { Err(Reason::Anonymous) };
        }
        let place = mapping.clone();
        let opened = PATIENCE.ask(pid, FILES, move || Opened::of(pid, &place))??;
        if let Some(module) = self.known.get(&opened.id) {
            return Ok(module.clone());
        }
        self.make_room()?;
        let room = COPIES_MAX.saturating_sub(self.known.values().map(|m| m.copied).sum());
        let (id, name) = (opened.id, mapping.file_name());
        let read = PATIENCE.ask(pid, FILES, move || opened.read(&name, room))??;
        let module = Rc::new(self.number(read, mapping.file_name()));
        self.known.insert(id, module.clone());
        Ok(module)
    }

    /// Modules that no process uses any more.
    pub(super) fn sweep(&mut self) -> Vec<Rc<Module>> {
        let unused = |module: &Rc<Module>| Rc::strong_count(module) == 1;
        let ids: Vec<FileId> = self.known.iter().filter(|(_, m)| unused(m)).map(|(id, _)| *id).collect();
        ids.iter().filter_map(|id| self.known.remove(id)).collect()
    }

    pub(super) fn is_full(&self) -> bool {
        self.known.len() >= MODULES_MAX
    }

    fn make_room(&self) -> Result<(), Reason> {
        if self.is_full() { Err(Reason::TooManyFiles) } else { Ok(()) }
    }

    fn number(&mut self, read: Read, name: String) -> Module {
        let Read { elf, copied, debug } = read;
        let path = PathBuf::from(format!("/proc/self/fd/{}", elf.file().as_raw_fd()));
        self.next += 1;
        Module { id: self.next, name, elf, path, debug, copied }
    }

    /// The kernel maps the same code into every process: our own stands for all.
    fn vdso(&mut self) -> Result<Rc<Module>, Reason> {
        if let Some(module) = &self.vdso {
            return Ok(module.clone());
        }
        let file = vdso::file().map_err(|_| Reason::Unopened)?;
        let read = Read::of(file, vdso::NAME, 0, false)?;
        let module = Rc::new(self.number(read, vdso::NAME.to_owned()));
        self.vdso = Some(module.clone());
        Ok(module)
    }
}

/// A mapped file, before anything in it was looked at.
struct Opened {
    file: File,
    id: FileId,
    trust: Trust,
}

impl Opened {
    fn of(pid: u32, mapping: &Mapping) -> Result<Self, Reason> {
        let file = open(pid, mapping).map_err(|error| {
            tracing::debug!(pid, %error, "cannot open a mapped file");
            Reason::Unopened
        })?;
        let id = FileId::of(&file).map_err(|_| Reason::Unopened)?;
        let trust = Trust::of(&file, mapping);
        Ok(Self { file, id, trust })
    }

    /// `room`: most bytes of a copy.
    fn read(self, name: &str, room: u64) -> Result<Read, Reason> {
        let Self { file, id, trust } = self;
        if trust != Trust::Nobody {
            return Read::of(file, name, 0, trust == Trust::FileAndPlace);
        }
        if id.size > COPY_MAX.min(room) {
            return Err(Reason::TooLarge);
        }
        let copy = anonymous::file(file.take(id.size)).map_err(|_| Reason::Unopened)?;
        Read::of(copy, name, id.size, false)
    }
}

/// A file whose headers were read.
struct Read {
    elf: ElfFile,
    copied: u64,
    debug: bool,
}

impl Read {
    /// `links`: whether files that it names may be opened.
    fn of(file: File, name: &str, copied: u64, links: bool) -> Result<Self, Reason> {
        let elf = ElfFile::parse(file).map_err(|error| {
            tracing::debug!(name, %error, "not a usable ELF file");
            Reason::Damaged
        })?;
        let fits = elf.id().size <= DEBUG_MAX && elf.debug_fits(DEBUG_MAX);
        let debug = fits && (links || !elf.names_another());
        Ok(Self { elf, copied, debug })
    }
}

/// Who but this host's root could have a hand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// Anyone.
    Nobody,
    /// Nobody could change it, but perhaps put something beside it.
    File,
    /// Nobody.
    FileAndPlace,
}

impl Trust {
    /// Only a file in this daemon's own file system at its path counts: "root" inside a container may be anyone's, as
    /// may be what a file system in user space says.
    fn of(file: &File, mapping: &Mapping) -> Self {
        let root_alone = |meta: &Metadata| meta.uid() == 0 && meta.mode() & 0o022 == 0;
        let (Ok(theirs), Ok(path)) = (file.metadata(), mapping.path.canonicalize()) else {
            return Self::Nobody;
        };
        let Ok(ours) = path.metadata() else { return Self::Nobody };
        let same = (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino());
        if !same || !root_alone(&theirs) || in_user_space(file) {
            return Self::Nobody;
        }
        let place = path.ancestors().skip(1).all(|dir| dir.metadata().is_ok_and(|meta| root_alone(&meta)));
        if place { Self::FileAndPlace } else { Self::File }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::maps::Maps;

    fn own_mapping(name: &str) -> Mapping {
        let maps = Maps::read(std::process::id()).unwrap();
        maps.iter().find(|m| m.executable && m.file_name().starts_with(name)).unwrap().clone()
    }

    #[test]
    fn one_module_per_file() {
        let mut modules = Modules::default();
        let mapping = own_mapping("libc.so");
        let a = modules.get(std::process::id(), &mapping).unwrap();
        let b = modules.get(std::process::id(), &mapping).unwrap();
        assert!(Rc::ptr_eq(&a, &b));
        assert!(modules.sweep().is_empty());
        drop((a, b));
        assert_eq!(modules.sweep().len(), 1);
        assert!(modules.known.is_empty());
    }

    #[test]
    fn the_vdso_has_symbols() {
        let vdso = Modules::default().get(std::process::id(), &own_mapping("[vdso]")).unwrap();
        assert!(vdso.elf.symbols(&["__vdso_clock_gettime"]).unwrap().len() == 1);
    }

    #[test]
    fn files_of_others_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib.so");
        let mapping = own_mapping("libc.so");
        std::fs::copy(&mapping.path, &path).unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        // At an address where nothing is mapped, so that the path decides.
        let mut mapping =
            Mapping { start: 0x1000, end: 0x2000, inode, path: path.as_path().into(), ..mapping };
        std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap_or_else(|_| {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        });
        let mut modules = Modules::default();
        let module = modules.get(std::process::id(), &mapping).unwrap();
        assert_eq!(module.copied, module.elf.id().size);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert!(module.elf.symbols(&["recv"]).unwrap().contains_key("recv"));

        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(COPY_MAX + 1).unwrap();
        assert_eq!(modules.get(std::process::id(), &mapping).unwrap_err(), Reason::TooLarge);
        mapping.inode += 1;
        assert_eq!(modules.get(std::process::id(), &mapping).unwrap_err(), Reason::Unopened);
    }
}
