//! The stages, joined.
//!
//! ```text
//!  ring ─► reader: decode, correlate ─► finisher: symbolize, profile ─► store writer
//!             │                            └────────────────────────► file exporter
//!             └─► process manager
//! ```
//!
//! Each arrow between threads is a bounded channel. From the reader to the finisher nothing is ever dropped: when
//! the finisher is behind, the reader waits, the ring fills, and the kernel side counts exactly what it could not
//! write and flags the connections and threads concerned. Samples are given up first (see
//! `Settings::ring_reserve`). Store and exporter count what they drop.

mod collecting;
mod files;
mod finisher;
mod reader;
mod stats;
mod undecided;

pub use files::FileExporter;
pub use finisher::{Finisher, Live, LiveSettings, Naming, Observer};
pub use reader::{CONTROLS, Control, Message, RawSample, Reader, TICK};
pub use stats::{Snapshot, Stats};

/// Batches between reader and finisher. A batch is at most one drain of the ring (see `reader`): with the one being
/// made and the one being worked on, 29 MiB of samples with the deepest stacks.
pub const BATCHES: usize = 16;
