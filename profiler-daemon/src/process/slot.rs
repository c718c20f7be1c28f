//! One value on its way from one thread to another that waits for it.
//!
//! Channels yield the CPU a few times before they sleep, which is fast where CPUs are idle. On a busy host each of these
//! gives whoever computes a whole turn, milliseconds: names of thousands of functions, asked for one by one, came half a
//! minute late, when the short-lived processes they were of had ended. Here a thread sleeps at once, and the scheduler
//! puts it in front when it wakes.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Why there is no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Empty {
    /// Not in time.
    Timeout,
    /// And none will come.
    Closed,
}

struct Shared<T> {
    held: Mutex<Held<T>>,
    changed: Condvar,
}

struct Held<T> {
    value: Option<T>,
    /// One side is gone.
    closed: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Held<T>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where values are put. When it is dropped no more will come.
pub struct Giver<T>(Arc<Shared<T>>);

/// Where they are taken.
pub struct Taker<T>(Arc<Shared<T>>);

pub fn slot<T>() -> (Giver<T>, Taker<T>) {
    let held = Mutex::new(Held { value: None, closed: false });
    let shared = Arc::new(Shared { held, changed: Condvar::new() });
    (Giver(shared.clone()), Taker(shared))
}

impl<T> Giver<T> {
    /// Puts a value there, in the place of one that was not taken. Gives it back if nobody is left to take it.
    pub fn give(&self, value: T) -> Result<(), T> {
        let mut held = self.0.lock();
        if held.closed {
            return Err(value);
        }
        held.value = Some(value);
        drop(held);
        self.0.changed.notify_one();
        Ok(())
    }
}

impl<T> Drop for Giver<T> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_one();
    }
}

impl<T> Taker<T> {
    /// Waits for a value at most so long; without a limit until there is one or none will come.
    pub fn take(&self, limit: Option<Duration>) -> Result<T, Empty> {
        let until = limit.map(|limit| Instant::now() + limit);
        let mut held = self.0.lock();
        loop {
            if let Some(value) = held.value.take() {
                return Ok(value);
            }
            if held.closed {
                return Err(Empty::Closed);
            }
            let changed = &self.0.changed;
            held = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => changed.wait(held).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(Empty::Timeout),
                Some(left) => changed.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

impl<T> Drop for Taker<T> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_goes_from_one_to_the_other_and_an_end_too() {
        let (giver, taker) = slot();
        assert_eq!(taker.take(Some(Duration::ZERO)), Err(Empty::Timeout));
        giver.give(1).unwrap();
        assert_eq!(taker.take(Some(Duration::ZERO)), Ok(1));
        let waits = std::thread::spawn(move || (taker.take(None), taker.take(None), taker.take(None)));
        giver.give(2).unwrap();
        while giver.0.lock().value.is_some() {
            std::thread::yield_now();
        }
        giver.give(3).unwrap();
        drop(giver);
        assert_eq!(waits.join().unwrap(), (Ok(2), Ok(3), Err(Empty::Closed)));
        let (giver, taker) = slot();
        drop(taker);
        assert_eq!(giver.give(4), Err(4));
    }
}
