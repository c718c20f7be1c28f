//! Taking probes out of processes without waiting for it.
//!
//! In: links of probes that are not needed any more. Out: nothing. The kernel waits for every CPU at each probe, some 25 ms,
//! one after the other, while whoever closes it waits too. So a thread does that, and the manager goes on.

use aya::Ebpf;
use aya::programs::uprobe::UProbeLink;
use crossbeam_channel::{Sender, unbounded};

use super::boundary::{Links, take_link};

/// See the module. What is left when the program ends is detached by that.
#[derive(Default)]
pub struct Detacher {
    /// Not bounded: what is in it was attached, which is.
    to: Option<Sender<UProbeLink>>,
}

impl Detacher {
    pub fn take(&mut self, object: &mut Ebpf, links: Links) {
        for (program, link) in links {
            let Some(link) = take_link(object, program, link) else { continue };
            if self.to.is_none() {
                let (to, links) = unbounded();
                let work = move || links.into_iter().for_each(drop::<UProbeLink>);
                // Where no thread can be had, the link is dropped here.
                self.to = std::thread::Builder::new().name("detacher".into()).spawn(work).ok().map(|_| to);
            }
            if let Some(to) = &self.to {
                // Should the thread be gone, the link comes back with the error, and is dropped here.
                let _ = to.send(link);
            }
        }
    }
}
