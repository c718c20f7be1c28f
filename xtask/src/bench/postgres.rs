//! A PostgreSQL cluster of our own: Debian's server program, a data folder that exists only for this run, a free
//! loopback port, an unprivileged user (the server refuses to run as root).

use std::ffi::CString;
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::site::free_port;
use crate::site::service::{Lifetime, Service};
use crate::{apt, sh};

const PROGRAMS: &str = "/usr/lib/postgresql";
/// Debian's package makes the first; every system has the second.
const USERS: [&str; 2] = ["postgres", "nobody"];
const START_LIMIT: Duration = Duration::from_secs(60);

/// A running server with an empty database; stopped and removed on drop.
pub struct Cluster {
    pub url: String,
    // Fields are dropped in this order: first the server, then its files.
    _server: Service,
    _data: DataFolder,
}

struct DataFolder(PathBuf);

impl Drop for DataFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("warning: cannot remove {}: {error}", self.0.display());
        }
    }
}

struct User {
    name: String,
    uid: u32,
    gid: u32,
}

impl Cluster {
    pub fn start(home: &Path) -> Result<Self> {
        let programs = newest_programs()?;
        let user =
            USERS.iter().find_map(|name| look_up(name)).context("neither a user postgres nor nobody")?;
        let data = DataFolder(reachable_folder(home, &user)?);
        let log = home.join("postgres.log");

        let mut initdb = as_user(&programs.join("initdb"), &user, &data.0);
        initdb.args([
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
            "--username=shop",
            "--pgdata",
        ]);
        initdb.arg(&data.0);
        sh::capture(&mut initdb)?;

        let addr = free_port()?;
        let port = addr.port().to_string();
        let mut postgres = as_user(&programs.join("postgres"), &user, &data.0);
        postgres.arg("-D").arg(&data.0).args(["-p", &port, "-c", "listen_addresses=127.0.0.1"]);
        // No socket file: its path would be too long for deep target folders.
        postgres.args(["-c", "unix_socket_directories=", "-c", "fsync=off"]);
        // SIGINT is its fast shutdown; SIGTERM would wait for every client to leave.
        let mut server = Service::start_with("postgres", postgres, &log, &Lifetime::Bound, libc::SIGINT)?;
        server.wait_for_log("database system is ready to accept connections", START_LIMIT)?;
        TcpStream::connect(addr).context("PostgreSQL says that it is ready but does not listen")?;
        // The database `postgres` is in every cluster; this cluster is the shop's alone.
        let url = format!("postgresql://shop@127.0.0.1:{port}/postgres");
        Ok(Self { url, _server: server, _data: data })
    }
}

/// The newest major version's programs: Debian keeps them off the PATH, one folder per version.
fn newest_programs() -> Result<PathBuf> {
    let versions = fs::read_dir(PROGRAMS).into_iter().flatten().flatten();
    let newest = versions
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|version| Path::new(PROGRAMS).join(format!("{version}/bin/initdb")).exists())
        .max()
        .context("PostgreSQL's server is not installed. Remedy: `apt-get install postgresql`")?;
    Ok(Path::new(PROGRAMS).join(format!("{newest}/bin")))
}

/// A folder that `user` owns and can get to: under `home`, or, when a parent is closed to others (a checkout below
/// /root), in the system's folder for temporary files.
fn reachable_folder(home: &Path, user: &User) -> Result<PathBuf> {
    let open = |folder: &Path| folder.metadata().is_ok_and(|metadata| metadata.mode() & 0o001 != 0);
    let folder = if home.ancestors().all(open) {
        home.join("postgres")
    } else {
        std::env::temp_dir().join(format!("reqprof-bench-postgres-{}", std::process::id()))
    };
    // What a run that was killed left behind; in the shared folder the name is new.
    if folder.starts_with(home) && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
    chown(&folder, Some(user.uid), Some(user.gid))
        .with_context(|| format!("cannot give {} to {} (root is needed)", folder.display(), user.name))?;
    Ok(folder)
}

fn as_user(program: &Path, user: &User, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.uid(user.uid).gid(user.gid).current_dir(folder).env("LC_ALL", "C");
    command
}

fn look_up(name: &str) -> Option<User> {
    let text = CString::new(name).ok()?;
    // SAFETY: `text` is a terminated string that outlives the call. The result is null or points to static memory
    // that the next such call overwrites; both numbers are copied out at once, and xtask calls this from one thread.
    let (uid, gid) = unsafe {
        let entry = libc::getpwnam(text.as_ptr()).as_ref()?;
        (entry.pw_uid, entry.pw_gid)
    };
    Some(User { name: name.into(), uid, gid })
}

/// Makes sure that the server's programs are there, from Debian's package where they are not.
pub fn install() -> Result<()> {
    if newest_programs().is_ok() {
        return Ok(());
    }
    apt::install(&["postgresql"], &sh::root().join("target/apt"))?;
    newest_programs().map(drop)
}
