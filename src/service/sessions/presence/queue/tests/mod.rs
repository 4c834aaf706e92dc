mod fences;

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::super::visibility::{Visibility, VisibilityConfig, VisibilityState};
use super::NextOperation::{Idle, NotBefore, Start};
use super::OperationOutcome::{Done, Elsewhere, Failed, Rejected, Vanished};
use super::PresenceOperation::{Refresh, Register, Unregister};
use super::circuit_breaker::{FAILURES_IN_ROW_MAX, PROBE_BACKOFF};
use super::entry::{REFRESH_AGE_MAX, RETRY_BACKOFF};
use super::*;

fn ids(user: usize) -> SessionIds {
    SessionIds::new(&format!("user-{user}"), "phone")
}

const REACH: VisibilityConfig = VisibilityConfig {
    lookup_lifetime: Duration::from_secs(1),
    registration_wait: Duration::from_secs(2),
};

fn limits(max: usize) -> QueueLimits {
    QueueLimits { sessions_max: max, ends_max: max }
}

/// A queue and its time, advanced by the tests.
struct Bench {
    queue: OperationQueue,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Self { queue: OperationQueue::new(limits(100)), now: Instant::now() }
    }

    fn next(&mut self) -> Option<PresenceOperation> {
        match self.queue.next(self.now) {
            Start(_, operation) => Some(operation),
            NotBefore(_) | Idle => None,
        }
    }

    fn complete(&mut self, operation: PresenceOperation, outcome: OperationOutcome) {
        self.queue.complete(ids(0), operation, outcome, 0.5, self.now);
    }

    /// Takes the next operation, which must be this one, and completes it.
    fn does(&mut self, operation: PresenceOperation, outcome: OperationOutcome) {
        assert_eq!(self.next(), Some(operation));
        self.complete(operation, outcome);
    }

    /// Admits a session whose visibility is awaited.
    fn admits(&mut self, user: usize, replaced: bool) -> Arc<Visibility> {
        let visibility = Arc::new(Visibility::new(REACH, self.now));
        self.queue.register(&ids(user), replaced, self.now);
        self.queue.notify_registered(&ids(user), VisibilityNotifier::new(Arc::clone(&visibility)));
        visibility
    }

    fn is_idle(&mut self) -> bool {
        self.next().is_none() && self.queue.len() == 0
    }

    fn fails(&mut self, operation: PresenceOperation) {
        self.does(operation, Failed);
        self.now += RETRY_BACKOFF.max();
    }
}

#[test]
fn session_is_registered_refreshed_and_unregistered() {
    let mut bench = Bench::new();
    assert!(bench.queue.register(&ids(0), false, bench.now));
    bench.does(Register, Done);
    assert!(bench.is_idle());
    assert!(bench.queue.refresh(&ids(0), false, bench.now));
    bench.does(Refresh { check: false }, Done);
    assert!(bench.queue.unregister(&ids(0), bench.now));
    bench.does(Unregister, Done);
    assert!(bench.is_idle());
}

#[test]
fn session_that_ends_before_its_registration_costs_no_call() {
    let mut bench = Bench::new();
    for _ in 0..50 {
        bench.queue.register(&ids(0), false, bench.now);
        bench.queue.unregister(&ids(0), bench.now);
    }
    assert!(bench.is_idle());
}

#[test]
fn session_that_ends_while_presence_is_unreachable_costs_one_call() {
    let mut bench = Bench::new();
    bench.queue.register(&ids(0), false, bench.now);
    bench.fails(Register);
    for _ in 0..50 {
        bench.queue.unregister(&ids(0), bench.now);
        bench.queue.register(&ids(0), false, bench.now);
    }
    bench.queue.unregister(&ids(0), bench.now);
    bench.does(Unregister, Done);
    assert!(bench.is_idle());
}

#[test]
fn newest_state_follows_the_call_in_flight() {
    let mut bench = Bench::new();
    bench.queue.register(&ids(0), false, bench.now);
    assert_eq!(bench.next(), Some(Register));
    bench.queue.unregister(&ids(0), bench.now);
    assert_eq!(bench.next(), None, "one call for a session at a time");
    bench.complete(Register, Done);
    assert_eq!(bench.next(), Some(Unregister));
    bench.queue.register(&ids(0), false, bench.now);
    bench.complete(Unregister, Done);
    bench.does(Register, Done);
    assert!(bench.is_idle());
}

#[test]
fn check_requested_during_a_call_is_made_after_it() {
    let mut bench = Bench::new();
    bench.queue.register(&ids(0), false, bench.now);
    assert_eq!(bench.next(), Some(Register));
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.complete(Register, Done);
    bench.fails(Refresh { check: true });
    bench.does(Refresh { check: true }, Done);
    assert!(bench.is_idle());
}

#[test]
fn vanished_registration_is_queued_again() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Refresh { check: true }, Vanished);
    bench.does(Register, Done);
    assert!(bench.is_idle());
}

#[test]
fn refresh_that_waited_too_long_becomes_a_registration() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), false, bench.now);
    bench.fails(Refresh { check: false });
    bench.now += REFRESH_AGE_MAX;
    bench.does(Register, Done);
}

#[test]
fn session_registered_elsewhere_is_reported_once_and_not_registered_again() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Refresh { check: true }, Elsewhere);
    assert!(bench.is_idle());
    assert_eq!(bench.queue.take_replaced(), [ids(0)]);
    assert_eq!(bench.queue.take_replaced(), []);
}

#[test]
fn session_that_reconnected_is_not_reported_as_replaced() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), true, bench.now);
    assert_eq!(bench.next(), Some(Refresh { check: true }));
    bench.queue.register(&ids(0), true, bench.now);
    bench.complete(Refresh { check: true }, Elsewhere);
    assert_eq!(bench.queue.take_replaced(), []);
    bench.does(Register, Done);

    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Refresh { check: true }, Elsewhere);
    bench.queue.register(&ids(0), false, bench.now);
    assert_eq!(bench.queue.take_replaced(), [], "found before it came back");
}

#[test]
fn unreachable_presence_is_probed_one_call_at_a_time() {
    let mut queue = OperationQueue::new(limits(1000));
    let mut now = Instant::now();
    for user in 0..500 {
        queue.register(&ids(user), false, now);
    }
    let mut calls = 0;
    let end = now + Duration::from_secs(60);
    while now < end {
        match queue.next(now) {
            Start(ids, operation) => {
                queue.complete(ids, operation, Failed, 0.0, now);
                calls += 1;
            }
            NotBefore(at) => now = at,
            Idle => unreachable!("there is always something to try"),
        }
    }
    assert!((20..40).contains(&calls), "{calls} calls in a minute");
    // After a success the queue runs at full pace at once.
    let Start(ids, operation) = queue.next(now) else { panic!("a call is due") };
    queue.complete(ids, operation, Done, 0.0, now);
    let Start(..) = queue.next(now) else { panic!("slow") };
    let Start(..) = queue.next(now) else { panic!("one at a time") };
}

#[test]
fn room_is_bounded_and_refreshes_leave_half_of_it() {
    let mut queue = OperationQueue::new(QueueLimits { sessions_max: 10, ends_max: 20 });
    let now = Instant::now();
    assert_eq!((0..10).filter(|user| queue.refresh(&ids(*user), false, now)).count(), 5);
    assert_eq!((10..20).filter(|user| queue.register(&ids(*user), false, now)).count(), 5);
    assert_eq!((30..60).filter(|user| queue.unregister(&ids(*user), now)).count(), 20);
    assert!(queue.unregister(&ids(0), now), "coalesced: no room needed");
    assert!(!queue.unregister(&ids(60), now));
    assert!(!queue.register(&ids(60), false, now), "the whole is bounded too");
    assert_eq!(queue.len(), 30);
}

#[test]
fn unregistrations_take_no_room_from_registrations() {
    let mut queue = OperationQueue::new(QueueLimits { sessions_max: 10, ends_max: 1_000 });
    let now = Instant::now();
    assert!((0..1_000).all(|user| queue.unregister(&ids(user), now)));
    assert!((1_000..1_010).all(|user| queue.register(&ids(user), false, now)));
    assert!(!queue.register(&ids(1_010), false, now));
    // A session that reconnects counts as a registration again.
    assert!((0..5).all(|user| queue.register(&ids(user), false, now)));
    assert!((2_000..2_010).filter(|user| queue.unregister(&ids(*user), now)).count() == 0);
    for _ in 0..1_010 {
        let Start(ids, operation) = queue.next(now) else { panic!("there is something to do") };
        queue.complete(ids, operation, Done, 0.5, now);
    }
    assert_eq!((queue.len(), queue.ends), (0, 0));
}

#[test]
fn shutdown_only_unregisters() {
    let mut bench = Bench::new();
    bench.queue.unregister(&ids(0), bench.now);
    bench.does(Unregister, Failed);
    bench.queue.register(&ids(1), false, bench.now);
    bench.queue.shut_down();
    assert!(!bench.queue.register(&ids(2), false, bench.now));
    assert_eq!(bench.queue.pending_unregistrations(), 1);
    bench.does(Unregister, Done);
    assert_eq!(bench.queue.pending_unregistrations(), 0);
    assert!(bench.is_idle());
}

#[test]
fn notifier_reports_only_its_own_registration() {
    let mut bench = Bench::new();
    let first = bench.admits(0, false);
    assert_eq!(bench.next(), Some(Register));
    // The device connects again during its first registration.
    let second = bench.admits(0, true);
    assert_eq!(first.state(bench.now), VisibilityState::NotVisible, "it is over with that one");
    bench.complete(Register, Done);
    assert_eq!(
        second.state(bench.now),
        VisibilityState::Pending(bench.now + REACH.registration_wait)
    );
    bench.does(Register, Failed);
    bench.now += RETRY_BACKOFF.delay(0, 1.0);
    bench.does(Register, Done);
    assert_eq!(
        second.state(bench.now),
        VisibilityState::Pending(bench.now + REACH.lookup_lifetime)
    );
    assert!(bench.is_idle());
}

#[test]
fn delayed_or_rejected_registration_is_not_waited_for() {
    let mut bench = Bench::new();
    let refused = bench.admits(0, false);
    bench.does(Register, Rejected);
    assert_eq!(refused.state(bench.now), VisibilityState::NotVisible);

    bench.queue.register(&ids(0), false, bench.now);
    (0..FAILURES_IN_ROW_MAX).for_each(|_| bench.fails(Register));
    let late = bench.admits(0, false);
    assert_eq!(
        late.state(bench.now),
        VisibilityState::NotVisible,
        "presence is known to be unreachable"
    );
    bench.now += PROBE_BACKOFF.max();
    bench.does(Register, Done);
    let reached = bench.now + REACH.lookup_lifetime;
    assert_eq!(late.state(reached), VisibilityState::Visible, "it counts when it comes");

    let mut full = Bench { queue: OperationQueue::new(limits(0)), now: bench.now };
    assert_eq!(full.admits(0, false).state(full.now), VisibilityState::NotVisible);
}

#[derive(Clone, Debug)]
enum Step {
    Opened(usize),
    Ended(usize),
    Refresh(usize),
    Begin,
    /// A call in flight is carried out or not, and answered or not.
    End {
        which: usize,
        carried_out: bool,
        answered: bool,
    },
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..4_usize).prop_map(Step::Opened),
        (0..4_usize).prop_map(Step::Ended),
        (0..4_usize).prop_map(Step::Refresh),
        Just(Step::Begin),
        (0..4_usize, any::<bool>(), any::<bool>())
            .prop_map(|(which, carried_out, answered)| Step::End { which, carried_out, answered }),
        (0..40_000_u64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 0..200)
}

/// Carries a call out like the presence service.
fn carry_out(registered: &mut HashSet<SessionIds>, ids: &SessionIds, operation: PresenceOperation) {
    match operation {
        Register => drop(registered.insert(ids.clone())),
        Unregister => drop(registered.remove(ids)),
        Refresh { .. } => {}
    }
}

proptest! {
    #[test]
    fn presence_ends_up_with_what_is_connected(steps in steps()) {
        let mut queue = OperationQueue::new(limits(100));
        let mut now = Instant::now();
        let mut connected = HashSet::new();
        let mut registered = HashSet::new();
        let mut under_way = Vec::new();
        for step in steps {
            match step {
                Step::Opened(user) => {
                    let replaced = !connected.insert(ids(user));
                    prop_assert!(queue.register(&ids(user), replaced, now));
                }
                Step::Ended(user) => {
                    if connected.remove(&ids(user)) {
                        prop_assert!(queue.unregister(&ids(user), now));
                    }
                }
                Step::Refresh(user) => {
                    if connected.contains(&ids(user)) {
                        prop_assert!(queue.refresh(&ids(user), false, now));
                    }
                }
                Step::Begin => {
                    if let Start(ids, operation) = queue.next(now) {
                        prop_assert!(under_way.iter().all(|(other, _)| *other != ids));
                        under_way.push((ids, operation));
                    }
                }
                Step::End { which, carried_out, answered } => {
                    if which < under_way.len() {
                        let (ids, operation) = under_way.remove(which);
                        if carried_out || answered {
                            carry_out(&mut registered, &ids, operation);
                        }
                        let outcome = if answered { Done } else { Failed };
                        queue.complete(ids, operation, outcome, 0.5, now);
                    }
                }
                Step::Pass(ms) => now += Duration::from_millis(ms),
            }
            let placed = queue.waiting.len() + queue.delayed.len() + under_way.len();
            prop_assert_eq!(queue.entries.len(), placed);
            let ends = queue.entries.values().filter(|entry| entry.desired == DesiredState::Offline).count();
            prop_assert_eq!(queue.ends, ends);
        }
        for (ids, operation) in under_way {
            queue.complete(ids, operation, Failed, 0.5, now);
        }
        loop {
            match queue.next(now) {
                Start(ids, operation) => {
                    carry_out(&mut registered, &ids, operation);
                    queue.complete(ids, operation, Done, 0.5, now);
                }
                NotBefore(at) => now = at,
                Idle => break,
            }
        }
        prop_assert_eq!(queue.len(), 0);
        prop_assert_eq!(registered, connected);
    }
}

#[test]
fn session_that_other_nodes_could_not_find_is_noted_once_it_is_registered() {
    let lapsing = || {
        let mut bench = Bench::new();
        bench.queue.note_lapses();
        bench
    };
    // A registration in time, and refreshes in time.
    let mut bench = lapsing();
    let _visibility = bench.admits(0, false);
    bench.does(Register, Done);
    bench.queue.refresh(&ids(0), false, bench.now);
    bench.does(Refresh { check: false }, Done);
    assert!(bench.queue.take_lapsed().is_empty());
    // A refresh finds the registration gone.
    bench.queue.refresh(&ids(0), false, bench.now);
    bench.does(Refresh { check: false }, Vanished);
    assert!(bench.queue.take_lapsed().is_empty(), "not before it is registered again");
    bench.does(Register, Done);
    assert_eq!(bench.queue.take_lapsed(), [ids(0)]);
    assert!(bench.queue.take_lapsed().is_empty(), "once");
    // Presence was unreachable until the registration may have expired.
    bench.queue.refresh(&ids(0), false, bench.now);
    bench.now += REFRESH_AGE_MAX;
    bench.does(Register, Done);
    assert_eq!(bench.queue.take_lapsed(), [ids(0)]);
    // The first registration took longer than the session waited.
    let mut bench = lapsing();
    let _visibility = bench.admits(0, false);
    bench.now += REACH.registration_wait;
    bench.does(Register, Done);
    assert_eq!(bench.queue.take_lapsed(), [ids(0)]);
    // A successor on this node has missed nothing.
    bench.queue.refresh(&ids(0), false, bench.now);
    bench.does(Refresh { check: false }, Vanished);
    let _visibility = bench.admits(0, true);
    bench.does(Register, Done);
    assert!(bench.queue.take_lapsed().is_empty());
    // There was no room for it.
    let mut bench = lapsing();
    assert!(bench.queue.register_again(&ids(0), bench.now));
    bench.does(Register, Done);
    assert_eq!(bench.queue.take_lapsed(), [ids(0)]);
    // Nobody looks for it.
    let mut bench = Bench::new();
    assert!(bench.queue.register_again(&ids(0), bench.now));
    bench.does(Register, Done);
    assert!(bench.queue.take_lapsed().is_empty());
}
