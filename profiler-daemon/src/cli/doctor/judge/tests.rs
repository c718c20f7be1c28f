//! Machines made up by hand.

use super::*;
use crate::cli::doctor::facts::DirectoryFacts;

/// A machine on which all is well.
fn machine() -> Facts {
    Facts {
        release: "6.1.0-18-amd64".into(),
        machine: "x86_64".into(),
        btf: true,
        capabilities: Some(0x1ff_ffff_ffff),
        perf_event_paranoid: Some(2),
        kptr_restrict: Some(0),
        bpf_stats: Some(0),
        ptrace_scope: Some(1),
        lockdown: Some("none".into()),
        initial_pid_namespace: true,
        uprobe: Some(8),
        ring_buffer: Ok(()),
        cpu_clock: Ok(()),
        foreign_memory: Some(Ok(())),
        store: StoreFacts {
            path: "/var/lib/reqprof".into(),
            directory: Ok(Some(DirectoryFacts { is_dir: true, uid: 0, mode: 0o700 })),
            our_user: 0,
            free: Ok(10 << 30),
            user: None,
        },
        targets: Vec::new(),
    }
}

/// Everything that is not well after a change: name, level and remedy.
fn complaints(change: impl FnOnce(&mut Facts)) -> Vec<(String, Level, String)> {
    let mut facts = machine();
    change(&mut facts);
    judge(&facts)
        .into_iter()
        .filter(|c| c.level != Level::Ok)
        .map(|c| (c.name.into_owned(), c.level, c.remedy.expect("a complaint has a remedy")))
        .collect()
}

fn only(change: impl FnOnce(&mut Facts)) -> (String, Level) {
    let mut all = complaints(change);
    assert_eq!(all.len(), 1, "{all:?}");
    let (name, level, _) = all.remove(0);
    (name, level)
}

#[test]
fn nothing_is_wrong_with_a_good_machine() {
    assert_eq!(complaints(|_| ()), []);
}

#[test]
fn kernels_before_5_10_are_refused() {
    for (release, level) in [
        ("5.9.16", Some(Level::Fail)),
        ("4.19.0-26-amd64", Some(Level::Fail)),
        ("5.10.0-8-amd64", None),
        ("6.18.44-1-amd64", None),
        ("10.0", None),
        ("custom", Some(Level::Warn)),
    ] {
        let found = complaints(|f| f.release = release.into());
        assert_eq!(found.first().map(|(_, level, _)| *level), level, "{release}");
    }
    assert_eq!(only(|f| f.machine = "aarch64".into()), ("architecture".into(), Level::Fail));
}

#[test]
fn missing_features_are_named() {
    assert_eq!(only(|f| f.btf = false), ("kernel types (BTF)".into(), Level::Warn));
    assert_eq!(only(|f| f.uprobe = None), ("uprobes".into(), Level::Fail));
    assert_eq!(only(|f| f.lockdown = Some("confidentiality".into())), ("lockdown".into(), Level::Fail));
    assert_eq!(only(|f| f.initial_pid_namespace = false), ("pid namespace".into(), Level::Fail));
    assert_eq!(only(|f| f.kptr_restrict = Some(2)), ("kptr_restrict".into(), Level::Warn));
    assert_eq!(only(|f| f.ring_buffer = Err(libc::EPERM)), ("ring buffer".into(), Level::Fail));
    assert_eq!(only(|f| f.foreign_memory = Some(Err(libc::EPERM))), ("process memory".into(), Level::Fail));
    assert_eq!(complaints(|f| f.foreign_memory = None), []);
}

#[test]
fn capabilities_are_bits() {
    // CAP_SYS_ADMIN (21) stands in for CAP_BPF (39) and CAP_PERFMON (38).
    let old = 1 << 21 | 1 << 19 | 1 << 2 | 1 << 34;
    assert_eq!(complaints(|f| f.capabilities = Some(old)), []);
    let names: Vec<_> =
        complaints(|f| f.capabilities = Some(1 << 38 | 1 << 39)).into_iter().map(|c| (c.0, c.1)).collect();
    assert_eq!(
        names,
        [
            ("CAP_SYS_ADMIN".to_owned(), Level::Fail),
            ("CAP_SYS_PTRACE".to_owned(), Level::Fail),
            ("CAP_DAC_READ_SEARCH".to_owned(), Level::Warn),
            ("CAP_SYSLOG".to_owned(), Level::Warn),
        ]
    );
    assert_eq!(complaints(|f| f.capabilities = Some(0)).len(), 6);
}

#[test]
fn a_paranoid_kernel_is_blamed_for_refused_sampling() {
    let found = complaints(|f| {
        f.perf_event_paranoid = Some(4);
        f.cpu_clock = Err(libc::EACCES);
    });
    assert_eq!(found[0].0, "perf_event_paranoid");
    assert!(found[0].2.contains("sysctl kernel.perf_event_paranoid=2"));
    assert_eq!((found[1].0.as_str(), found[1].1), ("CPU sampling", Level::Fail));
    // As root it does not matter.
    assert_eq!(complaints(|f| f.perf_event_paranoid = Some(4)), []);
}

#[test]
fn the_store_is_looked_at() {
    let with = |directory: DirectoryFacts| complaints(|f| f.store.directory = Ok(Some(directory)));
    let found = with(DirectoryFacts { is_dir: true, uid: 0, mode: 0o777 });
    assert_eq!((found[0].1, found[0].2.as_str()), (Level::Fail, "chmod 0700 /var/lib/reqprof"));
    let found = with(DirectoryFacts { is_dir: true, uid: 1000, mode: 0o700 });
    assert_eq!((found[0].1, found[0].2.as_str()), (Level::Fail, "chown root /var/lib/reqprof"));
    assert_eq!(with(DirectoryFacts { is_dir: false, uid: 0, mode: 0o700 })[0].1, Level::Fail);
    assert_eq!(complaints(|f| f.store.directory = Ok(None)), []);
    assert_eq!(only(|f| f.store.free = Ok(1 << 20)), ("disk space".into(), Level::Warn));
    assert_eq!(only(|f| f.store.user = Some(17)), ("other reqprof".into(), Level::Warn));
}

#[test]
fn targets_are_judged_by_what_they_are() {
    let image = |libc: Option<&str>, python: Option<Result<&str, &str>>| {
        let python = python.map(|found| found.map(Into::into).map_err(Into::into));
        Ok(Image { exe: "/x".into(), libc: libc.map(Into::into), python })
    };
    let level = |image| target(&TargetFacts { pid: 17, image }).level;
    assert_eq!(level(image(Some("/libc.so.6"), Some(Ok("3.11.7")))), Level::Ok);
    assert_eq!(level(image(Some("/libc.so.6"), None)), Level::Ok);
    assert_eq!(level(image(Some("/libc.so.6"), Some(Err("Python 3.15 is not supported")))), Level::Warn);
    assert_eq!(level(image(None, None)), Level::Warn);
    assert_eq!(level(Err("no such process".into())), Level::Fail);
    let hostile =
        target(&TargetFacts { pid: 17, image: Ok(Image { exe: "/\u{1b}[2J\n".into(), ..Image::default() }) });
    assert!(!hostile.finding.contains(['\u{1b}', '\n']) && hostile.name == "target 17");
}
