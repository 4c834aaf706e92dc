//! Clients of the other services and of Redis.

pub mod neighbours;
pub mod outage;
pub mod ports;
pub mod redis;
