//! The command as a newcomer and as an operator use it: everything from outside, nothing else
//! installed.

mod node;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod tail;
