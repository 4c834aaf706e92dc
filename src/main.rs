//! The `delivery` command.

use std::process::ExitCode;

/// Takes less memory per connection and less CPU time than the system allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // A panic is a broken invariant. A part that goes on without the thread or task that has panicked would hold up
    // clients or forget events; other nodes take over from a process that has ended. Release builds do not unwind
    // anyway.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::abort();
    }));
    delivery::app::cli::run()
}
