//! Reloading: which settings a running daemon takes over at once and which wait for a restart.
//!
//! In: the configuration in force and a new, checked one. Out: the configuration to go on with, and the names of
//! what changed. What is fixed when the kernel side is loaded or the sockets, the store and the folder for files are
//! opened waits. `applied` is what `session::live_settings` hands to the running pipeline, and nothing else.

use super::Config;

/// The outcome of a reload.
#[derive(Clone, Debug, PartialEq)]
pub struct Reload {
    /// What is in force from now on.
    pub config: Config,
    /// Settings that changed and apply now.
    pub applied: Vec<&'static str>,
    /// Settings that changed in the file and keep their old value until a restart.
    pub restart: Vec<&'static str>,
}

impl Config {
    /// Takes over from `new` what can be taken over.
    pub fn reload_from(old: &Config, new: Config) -> Reload {
        let mut config = new;
        let mut applied = Vec::new();
        let mut restart = Vec::new();
        // Names every field, so that a new setting cannot be forgotten here.
        let Config {
            selection,
            routes,
            route_patterns,
            freq,
            native_frames,
            boundary,
            ring_size,
            listen,
            allow_remote,
            allow_hosts,
            store,
            prof_path,
            prof_file,
            formats,
            min_duration,
            log_format,
        } = &mut config;

        fn at_once<T: PartialEq>(applied: &mut Vec<&'static str>, name: &'static str, old: &T, new: &T) {
            if old != new {
                applied.push(name);
            }
        }
        at_once(&mut applied, "route", &old.routes, routes);
        at_once(&mut applied, "route_patterns", &old.route_patterns, route_patterns);
        at_once(&mut applied, "min_duration", &old.min_duration, min_duration);

        fn later<T: PartialEq + Clone>(
            restart: &mut Vec<&'static str>,
            name: &'static str,
            old: &T,
            new: &mut T,
        ) {
            if old != new {
                restart.push(name);
                new.clone_from(old);
            }
        }
        later(&mut restart, "pid, all, comm, exe, port", &old.selection, selection);
        later(&mut restart, "freq", &old.freq, freq);
        later(&mut restart, "native_frames", &old.native_frames, native_frames);
        later(&mut restart, "boundary", &old.boundary, boundary);
        later(&mut restart, "ring_size", &old.ring_size, ring_size);
        later(&mut restart, "listen", &old.listen, listen);
        later(&mut restart, "allow_remote", &old.allow_remote, allow_remote);
        later(&mut restart, "allow_hosts", &old.allow_hosts, allow_hosts);
        later(&mut restart, "store.dir", &old.store.dir, &mut store.dir);
        later(&mut restart, "store.max_size", &old.store.max_size, &mut store.max_size);
        later(&mut restart, "store.max_age", &old.store.max_age, &mut store.max_age);
        later(&mut restart, "prof_path", &old.prof_path, prof_path);
        later(&mut restart, "prof_file", &old.prof_file, prof_file);
        later(&mut restart, "formats", &old.formats, formats);
        later(&mut restart, "log_format", &old.log_format, log_format);
        Reload { config, applied, restart }
    }
}
