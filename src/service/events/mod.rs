//! Events: decoding a record, and encoding it for each kind of session.

pub mod conversation_key;
pub mod encode;
pub mod envelope;
pub mod proto;
pub mod timestamp;
