//! Python frames: from the address of a code object and an offset in its byte code to a name, a file and a line.

pub mod code;
pub mod linetable;
