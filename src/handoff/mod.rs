//! The bounded rings between the service side and the shards, and the doorbell that wakes a
//! sleeping side.

mod doorbell;
mod ends;
mod ring;
mod sleep;
mod spill;

pub use doorbell::Doorbell;
pub use ends::{Duplex, PeerEnd, ShardEnd, connect};
pub use ring::{Consumer, Producer, Pushed, ring};
pub use spill::SpillingProducer;

/// The atomics of `sleep`. `tests/loom` replaces them by loom's model.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
}
