//! Whether a probe at a function's end would kill a process.
//!
//! From Linux 6.11 on such a probe ends in a system call of its own, which filters (seccomp) of containers and services did
//! not know: they killed the process for it. Since 6.14 filters do not see it (kernel/seccomp.c, "passthrough uretprobe
//! systemcall without filtering"), and so in later releases of 6.12 and 6.13.

use std::fs;

use super::identity::via;

/// The first releases of 6.12 and 6.13 that are trusted to have the mend: some later than the first that has it.
const MENDED: [((u32, u32), u32); 2] = [((6, 12), 20), ((6, 13), 10)];

/// Why there may be no probe at the end of a function of this process.
pub fn refuses_return_probes(pid: u32) -> Option<&'static str> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if !kills(&release) {
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{}/status", via(pid))).unwrap_or_default();
    is_filtered(&status).then_some(
        "it runs under a seccomp filter, which on Linux 6.11 to 6.13 would kill it for a probe at a function's end; \
         Linux 6.14 mends that",
    )
}

/// Whether filters of this release see the system call. What is no release at all is trusted as little.
fn kills(release: &str) -> bool {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (parts.next(), parts.next()) else { return true };
    let patch = parts.next().and_then(Result::ok).unwrap_or(0);
    let version = (major, minor);
    let mended = MENDED.iter().find(|(of, _)| *of == version).is_some_and(|(_, first)| patch >= *first);
    ((6, 11)..(6, 14)).contains(&version) && !mended
}

/// `Seccomp:` is 2 where there are filters (proc(5)). What cannot be read counts as such.
fn is_filtered(status: &str) -> bool {
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_none_or(|mode| mode.trim() == "2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_in_between_kill() {
        for (release, expected) in [
            ("5.10.0-46-cloud-amd64", false),
            ("6.10.11", false),
            ("6.11.2-arch1-1", true),
            ("6.12.5", true),
            ("6.12.107+deb13-cloud-amd64", false),
            ("6.13.0", true),
            ("6.13.12", false),
            ("6.14.0-rc1", false),
            ("6.18.44", false),
            ("7.2.12", false),
            ("", true),
        ] {
            assert_eq!(kills(release), expected, "{release}");
        }
    }

    #[test]
    fn a_filter_is_mode_two() {
        assert!(is_filtered("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!is_filtered("Name:\tx\nSeccomp:\t0\n"));
        assert!(is_filtered(""), "it cannot be read");
    }
}
