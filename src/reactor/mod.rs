//! The shard: the event loop, the connection slab, send queues, the timer wheel; generic over a
//! kernel.

pub mod kernel;
pub mod queue;
pub mod slab;
pub mod wheel;

pub use crate::domain::outgoing;
