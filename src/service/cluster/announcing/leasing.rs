//! The keeper of the lease and the table, against a log that is stored and read late.

use super::*;
use crate::service::members::beginnings::Beginnings;

/// Time passes for the log, in which the node writes nothing.
fn silence(node: &mut Fixture) {
    for _ in 0..=NODE_TIMEOUT_MS / 4_000 + 1 {
        node.now_ms += 4_000;
        let key = SessionsKey { epoch: 9, ..SessionsKey::default() };
        let lease = Lease { instance: "other".into(), ..Lease::default() };
        node.log.stored.lock().unwrap().push((key, Some(lease.encode_to_vec())));
        node.read(usize::MAX);
    }
}

/// Promise: “A node that was silent for `NODE_TIMEOUT` closes its sessions with 4409.”
#[test]
fn silent_epoch_closes_its_sessions_and_is_followed_by_a_new_one() {
    let mut node = Fixture::living(6);
    let first = node.own.living().unwrap();
    assert_eq!(node.admit(1, 1), Ok(None));
    node.log.store(usize::MAX);
    node.read(usize::MAX);
    silence(&mut node);
    assert_eq!(node.closed, [address(1)]);
    assert!(node.directory.is_empty());
    let at = RoutedPosition {
        source: SourcePartition { topic: 0, partition: 0 },
        offset: 5,
        generation: 1,
        table: 0,
    };
    assert!(!node.holder.lock().unwrap().needs(address(1), at), "nothing more is delivered");
    assert_eq!(node.admit(2, 2), Err(Unannounced::NoLease));
    node.pass(300);
    let second = node.own.living().unwrap();
    assert_ne!(first, second);
    assert_eq!(node.admit(2, 3), Ok(None));
    assert!(node.announcer.serial(address(3)).unwrap().0 > 1, "serials never start again");
    node.log.store(usize::MAX);
    assert_eq!(node.view(second.0).len(), 1);
}

#[test]
fn session_admitted_while_the_epoch_ends_is_closed() {
    let mut node = Fixture::living(6);
    let epoch = node.announcer.began(&ids(1), address(1)).unwrap();
    silence(&mut node);
    assert!(node.closed.is_empty(), "it is not in the directory yet");
    node.directory.insert(ids(1), address(1));
    node.announcer.admitted(address(1), epoch);
    node.take_missed();
    assert_eq!(node.closed, [address(1)]);
}

#[test]
fn second_node_of_an_instance_refuses_to_start_and_names_the_first() {
    let mut first = Fixture::living(6);
    let mut second = Fixture::new(Arc::clone(&first.log), 2, 6);
    for _ in 0..60 {
        first.pass(100);
        second.pass(100);
    }
    let LeaseState::InUse(why) = second.keeper.state() else {
        panic!("{:?}", second.keeper.state());
    };
    let named = ("node".to_owned(), "host-1".to_owned());
    assert_eq!((why.instance.clone(), why.host.clone()), named);
    assert!(why.to_string().contains("host-1"), "{why}");
    assert_eq!(*first.keeper.state(), LeaseState::Living);
}

#[test]
fn node_takes_the_place_of_one_that_does_not_renew() {
    let first = Fixture::living(6);
    let mut second = Fixture::new(Arc::clone(&first.log), 2, 6);
    second.read(usize::MAX);
    second.pass(5_000);
    assert_eq!(*second.keeper.state(), LeaseState::Watching, "three renewals are awaited");
    second.pass(2_000);
    assert_eq!(*second.keeper.state(), LeaseState::Living);
    let mut first = first;
    first.pass(300);
    assert!(matches!(first.keeper.state(), LeaseState::InUse(_)), "it wakes up too late");
    assert_eq!(*second.keeper.state(), LeaseState::Living);
}

#[test]
fn of_two_nodes_that_start_together_one_stays() {
    let log = Arc::new(Log { room: AtomicUsize::new(8), ..Log::default() });
    let mut nodes = [1, 2].map(|number| Fixture::new(Arc::clone(&log), number, 6));
    nodes.iter_mut().for_each(|node| node.keeper.turn(0));
    log.store(usize::MAX);
    nodes.iter_mut().for_each(|node| node.pass(10_000));
    assert_eq!(*nodes[0].keeper.state(), LeaseState::Living);
    let expected =
        InstanceInUse { instance: "node".into(), host: "host-1".into(), version: "1".into() };
    assert_eq!(*nodes[1].keeper.state(), LeaseState::InUse(expected));
}

#[test]
fn ends_of_the_sessions_are_stored_before_the_end_of_the_lease() {
    let mut node = Fixture::living(6);
    assert_eq!(node.admit(1, 1), Ok(None));
    node.log.store(usize::MAX);
    node.log.room.store(0, Ordering::Relaxed);
    node.end(1, 1);
    node.keeper.stop();
    node.keeper.turn(node.now_ms);
    assert_eq!(*node.keeper.state(), LeaseState::Stopping, "an end waits");
    node.log.room.store(8, Ordering::Relaxed);
    node.keeper.turn(node.now_ms);
    assert_eq!(*node.keeper.state(), LeaseState::Stopped);
    node.log.store(usize::MAX);
    let stored = node.log.stored.lock().unwrap();
    let last: Vec<_> = stored[stored.len() - 2..].iter().collect();
    assert!(last.iter().all(|(_, value)| value.is_none()));
    assert_eq!((last[0].0.user.as_str(), last[1].0.user.as_str()), ("user-1", ""));
}

#[test]
fn thread_keeps_the_lease_until_it_is_stopped() {
    let node = Fixture::living(6);
    let is_read = Arc::new(AtomicBool::new(false));
    let thread = crate::service::cluster::lease::LeaseThread::spawn(LeaseParts {
        instance: "another".into(),
        host: String::new(),
        version: String::new(),
        hand_off_partition: Box::new(|| Some(0)),
        table: Arc::clone(&node.table),
        own: Arc::clone(&node.own),
        announcer: Arc::clone(&node.announcer),
        writer: Arc::clone(&node.log) as _,
        is_read: Box::new(move || is_read.load(Ordering::Relaxed)),
        routed: Box::new(Vec::new),
        set_epoch: Box::new(|_| ()),
        new_epoch: Box::new(|| NodeEpoch(7)),
    })
    .unwrap();
    assert_eq!(*thread.state().borrow(), LeaseState::Reading);
    assert!(thread.stop(std::time::Duration::from_secs(60)));
}

/// A reader that began at another record has another clock, but takes the same nodes for dead.
#[test]
fn epoch_ends_at_the_same_record_for_all_readers() {
    struct NobodyListens;
    impl TableListener for NobodyListens {
        fn begun(&self, _: SessionSerial, _: i64) {}
        fn replaced(&self, _: &str, _: &str, _: SessionSerial) {}
        fn ended(&self, _: EpochEnd, _: Option<&Lease>) {}
    }
    let lives_after = |silence_ms: i64, first_ms: i64| {
        let config = TableConfig {
            topics: Vec::new(),
            node_timeout_ms: NODE_TIMEOUT_MS,
            newcomers_age_ms: NODE_TIMEOUT_MS,
            beginnings_max: Beginnings::KEPT_MAX,
        };
        let table = SessionTable::new(config, Arc::new(NobodyListens), Arc::default());
        table.read_to(0);
        let renew = |epoch: u64, at_ms: i64| {
            let lease = Lease { instance: epoch.to_string(), ..Lease::default() };
            table.record(SessionsRecord {
                offset: at_ms,
                appended_at_ms: at_ms,
                key: Some(SessionsKey { epoch, ..SessionsKey::default() }),
                value: Some(lease.encode_to_vec().into()),
            });
        };
        renew(1, first_ms);
        renew(2, 10_000);
        (1..)
            .map(|step| 10_000 + step * 130)
            .take_while(|at| *at < 10_000 + silence_ms)
            .for_each(|at| renew(1, at));
        renew(2, 10_000 + silence_ms);
        table.has_lease(NodeEpoch(2))
    };
    for first_ms in (9_000..10_000).step_by(70) {
        for silence_ms in (59_000..62_000).step_by(90) {
            assert_eq!(lives_after(silence_ms, first_ms), silence_ms <= NODE_TIMEOUT_MS);
        }
    }
}

/// A reader for which an epoch has ended reads a later lease of it: it tells the others.
#[test]
fn epoch_that_goes_on_after_its_end_ends_for_all() {
    let mut node = Fixture::living(6);
    let renew = |node: &mut Fixture, epoch: u64| {
        let lease = Lease { instance: "other".into(), ..Lease::default() };
        let key = SessionsKey { epoch, ..SessionsKey::default() };
        node.log.stored.lock().unwrap().push((key, Some(lease.encode_to_vec())));
    };
    let tombstones = |node: &Fixture| {
        let stored = node.log.stored.lock().unwrap();
        stored.iter().filter(|(key, value)| key.epoch == 7 && value.is_none()).count()
    };
    renew(&mut node, 7);
    node.pass(100 + NODE_TIMEOUT_MS as u64);
    assert!(node.table.has_lease(NodeEpoch(7)));
    node.pass(5_000);
    assert!(node.table.has_ended(NodeEpoch(7)));
    assert_eq!(tombstones(&node), 0);
    for count in 1..4 {
        renew(&mut node, 7);
        node.pass(1_000);
        assert_eq!(tombstones(&node), count);
    }
    // A table that is read again: the tombstone follows the last lease.
    node.table.restarted();
    node.read = 0;
    node.pass(1_000);
    assert_eq!(tombstones(&node), 3);
    // The node itself reads that it ended.
    let own = node.own.living().unwrap();
    let key = SessionsKey { epoch: own.0, ..SessionsKey::default() };
    node.log.stored.lock().unwrap().push((key, None));
    node.read(usize::MAX);
    assert_eq!(node.own.living(), None);
    node.pass(200);
    assert_ne!(node.own.living().unwrap(), own, "the node lives on under another epoch");
}

/// A node without a lease has left a session. It does not keep a living node from using its table for ever.
#[test]
fn table_read_again_becomes_whole_without_the_lease_of_a_dead_node() {
    let mut node = Fixture::living(6);
    let own = node.own.living();
    let key = SessionsKey { epoch: 7, user: "user".into(), device: "phone".into() };
    let begun = SessionBegun::default().encode_to_vec();
    node.log.stored.lock().unwrap().insert(0, (key, Some(begun)));
    node.read = 0;
    node.table.restarted();
    node.pass(59_000);
    assert!(!node.table.is_whole());
    assert_eq!(node.table.next_offset(), 0);
    node.pass(2_000);
    assert!(node.table.is_whole());
    assert_eq!(node.table.next_offset(), node.read as i64);
    assert_eq!(node.own.living(), own);
}
