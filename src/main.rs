//! The `delivery` command.

use std::process::ExitCode;

/// Less memory per connection than the system's allocator, and less time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    delivery::app::cli::run()
}
