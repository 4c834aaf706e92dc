//! The tokio side: users, conversations and back ends. Never touches a client socket.

pub mod auth;
pub mod bell;
pub mod client_message;
pub mod directory;
pub mod encode;
pub mod envelope;
pub mod neighbours;
pub mod ports;
pub mod proto;
pub mod redis;
pub mod sessions;
pub mod stream_key;
pub mod timestamp;
