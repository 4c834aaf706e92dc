//! The application: configuration, startup and shutdown, telemetry, the command line.

pub mod admin;
pub mod cli;
pub mod config;
pub mod dev;
pub mod node;
pub mod operate;
pub mod publish;
#[cfg(any(test, feature = "simulation"))]
pub mod returning;
mod secure_client;
pub mod serve;
pub mod sizing;
pub mod tail;
pub mod telemetry;
mod terminal;
