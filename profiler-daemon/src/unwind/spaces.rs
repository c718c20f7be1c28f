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
use crate::health::Pulse;
use crate::process::elf::{self, FileId};
use crate::process::identity::{self, ProcessKey};
use crate::process::maps::{self, Maps};
use crate::process::patience::{FILES, MEMORY, PATIENCE};
use crate::process::vdso;

/// How long after a look at a process's map another may be taken because it runs unknown code; doubled each time
/// nothing was new, because what compiles code at run time or hides it does so for ever.
const AGAIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(10);
/// As many as the kernel's list of targets.
const PROCESSES_MAX: usize = 16_384;

struct Process {
    key: ProcessKey,
    /// `None`: none could be made yet.
    list: Option<u64>,
    /// Of the executable mappings that its list was made of: what grows and shrinks otherwise is of no interest.
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

    /// As if the process had last been looked at so long ago.
    #[cfg(test)]
    pub(super) fn looked(&mut self, pid: u32, ago: Duration) {
        let process = self.processes.get_mut(&pid).expect("a process that is followed");
        process.looked = Instant::now().checked_sub(ago).expect("a machine that runs for so long");
    }

    /// Those whose mappings the kernel side knows.
    pub fn processes(&self) -> usize {
        self.processes.values().filter(|process| process.list.is_some()).count()
    }

    /// Looks at a process's map, and publishes it if it is another one than before. Whether it was.
    pub fn follow(&mut self, pid: u32) -> bool {
        let Ok(key) = identity::key(pid) else {
            self.ended(pid);
            return false;
        };
        if self.processes.get(&pid).is_some_and(|process| process.key != key) {
            self.ended(pid);
        }
        if !self.processes.contains_key(&pid) && self.processes.len() >= PROCESSES_MAX {
            self.counts.full += 1;
            return false;
        }
        self.counts.looks += 1;
        let list = self.look(pid);
        // Whatever came of it: the next look is not before its time.
        let nothing = Process { key, list: None, fingerprint: 0, looked: Instant::now(), again: AGAIN };
        let process = self.processes.entry(pid).or_insert(nothing);
        process.looked = Instant::now();
        let Some((list, fingerprint)) = list else { return false };
        process.fingerprint = fingerprint;
        process.again = AGAIN;
        if let Some(old) = process.list.replace(list) {
            self.leave(old);
        }
        true
    }

    /// The list of what a process maps, and the fingerprint to remember. `None`: it is what it was, or cannot be had.
    fn look(&mut self, pid: u32) -> Option<(u64, u64)> {
        let Ok(Ok(text)) = PATIENCE.ask(pid, MEMORY, move || Maps::text(pid)) else {
            self.counts.failed += 1;
            return None;
        };
        // A process that is ending has no map.
        if text.is_empty() {
            return None;
        }
        let maps = Maps::parse(&text);
        let executable: Vec<&maps::Mapping> = maps.iter().filter(|m| m.executable).collect();
        let fingerprint = self.hasher.hash_one(&executable);
        let before = self.processes.get(&pid).filter(|before| before.list.is_some());
        if before.is_some_and(|before| before.fingerprint == fingerprint) {
            return None;
        }
        let (list, whole) = self.list(pid, &executable)?;
        // What found no room is looked for again.
        Some((list, if whole { fingerprint } else { !fingerprint }))
    }

    /// The child's mappings are its parent's, and the kernel side knows that already, if it knew the parent's.
    pub fn forked(&mut self, parent: u32, child: u32) {
        let mother = self.processes.get(&parent).and_then(|mother| Some((mother.list?, mother.fingerprint)));
        let (Some((list, fingerprint)), Ok(key)) = (mother, identity::key(child)) else {
            self.follow(child);
            return;
        };
        let Some(shared) = self.lists.get_mut(&list) else { return };
        if self.processes.len() >= PROCESSES_MAX || self.sink.space(child, shared.space).is_err() {
            self.counts.full += 1;
            return;
        }
        shared.users += 1;
        // It may have mapped something since: its own map, when it is looked at, has another fingerprint then.
        let process = Process { key, list: Some(list), fingerprint, looked: Instant::now(), again: AGAIN };
        if let Some(old) = self.processes.insert(child, process).and_then(|old| old.list) {
            self.leave(old);
        }
    }

    /// A sample of the process was in code that is in no mapping known. Whether that was a reason to look.
    pub fn unknown(&mut self, pid: u32) -> bool {
        if let Some(process) = self.processes.get(&pid)
            && process.looked.elapsed() < process.again
        {
            return false;
        }
        self.counts.unknown += 1;
        if !self.follow(pid)
            && let Some(process) = self.processes.get_mut(&pid)
        {
            process.again = (process.again * 2).min(AGAIN_MAX);
        }
        true
    }

    /// The process is gone, or runs another program.
    pub fn ended(&mut self, pid: u32) {
        self.sink.forget(pid);
        if let Some(list) = self.processes.remove(&pid).and_then(|process| process.list) {
            self.leave(list);
        }
    }

    /// To be called now and then: forgets processes whose end nobody told, and looks at the map of the one that was
    /// looked at longest ago, since a library that takes another's place is no unknown code.
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
        let oldest = self.processes.iter().min_by_key(|(_, process)| process.looked);
        if let Some((&pid, process)) = oldest
            && process.looked.elapsed() >= AGAIN_MAX
        {
            self.follow(pid);
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
    fn list(&mut self, pid: u32, executable: &[&maps::Mapping]) -> Option<(u64, bool)> {
        self.generation = (self.generation + 1) & ((1 << 30) - 1);
        let generation = self.generation;
        let (mut mappings, mut tables) = (Vec::new(), Vec::new());
        let mut whole = true;
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
