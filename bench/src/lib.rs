//! What the load client, the comparison servers and the conductor share.

#[cfg(feature = "delivery")]
pub mod backend;
pub mod client;
pub mod clock;
pub mod conductor;
pub mod control;
pub mod flame;
pub mod frame;
pub mod generator;
pub mod histogram;
pub mod journey;
#[cfg(feature = "delivery")]
pub mod kafka;
pub mod names;
#[cfg(feature = "delivery")]
pub mod ours;
pub mod payload;
pub mod servers;
pub mod usage;
