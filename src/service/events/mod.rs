//! What a record says, and how each encoding writes it.

pub mod encode;
pub mod envelope;
pub mod proto;
pub mod stream_key;
pub mod timestamp;
