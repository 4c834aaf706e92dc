//! Cost of a message against the number of sessions: `delivery_bench::conductor::GrowthPlan`.

use clap::Parser;
use delivery_bench::conductor::{GrowthPlan, growth};

fn main() -> std::io::Result<()> {
    growth(&GrowthPlan::parse())
}
