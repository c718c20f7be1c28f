//! The corner cases, one by one, through the kernel side's capture rule or as bare pieces.

mod nonsense;
mod pipelining;
mod requests;
mod responses;
mod run;
