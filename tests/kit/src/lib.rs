//! Test doubles of what surrounds a node: the conversation, message and presence services, the
//! producer of the Kafka events, the issuer of tokens, and a client of the admin port.
//!
//! Generates its own wire types from `proto/` and depends on nothing of Delivery, so that the two
//! can disagree.

pub mod admin;
pub mod neighbours;
pub mod ports;
pub mod publisher;
pub mod services;
pub mod token;

#[allow(clippy::all, reason = "generated code")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}
pub use generated::realchat as proto;
