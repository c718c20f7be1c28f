//! How a test says that it cannot run here.
//!
//! libtest has no such outcome: the test passes, and `cargo xtask test` reads this line in what the tests printed and
//! counts it as skipped instead. The unit tests of the library include this file too.

/// `name`: the test's, with as much of its path as tells it from others.
pub fn skip(name: &str, reason: impl std::fmt::Display) {
    println!("SKIPPED {name}: {reason}");
}
