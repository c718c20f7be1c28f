//! CPython's contexts: which one a thread works in, and whether it still does what it received bytes for.
//!
//! In: a thread's state in the interpreter. Nothing here knows about BPF.

use profiler_common::{CONTEXT_ENTERED, CONTEXT_PREVIOUS, CONTEXT_VERSION};

use crate::memory::{Fault, Memory};

/// Where a thread is among its contexts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Here {
    /// The one that it has entered last, 0 = it has entered none.
    pub context: u64,
    /// Grows with each that it enters or leaves.
    pub version: u64,
}

/// Reads it from a thread's state; `at`: `PyThreadState.context`.
#[inline(always)]
pub fn here<M: Memory>(memory: &M, state: u64, at: u16) -> Result<Here, Fault> {
    const { assert!(CONTEXT_VERSION == 8) };
    let (context, version) = memory.pair(state + u64::from(at))?;
    Ok(Here { context, version })
}

/// Whether a thread that was `then` when it received has done nothing since but handle what it received.
///
/// The read may be inside the context in which the bytes are handled (asyncio): then nothing was entered or left since. It has
/// to be one that was entered, and from another one. A loop that stays in the context that its thread has anyhow, or in none
/// (Twisted's), turns from one event to the next without a sign; a thread of 3.14 is given one that is entered, from none.
///
/// Or the context is entered after the read (uvloop, `reads_first`): then it is the first one entered, from where the
/// thread was. When it is left the number has grown by two.
#[inline(always)]
pub fn in_turn<M: Memory>(memory: &M, then: Here, now: Here, reads_first: bool) -> bool {
    if now.context == 0 {
        return false;
    }
    if now == then {
        return memory.word(now.context + CONTEXT_ENTERED).is_ok_and(|word| word as u32 != 0)
            && memory.word(now.context + CONTEXT_PREVIOUS).is_ok_and(|previous| previous != 0);
    }
    reads_first
        && now.version == then.version.wrapping_add(1)
        && memory.word(now.context + CONTEXT_PREVIOUS) == Ok(then.context)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::memory::Block;

    /// A thread's contexts as `PyContext_Enter` and `PyContext_Exit` (Python/context.c) keep them.
    #[derive(Default)]
    struct Thread {
        words: HashMap<u64, u64>,
        now: (u64, u64),
    }

    const STATE: u64 = 0x1000;

    impl Thread {
        fn enter(&mut self, context: u64) -> &mut Self {
            self.words.insert(context + 16, self.now.0);
            self.words.insert(context + 40, 1);
            self.now = (context, self.now.1 + 1);
            self
        }
        fn exit(&mut self) -> &mut Self {
            self.words.insert(self.now.0 + 40, 0);
            let previous = self.words.insert(self.now.0 + 16, 0).expect("entered");
            self.now = (previous, self.now.1 + 1);
            self
        }
        /// Somebody asks for the current context where there is none (`context_get`).
        fn given(&mut self, context: u64) -> &mut Self {
            self.words.extend([(context + 16, 0), (context + 40, 0)]);
            self.now.0 = context;
            self
        }
        fn here(&self) -> Here {
            here(self, STATE, 208).expect("a state")
        }
        /// By asyncio's rule, and by uvloop's too.
        fn still(&self, then: Here) -> (bool, bool) {
            (in_turn(self, then, self.here(), false), in_turn(self, then, self.here(), true))
        }
    }

    impl Memory for Thread {
        fn word(&self, address: u64) -> Result<u64, Fault> {
            self.words.get(&address).copied().ok_or(Fault)
        }
        fn pair(&self, address: u64) -> Result<(u64, u64), Fault> {
            if address == STATE + 208 { Ok(self.now) } else { Err(Fault) }
        }
        fn fill<const N: usize>(&self, _: u64, _: u32, _: &mut Block<N>) -> Result<(), Fault> {
            Err(Fault)
        }
    }

    const MAIN: u64 = 0xa000;
    const SHARED: u64 = 0xb000;
    const OTHER: u64 = 0xc000;

    const YES: (bool, bool) = (true, true);
    const NO: (bool, bool) = (false, false);

    #[test]
    fn a_read_inside_the_callback() {
        let mut thread = Thread::default();
        let then = thread.enter(MAIN).enter(SHARED).here();
        assert_eq!(thread.still(then), YES);
        // The protocol runs something in another context: whose that is nobody knows.
        assert_eq!(thread.enter(OTHER).enter(0xd000).still(then), NO);
        assert_eq!(
            thread.exit().exit().still(then),
            NO,
            "the same context, but not the same turn for certain"
        );
        assert_eq!(thread.exit().still(then), NO);
        assert_eq!(thread.enter(SHARED).still(then), NO, "the connection's next callback");
    }

    #[test]
    fn a_read_before_the_callback() {
        for main in [0, 1, 2] {
            let mut thread = Thread::default();
            match main {
                0 => &mut thread,
                1 => thread.given(MAIN),
                _ => thread.enter(MAIN),
            };
            let then = thread.here();
            assert_eq!(thread.still(then), NO, "between the read and the callback");
            assert_eq!(thread.enter(SHARED).still(then), (false, true));
            assert_eq!(thread.exit().still(then), NO);
            assert_eq!(thread.enter(SHARED).still(then), NO, "another connection's, in the same context");
            thread.exit();
            assert_eq!(thread.enter(OTHER).still(then), NO);
        }
    }

    /// Twisted's reactor stays where it is from one event to the next, and runs coroutines in contexts of their own.
    #[test]
    fn a_loop_that_enters_nothing() {
        let mut thread = Thread::default();
        let then = thread.here();
        assert_eq!(thread.still(then), NO);
        assert_eq!(thread.given(MAIN).still(then), NO);
        let then = thread.here();
        assert_eq!(thread.still(then), NO, "the next event's callback is in the same context");
        let mut thread = Thread::default();
        let then = thread.enter(MAIN).here();
        assert_eq!(thread.still(then), NO, "as in a thread of 3.14");
        assert!(!thread.enter(OTHER).still(then).0, "as is the coroutine that it goes on with");
    }

    #[test]
    fn a_context_that_was_entered_from_elsewhere_is_another_s() {
        let mut thread = Thread::default();
        let then = thread.enter(MAIN).enter(SHARED).here();
        // The callback is over, in one step: what is current now was not entered from its context.
        assert_eq!(thread.exit().still(then), NO);
        // Nor is what cannot be read.
        let mut thread = Thread::default();
        let then = thread.here();
        thread.enter(SHARED).words.clear();
        assert_eq!(thread.still(then), NO);
    }
}
