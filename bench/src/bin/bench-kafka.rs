//! Delivery behind Kafka as a contender: see `delivery_bench::kafka`.

use clap::Parser;
use delivery_bench::control::{self, OpenSessions, Passages, Prepared, Word};
use delivery_bench::kafka::{ServedConfig, ServedDelivery};

fn main() -> std::io::Result<()> {
    let config = ServedConfig::parse();
    let words = control::commands(Word::parse, || {});
    let mut served = ServedDelivery::start(&config)?;
    control::answer(&served.ready());
    for word in words {
        match word {
            Word::Sessions => control::answer(&OpenSessions { sessions: served.sessions()? }),
            Word::Prepare(plan) => {
                served.prepare(plan)?;
                control::answer(&Prepared { prepared: true });
            }
            Word::Push(plan) => {
                control::answer(&served.push(plan)?);
                if plan.is_one_by_one() {
                    control::answer(&Passages { passages: served.passages() });
                }
            }
            Word::Presence | Word::Calls | Word::Echo(_) => {}
            Word::Quit => break,
        }
    }
    Ok(())
}
