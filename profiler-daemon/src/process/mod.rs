//! Everything the daemon learns from a process it did not write: `/proc`, its memory, its files.
//!
//! All of it is hostile input: a target may forge any structure it holds and swap any file it owns while we look.
//! So every reader here is bounded in space and returns typed errors. What a target can make wait for ever (its
//! memory, its files) is read through [`patience`], by the callers of this module.

pub mod anonymous;
pub mod attaching;
pub mod elf;
pub mod filtered;
pub mod identity;
pub mod joining;
pub mod manager;
pub mod maps;
pub mod memory;
mod named;
mod openssl;
pub mod patience;
mod pending;
mod program;
pub mod python;
pub mod roster;
mod runtime;
pub mod service;
pub mod sites;
mod slot;
pub mod sockets;
mod source;
pub mod targets;
pub mod usdt;
pub mod vdso;
