//! Debian packages.
//!
//! In: package names. Out: packages installed on this machine ([`install`]), or unpacked into a folder without
//! installing them ([`unpack`], [`unpack_all`], [`unpack_newest`], which need no root). Suites that the machine does
//! not have configured are read through an apt state of our own, from the mirrors that the machine is set up with and
//! checked with its Debian keyring; `/etc/apt` is never changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Makes sure that the packages are installed. Where the machine's own suites lack one, the backports and security
/// suites of its release are asked. `state` is a folder that may hold apt's lists for that.
pub fn install(packages: &[&str], state: &Path) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing Debian packages: {}", missing.join(" "));
    if sh::on_path("apt-get").is_none() {
        bail!("no apt-get here; install what Debian calls {} yourself", missing.join(" "));
    }
    let known = || missing.iter().all(|package| has_candidate(package));
    if !known() {
        sh::run(apt_get(None)?.args(["--quiet", "update"]))?;
    }
    let sources = if known() { None } else { Some(Sources::of_this_release(state)?) };
    let update = || sh::run(apt_get(sources.as_ref())?.args(["--quiet", "update"]));
    let install = || {
        let mut command = apt_get(sources.as_ref())?;
        sh::run(command.args(["--quiet", "--yes", "--no-install-recommends", "install"]).args(&missing))
    };
    if sources.is_some() {
        update()?;
    }
    let before = services();
    let outcome = install().or_else(|_| {
        // Lists that were read long ago name versions that the archive no longer has.
        update()?;
        install()
    });
    retire(&before)?;
    outcome
}

/// The services that systemd knows from packages.
fn services() -> BTreeSet<String> {
    let folders = ["/lib/systemd/system", "/usr/lib/systemd/system"];
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    // A template (`name@.service`) starts nothing by itself.
    names.filter(|name| name.ends_with(".service") && !name.contains("@.")).collect()
}

/// Stops and disables the services that have come since `before`: the programs were wanted, not servers that run from
/// now on and after every boot.
fn retire(before: &BTreeSet<String>) -> Result<()> {
    let new: Vec<String> = services().difference(before).cloned().collect();
    if new.is_empty() || sh::on_path("systemctl").is_none() {
        return Ok(());
    }
    sh::capture(sh::as_root("systemctl")?.arg("disable").args(&new))?;
    if Path::new("/run/systemd/system").is_dir() {
        sh::capture(sh::as_root("systemctl")?.arg("stop").args(&new))?;
    }
    Ok(())
}

/// Unpacks one package of one suite into `into`, in the newest version that starts with `version`. `state` is a folder
/// for apt's lists and the download.
pub fn unpack(package: &str, version: &str, suite: &str, state: &Path, into: &Path) -> Result<()> {
    let sources = Sources::new(state, &[(&Mirrors::configured()?.archive, suite)])?;
    sh::run(sources.apply(&mut Command::new("apt-get")).args(["--quiet", "update"]))?;
    let offers = sh::capture(sources.apply(&mut Command::new("apt-cache")).args(["madison", package]))?;
    let Some(chosen) = pick(&offers, version) else {
        bail!("{suite} has no {package} {version}; it offers:\n{offers}");
    };
    let mut download = Command::new("apt-get");
    sources.apply(&mut download).args(["--quiet", "download"]).arg(format!("{package}={chosen}"));
    sh::run(download.current_dir(state))?;
    let file = newest_deb(state, package)?;
    fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    sh::run(Command::new("dpkg").arg("-x").arg(&file).arg(into))?;
    fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))
}

/// Unpacks all these packages of one suite into `into`, in its newest versions, whatever is installed on this machine.
pub fn unpack_all(packages: &[String], suite: &str, state: &Path, into: &Path) -> Result<()> {
    let sources = Sources::new(state, &[(&Mirrors::configured()?.archive, suite)])?;
    // Else apt would offer what is installed where that is newer than the suite's.
    let status = state.join("status");
    fs::write(&status, "").with_context(|| format!("writing {}", status.display()))?;
    let status = format!("Dir::State::status={}", status.display());
    let debs = state.join("debs");
    let _ = fs::remove_dir_all(&debs);
    fs::create_dir_all(&debs).with_context(|| format!("creating {}", debs.display()))?;
    sh::run(sources.apply(&mut Command::new("apt-get")).args(["-o", &status, "--quiet", "update"]))?;
    let mut download = Command::new("apt-get");
    sources.apply(&mut download).args(["-o", &status, "--quiet", "download"]).args(packages);
    sh::run(download.current_dir(&debs))?;
    fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    for entry in fs::read_dir(&debs)? {
        sh::run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(into))?;
    }
    fs::remove_dir_all(state).with_context(|| format!("removing {}", state.display()))
}

/// Unpacks the newest of the packages whose names are `wanted`, one for each kind, into `into`. Of names that differ in a
/// version alone, as those of kernels do, the highest counts.
///
/// `security`: the suite is in the security archive.
pub fn unpack_newest(
    suite: &str,
    security: bool,
    state: &Path,
    into: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<()> {
    let mirrors = Mirrors::configured()?;
    let archive = if security {
        mirrors
            .security
            .as_ref()
            .with_context(|| format!("apt knows no security archive, which has {suite}"))?
    } else {
        &mirrors.archive
    };
    let sources = Sources::new(state, &[(archive, suite)])?;
    sh::run(sources.apply(&mut Command::new("apt-get")).args(["--quiet", "update"]))?;
    let names = sh::capture(sources.apply(&mut Command::new("apt-cache")).arg("pkgnames"))?;
    let chosen = newest_of_each_kind(names.lines().filter(|name| wanted(name)));
    if chosen.is_empty() {
        bail!("{suite} has no such package");
    }
    let mut download = Command::new("apt-get");
    sources.apply(&mut download).args(["--quiet", "download"]).args(&chosen);
    sh::run(download.current_dir(state))?;
    fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    for package in chosen {
        let file = newest_deb(state, package)?;
        sh::run(Command::new("dpkg").arg("-x").arg(&file).arg(into))?;
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
    }
    Ok(())
}

/// A name's kind is what stands in front of its first digit. Only kinds of the highest version count: a package that
/// has been split since is not to be joined with the parts of another version.
fn newest_of_each_kind<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let version = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
    };
    let mut names: Vec<&str> = names.collect();
    names.sort_by_cached_key(|name| version(name));
    let Some(highest) = names.last().map(|name| version(name)) else { return names };
    names.retain(|name| version(name) == highest);
    names
}

/// `apt-cache madison` prints `package | version | source` per line, newest first.
fn pick<'a>(madison: &'a str, version: &str) -> Option<&'a str> {
    madison
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|offer| offer.strip_prefix(version).is_some_and(|rest| rest.starts_with(['+', '-', '~'])))
}

fn newest_deb(dir: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    fs::read_dir(dir)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&prefix) && name.ends_with(".deb")
        })
        .with_context(|| format!("apt-get left no {package} package in {}", dir.display()))
}

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    sh::capture(query.args(["--show", "--showformat=${db:Status-Status}", package]))
        .is_ok_and(|s| s == "installed")
}

fn has_candidate(package: &str) -> bool {
    sh::capture(Command::new("apt-cache").env("LC_ALL", "C").args(["policy", package]))
        .is_ok_and(|policy| policy.contains("Candidate:") && !policy.contains("Candidate: (none)"))
}

fn apt_get(sources: Option<&Sources>) -> Result<Command> {
    // `env` sets the variables on the far side of sudo too. SYSTEMD_OFFLINE: a package's service is not to be started;
    // we want its programs. The lock timeout waits for another apt instead of failing.
    let mut command = sh::as_root("env")?;
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "SYSTEMD_OFFLINE=1",
        "apt-get",
        "-o",
        "DPkg::Lock::Timeout=300",
    ]);
    if let Some(sources) = sources {
        sources.apply(&mut command);
    }
    Ok(command)
}

/// A list of suites with an apt state of its own. Which packages are installed still comes from the machine.
struct Sources {
    state: PathBuf,
}

impl Sources {
    fn new(state: &Path, suites: &[(&str, &str)]) -> Result<Self> {
        if !Path::new(KEYRING).is_file() {
            bail!(
                "{KEYRING} is missing (Debian's package debian-archive-keyring); unsigned packages are not used"
            );
        }
        for dir in ["lists/partial", "cache/archives/partial"] {
            let dir = state.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        let list: String = suites
            .iter()
            .map(|(archive, suite)| format!("deb [signed-by={KEYRING}] {archive} {suite} main\n"))
            .collect();
        let file = state.join("sources.list");
        fs::write(&file, list).with_context(|| format!("writing {}", file.display()))?;
        Ok(Self { state: state.to_owned() })
    }

    fn of_this_release(state: &Path) -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
        let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        let Some(codename) = codename.map(|name| name.trim_matches('"')) else {
            bail!("/etc/os-release names no VERSION_CODENAME, so no further suites can be asked");
        };
        let (backports, security) = (format!("{codename}-backports"), format!("{codename}-security"));
        let Mirrors { archive, security: mirror } = Mirrors::configured()?;
        let mut suites = vec![(archive.as_str(), codename), (archive.as_str(), backports.as_str())];
        if let Some(mirror) = &mirror {
            suites.push((mirror, &security));
        }
        Self::new(state, &suites)
    }

    fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let at = |key: &str, name: &str| format!("{key}={}", self.state.join(name).display());
        for option in [
            at("Dir::Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            at("Dir::State::lists", "lists"),
            at("Dir::Cache", "cache"),
            "Acquire::Languages=none".to_owned(),
            // As root, apt would fetch as the user _apt, who may not write into our folder.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// Where this machine gets Debian's packages from.
#[derive(Debug, PartialEq)]
struct Mirrors {
    archive: String,
    security: Option<String>,
}

impl Mirrors {
    fn configured() -> Result<Self> {
        let format = "$(ORIGIN) $(REPO_URI)";
        let targets = || sh::capture(Command::new("apt-get").args(["indextargets", "--format", format]));
        let mut found = Self::among(&targets()?);
        if found.is_none() && sh::is_root() {
            // Who runs an archive is known from its lists, which a new machine has not read yet.
            sh::run(apt_get(None)?.args(["--quiet", "update"]))?;
            found = Self::among(&targets()?);
        }
        found.context("apt knows no Debian archive here; set one up, then run `apt-get update`")
    }

    /// `targets`: a line per index, with its origin and its address.
    fn among(targets: &str) -> Option<Self> {
        let mut debian: Vec<&str> = targets.lines().filter_map(|line| line.strip_prefix("Debian ")).collect();
        debian.dedup();
        let clean = |address: &&str| address.trim_end_matches('/').to_owned();
        let (security, archive): (Vec<&str>, Vec<&str>) =
            debian.into_iter().partition(|address| address.trim_end_matches('/').ends_with("-security"));
        Some(Self { archive: archive.first().map(clean)?, security: security.first().map(clean) })
    }
}

#[cfg(test)]
mod tests {
    use super::{Mirrors, newest_of_each_kind, pick};

    #[test]
    fn mirrors_are_those_of_the_machine() {
        let targets = "Node Source https://other.example/node/\n\
                       Debian http://mirror.example/debian-security/\n\
                       Debian http://mirror.example/debian/\nDebian http://mirror.example/debian/\n";
        let expected = Mirrors {
            archive: "http://mirror.example/debian".into(),
            security: Some("http://mirror.example/debian-security".into()),
        };
        assert_eq!(Mirrors::among(targets), Some(expected));
        assert_eq!(Mirrors::among("Other http://mirror.example/debian/"), None);
    }

    #[test]
    fn the_newest_kernel_is_chosen_with_all_its_parts() {
        let names = [
            "linux-binary-7.2.9+deb13-cloud-amd64",
            "linux-modules-7.2.12+deb13-cloud-amd64",
            "linux-image-7.2.9+deb13-cloud-amd64",
            "linux-binary-7.2.12+deb13-cloud-amd64",
        ];
        let mut chosen = newest_of_each_kind(names.into_iter());
        chosen.sort_unstable();
        assert_eq!(
            chosen,
            ["linux-binary-7.2.12+deb13-cloud-amd64", "linux-modules-7.2.12+deb13-cloud-amd64"]
        );
        assert_eq!(newest_of_each_kind([].into_iter()), [""; 0]);
    }

    #[test]
    fn the_version_is_matched_whole() {
        let madison = " rust-src | 1.96.1+dfsg1-2~bpo13+1 | http://mirror.example/debian trixie-backports/main\n\
                       rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://mirror.example/debian trixie-backports/main\n\
                       rust-src | 1.9.1+dfsg1-2 | http://mirror.example/debian trixie-backports/main\n";
        assert_eq!(pick(madison, "1.95.0"), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(pick(madison, "1.9"), None);
        assert_eq!(pick(madison, "1.97.0"), None);
    }
}
