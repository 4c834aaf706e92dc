//! What each fuzz target checks, as functions of bytes: run by the targets, by the replay of seeds
//! and regressions (`tests/fuzz_regressions.rs`) and by property tests. A violation panics.

pub mod commands;
pub mod connection;
pub mod deflate;
pub mod envelope;
pub mod frame;
pub mod input;
pub mod oracle;
pub mod upgrade;

/// What a target runs on each input.
pub type Check = fn(&[u8]);

/// The targets and what they run.
pub const TARGETS: [(&str, Check); 6] = [
    ("frame_decoder", frame::check),
    ("upgrade_parser", upgrade::check),
    ("connection", connection::check),
    ("deflate", deflate::check),
    ("envelope", envelope::check),
    ("command_parser", commands::check),
];
