//! Tests of the command line from outside, without any other service.

mod limits;
mod node;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod tail;
