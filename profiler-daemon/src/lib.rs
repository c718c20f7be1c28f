//! `reqprof`: per-request call trees for every HTTP service on this host.
//!
//! The modules tell the way of the data, left to right:
//! `bpf → decode → correlate → symbolize → profile → store → serve`.

pub mod bpf;
pub mod cli;
pub mod config;
pub mod correlate;
pub mod decode;
pub mod export;
pub mod health;
pub mod percentile;
pub mod pipeline;
pub mod process;
pub mod profile;
pub mod record;
pub mod replay;
pub mod serve;
pub mod session;
pub mod store;
pub mod symbolize;
pub mod unwind;

#[cfg(test)]
#[path = "../tests/support/interpreters.rs"]
mod interpreters;
#[cfg(test)]
#[path = "../tests/support/skip.rs"]
mod skip;
