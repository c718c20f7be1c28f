//! Whether the stages do their work.
//!
//! In: a beat from each stage whenever it comes round, at least once a second. Out: which stage does not come round,
//! and which has ended though nobody told it to. A stage that hangs or panicked must not look like one that has
//! nothing to do: readiness and the service manager's watchdog depend on this.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a stage may take between two beats. What a process may make us wait for is well below it, and a service
/// manager's watchdog, 30 s in our unit, above.
const STALLED_AFTER: Duration = Duration::from_secs(20);

const WORKING: u8 = 0;
const ENDED: u8 = 1;
const PANICKED: u8 = 2;

struct Beats {
    name: &'static str,
    count: AtomicU64,
    state: AtomicU8,
}

/// A stage's end; cheap to clone.
#[derive(Clone)]
pub struct Pulse(Arc<Beats>);

impl Pulse {
    /// The stage has come round.
    pub fn beat(&self) {
        self.0.count.fetch_add(1, Relaxed);
    }

    /// To be held by the stage's thread as long as it works.
    pub fn alive(&self) -> Alive {
        Alive(self.0.clone())
    }
}

/// Notices how a stage ends.
pub struct Alive(Arc<Beats>);

impl Drop for Alive {
    fn drop(&mut self) {
        let state = if std::thread::panicking() { PANICKED } else { ENDED };
        self.0.state.store(state, Relaxed);
    }
}

struct Stage {
    beats: Arc<Beats>,
    seen: u64,
    at: Instant,
}

/// All stages; cheap to clone.
#[derive(Clone, Default)]
pub struct Health(Arc<Shared>);

#[derive(Default)]
struct Shared {
    stages: Mutex<Vec<Stage>>,
    stopping: AtomicBool,
}

impl Health {
    /// Another stage, which works from now on.
    pub fn stage(&self, name: &'static str) -> Pulse {
        let beats = Arc::new(Beats { name, count: AtomicU64::new(0), state: AtomicU8::new(WORKING) });
        let stage = Stage { beats: beats.clone(), seen: 0, at: Instant::now() };
        self.0.stages.lock().unwrap_or_else(PoisonError::into_inner).push(stage);
        Pulse(beats)
    }

    /// From now on stages may end.
    pub fn stopping(&self) {
        self.0.stopping.store(true, Relaxed);
    }

    /// A stage that ended though nobody told it to: the rest cannot go on without it.
    pub fn dead(&self) -> Option<String> {
        if self.0.stopping.load(Relaxed) {
            return None;
        }
        let over = |state: &str| matches!(state, "ended" | "panicked");
        self.states().into_iter().find(|(_, s)| over(s)).map(|(name, state)| format!("stage {name} {state}"))
    }

    /// Why not all stages work.
    pub fn check(&self) -> Result<(), String> {
        let bad: Vec<String> = self
            .states()
            .into_iter()
            .filter(|(_, state)| *state != "working")
            .map(|(name, state)| format!("stage {name} {state}"))
            .collect();
        if bad.is_empty() { Ok(()) } else { Err(bad.join(", ")) }
    }

    /// Each stage: `working`, `stalled`, `ended` or `panicked`.
    pub fn states(&self) -> Vec<(&'static str, &'static str)> {
        self.states_at(Instant::now())
    }

    fn states_at(&self, now: Instant) -> Vec<(&'static str, &'static str)> {
        let mut stages = self.0.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let state = |stage: &mut Stage| {
            let count = stage.beats.count.load(Relaxed);
            if count != stage.seen {
                (stage.seen, stage.at) = (count, now);
            }
            match stage.beats.state.load(Relaxed) {
                PANICKED => "panicked",
                ENDED => "ended",
                _ if now.saturating_duration_since(stage.at) > STALLED_AFTER => "stalled",
                _ => "working",
            }
        };
        stages.iter_mut().map(|stage| (stage.beats.name, state(stage))).collect()
    }
}

/// Waits for a thread to end, but not for ever: what hangs must not keep the rest from ending in order.
pub fn join<T>(name: &str, thread: JoinHandle<T>, limit: Duration) -> Option<T> {
    let until = Instant::now() + limit;
    while !thread.is_finished() {
        if Instant::now() >= until {
            tracing::error!("stage {name} does not stop; going on without it");
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    match thread.join() {
        Ok(result) => Some(result),
        Err(_) => {
            tracing::error!("stage {name} panicked");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_that_does_not_come_round_is_named() {
        let health = Health::default();
        let (a, _b) = (health.stage("a"), health.stage("b"));
        let start = Instant::now();
        let late = start + STALLED_AFTER + Duration::from_secs(1);
        a.beat();
        assert_eq!(health.states_at(late), [("a", "working"), ("b", "stalled")]);
        let later = late + STALLED_AFTER + Duration::from_secs(1);
        assert_eq!(health.states_at(later), [("a", "stalled"), ("b", "stalled")]);
        a.beat();
        assert_eq!(health.states_at(later)[0], ("a", "working"));
        assert_eq!(health.dead(), None);
    }

    #[test]
    fn a_stage_that_ended_by_itself_is_dead() {
        let health = Health::default();
        let (good, bad) = (health.stage("good"), health.stage("bad"));
        assert_eq!(health.check(), Ok(()));
        let thread = std::thread::spawn(move || {
            let _alive = bad.alive();
            panic!("for the test");
        });
        assert_eq!(join::<()>("bad", thread, Duration::from_secs(60)), None);
        assert_eq!(health.dead().as_deref(), Some("stage bad panicked"));
        assert_eq!(health.check(), Err("stage bad panicked".to_owned()));
        drop(good.alive());
        assert_eq!(health.states()[0], ("good", "ended"));
        health.stopping();
        assert_eq!(health.dead(), None);
    }

    #[test]
    fn a_thread_that_hangs_is_left() {
        let (release, wait) = crossbeam_channel::bounded::<()>(0);
        let thread = std::thread::spawn(move || wait.recv().is_ok());
        assert_eq!(join("stuck", thread, Duration::from_millis(20)), None);
        drop(release);
        assert_eq!(join("fine", std::thread::spawn(|| 7), Duration::from_secs(60)), Some(7));
    }
}
