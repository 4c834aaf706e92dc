//! Checks of the fuzz targets, as functions of bytes. The targets, the replay of seeds and regressions
//! (`tests/fuzz_regressions.rs`) and property tests call them. A violation panics.

pub mod commands;
pub mod connection;
pub mod cursor;
pub mod deflate;
pub mod envelope;
pub mod frame;
pub mod input;
pub mod oracle;
pub mod tls_records;
pub mod upgrade;

/// Check that a target runs on each input.
pub type Check = fn(&[u8]);

/// All targets with their checks.
pub const TARGETS: [(&str, Check); 8] = [
    ("frame_decoder", frame::check),
    ("upgrade_parser", upgrade::check),
    ("connection", connection::check),
    ("deflate", deflate::check),
    ("envelope", envelope::check),
    ("command_parser", commands::check),
    ("cursor", cursor::check),
    ("tls_records", tls_records::check),
];
