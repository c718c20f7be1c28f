//! From events to requests, and which sample belongs to which.
//!
//! In: decoded events in ring order. Out: [`Output`]s: samples that are a request's, requests that ended, processes
//! that came and went. No I/O and no clock, so that a recorded stream gives the same result again.

mod engine;
pub mod http;
pub mod route;
mod thread;

pub use engine::{AUDIT_EVERY, Counters, Engine, Finished, Output, ProcessEvent, RequestKey};
