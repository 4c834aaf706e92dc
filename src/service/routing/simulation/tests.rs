//! Short runs of the simulation.

use super::*;

#[test]
fn seed_decides_everything() {
    assert_eq!(run(7, 4_000), run(7, 4_000));
}

/// What has to happen in a short run already, so that the checks are not idle.
const KINDS: [&str; 46] = [
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
    "sessions replaced on another node",
    "sessions resumed from cursors",
    "sessions that missed events",
    "sessions that missed events, with all",
    "sessions without a cursor that may get some",
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

/// The actions of nodes, but for the answers of the conversation service.
fn act_without_answers(cluster: &mut Cluster) {
    for _ in 0..4 {
        for number in 0..PROCESSES {
            for action in (0..10).filter(|action| *action != 7) {
                cluster.act(number, action, usize::MAX);
            }
            cluster.manage(number);
        }
        cluster.drive_replays(100);
    }
}

/// Promise: “everything for this user before these positions was sent to this session before this cursor”, if the owner's
/// own node takes the session while a record waits for its members and others have gone past it.
#[test]
fn cursor_of_the_owners_own_node_covers_what_went_past_a_parked_record() {
    let mut random = StdRng::seed_from_u64(1);
    let weather =
        Weather { has_service: true, has_cursors: true, routers: 1, ..Weather::calm(&mut random) };
    let mut cluster = Cluster::with(random, weather, 1);
    // In one partition, and with this user.
    let (known, slow, device) = (0, 3, (1, 1));
    cluster.check_group();
    cluster.logs.append(known, 0);
    cluster.settle();
    cluster.connect_to(0, device);
    cluster.settle();
    assert!(cluster.returning[&device].cursor.is_some());
    cluster.disconnect_device(device);
    cluster.settle();

    cluster.logs.append(slow, 0);
    cluster.logs.append(known, 0);
    act_without_answers(&mut cluster);
    cluster.connect_to(0, device);
    act_without_answers(&mut cluster);
    // Every cursor is checked.
    cluster.settle();
    cluster.check();
    let keeper = &cluster.returning[&device];
    let covered = keeper.cursor.as_ref().unwrap().positions()[0].next;
    assert_eq!((covered, keeper.had[0].iter().copied().collect::<Vec<_>>()), (3, vec![1, 2]));
}
