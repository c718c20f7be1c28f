//! Unwind tables for native code: what `.eh_frame` says, in the form that the kernel side follows.
//!
//! In: the files that targets map. Out: for each a [`Table`] of blocks, the rules that its rows name, and for each target
//! the list of what it maps, all in the kernel's memory. A file may be forged: work and memory are bounded by its size
//! and by fixed limits, and what is damaged is counted.

pub mod cache;
mod numbers;
pub mod quality;
pub mod rows;
mod rule;
pub mod section;
pub mod spaces;
pub mod table;
mod worker;

pub use cache::{Cache, NoTable, Sink};
pub use quality::Quality;
pub use rows::{Rows, RowsError, rows};
pub use section::{Section, SectionError};
pub use table::Table;
pub use worker::{Report, Unwinding, Worker, unwinding};

#[cfg(test)]
mod tests;
