//! Sessions of clients: handshakes, tokens, catch-up, presence.

pub mod auth;
pub mod catch_up;
pub mod client_message;
pub mod manager;
pub mod presence;
pub mod presence_fanout;
