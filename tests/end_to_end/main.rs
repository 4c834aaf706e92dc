//! Tests of the real binary over real sockets, with a real Kafka and a real Redis. A plain `cargo test`
//! ignores those that need a service; `tests/run` starts the services and runs them.

#[path = "../support/mod.rs"]
mod support;
#[path = "../data/upgrade_cases.rs"]
mod upgrade_cases;

mod back_pressure;
mod clients;
mod cluster;
mod contract;
mod cursors;
mod delivery_to_all;
mod door;
mod faults;
mod ledger;
mod mixed_cluster;
mod operators;
mod pages;
mod redis;
mod redis_gaps;
mod secure;
mod tls;
mod topics;
