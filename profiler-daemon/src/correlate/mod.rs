//! Requests out of byte streams, and what they are called.

pub mod route;
