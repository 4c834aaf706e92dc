//! The shard: event loop, connection slab, send queues, timer wheel. Generic over a kernel.

pub mod config;
pub mod connection;
pub mod counters;
pub mod listener;
pub mod queue;
pub mod rate;
pub mod shard;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod slab;
pub mod thread;
pub mod tls;
pub mod wheel;
