//! What runs in the kernel: the probes' bodies, the maps, and access to the current task.

pub mod boundary;
pub mod call;
mod capture;
pub mod code;
mod connection;
pub mod context;
pub mod events;
pub mod lifecycle;
pub mod maps;
pub mod native;
pub mod piece;
pub mod sampler;
pub mod syscall;
pub mod task;
pub mod tls;
pub mod transfer;
