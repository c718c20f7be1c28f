//! Everything the daemon learns from a process it did not write: `/proc`, its memory, its files.
//!
//! All of it is hostile input: a target may forge any structure it holds and swap any file it owns while we look.
//! So every reader here is bounded in time and space, never waits on a target's file, and returns typed errors.

pub mod elf;
pub mod identity;
pub mod manager;
pub mod maps;
pub mod memory;
mod named;
pub mod python;
pub mod service;
pub mod sites;
pub mod sockets;
pub mod targets;
