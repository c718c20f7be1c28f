//! Which processes are followed, as the kernel side and the daemon know it: kept in step here.
//!
//! In: decisions of the manager. Out: entries of the kernel's `TARGETS`, the daemon's table of [`Targets`], and an
//! order to the table of connections to forget those of the dead.

use aya::maps::MapError;
use profiler_common::{Target, target_flags};

use super::identity::ProcessKey;
use super::targets::{TargetInfo, Targets};
use crate::bpf::{Connections, HashOf, TargetValue};

/// What is asked of the map `TARGETS`, so that it can be another one in tests.
trait Followed: Send {
    fn insert(&mut self, pid: u32, target: Target) -> Result<(), MapError>;
    fn remove(&mut self, pid: u32);
    fn get(&self, pid: u32) -> Option<Target>;
    fn entries(&self) -> Vec<(u32, Target)>;
}

impl Followed for HashOf<u32, TargetValue> {
    fn insert(&mut self, pid: u32, target: Target) -> Result<(), MapError> {
        self.insert(pid, TargetValue(target), 0)
    }

    fn remove(&mut self, pid: u32) {
        // The kernel side removes it too where it can tell; an entry that is gone already is no error.
        let _ = self.remove(&pid);
    }

    fn get(&self, pid: u32) -> Option<Target> {
        Some(self.get(&pid, 0).ok()?.0)
    }

    fn entries(&self) -> Vec<(u32, Target)> {
        self.iter().flatten().map(|(pid, value)| (pid, value.0)).collect()
    }
}

/// See the module.
pub struct Roster {
    kernel: Box<dyn Followed>,
    pub connections: Connections,
    pub targets: Targets,
}

impl Roster {
    pub fn new(map: HashOf<u32, TargetValue>, connections: Connections, targets: Targets) -> Self {
        Self { kernel: Box::new(map), connections, targets }
    }

    /// The kernel side looks at this process from now on, and how.
    pub fn follow(&mut self, pid: u32, target: Target) -> Result<(), MapError> {
        self.kernel.insert(pid, target)
    }

    /// Whether the kernel side knows of a child what it knows of its parent. The child got its entry when it was forked,
    /// and its parent may have been looked into since.
    pub fn inherited(&self, parent: u32, child: u32) -> bool {
        self.kernel.get(child).is_some_and(|target| Some(target) == self.kernel.get(parent))
    }

    /// The process is what it was found to be, and followed.
    pub fn enter(&self, info: TargetInfo) {
        self.targets.insert(info);
    }

    /// The process is not selected. An entry without flags stays with the kernel side, which would adopt the process
    /// again at its next connection; it goes with the process.
    pub fn reject(&mut self, key: ProcessKey) {
        // Without room it is adopted again, and asked about again.
        let _ = self.kernel.insert(key.pid, Target::default());
        self.targets.reject(key);
    }

    /// The kernel side looks at this process no more, unless it was decided upon: without the entry of one that is
    /// rejected it would adopt it again.
    pub fn let_go(&mut self, pid: u32) {
        if !self.targets.is_live(pid) && !self.targets.is_rejected(pid) {
            self.kernel.remove(pid);
        }
    }

    /// The process is gone.
    pub fn bury(&mut self, pid: u32) {
        self.kernel.remove(pid);
        self.targets.ended(pid);
    }

    /// Processes that the kernel side follows and that are no targets: children whose fork was not told.
    pub fn unknown(&self) -> Vec<u32> {
        let followed = |target: &Target| target.flags & target_flags::HTTP != 0;
        let entries = self.kernel.entries().into_iter();
        entries
            .filter(|(pid, target)| followed(target) && !self.targets.is_live(*pid))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Forgets what is left of processes that are gone. `now`: ns of the kernel's clock; `runs` says which process has
    /// a pid.
    pub fn sweep(&self, now: u64, runs: impl Fn(u32) -> Option<ProcessKey>) {
        self.targets.sweep_rejected(|key| runs(key.pid) == Some(key));
        self.connections.sweep(now, |pid| runs(pid).is_some());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bpf::connections;
    use crate::process::targets::{Feature, Runtime};
    use profiler_common::ConnId;

    /// The kernel's map with room for a few.
    #[derive(Clone, Default)]
    struct Map(Arc<Mutex<BTreeMap<u32, Target>>>);

    const ROOM: usize = 3;

    impl Map {
        fn flags(&self) -> Vec<(u32, u32)> {
            self.0.lock().unwrap().iter().map(|(pid, target)| (*pid, target.flags)).collect()
        }
    }

    impl Followed for Map {
        fn insert(&mut self, pid: u32, target: Target) -> Result<(), MapError> {
            let mut map = self.0.lock().unwrap();
            if map.len() >= ROOM && !map.contains_key(&pid) {
                return Err(MapError::OutOfBounds { index: pid, max_entries: ROOM as u32 });
            }
            map.insert(pid, target);
            Ok(())
        }
        fn remove(&mut self, pid: u32) {
            self.0.lock().unwrap().remove(&pid);
        }
        fn get(&self, pid: u32) -> Option<Target> {
            self.0.lock().unwrap().get(&pid).copied()
        }
        fn entries(&self) -> Vec<(u32, Target)> {
            self.0.lock().unwrap().iter().map(|(pid, target)| (*pid, *target)).collect()
        }
    }

    const HTTP: u32 = target_flags::HTTP | target_flags::SAMPLE;

    fn roster(entries: &[(u32, u32, u64)]) -> (Roster, Map) {
        let map = Map::default();
        let connections = connections::tests::connections(entries);
        (Roster { kernel: Box::new(map.clone()), connections, targets: Targets::default() }, map)
    }

    fn key(pid: u32, start_time: u64) -> ProcessKey {
        ProcessKey { pid, start_time }
    }

    fn info(pid: u32) -> TargetInfo {
        let works = || Feature::works("");
        TargetInfo {
            key: key(pid, 1),
            pid,
            ppid: 1,
            comm: "server".into(),
            exe: "/server".into(),
            service: "server".into(),
            ports: Vec::new(),
            runtime: Runtime { name: "native", version: None },
            boundary: works(),
            speaks_tls: false,
            tls: Feature::missing("not looked at"),
            by_calls: false,
            attribution: works(),
            native_stacks: works(),
            interpreter_stacks: works(),
            other_protocols: Vec::new(),
        }
    }

    fn follow(roster: &mut Roster, pid: u32) {
        roster.follow(pid, Target { flags: HTTP, ..Target::default() }).unwrap();
    }

    #[test]
    fn a_rejected_process_keeps_an_entry_that_looks_at_nothing() {
        let (mut roster, map) = roster(&[]);
        follow(&mut roster, 7);
        roster.enter(info(7));
        roster.reject(key(7, 1));
        assert_eq!(map.flags(), [(7, 0)], "or the kernel side would adopt it at its next connection");
        assert!(roster.targets.is_rejected(7) && !roster.targets.is_live(7));
        // Selected after all.
        follow(&mut roster, 7);
        roster.enter(info(7));
        assert_eq!(map.flags(), [(7, HTTP)]);
        assert!(roster.targets.is_live(7) && !roster.targets.is_rejected(7));
        roster.bury(7);
        assert_eq!(map.flags(), []);
        assert!(!roster.targets.is_live(7) && !roster.targets.is_rejected(7));
        assert!(roster.targets.get(7).is_some(), "its last requests are still under way");
    }

    #[test]
    fn who_was_decided_upon_is_not_let_go() {
        let (mut roster, map) = roster(&[]);
        follow(&mut roster, 6);
        roster.enter(info(6));
        follow(&mut roster, 7);
        roster.reject(key(7, 1));
        follow(&mut roster, 8);
        // The last look at a new program, by which 7 was met at a port that is not selected.
        for pid in [6, 7, 8] {
            roster.let_go(pid);
        }
        assert_eq!(map.flags(), [(6, HTTP), (7, 0)], "7 would be adopted again, and 8 was nobody's");
    }

    #[test]
    fn a_process_is_rejected_though_the_map_is_full() {
        let (mut roster, map) = roster(&[]);
        for pid in 1..=ROOM as u32 {
            follow(&mut roster, pid);
        }
        assert!(roster.follow(9, Target::default()).is_err());
        roster.reject(key(9, 1));
        assert!(roster.targets.is_rejected(9));
        assert_eq!(map.flags().len(), ROOM);
        roster.let_go(2);
        assert!(roster.follow(9, Target::default()).is_ok(), "there is room again");
    }

    #[test]
    fn children_that_nobody_told_of_are_found() {
        let (mut roster, _) = roster(&[]);
        for pid in [5, 6] {
            follow(&mut roster, pid);
        }
        roster.enter(info(5));
        roster.reject(key(8, 1));
        assert_eq!(roster.unknown(), [6], "neither the target nor what was rejected");
        roster.let_go(6);
        assert_eq!(roster.unknown(), [0; 0]);
    }

    #[test]
    fn a_child_forked_before_its_parent_was_looked_into_is_told_apart() {
        let (mut roster, map) = roster(&[]);
        let fork = |child| {
            let mut map = map.0.lock().unwrap();
            let target = map[&5];
            map.insert(child, target);
        };
        follow(&mut roster, 5);
        fork(6);
        assert!(roster.inherited(5, 6));
        let python = Target { flags: HTTP | target_flags::PYTHON, tss_key: 3, ..Target::default() };
        roster.follow(5, python).unwrap();
        fork(7);
        assert!(roster.inherited(5, 7));
        assert!(!roster.inherited(5, 6), "its stacks would have no Python frames for ever");
        roster.bury(7);
        assert!(!roster.inherited(5, 7) && !roster.inherited(8, 9));
    }

    #[test]
    fn a_sweep_forgets_the_dead_and_their_successors_stay() {
        let open =
            |roster: &Roster, pid, generation| roster.connections.is_open(ConnId { generation, pid, fd: 5 });
        let (mut roster, _) = roster(&[(1, 5, 100), (2, 5, 100), (3, 5, 100)]);
        for pid in [1, 2, 3] {
            roster.reject(key(pid, 10));
        }
        // 1 lives, 2 is gone, 3 is gone and another process has its pid.
        let runs = |pid| match pid {
            1 => Some(key(1, 10)),
            3 => Some(key(3, 99)),
            _ => None,
        };
        roster.sweep(200, runs);
        let rejected = [1, 2, 3].map(|pid| roster.targets.is_rejected(pid));
        assert_eq!(rejected, [true, false, false], "the new 3 is to be asked about");
        assert_eq!([1, 2, 3].map(|pid| open(&roster, pid, 100)), [true, false, true]);
    }
}
