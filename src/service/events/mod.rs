//! What a record says, and how each encoding writes it.

pub mod conversation_key;
pub mod encode;
pub mod envelope;
pub mod proto;
pub mod timestamp;
