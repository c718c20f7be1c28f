//! From events to requests, and which sample belongs to which.
//!
//! In: decoded events in ring order. Out: [`Output`]s: samples that are a request's, requests that ended, processes
//! that came and went. No I/O and no clock, so that a recorded stream gives the same result again.

mod attribution;
mod contexts;
mod ending;
mod engine;
pub mod http;
mod output;
mod rejection;
pub mod route;
#[cfg(test)]
mod tests;
mod thread;

pub use ending::AUDIT_EVERY;
pub use engine::Engine;
pub use output::{Counters, Finished, Output, ProcessEvent, RequestKey};
