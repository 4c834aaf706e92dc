//! The `delivery` command.

use std::process::ExitCode;

/// Takes less memory per connection and less CPU time than the system allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    delivery::app::cli::run()
}
