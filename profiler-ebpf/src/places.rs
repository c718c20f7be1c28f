//! What a CPU remembers from one walk to the next: arrays with one place for each number.
//!
//! In: a number. Out: the place of what is remembered for it, where another number's may be. Nobody looks further: who
//! does not find what is his finds it out anew and puts it there.

use core::cell::Cell;

/// Of each kind: some hundreds are what the stacks of a large service are made of, and an array of them is one element of
/// a map, which must stay below 32 KiB on each CPU.
pub const PLACES: usize = 1 << BITS;
const BITS: u32 = 10;

pub type Places<T> = [Cell<T>; PLACES];

/// The place of a number that may differ from others in any of its bits.
#[inline(always)]
pub fn place<T>(places: &Places<T>, number: u64) -> &Cell<T> {
    // Fibonacci's hash: the upper bits of the product depend on all bits. The mask is for the verifier.
    let at = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
    &places[at as usize & (PLACES - 1)]
}
