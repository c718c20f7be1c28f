//! CPython's contexts: which one a thread works in, and whether it still does what it received bytes for.
//!
//! In: a thread's state in the interpreter. Nothing here knows about BPF.

use profiler_common::{CONTEXT_PREVIOUS, CONTEXT_VERSION};

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
/// Either the read was inside the context in which the bytes are handled (asyncio), and nothing was entered or left since.
/// Or the context is entered for that after the read (uvloop): then it is the first one entered, and from where the thread
/// was. When it is left the number has grown by two.
#[inline(always)]
pub fn in_turn<M: Memory>(memory: &M, then: Here, now: Here) -> bool {
    if now == then {
        return true;
    }
    now.context != 0
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
            self.now = (context, self.now.1 + 1);
            self
        }
        fn exit(&mut self) -> &mut Self {
            let previous = self.words.insert(self.now.0 + 16, 0).expect("entered");
            self.now = (previous, self.now.1 + 1);
            self
        }
        fn here(&self) -> Here {
            here(self, STATE, 208).expect("a state")
        }
        fn still(&self, then: Here) -> bool {
            in_turn(self, then, self.here())
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

    #[test]
    fn a_read_inside_the_callback() {
        let mut thread = Thread::default();
        let then = thread.enter(MAIN).enter(SHARED).here();
        assert!(thread.still(then));
        // The protocol runs something in another context: whose that is nobody knows.
        assert!(!thread.enter(OTHER).enter(0xd000).still(then));
        assert!(!thread.exit().exit().still(then), "the same context, but not the same turn for certain");
        assert!(!thread.exit().still(then));
        assert!(!thread.enter(SHARED).still(then), "the connection's next callback");
    }

    #[test]
    fn a_read_before_the_callback() {
        for main in [false, true] {
            let mut thread = Thread::default();
            if main {
                thread.enter(MAIN);
            }
            let then = thread.here();
            assert!(thread.still(then), "between the read and the callback");
            assert!(thread.enter(SHARED).still(then));
            assert!(!thread.exit().still(then));
            assert!(!thread.enter(SHARED).still(then), "another connection's, in the same context");
            thread.exit();
            assert!(!thread.enter(OTHER).still(then));
        }
    }

    #[test]
    fn a_context_that_was_entered_from_elsewhere_is_another_s() {
        let mut thread = Thread::default();
        let then = thread.enter(MAIN).enter(SHARED).here();
        // The callback is over, in one step: what is current now was not entered from its context.
        assert!(!thread.exit().still(then));
        // Nor is what cannot be read.
        let mut thread = Thread::default();
        let then = thread.here();
        thread.enter(SHARED).words.clear();
        assert!(!thread.still(then));
    }
}
