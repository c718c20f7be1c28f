//! The parts of the kernel side that are pure logic.
//!
//! They take the profiled process's memory through [`memory::Memory`], so that the same code runs in BPF and in
//! tests on the host.
#![cfg_attr(not(test), no_std)]

pub mod context;
pub mod head;
pub mod memory;
pub mod native;
pub mod places;
pub mod python;
