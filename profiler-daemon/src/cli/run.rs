//! The commands that profile: `daemon`, `record`, and `replay` of a recording.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use super::args::{DaemonArgs, RecordArgs};
use super::server::{Server, reserve};
use super::summary::Summary;
use super::{CliError, ExitCode, output};
use crate::config::{Config, LogFormat, Selection, Selectors};
use crate::export::{DirectoryError, ProfileDir};
use crate::pipeline::{FileExporter, Stats};
use crate::serve;
use crate::session::{Outputs, Session, StartError};
use crate::store::{self, Store};

/// How often it is looked whether a stage died, and the service manager told that none did.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long questions that are being answered may keep the end waiting; one may read for half a minute.
const ANSWERS_LIMIT: Duration = Duration::from_secs(5);

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        match &error {
            StartError::Load(_) => Self::unsupported(
                error.to_string(),
                "run as root; `reqprof doctor` says what this machine allows",
            ),
            _ => Self::runtime(error.to_string()),
        }
    }
}

fn log_to_stderr(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,aya=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Only fails when a logger is set already, as in tests.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(output::stderr_has_colors()).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// Files that we make are for nobody else. Returns the umask that was in force.
fn private_files() -> libc::mode_t {
    // SAFETY: no memory is involved; no other thread exists yet.
    unsafe { libc::umask(0o077) }
}

/// Memory that one thread gives back is of use to all. glibc makes an arena for each thread, and keeps in each what was
/// ever needed there at once; the stages hand memory to one another, so most of it would lie idle.
fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only numbers; no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // Otherwise this grows with the largest block ever freed, and such blocks stay.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}

fn need_root() -> Result<(), CliError> {
    // SAFETY: no arguments.
    let user = unsafe { libc::geteuid() };
    if user == 0 {
        return Ok(());
    }
    // Capabilities may do; without any there is no point in trying.
    let effective = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|s| s.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok()))
        .unwrap_or_default();
    if effective != 0 {
        return Ok(());
    }
    Err(CliError::unsupported(
        "reqprof needs to load BPF programs, and this user may not",
        "run it as root (sudo), or give it CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
    ))
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread()
        // The API is rarely asked, and the machine belongs to those we watch.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| CliError::runtime(format!("starting the runtime: {e}")))
}

/// Runs `work`, and waits at most `limit` for what it left on threads that may block.
fn complete<T>(runtime: tokio::runtime::Runtime, limit: Duration, work: impl Future<Output = T>) -> T {
    let outcome = runtime.block_on(work);
    runtime.shutdown_timeout(limit);
    outcome
}

/// Named processes must exist.
fn check_pids(config: &Config) -> Result<(), CliError> {
    if let Selection::Only(selectors) = &config.selection {
        for pid in &selectors.pids {
            if !Path::new(&format!("/proc/{pid}")).exists() {
                return Err(CliError::usage(format!("--pid {pid}: there is no such process")));
            }
        }
    }
    Ok(())
}

fn file_exporter(config: &Config, stats: &Stats) -> Result<Option<FileExporter>, CliError> {
    let Some(path) = &config.prof_path else { return Ok(None) };
    let directory =
        ProfileDir::open(path, config.prof_file.clone(), config.formats.clone()).map_err(|e| match &e {
            // The disk said no to a directory that may well be the right one.
            DirectoryError::Open { source, .. }
                if !matches!(source.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) =>
            {
                CliError::runtime(e.to_string())
            }
            _ => CliError::usage(e.to_string()),
        })?;
    FileExporter::start(directory, stats.clone())
        .map(Some)
        .map_err(|e| CliError::runtime(format!("starting a thread: {e}")))
}

fn open_store(config: &Config) -> Result<Store, CliError> {
    Store::open(&store::Config {
        dir: config.store.dir.clone(),
        max_bytes: config.store.max_size,
        max_age: config.store.max_age,
    })
    .map_err(|e| CliError::runtime(e.to_string()))
}

/// `reqprof daemon`.
pub fn daemon(args: &DaemonArgs) -> Result<ExitCode, CliError> {
    let config = args.settings.to_config()?;
    check_pids(&config)?;
    need_root()?;
    private_files();
    one_heap();
    log_to_stderr(config.log_format);
    let store = open_store(&config)?;
    let socket = reserve(config.listen)?;
    let stats = Stats::default();
    let files = file_exporter(&config, &stats)?;
    let outputs = Outputs {
        store: Some(store.sender()),
        files: files.clone(),
        recorder: args.events.clone(),
        health: store.health(),
        ..Outputs::default()
    };
    let runtime = runtime()?;
    let session = Arc::new(Session::start(&config, stats, outputs)?);
    let work = serve_until_told(args, config, &store, socket, session.clone());
    let outcome = complete(runtime, ANSWERS_LIMIT, work);
    stop(session);
    if let Some(files) = files {
        files.finish();
    }
    store.close();
    outcome
}

/// Ends the session as soon as nobody else uses it. A reload may still do so, for a moment.
fn stop(mut session: Arc<Session>) {
    let limit = Instant::now() + Duration::from_secs(5);
    loop {
        session = match Arc::try_unwrap(session) {
            Ok(session) => return session.stop(),
            Err(shared) => shared,
        };
        if Instant::now() > limit {
            tracing::warn!("a reload does not end; requests of the last moment may be missing");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

async fn serve_until_told(
    args: &DaemonArgs,
    config: Config,
    store: &Store,
    socket: tokio::net::TcpSocket,
    session: Arc<Session>,
) -> Result<ExitCode, CliError> {
    let failed = |what: &str, e: std::io::Error| CliError::runtime(format!("{what}: {e}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed("signals", e))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed("signals", e))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(|e| failed("signals", e))?;

    let gauges = session.gauges.clone();
    let reload = reloader(args, config.clone(), &session);
    let server = Server::start(socket, &config, store, &gauges, reload.clone())?;
    // Without systemd there is nobody to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut look = tokio::time::interval(LOOK_EVERY);
    let outcome = loop {
        tokio::select! {
            _ = interrupt.recv() => break Ok(ExitCode::Interrupted),
            _ = terminate.recv() => break Ok(ExitCode::Success),
            _ = hangup.recv() => {
                let reload = reload.clone();
                let done = tokio::task::spawn_blocking(move || reload()).await;
                if let Ok(Err(reason)) = done {
                    tracing::error!("the configuration was not reloaded: {reason}");
                }
            }
            _ = look.tick() => {
                if let Some(dead) = gauges.health.dead() {
                    break Err(stage_died(dead));
                }
                if gauges.health.check().is_ok() {
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                }
            }
        }
    };
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    server.stop().await;
    drop(reload);
    outcome
}

/// Nothing is seen any more, so nothing would be gained by going on.
fn stage_died(what: String) -> CliError {
    CliError::runtime(what).with_remedy("the log has the message; please report it")
}

/// Reads the file again; what cannot be taken over at once is named.
fn reloader(args: &DaemonArgs, config: Config, session: &Arc<Session>) -> serve::Check {
    let current = Mutex::new(config);
    let settings = args.settings.clone();
    let metrics = session.gauges.metrics.clone();
    // The session must be free to end while the server still holds this.
    let session = Arc::downgrade(session);
    serve::noted(metrics, move || {
        let Some(session) = session.upgrade() else { return Ok(()) };
        let new = settings.to_config().map_err(|e| e.to_string())?;
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = Config::reload_from(&current, new);
        session.configure(&outcome.config);
        tracing::info!(applied = ?outcome.applied, after_restart = ?outcome.restart, "configuration reloaded");
        *current = outcome.config;
        Ok(())
    })
}

/// `reqprof record`.
pub fn record(args: &RecordArgs) -> Result<ExitCode, CliError> {
    let mut config = args.to_config()?;
    check_pids(&config)?;
    need_root()?;
    let umask = private_files();
    one_heap();
    log_to_stderr(config.log_format);
    if !args.command.is_empty() {
        // Nothing but the command and its children.
        config.selection = Selection::Only(Selectors::default());
    }
    let directory = config.prof_path.get_or_insert_with(|| {
        PathBuf::from(format!("reqprof-{}", jiff::Zoned::now().strftime("%Y%m%d-%H%M%S")))
    });
    let directory = directory.clone();
    let store = args.stores().then(|| open_store(&config)).transpose()?;
    let socket = args.serves().then(|| reserve(config.listen)).transpose()?;
    let stats = Stats::default();
    let files = file_exporter(&config, &stats)?;
    let summary = Arc::new(Mutex::new(Summary::default()));
    let seen = summary.clone();
    let outputs = Outputs {
        store: store.as_ref().map(Store::sender),
        files: files.clone(),
        observer: Some(Box::new(move |record, profile| {
            seen.lock().unwrap_or_else(PoisonError::into_inner).add(record, profile.is_some());
        })),
        health: store.as_ref().map(Store::health).unwrap_or_default(),
        ..Outputs::default()
    };
    let runtime = runtime()?;
    let session = Session::start(&config, stats, outputs)?;
    let gauges = session.gauges.clone();
    let outcome = complete(runtime, ANSWERS_LIMIT, async {
        let reload = Arc::new(|| Err("a recording keeps its settings".to_owned()));
        let server = match (socket, &store) {
            (Some(socket), Some(store)) => Some(Server::start(socket, &config, store, &gauges, reload)?),
            _ => None,
        };
        let outcome = record_until_over(args, umask, &session).await;
        if let Some(server) = server {
            server.stop().await;
        }
        outcome
    });
    session.stop();
    if let Some(files) = files {
        files.finish();
    }
    if let Some(store) = store {
        store.close();
    }
    let mut summary = summary.lock().unwrap_or_else(PoisonError::into_inner);
    output::stdout(summary.table().as_bytes())?;
    let counts = gauges.stats.snapshot();
    let unwritten = counts.files_dropped + counts.files_failed;
    if std::io::stderr().is_terminal() {
        let (requests, profiles) = (summary.requests, summary.profiles);
        let place = directory.display();
        anstream::eprintln!("{requests} requests, {profiles} with samples; profiles are in {place}");
    }
    let code = outcome?;
    if unwritten > 0 {
        return Err(CliError::runtime(format!("{unwritten} profiles could not be written")));
    }
    Ok(code)
}

/// The application as the user would have started it: what we do to our own files must not change its.
fn application(program: &OsStr, arguments: &[OsString], umask: libc::mode_t) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).kill_on_drop(true);
    // SAFETY: umask may be called between fork and exec; nothing else happens there.
    unsafe {
        command.pre_exec(move || {
            libc::umask(umask);
            Ok(())
        })
    };
    command
}

async fn record_until_over(
    args: &RecordArgs,
    umask: libc::mode_t,
    session: &Session,
) -> Result<ExitCode, CliError> {
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|e| CliError::runtime(format!("signals: {e}")))?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|e| CliError::runtime(format!("signals: {e}")))?;
    let mut child = match args.command.split_first() {
        None => None,
        Some((program, arguments)) => {
            let child = application(program, arguments, umask)
                .spawn()
                .map_err(|e| CliError::usage(format!("{}: {e}", program.display())))?;
            if let Some(pid) = child.id() {
                session.include(pid);
            }
            Some(child)
        }
    };
    let limit = async {
        match &args.duration {
            Some(span) => tokio::time::sleep(span.clone().get()).await,
            None => std::future::pending().await,
        }
    };
    let ended = async {
        match &mut child {
            Some(child) => child.wait().await.ok(),
            None => std::future::pending().await,
        }
    };
    if std::io::stderr().is_terminal() {
        anstream::eprintln!("recording; Ctrl-C ends it");
    }
    let health = session.gauges.health.clone();
    let died = async {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            look.tick().await;
            if let Some(dead) = health.dead() {
                break dead;
            }
        }
    };
    let outcome = tokio::select! {
        _ = interrupt.recv() => Ok(ExitCode::Interrupted),
        _ = terminate.recv() => Ok(ExitCode::Success),
        () = limit => Ok(ExitCode::Success),
        status = ended => {
            // Our own exit code says how the recording went; that of the application would be taken for it.
            if let Some(status) = status.filter(|status| !status.success()) {
                anstream::eprintln!("the command ended with {status}");
            }
            Ok(ExitCode::Success)
        }
        dead = died => Err(stage_died(dead)),
    };
    if let Some(mut child) = child
        && let Some(pid) = child.id()
    {
        // SAFETY: no memory is involved; the child has not been waited for, so the pid is its own.
        unsafe { libc::kill(pid as i32, libc::SIGTERM) };
        let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
    }
    outcome
}

/// `reqprof replay FILE`: the recorded records through the same stages; the requests as JSON lines.
pub fn replay(file: &Path) -> Result<ExitCode, CliError> {
    let failed = |e: crate::replay::ReplayError| CliError::usage(e.to_string());
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = lines.clone();
    crate::replay::play(file, move |record| {
        if let Ok(line) = serde_json::to_string(record) {
            let mut lines = sink.lock().unwrap_or_else(PoisonError::into_inner);
            lines.extend_from_slice(line.as_bytes());
            lines.push(b'\n');
        }
    })
    .map_err(failed)?;
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    output::stdout(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question that reads for as long as it likes, when the daemon is told to end.
    #[test]
    fn the_end_does_not_wait_for_answers() {
        let (release, hang) = crossbeam_channel::bounded::<()>(0);
        let (begun, reading) = crossbeam_channel::bounded(1);
        let (ended, end) = crossbeam_channel::bounded(1);
        std::thread::spawn(move || {
            let work = async {
                tokio::task::spawn_blocking(move || {
                    begun.send(()).unwrap();
                    let _ = hang.recv();
                });
                reading.recv().unwrap();
            };
            complete(runtime().unwrap(), Duration::from_millis(20), work);
            ended.send(())
        });
        // What hangs is released only after this.
        assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok(()));
        drop(release);
    }

    #[test]
    fn the_application_has_the_umask_that_it_would_have_had() {
        let runtime = runtime().unwrap();
        let output = runtime.block_on(async {
            let arguments = ["-c".into(), "umask".into()];
            application(OsStr::new("sh"), &arguments, 0o027)
                .stdout(std::process::Stdio::piped())
                .output()
                .await
        });
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        assert_eq!(u32::from_str_radix(text.trim(), 8), Ok(0o027));
    }
}
