//! The clocks of publishers and brokers decide nothing about who receives a record.

use super::world::{RouterWorld, With, changed, created, message};
use crate::service::events::timestamp::unix_ms;

/// Who received each record of a history in which members come and go, if the clock of its publisher is off by
/// `skew_ms`.
fn audiences(skew_ms: i64) -> Vec<Vec<u32>> {
    let mut world = RouterWorld::new(With::default());
    for user in ["alice", "bob", "carol"] {
        world.connect(user, "phone", 0);
    }
    world.conversations.set("fetched", &["alice", "bob"]);
    let (log, _) = world.assign(0);
    let history = [
        message("fetched", 1),
        changed("fetched", "bob", false),
        message("fetched", 2),
        changed("fetched", "carol", true),
        message("fetched", 3),
        changed("fetched", "bob", true),
        message("fetched", 4),
        created("created", &["alice"]),
        changed("created", "bob", true),
        message("created", 1),
        changed("created", "alice", false),
        message("created", 2),
    ];
    let mut audiences: Vec<Vec<u32>> = Vec::new();
    for (offset, value) in (0..).zip(history) {
        let at_ms = unix_ms().saturating_add_signed(skew_ms);
        log.append_at(offset, at_ms, None, value);
        let wanted = audiences.len() + 1;
        world.until("delivered", |world| world.counters.deliveries.get() == wanted as u64);
        audiences.extend(world.taken(0));
        assert_eq!(audiences.len(), wanted);
    }
    assert_eq!(world.conversations.requested().len(), 1, "no change made the list doubtful");
    audiences
}

/// Promise: “Clocks decide nothing about membership.”
#[test]
fn clock_that_is_off_changes_no_audience() {
    const SECOND: i64 = 1_000;
    let expected = audiences(0);
    let [alice, bob, carol] = [1, 2, 3];
    assert_eq!(expected[2], [alice], "bob was removed");
    assert_eq!(expected[4], [alice, carol], "carol was added");
    assert_eq!(expected[6], [alice, bob, carol]);
    assert_eq!(expected[9..], [vec![alice, bob], vec![alice, bob], vec![bob]]);
    for seconds in [1, 4, 5, 6, 8, 60, 600, 86_400] {
        for skew_ms in [seconds * SECOND, -seconds * SECOND] {
            assert_eq!(audiences(skew_ms), expected, "the clock is off by {skew_ms} ms");
        }
    }
}
