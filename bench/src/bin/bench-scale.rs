//! Many sessions in one server: `delivery_bench::conductor::ScalePlan`.

use clap::Parser;
use delivery_bench::conductor::{ScalePlan, scale};

fn main() -> std::io::Result<()> {
    scale(&ScalePlan::parse())
}
