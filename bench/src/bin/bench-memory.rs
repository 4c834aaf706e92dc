//! Memory of idle sessions of a server: see `delivery_bench::conductor::MemoryPlan`.

use clap::Parser;
use delivery_bench::conductor::{MemoryPlan, memory};

fn main() -> std::io::Result<()> {
    memory(&MemoryPlan::parse())
}
