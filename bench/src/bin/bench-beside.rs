//! What one kind of conversation costs the events of all others: `delivery_bench::beside`.

use clap::Parser as _;
use delivery_bench::beside::BesidePlan;

fn main() -> std::io::Result<()> {
    BesidePlan::parse().run()
}
