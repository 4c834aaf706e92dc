//! Clients that behave badly; see `delivery_bench::hostile`.

use clap::Parser as _;
use delivery_bench::hostile::HostilePlan;

fn main() -> std::io::Result<()> {
    HostilePlan::parse().run()
}
