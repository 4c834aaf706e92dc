//! Routing: from a Kafka record to its recipients, and back to the committed offset.

pub mod kafka;
pub mod offsets;
pub mod replays;
pub mod router;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod sizing;
