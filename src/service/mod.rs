//! The tokio side: users, conversations and back ends. Never touches a client socket.

pub mod auth;
pub mod bell;
pub mod client_message;
pub mod directory;
pub mod encode;
pub mod envelope;
pub mod grpc;
pub mod hub;
pub mod kafka;
pub mod membership;
pub mod neighbours;
pub mod offsets;
pub mod outage;
pub mod ports;
pub mod presence;
pub mod presence_fanout;
pub mod proto;
pub mod redis;
pub mod resume;
pub mod router;
pub mod sessions;
pub mod stream_key;
pub mod timestamp;

#[cfg(test)]
#[path = "../../tests/support/neighbours.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, reason = "shared with the tests of the whole")]
pub(crate) mod fakes;
