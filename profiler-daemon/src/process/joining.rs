//! Connections that were open before their process became a target.
//!
//! In: a target. Out: entries of the kernel's `CONNECTIONS`, so that the next request on such a connection is seen
//! however the server reads it. Without them only what comes by `recv` is recognised: `read` has files and pipes too.

use aya::maps::MapError;

use super::sockets;
use crate::bpf::Connections;

/// Lets the kernel side follow every connection that somebody has made to `pid`. To be called when the process is a
/// target with probes: from then on what is accepted or closed there is noticed without us.
///
/// The process goes on meanwhile, and a descriptor may be closed and used again for anything at any moment:
/// - Before the entry is made: nobody takes the entry away again, so the descriptor is looked at once more afterwards.
///   If it is another socket by then, or none, the entry goes.
/// - After it is made: the probe in `close` removes it.
/// - By a new connection: the probe in `accept` makes an entry, which ours never replaces, and which replaces ours.
///
/// What remains is a descriptor that changes hands without `close` (`dup2`, `close_range`), as with connections that
/// were seen being accepted. Even then nothing is recorded before bytes arrive, from a socket, that begin with a method
/// and go on as a whole request line.
pub fn join(pid: u32, connections: &Connections) -> Result<(), MapError> {
    for (fd, inode) in sockets::incoming(pid) {
        let Some(joined) = connections.join(pid, fd)? else { continue };
        if sockets::inode(pid, fd) != Some(inode) {
            connections.forget(joined);
        }
    }
    Ok(())
}
