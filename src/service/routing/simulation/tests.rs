//! Short runs of the simulation.

use super::*;

#[test]
fn seed_decides_everything() {
    assert_eq!(run(7, 4_000), run(7, 4_000));
}

/// What has to happen in a short run already, so that the checks are not idle.
const KINDS: [&str; 45] = [
    "acknowledgements lost",
    "audience_evictions",
    "audience_look_ups",
    "cursors",
    "cursors too old",
    "deliveries",
    "epochs that ended: lost",
    "epochs that ended: replaced",
    "epochs that ended: silent",
    "events expired",
    "gaps",
    "hand_offs_late",
    "hand_offs_too_large",
    "hand-offs, gap",
    "hand-offs, live",
    "hand-offs, lost",
    "hand-offs, missed",
    "hand-offs, missed range",
    "hand-offs, passed",
    "hand-offs, replay",
    "hand-offs, replay answer",
    "hand-offs, replay request",
    "losses of all sessions of a node",
    "nodes killed",
    "nodes stalled",
    "nodes started",
    "nodes stopped",
    "nodes taken over by another process",
    "nodes that gave way",
    "outages of Kafka",
    "partitions assigned",
    "partitions assigned whose next records are gone",
    "partitions lost by a stalled node",
    "partitions released",
    "positions lost",
    "records replayed from cursors",
    "replays",
    "sessions",
    "sessions caught up",
    "sessions replaced on another node",
    "sessions that missed events",
    "sessions that missed events, with all",
    "tables read again",
    "waits_for_hand_offs",
    "waits_for_members",
];

#[test]
fn sessions_miss_nothing_and_get_nothing_twice() {
    let mut total = ClusterSummary::default();
    for seed in 0..40 {
        total.add(&run(seed, 4_000));
    }
    println!("{:#?}", total.counts);
    for kind in KINDS {
        assert!(total.counts.get(kind).is_some_and(|count| *count > 0), "no {kind}");
    }
}
