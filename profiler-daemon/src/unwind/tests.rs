//! Tables against gimli's own reading of the same files, and against forged ones.

mod cache;
mod forged;
mod host;
mod kept;
mod nested;
mod oracle;
