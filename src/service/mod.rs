//! The tokio side: users, conversations and back ends. Never touches a client socket.

pub mod bell;
pub mod directory;
pub mod ports;
pub mod proto;
pub mod stream_key;
pub mod timestamp;
