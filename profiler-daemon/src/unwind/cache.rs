//! Tables that the kernel side has, by what they were made from.
//!
//! In: opened ELF files. Out: where each one's table is. A table is made once for all files with the same `.eh_frame`, at
//! whatever place and under whatever name: not a build ID says so, which anybody can write into a file to have the
//! tables of others go wrong, but a hash of the section under a key of our own. Tables that nobody uses stay until
//! their room is needed.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::BuildHasher;
use std::io;
use std::time::{Duration, Instant};

use profiler_common::unwind::{BLOCKS_MAX, Block, Mapping, RULES_MAX, Rule, Space};

use super::numbers::{Blocks, Rules};
use super::rows::{RowsError, rows};
use super::section::{Section, SectionError};
use super::table::Table;
use crate::process::elf::{ElfError, ElfFile, FileId, Load};

/// Where tables go: the kernel's maps.
pub trait Sink: Send {
    fn rules(&mut self, rules: &[(u16, Rule)]) -> io::Result<()>;
    /// `numbers` are in order, and as many as `blocks`.
    fn blocks(&mut self, numbers: &[u32], blocks: &[Block]) -> io::Result<()>;
    fn mappings(&mut self, first: u32, mappings: &[Mapping]) -> io::Result<()>;
    fn space(&mut self, pid: u32, space: Space) -> io::Result<()>;
    fn forget(&mut self, pid: u32);
}

/// Why a file has no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NoTable {
    /// It has no `.eh_frame`, or an empty one.
    Missing,
    /// It is no ELF file that we understand, or damaged.
    Damaged,
    /// It could not be opened or read.
    Unreadable,
    /// It is larger than any that is known.
    TooLarge,
    /// There is no room now.
    Full,
}

impl NoTable {
    pub fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Damaged => "damaged",
            Self::Unreadable => "unreadable",
            Self::TooLarge => "too_large",
            Self::Full => "full",
        }
    }
}

impl From<ElfError> for NoTable {
    fn from(error: ElfError) -> Self {
        match error {
            ElfError::Io(_) => Self::Unreadable,
            ElfError::Format(_) => Self::Damaged,
            ElfError::TooLarge => Self::TooLarge,
        }
    }
}

impl From<SectionError> for NoTable {
    fn from(error: SectionError) -> Self {
        match error {
            SectionError::Io(_) => Self::Unreadable,
            SectionError::Missing => Self::Missing,
            SectionError::TooLarge => Self::TooLarge,
        }
    }
}

impl From<RowsError> for NoTable {
    fn from(error: RowsError) -> Self {
        match error {
            RowsError::Empty => Self::Missing,
            RowsError::Span | RowsError::TooMany => Self::TooLarge,
        }
    }
}

/// What a section holds, hashed twice.
pub type Content = (u64, u64);

/// What is read of a file: the part that can be waited for.
pub struct Read {
    pub(super) loads: Vec<Load>,
    pub(super) section: Result<Section, NoTable>,
}

impl Read {
    pub fn of(file: File) -> Result<Self, NoTable> {
        let elf = ElfFile::parse(file)?;
        Ok(Self { loads: elf.loads().to_vec(), section: Section::of(&elf).map_err(NoTable::from) })
    }
}

/// A file that was read before.
#[derive(Clone)]
pub struct Known {
    pub loads: std::sync::Arc<[Load]>,
    pub table: Result<Content, NoTable>,
}

/// A table in the kernel's memory.
struct Stored {
    base: u64,
    root: u32,
    levels: u32,
    rows: usize,
    blocks: Vec<u32>,
    rules: Vec<u16>,
    /// Lists of mappings that name it.
    users: u32,
    /// When it was used last, on the cache's own count.
    used: u64,
}

/// Where a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub base: u64,
    pub root: u32,
    pub levels: u32,
}

/// How it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub tables: usize,
    pub rows: usize,
    pub rules: usize,
    /// Of the kernel's memory.
    pub bytes: usize,
    /// Tables made, the time it took, and the longest that one took.
    pub built: u64,
    pub build_time: Duration,
    pub build_longest: Duration,
    pub evicted: u64,
}

/// Files remembered, also those without a table: 200 bytes each.
const FILES_MAX: usize = 8192;
/// Unused tables make room before it is needed, because what is given back has to rest: so many blocks are kept free.
const RESERVE: usize = BLOCKS_MAX as usize / 8;

/// Of one file: the rows of the largest make a quarter of all blocks. A forged one may spread its rows so that each has a
/// block of its own, and may not take all the room with them.
const FILE_BLOCKS_MAX: usize = BLOCKS_MAX as usize / 8 * 3;

/// See the module.
pub struct Cache {
    files: HashMap<FileId, (Known, u64)>,
    tables: HashMap<Content, Stored>,
    rules: Rules,
    blocks: Blocks,
    keys: (RandomState, RandomState),
    now: u64,
    usage: Usage,
}

impl Default for Cache {
    fn default() -> Self {
        Self::with_room(BLOCKS_MAX)
    }
}

impl Cache {
    pub fn with_room(blocks: u32) -> Self {
        Self {
            files: HashMap::new(),
            tables: HashMap::new(),
            rules: Rules::new(RULES_MAX),
            blocks: Blocks::new(blocks),
            keys: (RandomState::new(), RandomState::new()),
            now: 0,
            usage: Usage::default(),
        }
    }

    pub fn usage(&self) -> Usage {
        let stored = self.tables.values();
        let blocks: usize = stored.clone().map(|table| table.blocks.len()).sum();
        Usage {
            tables: self.tables.len(),
            rows: stored.map(|table| table.rows).sum(),
            rules: self.rules.len(),
            bytes: blocks * size_of::<Block>(),
            ..self.usage
        }
    }

    /// What is known of a file. A table that was evicted since is not.
    pub fn known(&mut self, id: FileId) -> Option<Known> {
        self.now += 1;
        let (known, used) = self.files.get_mut(&id)?;
        if let Ok(content) = &known.table
            && !self.tables.contains_key(content)
        {
            return None;
        }
        *used = self.now;
        Some(known.clone())
    }

    /// Takes in what was read of a file.
    pub fn add(&mut self, id: FileId, read: Read, sink: &mut impl Sink) -> Known {
        self.now += 1;
        let table = read.section.and_then(|section| self.store(&section, sink));
        let known = Known { loads: read.loads.into(), table };
        // Room is found another time.
        if known.table != Err(NoTable::Full) {
            self.remember(id, known.clone());
        }
        known
    }

    /// Takes in that a file cannot be read.
    pub fn refuse(&mut self, id: FileId, reason: NoTable) -> Known {
        self.now += 1;
        let known = Known { loads: [].into(), table: Err(reason) };
        self.remember(id, known.clone());
        known
    }

    fn remember(&mut self, id: FileId, known: Known) {
        if self.files.len() >= FILES_MAX {
            let mut used: Vec<u64> = self.files.values().map(|(_, used)| *used).collect();
            let (_, middle, _) = used.select_nth_unstable(FILES_MAX / 2);
            let since = *middle;
            self.files.retain(|_, (_, used)| *used > since);
        }
        self.files.insert(id, (known, self.now));
    }

    fn store(&mut self, section: &Section, sink: &mut impl Sink) -> Result<Content, NoTable> {
        let content = (self.keys.0.hash_one(section), self.keys.1.hash_one(section));
        if self.tables.contains_key(&content) {
            return Ok(content);
        }
        let began = Instant::now();
        let rows = rows(&section.bytes, section.address)?;
        let now = Instant::now();
        let (numbers, fresh) = self.rules.take(&rows.rules, now);
        let mut table = Table::new(&rows, |place| numbers[usize::from(place)]);
        if table.blocks.len() > FILE_BLOCKS_MAX {
            self.rules.give_back(&numbers, now);
            return Err(NoTable::TooLarge);
        }
        let blocks = self.blocks.take(table.blocks.len(), now);
        let Some(blocks) = blocks else {
            self.rules.give_back(&numbers, now);
            self.make_room(table.blocks.len(), now);
            return Err(NoTable::Full);
        };
        table.place(&blocks);
        let fresh: Vec<(u16, Rule)> =
            fresh.iter().map(|number| (*number, self.rules.rule(*number))).collect();
        let written = sink.rules(&fresh).and_then(|()| sink.blocks(&blocks, &table.blocks));
        let root = blocks.last().copied().unwrap_or_default();
        let stored = Stored {
            base: table.base,
            root,
            levels: table.levels,
            rows: table.rows,
            blocks,
            rules: numbers,
            users: 0,
            used: self.now,
        };
        if let Err(error) = written {
            tracing::warn!(%error, "an unwind table could not be put into the kernel's memory");
            self.release(stored, now);
            return Err(NoTable::Full);
        }
        let took = began.elapsed();
        self.usage.built += 1;
        self.usage.build_time += took;
        self.usage.build_longest = self.usage.build_longest.max(took);
        self.tables.insert(content, stored);
        Ok(content)
    }

    /// A list of mappings names this table from now on.
    pub fn take(&mut self, content: Content) -> Option<Place> {
        self.now += 1;
        let stored = self.tables.get_mut(&content)?;
        stored.users += 1;
        stored.used = self.now;
        Some(Place { base: stored.base, root: stored.root, levels: stored.levels })
    }

    /// One names it no more.
    pub fn give_back(&mut self, content: Content) {
        if let Some(stored) = self.tables.get_mut(&content) {
            stored.users = stored.users.saturating_sub(1);
        }
    }

    /// To be called now and then: keeps some room free.
    pub fn tidy(&mut self) {
        if self.blocks.left() < RESERVE {
            self.make_room(RESERVE, Instant::now());
        }
    }

    /// Forgets unused tables, those first that were not used for longest, until there are so many blocks.
    fn make_room(&mut self, blocks: usize, now: Instant) {
        let mut unused: Vec<(u64, Content)> = self
            .tables
            .iter()
            .filter(|(_, stored)| stored.users == 0)
            .map(|(content, stored)| (stored.used, *content))
            .collect();
        unused.sort_unstable();
        for (_, content) in unused {
            if self.blocks.left() >= blocks {
                break;
            }
            if let Some(stored) = self.tables.remove(&content) {
                self.usage.evicted += 1;
                self.release(stored, now);
            }
        }
    }

    fn release(&mut self, stored: Stored, now: Instant) {
        self.rules.give_back(&stored.rules, now);
        self.blocks.give_back(stored.blocks, now);
    }
}
