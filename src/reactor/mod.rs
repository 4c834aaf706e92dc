//! The shard: the event loop, the connection slab, send queues, the timer wheel; generic over a
//! kernel.

pub mod config;
pub mod connection;
pub mod counters;
pub mod gate;
pub mod kernel;
pub mod listener;
pub mod queue;
pub mod rate;
pub mod shard;
pub mod simulation;
pub mod slab;
pub mod thread;
pub mod wheel;

pub use crate::domain::outgoing;
