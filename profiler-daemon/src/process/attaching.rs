//! Where the requests of a process are seen, and the probes for that.
//!
//! In: what a process maps, what its program is, and that TLS was met on its connections. Out: boundary probes on C
//! libraries as they appear, system calls where there is no such library, OpenSSL's functions; and what to say of each.

use std::path::Path;
use std::sync::Arc;

use aya::Ebpf;

use super::filtered;
use super::identity::ProcessKey;
use super::maps::{self, Mapping, Maps};
use super::openssl;
use super::patience::{FILES, MEMORY, PATIENCE};
use super::program::Program;
use super::sockets;
use super::source::{self, Source};
use super::targets::{Feature, TargetInfo, Targets};
use crate::bpf::{BoundaryProbes, OpenSslProbes, ProbeTable, SyscallProbes};
use crate::config::BoundarySource;
use crate::correlate::http::Protocol;

/// Ancestors that are looked at to find whose workers a process is one of.
const ANCESTORS_MAX: usize = 8;

/// Of a process that was forked.
const LATER: &str = "OpenSSL; its probes come when TLS is met on a connection";

/// See the module.
pub struct Attaching {
    boundary: BoundaryProbes,
    calls: SyscallProbes,
    openssl: OpenSslProbes,
    probes: ProbeTable,
    targets: Targets,
    /// Where the user wants boundaries to be seen.
    wish: BoundarySource,
    own_pid: u32,
}

impl Attaching {
    pub fn new(probes: ProbeTable, targets: Targets, wish: BoundarySource) -> Self {
        Self {
            boundary: BoundaryProbes::default(),
            calls: SyscallProbes::default(),
            openssl: OpenSslProbes::default(),
            probes,
            targets,
            wish,
            own_pid: std::process::id(),
        }
    }

    /// The C library of the host itself (or the system calls), so that a service that starts later finds the probes in place.
    pub fn host_libc(&mut self, object: &mut Ebpf) {
        // What comes of it is in the table of probes.
        if self.wish == BoundarySource::Syscall {
            let _ = self.calls.attach(object, &self.probes);
        } else if let Ok(maps) = Maps::read(self.own_pid)
            && let Some(mapping) = maps.iter().find(|m| m.executable && m.is_glibc())
        {
            let _ = self.library(object, self.own_pid, mapping);
        }
    }

    /// Whether and where requests of this process are seen, and whether that is at system calls.
    pub fn boundary(
        &mut self,
        object: &mut Ebpf,
        pid: u32,
        program: Option<&Program>,
        maps: &Maps,
    ) -> (Feature, bool) {
        let (mut boundary, calls) = self.source(object, pid, program, maps);
        if boundary.works && sockets::has_io_uring(pid) {
            boundary.detail.push_str("; it has rings of io_uring, and what it transfers by them is not seen");
        }
        (boundary, calls)
    }

    fn source(
        &mut self,
        object: &mut Ebpf,
        pid: u32,
        program: Option<&Program>,
        maps: &Maps,
    ) -> (Feature, bool) {
        let reason = match source::choose(self.wish, program, maps) {
            Source::Library { mapping, or_calls } => match self.library(object, pid, mapping) {
                Ok(detail) => return (Feature::works(detail), false),
                Err(reason) if !or_calls => return (Feature::missing(reason), false),
                Err(reason) => reason,
            },
            Source::Calls(reason) => reason.to_owned(),
            Source::Later => return (Feature::missing("no C library is mapped yet"), false),
            Source::Nowhere(reason) => return (Feature::missing(reason), false),
        };
        match self.calls.attach(object, &self.probes) {
            Ok(()) => (Feature::works(format!("syscall: {reason}")), true),
            Err(error) => (Feature::missing(format!("{reason}; {error}")), false),
        }
    }

    fn library(&mut self, object: &mut Ebpf, pid: u32, mapping: &Mapping) -> Result<String, String> {
        let name = mapping.path.to_string_lossy().into_owned();
        let place = mapping.clone();
        let file = PATIENCE.ask(pid, FILES, move || maps::open(pid, &place));
        let file = file.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let targets = self.targets.clone();
        let own = self.own_pid;
        self.boundary.sweep(move |user| user == own || targets.is_live(user));
        let attached = self.boundary.attach(object, pid, file, &name, &self.probes)?;
        Ok(format!("uprobe: {attached} in {name}"))
    }

    /// Whether and where the clear text of TLS that this process ends itself is seen.
    pub fn tls(
        &mut self,
        object: &mut Ebpf,
        key: ProcessKey,
        runtime: &'static str,
        exe: Option<&Path>,
        maps: &Maps,
    ) -> Feature {
        let comes_back = openssl::comes_back(runtime, exe);
        let mut places = openssl::libraries(maps);
        places.extend(openssl::program(maps, exe).filter(|_| comes_back));
        if !comes_back && !places.is_empty() {
            return Feature::missing(openssl::UNSURE);
        }
        if let Some(reason) = filtered::refuses_return_probes(key.pid).filter(|_| !places.is_empty()) {
            return Feature::missing(reason);
        }
        let (mut works, mut failed) = (Vec::new(), Vec::new());
        for mapping in places {
            let (pid, place) = (key.pid, mapping.clone());
            let file = PATIENCE.ask(pid, FILES, move || maps::open(pid, &place));
            let file = file.map_err(|e| e.to_string()).and_then(|file| file.map_err(|e| e.to_string()));
            match file.and_then(|file| self.openssl.attach(object, key, file)) {
                Ok(sites) => works.push(format!("{sites} in {}", mapping.path.display())),
                Err(reason) => failed.push(format!("{}: {reason}", mapping.file_name())),
            }
        }
        if !works.is_empty() {
            return Feature::works(format!("uprobe: {}", works.join("; ")));
        }
        Feature::missing(if failed.is_empty() { "it maps no OpenSSL".into() } else { failed.join("; ") })
    }

    /// A process forked, which is no target yet: `child` says of it what is known of its parent. Probes on OpenSSL cost a
    /// worker that serves clear text some milliseconds at its beginning, and the kernel more at its end; so it gets them
    /// when it, or another worker of the same service, is met with TLS.
    pub fn forked(&mut self, object: &mut Ebpf, parent: u32, child: &mut TargetInfo) {
        self.boundary.inherit(parent, child.pid);
        if child.tls.works && !(child.speaks_tls && self.inherits(object, parent, child)) {
            child.tls = Feature::works(LATER);
        }
    }

    /// Whether the child has got its parent's probes. Not if it runs another program by now, or they would kill it.
    fn inherits(&mut self, object: &mut Ebpf, parent: u32, child: &TargetInfo) -> bool {
        let exe = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
        exe(child.pid).is_some_and(|program| exe(parent) == Some(program))
            && filtered::refuses_return_probes(child.pid).is_none()
            && self.openssl.inherit(object, parent, child.key).is_ok()
    }

    /// TLS was met at this time (ns of the kernel's clock) on a connection of a process, which may have forked or loaded its
    /// library since it was looked at. Whether it is followed. `beat` is called before each process that may let us wait.
    pub fn met_tls(&mut self, object: &mut Ebpf, pid: u32, time: u64, beat: impl Fn()) -> bool {
        let Some(info) = self.targets.get(pid) else { return false };
        if !info.speaks_tls {
            self.targets.update(pid, |info| info.speaks_tls = true);
            let whose = self.eldest(info.clone());
            let mut siblings = self.targets.list();
            siblings.retain(|each| each.pid != pid && self.eldest(each.clone()) == whose);
            for worker in siblings {
                self.targets.update(worker.pid, |info| info.speaks_tls = true);
                // The others do not map it; should one serve TLS later, it comes by here itself.
                if worker.tls.works {
                    beat();
                    self.tls_now(object, &worker);
                }
            }
        }
        // Once: where it fails, the name of the protocol stays.
        if !info.other_protocols.contains(&Protocol::Tls.name()) {
            beat();
            self.tls_now(object, &info);
        }
        let since = self.openssl.since(info.key);
        // One that has ended may have been followed, and its last connections not.
        if since.map_or(info.tls.works, |since| since > time) {
            self.targets.count_early();
        }
        since.is_some()
    }

    /// A process gets its probes, if it has none.
    fn tls_now(&mut self, object: &mut Ebpf, info: &TargetInfo) {
        let pid = info.pid;
        if self.openssl.since(info.key).is_none()
            && let Ok(Ok(maps)) = PATIENCE.ask(pid, MEMORY, move || Maps::read(pid))
        {
            let tls = self.tls(object, info.key, info.runtime.name, Some(Path::new(&info.exe)), &maps);
            self.targets.update(pid, |info| info.tls = tls);
        }
    }

    /// The first of a process's ancestors that is a target like all between.
    fn eldest(&self, mut info: Arc<TargetInfo>) -> u32 {
        for _ in 0..ANCESTORS_MAX {
            match self.targets.get(info.ppid).filter(|_| self.targets.is_live(info.ppid)) {
                Some(parent) => info = parent,
                None => break,
            }
        }
        info.pid
    }

    /// The process is gone, or runs another program.
    pub fn ended(&mut self, pid: u32) {
        self.openssl.ended(pid);
    }

    /// Events were lost: any process may be another.
    pub fn forget_gone(&mut self) {
        self.openssl.forget_gone();
    }

    /// To be called once a second.
    pub fn tend(&mut self, object: &mut Ebpf) {
        self.openssl.tend(object, &self.probes);
        let by_calls = self.targets.list().iter().any(|target| target.by_calls);
        let needed = by_calls || self.wish == BoundarySource::Syscall;
        self.calls.tend(object, &self.probes, needed);
    }

    pub fn detach(&mut self, object: &mut Ebpf) {
        self.boundary.detach(object);
        self.calls.detach(object);
        self.openssl.detach(object);
    }
}
