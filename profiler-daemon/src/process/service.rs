//! What a process's service is called.
//!
//! In: its identity. Out: a short name that all workers of one service share: the systemd unit, else the
//! application that a known server was told to run, else the program.

use super::identity::Identity;

/// Longest name; it becomes a metric label.
const NAME_MAX: usize = 80;

/// Servers whose argument names the application.
const SERVERS: [&str; 7] =
    ["gunicorn", "uvicorn", "hypercorn", "daphne", "uwsgi", "waitress-serve", "granian"];

/// The service's name; never empty.
pub fn name(identity: &Identity) -> String {
    let found = unit(&identity.cgroup)
        .or_else(|| application(&identity.cmdline))
        .or_else(|| program(&identity.cmdline))
        .or_else(|| {
            identity.exe.as_ref().and_then(|exe| Some(exe.file_name()?.to_string_lossy().into_owned()))
        })
        .unwrap_or_else(|| identity.comm.clone());
    let clean: String = found.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect();
    if clean.is_empty() { "unknown".to_owned() } else { clean }
}

/// `…/shop.service/…`: units of the system, not the session of a person who started something by hand.
fn unit(cgroup: &str) -> Option<String> {
    let unit = cgroup.split('/').rev().find_map(|part| part.strip_suffix(".service"))?;
    let session = unit.starts_with("user@") || unit.starts_with("session-");
    (!session && !unit.is_empty()).then(|| unit.to_owned())
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// `gunicorn … shop.wsgi:application` is `shop`; so is the title `gunicorn: worker [shop.wsgi]`.
fn application(cmdline: &[String]) -> Option<String> {
    let server = cmdline.iter().take(4).position(|arg| {
        let word = base(arg.split_whitespace().next().unwrap_or_default()).trim_end_matches(':');
        SERVERS.contains(&word)
    })?;
    let title = &cmdline[server];
    if let Some((_, rest)) = title.split_once('[') {
        return first_module(rest.split(']').next()?);
    }
    let arguments = &cmdline[server + 1..];
    let named = arguments.iter().filter(|arg| !arg.starts_with('-')).find_map(|arg| {
        let looks = arg.contains(':') || arg.ends_with(".wsgi") || arg.ends_with(".asgi");
        (looks && !arg.contains('/')).then(|| first_module(arg)).flatten()
    });
    // `gunicorn -w 4 shop`: the application comes last.
    named.or_else(|| arguments.last().filter(|arg| !arg.contains('/')).and_then(|arg| first_module(arg)))
}

/// The part of a module path that names the project.
fn first_module(path: &str) -> Option<String> {
    let module = path.split(':').next()?;
    let mut parts = module.split('.');
    let first = parts.next().filter(|first| {
        first.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_')
            && first.chars().all(|c| c.is_alphanumeric() || c == '_')
    })?;
    // `config.wsgi` names a folder that many projects have; still better than the server's own name.
    Some(first.to_owned())
}

/// A script run by an interpreter, by its file name.
fn program(cmdline: &[String]) -> Option<String> {
    let (first, rest) = cmdline.split_first()?;
    let name = base(first);
    let interpreter = ["python", "node", "ruby", "php", "perl"].iter().any(|i| name.starts_with(i));
    if !interpreter {
        return (!name.is_empty()).then(|| name.split(':').next().unwrap_or(name).to_owned());
    }
    let mut arguments = rest.iter();
    while let Some(arg) = arguments.next() {
        if arg == "-m" {
            return arguments.next().cloned();
        }
        if !arg.starts_with('-') {
            return Some(base(arg).to_owned());
        }
    }
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::identity::ProcessKey;

    fn of(cgroup: &str, cmdline: &[&str]) -> String {
        name(&Identity {
            key: ProcessKey { pid: 1, start_time: 1 },
            ppid: 0,
            comm: "comm".into(),
            exe: Some("/usr/bin/prog".into()),
            cmdline: cmdline.iter().map(|s| (*s).to_owned()).collect(),
            cgroup: cgroup.into(),
        })
    }

    #[test]
    fn services_are_named() {
        assert_eq!(of("/system.slice/shop.service", &["x"]), "shop");
        assert_eq!(of("/user.slice/user@0.service/app", &["/usr/sbin/nginx"]), "nginx");
        assert_eq!(
            of("", &["/v/bin/python3", "/v/bin/gunicorn", "-w", "4", "shop.wsgi:application"]),
            "shop"
        );
        assert_eq!(of("", &["gunicorn: worker [truth:app]"]), "truth");
        assert_eq!(of("", &["python3", "/v/bin/gunicorn", "-b", "127.0.0.1:80", "truth"]), "truth");
        assert_eq!(of("", &["python3", "-m", "http.server"]), "http.server");
        assert_eq!(of("", &["python3", "-u", "/srv/app/main.py"]), "main.py");
        assert_eq!(of("", &["nginx: worker process"]), "nginx");
        assert_eq!(of("", &[]), "prog");
    }

    #[test]
    fn names_are_fit_for_labels() {
        assert_eq!(of("", &["a\u{1b}[31mb"]), "a[31mb");
        assert_eq!(of("", &["\n"]), "unknown");
        assert_eq!(of("", &["x".repeat(500).as_str()]).len(), 80);
    }
}
