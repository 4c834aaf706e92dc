//! The conductor; `bench/run` builds everything and calls it.

use clap::Parser;
use delivery_bench::conductor::{Comparison, run};

fn main() -> std::io::Result<()> {
    run(&Comparison::parse())
}
