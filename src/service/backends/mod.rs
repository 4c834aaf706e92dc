//! The services and servers that a node talks to, Kafka excepted.

pub mod neighbours;
pub mod outage;
pub mod ports;
pub mod redis;
