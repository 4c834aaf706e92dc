//! The `delivery` command.

fn main() {}
