//! Redis: where users are (contract §4), handing events to their nodes, and what other nodes and
//! the presence service publish.

mod address;
mod link;

pub use address::{RedisAddress, RedisAddressError};
pub use link::{RedisConfig, RedisFault, RedisLink, RedisLinkCounters, connect};
