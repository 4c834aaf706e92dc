//! What the tests share: a client fleet and its tally, a producer, services, processes.
#![allow(dead_code, unreachable_pub, reason = "shared by test targets that each use a part")]

pub mod back_end;
pub mod client;
pub mod crowd;
pub mod fleet;
pub mod node;
pub mod own_services;
pub mod proxy;
pub mod registry;
pub mod services;
pub mod tally;
pub mod wait;
pub mod world;
