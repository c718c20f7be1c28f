//! Files as people write them, right and wrong.

use std::collections::BTreeSet;
use std::io::Write;

use super::*;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("written");
    file
}

fn load(text: &str) -> Result<Config, ConfigError> {
    Config::load(Some(file(text).path()), &RawConfig::default())
}

/// The message without the temporary file's name: `LINE:COLUMN: reason`.
fn error(text: &str) -> String {
    let file = file(text);
    let message = Config::load(Some(file.path()), &RawConfig::default()).expect_err(text).to_string();
    let rest =
        message.strip_prefix(&format!("{}:", file.path().display())).expect("begins with the file's name");
    rest.to_owned()
}

#[test]
fn nothing_said_is_the_default() {
    let default = Config::load(None, &RawConfig::default()).expect("the default");
    for text in ["", "# only a comment\n", "---\n", "{}", "freq:\nstore:\n"] {
        assert_eq!(load(text).expect(text), default);
    }
    assert_eq!(default.selection, Selection::All);
    assert_eq!(default.freq, 99);
    assert_eq!(default.listen.to_string(), "127.0.0.1:9977");
    assert_eq!(default.store.dir, Path::new("/var/lib/reqprof"));
    assert_eq!(default.store.max_size, 536_870_912);
    assert_eq!(default.ring_size, 8_388_608);
    assert_eq!(default.min_duration, Duration::ZERO);
    assert!(default.native_frames && default.routes.is_empty() && default.prof_path.is_none());
    assert_eq!(default.formats, [Format::Text]);
}

#[test]
fn every_setting_is_read() {
    let config = load(
        "pid: [17, 18, 17]\ncomm: ['gunicorn*']\nexe: [/opt/*/python3]\nport: [8000]\nroute: ['/api/*']\n\
         route_patterns:\n- {service: shop, pattern: '/orders/{id}'}\n- pattern: /files/{*rest}\n\
         freq: 199\nnative_frames: false\nboundary: syscall\nring_size: 1MiB\nlisten: 0.0.0.0:80\nallow_remote: true\nallow_hosts: [Shop.example]\n\
         store: {dir: /srv/reqprof, max_size: 2GiB, max_age: 1h}\nprof_path: /srv/prof\n\
         prof_file: '{path}.{id}'\nmin_duration: 250ms\nlog_format: json\n",
    )
    .expect("a valid file");
    let Selection::Only(selectors) = &config.selection else { panic!("{config:?}") };
    assert_eq!(
        (selectors.pids.as_slice(), selectors.ports.as_slice()),
        ([17, 18].as_slice(), [8000].as_slice())
    );
    assert!(selectors.comm.matches("gunicorn: worker") && !selectors.comm.matches("nginx"));
    assert!(selectors.exe.matches("/opt/a/b/python3"));
    assert!(config.routes.matches("/api/orders/{id}") && !config.routes.matches("/orders"));
    assert_eq!(config.route_patterns.len(), 2);
    assert_eq!(config.route_patterns[0].service.as_deref(), Some("shop"));
    assert!(
        config.route_patterns[1].service.is_none() && config.route_patterns[1].pattern.matches("/files/a/b")
    );
    assert_eq!((config.freq, config.native_frames, config.ring_size), (199, false, 1_048_576));
    assert_eq!(config.boundary, BoundarySource::Syscall);
    assert_eq!((config.listen.to_string().as_str(), config.allow_remote), ("0.0.0.0:80", true));
    assert_eq!(config.allow_hosts, ["shop.example"]);
    let store = Store { dir: "/srv/reqprof".into(), max_size: 2 << 30, max_age: Duration::from_secs(3600) };
    assert_eq!(config.store, store);
    assert_eq!(config.prof_path.as_deref(), Some(Path::new("/srv/prof")));
    assert_eq!(config.min_duration, Duration::from_millis(250));
    assert_eq!(config.log_format, LogFormat::Json);
}

#[test]
fn a_process_is_selected_by_any_selector() {
    let config = load("pid: [17]\ncomm: ['uwsgi*']\nexe: ['/opt/*']\nport: [8000, 8001]").expect("valid");
    let matches = |comm, exe: &str, ports: &[u16]| config.selection.matches(comm, Path::new(exe), ports);
    assert!(matches("uwsgi", "/x", &[]));
    assert!(matches("x", "/opt/x/y", &[]));
    assert!(matches("x", "/x", &[22, 8001]));
    assert!(!matches("x", "/x", &[22]));
    assert!(Selection::All.matches("x", Path::new("/x"), &[]));
}

#[test]
fn a_second_document_is_named_by_its_line() {
    for (text, line) in
        [("freq: 99\n---\nfreq: 49\n", 2), ("# a\n---\nfreq: 99\n# b\n--- # again\nfreq: 49\n", 5)]
    {
        let error = error(text);
        assert!(
            error.starts_with(&format!("{line}:1: ")) && error.contains("more than one document"),
            "{error}"
        );
    }
}

/// Lines and columns counted by hand.
#[test]
fn errors_name_the_line_and_the_column() {
    for (text, expected) in [
        ("freq: 99\n\nport: [8000]\nfrq: 1\n", "4:1: unknown key `frq`; did you mean `freq`?"),
        ("store:\n  max_sise: 1GiB\n", "2:3: unknown key `max_sise` in `store`; did you mean `max_size`?"),
        (
            "store:\n  colour: red\n",
            "2:3: unknown key `colour` in `store`; keys are `dir`, `max_size`, `max_age`",
        ),
        ("# x\nfreq: 0\n", "2:7: freq: `0`: the frequency must be a whole number from 1 to 9999"),
        (
            "port:\n  - 80\n  - 70000\n",
            "3:5: port[1]: `70000`: a port must be a whole number from 1 to 65535",
        ),
        ("store:\n  max_age: soon\n", "2:12: store.max_age: `soon`: not a duration"),
        ("a: 1\nfreq: 99\n", "1:1: unknown key `a`"),
        ("prof_file: '{user}'", "1:12: prof_file: unknown field `{user}`; fields are path, duration"),
        (
            "route_patterns:\n- pattern: orders\n",
            "2:12: route_patterns[0].pattern: a route pattern begins with `/`",
        ),
        ("route_patterns:\n- service: shop\n", "2:3: route_patterns[0]: missing field `pattern`"),
        ("all: yes\n", "1:6: all: invalid type: string \"yes\", expected a boolean"),
        ("listen: localhost:80\n", "1:9: listen: invalid socket address syntax"),
        ("comm: ['a[']\n", "1:8: comm[0]: `a[`: not a glob: unclosed character class"),
        ("formats: [xml]\n", "1:11: formats[0]: `xml`: not a format reqprof can write"),
        ("log_format: xml\n", "1:13: log_format: `xml`: the log format is `text` or `json`"),
        ("freq: 1\nfreq: 2\n", "2:1: duplicate field `freq`"),
        ("store:\n  dir: /a\n max_size: 1MiB\n", "3:2: did not find expected key"),
        ("freq: 1\n\tlisten: x\n", "2:1: found a tab character"),
        ("port: *b\n", "1:7: unknown anchor"),
        ("freq: [1]\n", "1:7: freq: invalid type: sequence, expected a single value"),
        ("store: 5\n", "1:8: store: invalid type: integer `5`, expected a mapping"),
        ("- freq\n", "1:1: invalid type: "),
    ] {
        let message = error(text);
        assert!(message.starts_with(expected), "{text:?} gives {message}");
        assert!(!message.contains('\n'), "one line: {message}");
    }
}

#[test]
fn rules_between_settings_name_the_line_too() {
    let remote = error("freq: 99\nlisten: 0.0.0.0:80\n");
    assert!(remote.starts_with("2:1: 0.0.0.0:80 can be reached from other hosts"), "{remote}");
    assert!(load("listen: '[::1]:80'").is_ok() && load("listen: 127.0.0.9:80").is_ok());
    assert!(error("pid: [1]\nall: true\n").starts_with("2:1: contradicts the pids"));
    assert!(error("all: false\n").starts_with("1:1: is false and no pid"));
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_the_reason() {
    let message =
        |path: &Path| Config::load(Some(path), &RawConfig::default()).expect_err("no file").to_string();
    assert_eq!(
        message(Path::new("/no/such.yaml")),
        "/no/such.yaml: cannot be read: No such file or directory (os error 2)"
    );
    assert_eq!(message(Path::new("/")), "/: cannot be read: Is a directory (os error 21)");
    assert_eq!(
        message(Path::new("/dev/zero")),
        "/dev/zero: more than 1048576 bytes, which is no configuration"
    );
    let mut binary = tempfile::NamedTempFile::new().expect("a temporary file");
    binary.write_all(b"freq: 1\nab\xff").expect("written");
    assert_eq!(message(binary.path()), format!("{}:2:3: not UTF-8 text", binary.path().display()));
}

#[test]
fn flags_win_over_the_file() {
    let file = file("freq: 10\ncomm: [nginx]\nstore: {dir: /a, max_size: 1GiB}\nport: [80]\n");
    let flags = RawConfig {
        freq: Some("20".parse().expect("valid")),
        pid: Some(vec!["17".parse().expect("valid")]),
        store: Some(RawStore { dir: Some("/b".into()), ..RawStore::default() }),
        ..RawConfig::default()
    };
    let config = Config::load(Some(file.path()), &flags).expect("valid");
    assert_eq!(config.freq, 20);
    assert_eq!((config.store.dir.as_path(), config.store.max_size), (Path::new("/b"), 1 << 30));
    let only_pid = Selectors { pids: vec![17], ..Selectors::default() };
    assert_eq!(
        config.selection,
        Selection::Only(only_pid),
        "a flag about targets replaces the file's targets"
    );

    let remote = RawConfig { listen: Some("0.0.0.0:1".parse().expect("valid")), ..RawConfig::default() };
    let error = Config::load(Some(file.path()), &remote).expect_err("remote").to_string();
    assert!(error.starts_with("--listen: 0.0.0.0:1 can be reached"), "{error}");
}

#[test]
fn a_reload_takes_what_can_be_taken_and_names_the_rest() {
    let old = load("freq: 10\nmin_duration: 1s\n").expect("valid");
    let same = Config::reload_from(&old, old.clone());
    assert_eq!(same, Reload { config: old.clone(), applied: vec![], restart: vec![] });

    let new = load(
        "freq: 20\nmin_duration: 2s\nroute: [/a]\npid: [5]\nstore: {dir: /b, max_size: 1GiB}\nlog_format: json\n",
    )
    .expect("valid");
    let reload = Config::reload_from(&old, new.clone());
    assert_eq!(reload.applied, ["route", "min_duration"]);
    assert_eq!(
        reload.restart,
        ["pid, all, comm, exe, port", "freq", "store.dir", "store.max_size", "log_format"]
    );
    assert_eq!((reload.config.freq, reload.config.min_duration), (10, Duration::from_secs(2)));
    assert_eq!(reload.config.store, old.store);
    assert_eq!((&reload.config.selection, &reload.config.routes), (&old.selection, &new.routes));
}

#[test]
fn the_example_file_is_the_default_and_its_examples_are_valid() {
    let text = include_str!("../../../deploy/reqprof.yaml");
    assert_eq!(
        load(text).expect("the example"),
        Config::load(None, &RawConfig::default()).expect("the default")
    );
    // Each setting stands there commented out, as `#key:`; prose has a space after the `#`.
    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with("  #") && !rest.starts_with(" ") => {
                format!("{rest}\n")
            }
            Some(rest) if rest.starts_with("  ") => format!("{rest}\n"),
            _ => "\n".to_owned(),
        })
        .collect();
    let source = file(&uncommented);
    let raw = yaml::Source::read(source.path()).and_then(|s| s.parse()).expect("the examples");
    // Debug shows `None` for a setting that the example does not mention; values of settings stand deeper.
    let shown = format!("{raw:#?}");
    let indent = |line: &str| line.len() - line.trim_start().len();
    let unmentioned: Vec<&str> =
        shown.lines().filter(|l| l.ends_with(": None,") && indent(l) <= 12).collect();
    assert!(unmentioned.is_empty(), "{unmentioned:?}");
}

#[test]
fn the_documentation_has_every_key_and_no_other() {
    let text = include_str!("../../../docs/configuration.md");
    let documented: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    // Debug names the fields, one a line.
    let fields = |shown: String, prefix: &str| -> Vec<String> {
        let names = shown.lines().filter_map(|line| line.trim().strip_suffix(": None,").map(str::to_owned));
        names.filter(|name| name != "store").map(|name| format!("{prefix}{name}")).collect()
    };
    let mut keys = fields(format!("{:#?}", RawConfig::default()), "");
    keys.extend(fields(format!("{:#?}", RawStore::default()), "store."));
    // The page's other table is of a template's fields, which are in braces.
    let documented: BTreeSet<&str> = documented.into_iter().filter(|key| !key.starts_with('{')).collect();
    assert_eq!(documented, keys.iter().map(String::as_str).collect());
}
