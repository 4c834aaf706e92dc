//! From a Kafka record to the sessions that receive it, and back to the committed offset.

pub mod kafka;
pub mod offsets;
pub mod router;
