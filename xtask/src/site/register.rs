//! A file that names processes which outlive xtask, so that a later xtask can stop them.
//!
//! One line of JSON per process, appended the moment it is started: what is interrupted afterwards, by Ctrl-C or a crash,
//! leaves nothing running that nobody knows of. A line that is out of date does no harm, since a process is known by its
//! start time too.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::service::Identity;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Register(PathBuf);

impl Register {
    pub fn at(file: PathBuf) -> Self {
        Self(file)
    }

    pub fn add(&self, name: &str, process: Identity) -> Result<()> {
        let line = json!({"name": name, "pid": process.pid, "start_ticks": process.start_ticks});
        let file = OpenOptions::new().create(true).append(true).open(&self.0);
        let written = file.and_then(|mut file| writeln!(file, "{line}"));
        written.with_context(|| format!("cannot write {}", self.0.display()))
    }

    /// Stops all of them that still run, the last started first, and forgets them. Returns whether there was any.
    pub fn stop_all(&self) -> Result<bool> {
        let Ok(text) = fs::read_to_string(&self.0) else { return Ok(false) };
        let mut stopped = false;
        for line in text.lines().rev() {
            // Half a line, from a full disk, names nobody.
            let entry: Value = serde_json::from_str(line).unwrap_or_default();
            let number = |key: &str| entry[key].as_u64();
            if let (Some(pid), Some(start_ticks)) = (number("pid"), number("start_ticks")) {
                stopped |= Identity { pid: u32::try_from(pid)?, start_ticks }.stop_group()?;
            }
        }
        fs::remove_file(&self.0).with_context(|| format!("cannot remove {}", self.0.display()))?;
        Ok(stopped)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::site::service::{Lifetime, Service};

    fn register(name: &str) -> Register {
        Register::at(std::env::temp_dir().join(format!("reqprof-{name}-{}.json", std::process::id())))
    }

    #[test]
    fn processes_that_are_gone_are_forgotten_and_nobody_is_stopped() {
        let kept = register("gone");
        // Our own pid with another start time: a reused pid must be left alone.
        kept.add("site", Identity { pid: std::process::id(), start_ticks: 0 }).unwrap();
        fs::write(&kept.0, fs::read_to_string(&kept.0).unwrap() + "{\"pid\": 1").unwrap();
        assert!(!kept.stop_all().unwrap());
        assert!(!kept.0.exists());
        assert!(!kept.stop_all().unwrap());
    }

    /// As after Ctrl-C: nobody gave the service away, and nobody stops it.
    #[test]
    fn a_service_is_known_as_soon_as_it_runs() {
        let kept = register("early");
        let log = std::env::temp_dir().join(format!("reqprof-early-{}.log", std::process::id()));
        let mut command = Command::new("sleep");
        command.arg("1000");
        let mut service = Service::start("sleep", command, &log, &Lifetime::Detached(kept.clone())).unwrap();
        let mut stopped = None;
        let ended = service.wait_for("gone", Duration::from_secs(30), || {
            // In a thread, since only its parent, this process, can take note of its end.
            stopped.get_or_insert_with(|| {
                let kept = kept.clone();
                std::thread::spawn(move || kept.stop_all().unwrap())
            });
            None::<()>
        });
        assert!(ended.unwrap_err().to_string().contains("ended before"), "it was not stopped");
        assert!(stopped.unwrap().join().unwrap());
        fs::remove_file(log).unwrap();
    }
}
