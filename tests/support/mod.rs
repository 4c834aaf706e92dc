//! Shared by the tests: a client fleet and its tally, Kafka and Redis, processes.
#![allow(dead_code, unreachable_pub, reason = "each test target uses a part")]

pub mod back_end;
pub mod client;
pub mod crowd;
pub mod fleet;
pub mod group;
pub mod http2;
pub mod node;
pub mod own_services;
pub mod proxy;
pub mod registry;
pub mod services;
pub mod stream;
pub mod tally;
pub mod wait;
pub mod world;
