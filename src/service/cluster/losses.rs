//! Tests of the holder: what a session lacks because it was parked, which sessions lose something if records are gone,
//! and from where a session is live and which positions it may get as cursors.

use super::holder::{
    Arrived, Holder, LossConcerns, RoutedPosition, SessionSerial, SourcePartition,
};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};

/// The table of the first owner. Sessions that begin below it are established.
const TABLE: i64 = 100;

fn address(serial: u64) -> SessionAddress {
    let slot = u32::try_from(serial).expect("small");
    SessionAddress {
        shard: ShardId(0),
        encoding: Encoding::Binary,
        connection: ConnectionKey { slot, generation: 0 },
    }
}

fn at(generation: i64, offset: i64) -> RoutedPosition {
    let source = SourcePartition { topic: 0, partition: 0 };
    RoutedPosition { source, offset, generation, table: TABLE }
}

/// Begins a session, whose beginning is stored at this offset of the sessions topic.
fn begin(holder: &mut Holder, serial: u64, begin: i64) {
    holder.began(SessionSerial(serial), address(serial));
    holder.stored(SessionSerial(serial), begin);
}

/// A live record passes, to these sessions.
fn passes(holder: &mut Holder, at: RoutedPosition, parked: &[i64], to: &[u64]) {
    assert_eq!(holder.arrive(at, parked), Arrived::InTurn);
    for serial in to {
        assert!(holder.needs(address(*serial), at), "{at:?} to {serial}");
    }
    holder.delivered(at, parked, to.iter().map(|serial| address(*serial)));
    holder.passed(at);
}

/// A node with two sessions, whose owner has handed over everything below 6.
fn holder() -> Holder {
    let mut holder = Holder::default();
    begin(&mut holder, 1, 10);
    begin(&mut holder, 2, 20);
    passes(&mut holder, at(1, 5), &[], &[1]);
    holder
}

/// Promise: “A session gets each event once and in order while the owners of its partition change”
#[test]
fn record_that_was_parked_for_a_replay_is_not_lacked_any_more_once_it_was_handed_over() {
    let mut holder = Holder::default();
    begin(&mut holder, 1, 10);
    let before = |offset| RoutedPosition { table: 10, ..at(1, offset) };
    assert_eq!(holder.arrive(before(9), &[6, 7]), Arrived::InTurn);
    holder.delivered(before(9), &[6, 7], std::iter::once(address(1)));
    holder.replayed(before(9));
    // The first live records: from the first one on, the session is not young.
    passes(&mut holder, at(1, 6), &[], &[1]);
    passes(&mut holder, at(1, 7), &[], &[1]);
    // The next owner starts behind what its predecessor has committed.
    for offset in [6, 7, 9] {
        assert_eq!(holder.arrive(at(2, offset), &[]), Arrived::InTurn);
        assert!(!holder.needs(address(1), at(2, offset)), "{offset} again");
    }
}

fn sessions(concerned: LossConcerns) -> Vec<u32> {
    let LossConcerns::Sessions(sessions) = concerned else { panic!("{concerned:?}") };
    let mut slots: Vec<_> = sessions.iter().map(|it| it.connection.slot).collect();
    slots.sort_unstable();
    slots
}

#[test]
fn nobody_lacks_what_was_handed_over() {
    let mut holder = holder();
    assert_eq!(sessions(holder.lose(at(2, 6), 2, TABLE)), [0; 0]);
    assert!(holder.needs(address(1), at(2, 6)));
}

#[test]
fn everybody_may_lack_a_record_that_was_not_handed_over() {
    let mut holder = holder();
    assert_eq!(sessions(holder.lose(at(2, 7), 2, TABLE)), [1, 2]);
    // As if they had ended.
    assert!(!holder.needs(address(1), at(2, 7)));
    // The successor says it again. Who came meanwhile lacks nothing.
    begin(&mut holder, 3, 30);
    assert_eq!(sessions(holder.lose(at(3, 7), 2, TABLE)), [0; 0]);
}

/// Promise: “A record that waited for its members counts, also if later ones were handed over.”
#[test]
fn everybody_may_lack_a_record_that_was_parked_when_later_ones_were_handed_over() {
    for (parked, from, lost) in [(7, 7, true), (7, 3, true), (8, 7, true), (7, 8, false)] {
        let mut holder = holder();
        passes(&mut holder, at(1, 9), &[parked], &[2]);
        let expected: &[u32] = if lost { &[1, 2] } else { &[] };
        assert_eq!(sessions(holder.lose(at(2, 10), from, TABLE)), expected, "{parked}, {from}");
    }
    let mut holder = holder();
    passes(&mut holder, at(1, 9), &[7], &[2]);
    passes(&mut holder, at(1, 7), &[], &[1]);
    assert_eq!(sessions(holder.lose(at(2, 10), 7, TABLE)), [0; 0], "it was handed over later");
}

#[test]
fn young_session_may_lack_what_it_did_not_get() {
    let mut holder = holder();
    let ahead = |offset| RoutedPosition { table: TABLE + 20, ..at(2, offset) };
    // Their owner, but not the one before, has applied their beginnings.
    begin(&mut holder, 3, TABLE + 5);
    begin(&mut holder, 4, TABLE + 6);
    begin(&mut holder, 5, TABLE + 30);
    // A replay, for which 4 was parked.
    assert_eq!(holder.arrive(ahead(5), &[4]), Arrived::InTurn);
    holder.delivered(ahead(5), &[4], [3, 4].map(address).into_iter());
    holder.replayed(ahead(5));
    // One of them gets it.
    holder.delivered(ahead(4), &[], std::iter::once(address(4)));
    // The last one waits for a replay.
    let lost = RoutedPosition { generation: 3, ..ahead(6) };
    assert_eq!(sessions(holder.lose(lost, 2, TABLE + 40)), [3]);
}

#[test]
fn loss_waits_until_the_beginnings_are_known_that_its_owner_knows() {
    let mut holder = holder();
    holder.began(SessionSerial(3), address(3));
    assert_eq!(holder.lose(at(2, 7), 2, TABLE - 1), LossConcerns::NotKnown);
    assert_eq!(sessions(holder.lose(at(2, 7), 2, TABLE)), [1, 2]);
}

#[test]
fn zombie_cannot_report_a_loss() {
    let mut holder = holder();
    assert_eq!(holder.arrive(at(2, 6), &[]), Arrived::InTurn);
    assert_eq!(holder.lose(at(1, 9), 2, TABLE), LossConcerns::Zombie);
}

#[test]
fn log_that_has_lost_its_end_begins_below_what_has_passed() {
    let mut holder = holder();
    begin(&mut holder, 3, TABLE + 50);
    assert_eq!(sessions(holder.lose(at(2, 3), 6, TABLE)), [1, 2, 3]);
    begin(&mut holder, 4, 90);
    passes(&mut holder, at(2, 3), &[], &[4]);
    passes(&mut holder, at(2, 4), &[], &[4]);
}

/// A record whose sessions were looked up does not reach one that enters the directory before it has passed.
#[test]
fn session_is_live_behind_the_last_record_whose_sessions_were_looked_up() {
    let mut holder = holder();
    let source = at(1, 0).source;
    assert_eq!(holder.live_from()[&source], 6);
    assert_eq!(holder.arrive(at(1, 6), &[]), Arrived::InTurn);
    assert_eq!(holder.live_from()[&source], 6);
    holder.looks_up(at(1, 6));
    assert_eq!(holder.live_from()[&source], 7);
    holder.passed(at(1, 6));
    holder.passed_below(at(1, 9));
    assert_eq!(holder.live_from()[&source], 9);
    // A successor routes it again.
    holder.looks_up(at(2, 6));
    assert_eq!(holder.live_from()[&source], 9);
    // The log has lost its last records.
    holder.lose(at(3, 3), 6, TABLE);
    assert_eq!(holder.live_from()[&source], 3);
}

/// websocket.md: every event of this user before the cursor was sent to this session before this text.
#[test]
fn session_gets_cursors_when_nothing_has_counted_that_its_owner_passed_without_knowing_it() {
    let mut holder = holder();
    let source = at(1, 0).source;
    let (next, begin) = (RoutedPosition { table: 15, ..at(1, 9) }, 20);
    assert!(holder.counts_for_cursors(next));
    assert_eq!(holder.may_get_cursors(begin, |_| None), Err(vec![source]), "not checked");
    assert_eq!(holder.may_get_cursors(begin, |_| Some(8)), Err(vec![source]), "checked too low");
    // The owner that has checked it is not so far.
    holder.lower_counted(source, 8);
    assert_eq!(holder.may_get_cursors(begin, |_| Some(8)), Ok(()));
    // From now on an owner has to know it.
    assert!(!holder.counts_for_cursors(next));
    let knows = RoutedPosition { table: 21, ..next };
    assert!(holder.counts_for_cursors(knows));
    assert_eq!(
        holder.may_get_cursors(begin, |_| Some(8)),
        Ok(()),
        "it has everything below 9 live"
    );
    // What the lane of a zombie routes reaches nobody.
    assert_eq!(holder.arrive(RoutedPosition { table: 21, ..at(2, 9) }, &[]), Arrived::InTurn);
    assert!(!holder.counts_for_cursors(RoutedPosition { offset: 12, ..knows }));
}
