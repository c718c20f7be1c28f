//! (to be written)

pub mod http;
