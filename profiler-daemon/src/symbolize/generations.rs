//! A bounded map that forgets its older half, and that a forked process can share.
//!
//! Look-ups are on the hot path, so there is no bookkeeping per hit: entries age by insertion alone. What is
//! forgotten is resolved again at the next sight.

use std::hash::Hash;
use std::rc::Rc;

use rustc_hash::FxHashMap;

#[derive(Debug)]
pub(super) struct Generations<K, V> {
    young: FxHashMap<K, V>,
    /// Shared with the processes forked from this one, until either changes it.
    old: Rc<FxHashMap<K, V>>,
    /// Entries per generation.
    half: usize,
}

impl<K: Eq + Hash + Clone, V: Clone> Generations<K, V> {
    /// At most `capacity` entries.
    pub(super) fn new(capacity: usize) -> Self {
        Self { young: FxHashMap::default(), old: Rc::default(), half: capacity / 2 }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.half {
            self.old = Rc::new(std::mem::take(&mut self.young));
        }
        self.young.insert(key, value);
    }

    /// A map of the same contents. Costs nothing when nothing was inserted since the last time.
    pub(super) fn fork(&mut self) -> Self {
        if self.old.len() + self.young.len() > self.half {
            self.old = Rc::new(std::mem::take(&mut self.young));
        } else if !self.young.is_empty() {
            Rc::make_mut(&mut self.old).extend(self.young.drain());
        }
        Self { young: FxHashMap::default(), old: self.old.clone(), half: self.half }
    }

    /// Keeps what `keep` holds of.
    pub(super) fn retain(&mut self, keep: impl Fn(&K, &V) -> bool) {
        self.young.retain(|key, value| keep(key, value));
        if !self.old.iter().all(|(key, value)| keep(key, value)) {
            Rc::make_mut(&mut self.old).retain(|key, value| keep(key, value));
        }
    }

    pub(super) fn clear(&mut self) {
        self.young.clear();
        self.old = Rc::default();
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.young.values().chain(self.old.values())
    }

    pub(super) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newer_half_and_never_more_than_its_capacity() {
        let mut map = Generations::new(10);
        for n in 0..100 {
            map.insert(n, n * 2);
            assert!(map.len() <= 10);
            assert_eq!(map.get(&n), Some(&(n * 2)));
        }
        assert_eq!(map.get(&98), Some(&196));
        assert_eq!(map.get(&10), None);
        map.retain(|n, _| *n != 99);
        assert_eq!((map.get(&98), map.get(&99)), (Some(&196), None));
        map.clear();
        assert_eq!((map.len(), map.get(&98)), (0, None));
    }

    #[test]
    fn a_fork_has_the_same_contents_and_its_own_future() {
        let mut parent = Generations::new(100);
        parent.insert(1, 'a');
        let mut child = parent.fork();
        parent.insert(2, 'b');
        child.insert(3, 'c');
        assert_eq!((child.get(&1), child.get(&2), child.get(&3)), (Some(&'a'), None, Some(&'c')));
        assert_eq!((parent.get(&1), parent.get(&2), parent.get(&3)), (Some(&'a'), Some(&'b'), None));
        let grandchild = child.fork();
        assert_eq!((grandchild.get(&1), grandchild.get(&3)), (Some(&'a'), Some(&'c')));
        assert!(Rc::ptr_eq(&grandchild.old, &child.fork().old));
    }
}
