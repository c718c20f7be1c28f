//! What each process maps, as the kernel side looks it up.
//!
//! In: processes that became targets, forked, ran new programs, ended, or were seen running code that is in no mapping
//! known. Out: their lists of mappings in the kernel's memory, with a table for each file that has one. A forked process
//! shares its parent's list until either maps something else.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use profiler_common::unwind::{MAPPINGS_MAX, MAPPINGS_OF_ONE, Mapping, Space, mapping_mark};

use super::cache::{Cache, Content, Known, NoTable, Read, Sink};
use super::numbers::Stretches;
use super::vdso;
use crate::health::Pulse;
use crate::process::elf::{self, FileId};
use crate::process::identity::{self, ProcessKey};
use crate::process::maps::{self, Maps};
use crate::process::patience::{FILES, MEMORY, PATIENCE};

/// How long after a look at a process's map another may be taken because it runs unknown code; doubled each time
/// nothing was new, because what compiles code at run time or hides it does so for ever.
const AGAIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(10);
/// As many as the kernel's list of targets.
const PROCESSES_MAX: usize = 16_384;

struct Process {
    key: ProcessKey,
    list: u64,
    /// Of its map's text as it was read last.
    fingerprint: u64,
    looked: Instant,
    again: Duration,
}

/// Mappings that one process has, or several that forked.
struct List {
    space: Space,
    tables: Vec<Content>,
    users: u32,
}

/// What was done, and could not be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Maps read.
    pub looks: u64,
    /// Of these, because unknown code ran.
    pub unknown: u64,
    /// Maps that could not be read, or lists that could not be written.
    pub failed: u64,
    /// Lists, or ends of lists, for which there was no room.
    pub full: u64,
    /// Files without a table, by reason: as often as they were met in a process for the first time.
    pub without: std::collections::BTreeMap<NoTable, u64>,
}

/// See the module.
pub struct Spaces<S> {
    pub cache: Cache,
    sink: S,
    processes: HashMap<u32, Process>,
    lists: HashMap<u64, List>,
    places: Stretches,
    /// The vDSO, once it was looked at.
    vdso: Option<Known>,
    generation: u32,
    lists_made: u64,
    hasher: RandomState,
    /// Beats between files: a process may have hundreds that take long.
    pub pulse: Option<Pulse>,
    pub counts: Counts,
}

impl<S: Sink> Spaces<S> {
    pub fn new(sink: S) -> Self {
        Self {
            cache: Cache::default(),
            sink,
            processes: HashMap::new(),
            lists: HashMap::new(),
            places: Stretches::new(MAPPINGS_MAX),
            vdso: None,
            generation: 0,
            lists_made: 0,
            hasher: RandomState::new(),
            pulse: None,
            counts: Counts::default(),
        }
    }

    pub fn processes(&self) -> usize {
        self.processes.len()
    }

    /// Looks at a process's map, and publishes it if it is another one than before.
    pub fn follow(&mut self, pid: u32) {
        let Ok(key) = identity::key(pid) else { return self.ended(pid) };
        if self.processes.get(&pid).is_some_and(|process| process.key != key) {
            self.ended(pid);
        }
        if !self.processes.contains_key(&pid) && self.processes.len() >= PROCESSES_MAX {
            self.counts.full += 1;
            return;
        }
        self.counts.looks += 1;
        let Ok(Ok(text)) = PATIENCE.ask(pid, MEMORY, move || Maps::text(pid)) else {
            self.counts.failed += 1;
            return;
        };
        let fingerprint = self.hasher.hash_one(&text);
        let before = self.processes.get_mut(&pid);
        // A process that is ending has no map.
        if text.is_empty() || before.as_ref().is_some_and(|before| before.fingerprint == fingerprint) {
            if let Some(before) = before {
                before.looked = Instant::now();
                before.again = (before.again * 2).min(AGAIN_MAX);
            }
            return;
        }
        let Some((list, whole)) = self.list(pid, &Maps::parse(&text)) else { return };
        let looked = Instant::now();
        // What found no room is looked for again.
        let fingerprint = if whole { fingerprint } else { !fingerprint };
        let process = Process { key, list, fingerprint, looked, again: AGAIN };
        if let Some(old) = self.processes.insert(pid, process) {
            self.leave(old.list);
        }
    }

    /// The child's mappings are its parent's, and the kernel side knows that already, if it knew the parent's.
    pub fn forked(&mut self, parent: u32, child: u32) {
        let (Some(mother), Ok(key)) = (self.processes.get(&parent), identity::key(child)) else {
            return self.follow(child);
        };
        let (list, fingerprint) = (mother.list, mother.fingerprint);
        let Some(shared) = self.lists.get_mut(&list) else { return };
        if self.processes.len() >= PROCESSES_MAX || self.sink.space(child, shared.space).is_err() {
            self.counts.full += 1;
            return;
        }
        shared.users += 1;
        // It may have mapped something since, so what it maps is not known to be what it says.
        let process = Process { key, list, fingerprint: !fingerprint, looked: Instant::now(), again: AGAIN };
        if let Some(old) = self.processes.insert(child, process) {
            self.leave(old.list);
        }
    }

    /// A sample of the process was in code that is in no mapping known.
    pub fn unknown(&mut self, pid: u32) {
        if let Some(process) = self.processes.get(&pid)
            && process.looked.elapsed() < process.again
        {
            return;
        }
        self.counts.unknown += 1;
        self.follow(pid);
    }

    /// The process is gone, or runs another program.
    pub fn ended(&mut self, pid: u32) {
        self.sink.forget(pid);
        if let Some(process) = self.processes.remove(&pid) {
            self.leave(process.list);
        }
    }

    /// To be called now and then: forgets processes whose end nobody told.
    pub fn tidy(&mut self) {
        let gone: Vec<u32> = self
            .processes
            .iter()
            .filter(|(pid, process)| identity::key(**pid).ok() != Some(process.key))
            .map(|(pid, _)| *pid)
            .collect();
        for pid in gone {
            self.ended(pid);
        }
        self.cache.tidy();
    }

    fn leave(&mut self, number: u64) {
        let Some(list) = self.lists.get_mut(&number) else { return };
        list.users -= 1;
        if list.users > 0 {
            return;
        }
        if let Some(list) = self.lists.remove(&number) {
            self.places.give_back(list.space.first, list.space.count, Instant::now());
            for content in list.tables {
                self.cache.give_back(content);
            }
        }
    }

    /// Makes the list of a map, and gives it to the process. Whether it is whole: some file's table found no room.
    fn list(&mut self, pid: u32, maps: &Maps) -> Option<(u64, bool)> {
        self.generation = (self.generation + 1) & ((1 << 30) - 1);
        let generation = self.generation;
        let (mut mappings, mut tables) = (Vec::new(), Vec::new());
        let mut whole = true;
        let executable: Vec<&maps::Mapping> = maps.iter().filter(|m| m.executable).collect();
        if executable.len() > MAPPINGS_OF_ONE as usize {
            self.counts.full += 1;
        }
        let executable = &executable[..executable.len().min(MAPPINGS_OF_ONE as usize)];
        for (mapping, known) in executable.iter().zip(self.look_up(pid, executable)) {
            let mut found = Mapping {
                start: mapping.start,
                end: mapping.end,
                ..Mapping { mark: mapping_mark(0, generation), ..Mapping::default() }
            };
            let table = known.as_ref().map(|known| known.table);
            whole &= table != Some(Err(NoTable::Full));
            if let Some(Ok(content)) = table
                && let Some(bias) = known.and_then(|known| elf::bias(&known.loads, mapping))
                && let Some(place) = self.cache.take(content)
            {
                tables.push(content);
                found.base = place.base.wrapping_add(bias);
                found.root = place.root;
                found.mark = mapping_mark(place.levels, generation);
            }
            mappings.push(found);
        }
        let space = self.publish(pid, &mappings, generation);
        let Some(space) = space else {
            for content in tables {
                self.cache.give_back(content);
            }
            return None;
        };
        self.lists_made += 1;
        self.lists.insert(self.lists_made, List { space, tables, users: 1 });
        Some((self.lists_made, whole))
    }

    fn publish(&mut self, pid: u32, mappings: &[Mapping], generation: u32) -> Option<Space> {
        let count = mappings.len() as u32;
        let Some(first) = self.places.take(count, Instant::now()) else {
            self.counts.full += 1;
            return None;
        };
        let space = Space { first, count, generation, reserved: 0 };
        let written = self.sink.mappings(first, mappings).and_then(|()| self.sink.space(pid, space));
        if let Err(error) = written {
            tracing::warn!(pid, %error, "a process's mappings could not be put into the kernel's memory");
            self.counts.failed += 1;
            self.places.give_back(first, count, Instant::now());
            return None;
        }
        Some(space)
    }

    /// What is known of the file behind each mapping; `None` where there is none.
    fn look_up(&mut self, pid: u32, executable: &[&maps::Mapping]) -> Vec<Option<Known>> {
        let asked: Vec<maps::Mapping> = executable.iter().map(|m| (*m).clone()).collect();
        let asked = Arc::new(asked);
        let files = asked.clone();
        // All of them at once: being told apart costs a microsecond or ten, each question to another thread some more.
        let ids = PATIENCE.ask(pid, FILES, move || {
            files.iter().map(|mapping| identify(pid, mapping)).collect::<Vec<Option<FileId>>>()
        });
        let Ok(ids) = ids else {
            self.counts.failed += 1;
            return vec![None; executable.len()];
        };
        let mut found = Vec::with_capacity(ids.len());
        for (at, id) in ids.into_iter().enumerate() {
            let mapping = &asked[at];
            found.push(match id {
                Some(id) => Some(self.file(pid, mapping, id)),
                None if mapping.path.as_os_str() == vdso::NAME => self.vdso(),
                None => None,
            });
        }
        found
    }

    fn file(&mut self, pid: u32, mapping: &maps::Mapping, id: FileId) -> Known {
        if let Some(known) = self.cache.known(id) {
            return known;
        }
        if let Some(pulse) = &self.pulse {
            pulse.beat();
        }
        let place = mapping.clone();
        let read = PATIENCE.ask(pid, FILES, move || {
            let file = maps::open(pid, &place).map_err(|_| NoTable::Unreadable)?;
            // Another one by now is not what was asked about.
            match FileId::of(&file) {
                Ok(now) if now == id => Read::of(file),
                _ => Err(NoTable::Unreadable),
            }
        });
        let known = match read {
            Ok(Ok(read)) => self.cache.add(id, read, &mut self.sink),
            Ok(Err(reason)) => self.cache.refuse(id, reason),
            // It may answer another time.
            Err(_) => Known { loads: [].into(), table: Err(NoTable::Unreadable) },
        };
        if let Err(reason) = known.table {
            *self.counts.without.entry(reason).or_default() += 1;
            tracing::debug!(pid, path = %mapping.path.display(), reason = reason.name(), "no unwind table");
        }
        known
    }

    fn vdso(&mut self) -> Option<Known> {
        if self.vdso.is_none() {
            let read = || -> Option<(FileId, Read)> {
                let file = vdso::file().ok()?;
                Some((FileId::of(&file).ok()?, Read::of(file).ok()?))
            };
            let (id, read) = read()?;
            let known = self.cache.add(id, read, &mut self.sink);
            // Its table is never evicted: all processes have it.
            if let Ok(content) = known.table {
                self.cache.take(content);
            }
            self.vdso = Some(known);
        }
        self.vdso.clone()
    }
}

fn identify(pid: u32, mapping: &maps::Mapping) -> Option<FileId> {
    if !mapping.is_file() {
        return None;
    }
    FileId::of(&maps::open(pid, mapping).ok()?).ok()
}
