//! Taking probes out of processes without waiting for it.
//!
//! In: links of probes that are not needed any more. Out: nothing. The kernel waits for every CPU at each probe, some 25 ms,
//! while whoever closes it waits too. So a thread does that, and the manager goes on.

use aya::Ebpf;
use aya::programs::uprobe::UProbeLink;
use crossbeam_channel::{Receiver, Sender, bounded};

use super::boundary::{Links, drop_all, take_link};

/// Links that wait, each with a descriptor: those of 500 processes. Beyond, whoever brings more waits.
const WAITING_MAX: usize = 4_096;
/// Closed at the same time, because the kernel then waits for all of them at once.
const AT_ONCE: usize = 64;

/// See the module. What is left when the program ends is detached by that.
#[derive(Default)]
pub struct Detacher {
    to: Option<Sender<UProbeLink>>,
}

impl Detacher {
    pub fn take(&mut self, object: &mut Ebpf, links: Links) {
        for (program, link) in links {
            let Some(link) = take_link(object, program, link) else { continue };
            if self.to.is_none() {
                let (to, links) = bounded(WAITING_MAX);
                let thread = std::thread::Builder::new().name("detacher".into());
                // Where no thread can be had, the link is dropped here.
                self.to = thread.spawn(move || work(&links)).ok().map(|_| to);
            }
            if let Some(to) = &self.to {
                // Should the thread be gone, the link comes back with the error, and is dropped here.
                let _ = to.send(link);
            }
        }
    }
}

fn work(links: &Receiver<UProbeLink>) {
    while let Ok(first) = links.recv() {
        drop_all(std::iter::once(first).chain(links.try_iter().take(AT_ONCE - 1)).collect());
    }
}
