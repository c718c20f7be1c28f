//! The processes that somebody named by pid, and their descendants.
//!
//! A pid is reused when its process has ended; whoever gets it then was not meant. So what is remembered is the process
//! that had the pid when it was named.

use std::collections::HashSet;

use super::identity::{self, ProcessKey};

/// Deeper than any process tree; a cycle cannot be, but costs nothing to survive.
const DEPTH_MAX: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub struct Named(HashSet<ProcessKey>);

impl Named {
    /// The processes that have these pids now.
    pub fn of(pids: &[u32]) -> Self {
        Self(pids.iter().filter_map(|pid| identity::key(*pid).ok()).collect())
    }

    /// Adds the process that has this pid now. `false`: there is none.
    pub fn add(&mut self, pid: u32) -> bool {
        identity::key(pid).map(|key| self.0.insert(key)).is_ok()
    }

    /// Whether this process, a child of `parent`, or an ancestor of it was named.
    pub fn covers(&self, key: ProcessKey, mut parent: u32) -> bool {
        if self.0.contains(&key) {
            return true;
        }
        if self.0.is_empty() {
            return false;
        }
        for _ in 0..DEPTH_MAX {
            if parent <= 1 {
                return false;
            }
            let Ok(who) = identity::read(parent) else { return false };
            if self.0.contains(&who.key) {
                return true;
            }
            parent = who.ppid;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_covered_and_strangers_are_not() {
        let (own, parent) = (std::process::id(), std::os::unix::process::parent_id());
        let me = identity::key(own).unwrap();
        let child = ProcessKey { pid: 4_194_303, start_time: me.start_time + 1 };
        let named = Named::of(&[own]);
        assert!(named.covers(me, parent));
        assert!(named.covers(child, own));
        assert!(!named.covers(child, 1));
        assert!(!Named::default().covers(me, parent));
    }

    #[test]
    fn whoever_gets_the_pid_later_is_not_meant() {
        let own = std::process::id();
        let me = identity::key(own).unwrap();
        // The pid was named when an earlier process had it.
        let named = Named(HashSet::from([ProcessKey { start_time: me.start_time - 1, ..me }]));
        assert!(!named.covers(me, 1));
        let child = ProcessKey { pid: 4_194_303, start_time: me.start_time + 1 };
        assert!(!named.covers(child, own));
        // And nothing is remembered of a pid that nobody has.
        assert!(!Named::default().add(u32::MAX));
    }
}
