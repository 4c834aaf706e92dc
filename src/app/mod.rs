//! Configuration, wiring, shutdown, telemetry, the command line.

pub mod admin;
pub mod config;
pub mod publish;
pub mod telemetry;
