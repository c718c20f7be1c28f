//! Who has which numbers: of rules, of blocks, of places for mappings.
//!
//! In: what is needed and what is given back. Out: numbers, as long as there are any. What is given back may still be in
//! use by a program that began before, so it rests for a while first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use profiler_common::unwind::{RULE_UNSUPPORTED, RULES_FROM, Rule};

/// A walk takes microseconds; the CPU it runs on may be a virtual one that is not run for a while.
const REST: Duration = Duration::from_secs(2);

/// Rules, each with a number below a bound, counted by the tables that name them.
pub struct Rules {
    numbers: HashMap<Rule, u16>,
    /// By number: the rule, and how many tables name it.
    users: Vec<(Rule, u32)>,
    resting: VecDeque<(Instant, u16)>,
    bound: u32,
}

impl Rules {
    pub fn new(bound: u32) -> Self {
        let marks = vec![(Rule::default(), 1); RULES_FROM.into()];
        Self { numbers: HashMap::new(), users: marks, resting: VecDeque::new(), bound }
    }

    /// The numbers of a table's rules, and which of them are new. Where there is no room the number is that of what is
    /// not supported.
    pub fn take(&mut self, rules: &[Rule], now: Instant) -> (Vec<u16>, Vec<u16>) {
        let mut fresh = Vec::new();
        let numbers = rules
            .iter()
            .map(|rule| {
                if let Some(&number) = self.numbers.get(rule) {
                    self.users[usize::from(number)].1 += 1;
                    return number;
                }
                let number = match self.resting.front() {
                    Some((since, number)) if now.duration_since(*since) >= REST => {
                        let number = *number;
                        self.resting.pop_front();
                        self.users[usize::from(number)] = (*rule, 1);
                        number
                    }
                    _ if (self.users.len() as u32) < self.bound => {
                        self.users.push((*rule, 1));
                        (self.users.len() - 1) as u16
                    }
                    _ => return RULE_UNSUPPORTED,
                };
                self.numbers.insert(*rule, number);
                fresh.push(number);
                number
            })
            .collect();
        (numbers, fresh)
    }

    /// A table is no more.
    pub fn give_back(&mut self, numbers: &[u16], now: Instant) {
        for &number in numbers.iter().filter(|number| **number >= RULES_FROM) {
            let (rule, users) = &mut self.users[usize::from(number)];
            *users -= 1;
            if *users == 0 {
                self.numbers.remove(rule);
                self.resting.push_back((now, number));
            }
        }
    }

    pub fn rule(&self, number: u16) -> Rule {
        self.users[usize::from(number)].0
    }

    /// Rules that some table names.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }
}

/// Blocks, one like the other.
pub struct Blocks {
    /// The first that was never used.
    next: u32,
    bound: u32,
    resting: VecDeque<(Instant, Vec<u32>)>,
    free: Vec<u32>,
}

impl Blocks {
    pub fn new(bound: u32) -> Self {
        Self { next: 0, bound, resting: VecDeque::new(), free: Vec::new() }
    }

    /// As many as that, or none.
    pub fn take(&mut self, count: usize, now: Instant) -> Option<Vec<u32>> {
        while let Some((since, _)) = self.resting.front()
            && now.duration_since(*since) >= REST
        {
            self.free.extend(self.resting.pop_front().into_iter().flat_map(|(_, blocks)| blocks));
        }
        let fresh = count.saturating_sub(self.free.len());
        if fresh > (self.bound - self.next) as usize {
            return None;
        }
        // Those that were used before come first: memory for others may not be there yet.
        let mut taken = self.free.split_off(self.free.len() - (count - fresh));
        taken.extend(self.next..self.next + fresh as u32);
        self.next += fresh as u32;
        taken.sort_unstable();
        Some(taken)
    }

    pub fn give_back(&mut self, blocks: Vec<u32>, now: Instant) {
        if !blocks.is_empty() {
            self.resting.push_back((now, blocks));
        }
    }

    /// Blocks that nobody has, those that rest included.
    pub fn left(&self) -> usize {
        let resting: usize = self.resting.iter().map(|(_, blocks)| blocks.len()).sum();
        (self.bound - self.next) as usize + self.free.len() + resting
    }
}

/// Stretches of one long row of places.
pub struct Stretches {
    /// Free ones by where they begin, with their length; none touches another.
    free: std::collections::BTreeMap<u32, u32>,
    resting: VecDeque<(Instant, u32, u32)>,
}

impl Stretches {
    pub fn new(bound: u32) -> Self {
        Self { free: [(0, bound)].into(), resting: VecDeque::new() }
    }

    /// Where a stretch of this length begins: the first that is long enough.
    pub fn take(&mut self, length: u32, now: Instant) -> Option<u32> {
        while let Some(&(since, first, count)) = self.resting.front()
            && now.duration_since(since) >= REST
        {
            self.resting.pop_front();
            self.join(first, count);
        }
        let (&first, &count) = self.free.iter().find(|(_, count)| **count >= length)?;
        self.free.remove(&first);
        if count > length {
            self.free.insert(first + length, count - length);
        }
        Some(first)
    }

    pub fn give_back(&mut self, first: u32, length: u32, now: Instant) {
        if length > 0 {
            self.resting.push_back((now, first, length));
        }
    }

    fn join(&mut self, mut first: u32, mut length: u32) {
        if let Some((&before, &count)) = self.free.range(..first).next_back()
            && before + count == first
        {
            self.free.remove(&before);
            (first, length) = (before, length + count);
        }
        if let Some(behind) = self.free.remove(&(first + length)) {
            length += behind;
        }
        self.free.insert(first, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(cfa_offset: i32) -> Rule {
        Rule { cfa: 1, cfa_offset, ..Rule::default() }
    }

    #[test]
    fn rules_are_shared_and_their_numbers_rest_before_they_mean_another() {
        let start = Instant::now();
        let mut rules = Rules::new(5);
        assert_eq!(rules.take(&[rule(8), rule(16)], start), (vec![3, 4], vec![3, 4]));
        assert_eq!(rules.take(&[rule(16)], start), (vec![4], vec![]));
        assert_eq!(rules.take(&[rule(24)], start), (vec![RULE_UNSUPPORTED], vec![]), "no room");
        rules.give_back(&[3, 4], start);
        assert_eq!(rules.len(), 1);
        assert_eq!(rules.take(&[rule(24)], start).0, [RULE_UNSUPPORTED], "not before it has rested");
        assert_eq!(rules.take(&[rule(24), rule(16)], start + REST), (vec![3, 4], vec![3]));
        assert_eq!((rules.rule(3), rules.rule(4)), (rule(24), rule(16)));
        // What never had a number gives none back.
        rules.give_back(&[RULE_UNSUPPORTED], start);
    }

    #[test]
    fn blocks_are_all_or_none_and_rest() {
        let start = Instant::now();
        let mut blocks = Blocks::new(4);
        assert_eq!(blocks.take(3, start), Some(vec![0, 1, 2]));
        assert_eq!(blocks.take(2, start), None);
        blocks.give_back(vec![0, 1, 2], start);
        assert_eq!((blocks.left(), blocks.take(2, start)), (4, None));
        assert_eq!(blocks.take(2, start + REST).map(|b| b.len()), Some(2));
        assert_eq!(blocks.take(2, start + REST).map(|b| b.len()), Some(2));
        assert_eq!(blocks.left(), 0);
    }

    #[test]
    fn stretches_grow_together_again() {
        let start = Instant::now();
        let mut places = Stretches::new(10);
        assert_eq!(places.take(4, start), Some(0));
        assert_eq!(places.take(4, start), Some(4));
        assert_eq!(places.take(4, start), None);
        places.give_back(0, 4, start);
        places.give_back(4, 4, start);
        assert_eq!(places.take(10, start), None);
        assert_eq!(places.take(10, start + REST), Some(0));
        assert_eq!(places.take(1, start + REST), None);
    }
}
