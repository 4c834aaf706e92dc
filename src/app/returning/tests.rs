use super::*;

/// Promise: “In order per conversation.”
///
/// Issue “From the log to the members”: “for any interleaving of late commits, live events, catch-up pages,
/// … and reconnects every client receives every message at least once, in log order within a session.”
#[test]
fn client_that_comes_back_receives_every_message_in_order() {
    print_on_panic();
    let mut total = ReturningSummary::default();
    for seed in 1..=SEEDS {
        total.add(&run(seed));
    }
    println!("{SEEDS} seeds: {total:?}");
    // The cases that the rule is about did happen.
    assert!(total.sessions > 2 * SEEDS && total.late > SEEDS / 4, "{total:?}");
    assert!(total.duplicates_dropped > SEEDS / 4 && total.repeated > 0, "{total:?}");
    assert!(total.cursors > SEEDS / 4 && total.resumed > SEEDS / 8, "{total:?}");
    assert!(total.expired > SEEDS / 50 && total.replayed > SEEDS / 2, "{total:?}");
}

/// Seed 2 finds the rule that a sequence is a duplicate if it is not above the highest delivered one
/// (`tests/mutations/returning`).
const SEEDS: u64 = 1_000;

#[test]
fn a_seed_replays_exactly() {
    assert_eq!(run(7), run(7));
}
