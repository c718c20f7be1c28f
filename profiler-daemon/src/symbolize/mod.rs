//! x

pub mod python;
mod text;
