//! The load client, the comparison servers and the conductor of the benchmarks.

pub mod admin;
pub mod backend;
pub mod beside;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod conductor;
pub mod control;
pub mod flame;
pub mod frame;
pub mod generator;
pub mod hostile;
pub mod journey;
pub mod kafka;
pub mod latency;
pub mod names;
pub mod ours;
pub mod payload;
pub mod program;
pub mod servers;
pub mod usage;
