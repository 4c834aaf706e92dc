//! The bounded rings between the service side and the shards, and the bell that wakes a sleeper.

mod doorbell;
mod ring;
mod sleep;

pub use doorbell::Doorbell;
pub use ring::{Consumer, Producer, Pushed, ring};

/// What `sleep` is built on; in `tests/loom`, loom's model of the same.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
}
