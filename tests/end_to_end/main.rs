//! What crosses a wire: a real Kafka, a real Redis, the real binary, real sockets. Each test that
//! needs a service is ignored by a plain `cargo test`; `tests/run` starts the services and runs them.

#[path = "../support/mod.rs"]
mod support;
#[path = "../data/upgrade_cases.rs"]
mod upgrade_cases;

mod back_pressure;
mod clients;
mod contract;
mod delivery_to_all;
mod door;
mod faults;
mod ledger;
mod pages;
