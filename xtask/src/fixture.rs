//! `cargo xtask fixture`: records anew what `profiler-daemon/tests/replay.rs` replays.
//!
//! In: this kernel, as root. Out: new files in `profiler-daemon/tests/fixtures`. They are written only when the new
//! recording says the same about the conversation as the tests expect of the committed one, which is then replayed too.

use anyhow::{Result, ensure};

use crate::sh;

pub fn run() -> Result<()> {
    ensure!(sh::is_root(), "recording loads BPF programs: run this as root");
    // The test that holds the conversation first: the others read what it wrote.
    for filter in [Some("a_conversation_of_now_gives_the_same"), None] {
        let mut test = sh::cargo();
        test.args(["test", "--locked", "--package", "profiler-daemon", "--test", "replay", "--"]);
        test.args(["--test-threads=1", "--show-output"]).args(filter);
        if filter.is_some() {
            test.envs([("REQPROF_E2E", "1"), ("REQPROF_FIXTURE", "write")]);
        }
        sh::run(&mut test)?;
    }
    Ok(())
}
