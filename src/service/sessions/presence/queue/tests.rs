use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::super::reach::{Reach, ReachConfig, Standing};
use super::entry::{REFRESH_AGE_MAX, RETRY_MAX, RETRY_MIN};
use super::pace::{FAILURES_IN_ROW_MAX, PROBE_MAX};
use super::*;

fn ids(user: usize) -> SessionIds {
    SessionIds::new(&format!("user-{user}"), "phone")
}

const REACH: ReachConfig = ReachConfig {
    lookup_lifetime: Duration::from_secs(1),
    registration_wait: Duration::from_secs(2),
};

fn limits(max: usize) -> Limits {
    Limits { sessions_max: max, ends_max: max }
}

/// A queue, and its time, which passes only when told to.
struct Bench {
    queue: Queue,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Self { queue: Queue::new(limits(100)), now: Instant::now() }
    }

    fn next(&mut self) -> Option<Job> {
        match self.queue.next(self.now) {
            Next::Do(_, job) => Some(job),
            Next::At(_) | Next::Nothing => None,
        }
    }

    fn finish(&mut self, job: Job, outcome: Outcome) {
        self.queue.finish(ids(0), job, outcome, 0.5, self.now);
    }

    /// Takes the next job, which must be this one, and finishes it.
    fn does(&mut self, job: Job, outcome: Outcome) {
        assert_eq!(self.next(), Some(job));
        self.finish(job, outcome);
    }

    /// A session that somebody waits for.
    fn admits(&mut self, user: usize, replaced: bool) -> Arc<Reach> {
        let reach = Arc::new(Reach::new(REACH, self.now));
        self.queue.opened(&ids(user), replaced, self.now);
        self.queue.pledge(&ids(user), Pledge::new(Arc::clone(&reach)));
        reach
    }

    fn is_idle(&mut self) -> bool {
        self.next().is_none() && self.queue.len() == 0
    }

    fn fails(&mut self, job: Job) {
        self.does(job, Outcome::Failed);
        self.now += RETRY_MAX;
    }
}

#[test]
fn session_is_registered_refreshed_and_unregistered() {
    let mut bench = Bench::new();
    assert!(bench.queue.opened(&ids(0), false, bench.now));
    bench.does(Job::Register, Outcome::Done);
    assert!(bench.is_idle());
    assert!(bench.queue.refresh(&ids(0), false, bench.now));
    bench.does(Job::Refresh { check: false }, Outcome::Done);
    assert!(bench.queue.ended(&ids(0), bench.now));
    bench.does(Job::Unregister, Outcome::Done);
    assert!(bench.is_idle());
}

#[test]
fn session_that_came_and_went_untold_costs_nothing() {
    let mut bench = Bench::new();
    for _ in 0..50 {
        bench.queue.opened(&ids(0), false, bench.now);
        bench.queue.ended(&ids(0), bench.now);
    }
    assert!(bench.is_idle());
}

#[test]
fn session_that_came_and_went_while_presence_was_away_costs_one_call() {
    let mut bench = Bench::new();
    bench.queue.opened(&ids(0), false, bench.now);
    bench.fails(Job::Register);
    for _ in 0..50 {
        bench.queue.ended(&ids(0), bench.now);
        bench.queue.opened(&ids(0), false, bench.now);
    }
    bench.queue.ended(&ids(0), bench.now);
    bench.does(Job::Unregister, Outcome::Done);
    assert!(bench.is_idle());
}

#[test]
fn newest_state_follows_the_call_under_way() {
    let mut bench = Bench::new();
    bench.queue.opened(&ids(0), false, bench.now);
    assert_eq!(bench.next(), Some(Job::Register));
    bench.queue.ended(&ids(0), bench.now);
    assert_eq!(bench.next(), None, "one call for a session at a time");
    bench.finish(Job::Register, Outcome::Done);
    assert_eq!(bench.next(), Some(Job::Unregister));
    bench.queue.opened(&ids(0), false, bench.now);
    bench.finish(Job::Unregister, Outcome::Done);
    bench.does(Job::Register, Outcome::Done);
    assert!(bench.is_idle());
}

#[test]
fn check_that_is_asked_for_meanwhile_is_made_afterwards() {
    let mut bench = Bench::new();
    bench.queue.opened(&ids(0), false, bench.now);
    assert_eq!(bench.next(), Some(Job::Register));
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.finish(Job::Register, Outcome::Done);
    bench.fails(Job::Refresh { check: true });
    bench.does(Job::Refresh { check: true }, Outcome::Done);
    assert!(bench.is_idle());
}

#[test]
fn vanished_registration_is_made_again() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Job::Refresh { check: true }, Outcome::Vanished);
    bench.does(Job::Register, Outcome::Done);
    assert!(bench.is_idle());
}

#[test]
fn refresh_that_waited_too_long_becomes_a_registration() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), false, bench.now);
    bench.fails(Job::Refresh { check: false });
    bench.now += REFRESH_AGE_MAX;
    bench.does(Job::Register, Outcome::Done);
}

#[test]
fn session_held_elsewhere_is_reported_once_and_not_taken_back() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Job::Refresh { check: true }, Outcome::Elsewhere);
    assert!(bench.is_idle());
    assert_eq!(bench.queue.take_replaced(), [ids(0)]);
    assert_eq!(bench.queue.take_replaced(), []);
}

#[test]
fn session_that_came_back_meanwhile_is_not_taken_for_the_replaced_one() {
    let mut bench = Bench::new();
    bench.queue.refresh(&ids(0), true, bench.now);
    assert_eq!(bench.next(), Some(Job::Refresh { check: true }));
    bench.queue.opened(&ids(0), true, bench.now);
    bench.finish(Job::Refresh { check: true }, Outcome::Elsewhere);
    assert_eq!(bench.queue.take_replaced(), []);
    bench.does(Job::Register, Outcome::Done);

    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Job::Refresh { check: true }, Outcome::Elsewhere);
    bench.queue.opened(&ids(0), false, bench.now);
    assert_eq!(bench.queue.take_replaced(), [], "found before it came back");
}

#[test]
fn presence_that_is_away_is_tried_one_call_at_a_time() {
    let mut queue = Queue::new(limits(1000));
    let mut now = Instant::now();
    for user in 0..500 {
        queue.opened(&ids(user), false, now);
    }
    let mut calls = 0;
    let end = now + Duration::from_secs(60);
    while now < end {
        match queue.next(now) {
            Next::Do(ids, job) => {
                queue.finish(ids, job, Outcome::Failed, 0.0, now);
                calls += 1;
            }
            Next::At(at) => now = at,
            Next::Nothing => unreachable!("there is always something to try"),
        }
    }
    assert!((20..40).contains(&calls), "{calls} calls in a minute");
    // And at once at full pace when it is back.
    let Next::Do(ids, job) = queue.next(now) else { panic!("a call is due") };
    queue.finish(ids, job, Outcome::Done, 0.0, now);
    let Next::Do(..) = queue.next(now) else { panic!("slow") };
    let Next::Do(..) = queue.next(now) else { panic!("one at a time") };
}

#[test]
fn room_is_bounded_and_refreshes_leave_half_of_it() {
    let mut queue = Queue::new(Limits { sessions_max: 10, ends_max: 20 });
    let now = Instant::now();
    assert_eq!((0..10).filter(|user| queue.refresh(&ids(*user), false, now)).count(), 5);
    assert_eq!((10..20).filter(|user| queue.opened(&ids(*user), false, now)).count(), 5);
    assert_eq!((30..60).filter(|user| queue.ended(&ids(*user), now)).count(), 20);
    assert!(queue.ended(&ids(0), now), "coalesced: no room needed");
    assert!(!queue.ended(&ids(60), now));
    assert!(!queue.opened(&ids(60), false, now), "the whole is bounded too");
    assert_eq!(queue.len(), 30);
}

#[test]
fn crowd_that_leaves_takes_no_room_from_the_one_that_comes() {
    let mut queue = Queue::new(Limits { sessions_max: 10, ends_max: 1_000 });
    let now = Instant::now();
    assert!((0..1_000).all(|user| queue.ended(&ids(user), now)));
    assert!((1_000..1_010).all(|user| queue.opened(&ids(user), false, now)));
    assert!(!queue.opened(&ids(1_010), false, now));
    // Who is back is registered, and is no end any more.
    assert!((0..5).all(|user| queue.opened(&ids(user), false, now)));
    assert!((2_000..2_010).filter(|user| queue.ended(&ids(*user), now)).count() == 0);
    for _ in 0..1_010 {
        let Next::Do(ids, job) = queue.next(now) else { panic!("there is something to do") };
        queue.finish(ids, job, Outcome::Done, 0.5, now);
    }
    assert_eq!((queue.len(), queue.ends), (0, 0));
}

#[test]
fn closing_tells_ends_only() {
    let mut bench = Bench::new();
    bench.queue.ended(&ids(0), bench.now);
    bench.does(Job::Unregister, Outcome::Failed);
    bench.queue.opened(&ids(1), false, bench.now);
    bench.queue.close();
    assert!(!bench.queue.opened(&ids(2), false, bench.now));
    assert_eq!(bench.queue.ends_untold(), 1);
    bench.does(Job::Unregister, Outcome::Done);
    assert_eq!(bench.queue.ends_untold(), 0);
    assert!(bench.is_idle());
}

#[test]
fn who_waits_for_a_registration_hears_of_his_own_only() {
    let mut bench = Bench::new();
    let first = bench.admits(0, false);
    assert_eq!(bench.next(), Some(Job::Register));
    // The device connects again while its first registration is under way.
    let second = bench.admits(0, true);
    assert_eq!(first.standing(bench.now), Standing::Unreached, "it is over with that one");
    bench.finish(Job::Register, Outcome::Done);
    assert_eq!(second.standing(bench.now), Standing::Open(bench.now + REACH.registration_wait));
    bench.does(Job::Register, Outcome::Failed);
    bench.now += RETRY_MIN;
    bench.does(Job::Register, Outcome::Done);
    assert_eq!(second.standing(bench.now), Standing::Open(bench.now + REACH.lookup_lifetime));
    assert!(bench.is_idle());
}

#[test]
fn nobody_waits_for_a_registration_that_will_take_long_or_never_come() {
    let mut bench = Bench::new();
    let refused = bench.admits(0, false);
    bench.does(Job::Register, Outcome::Rejected);
    assert_eq!(refused.standing(bench.now), Standing::Unreached);

    bench.queue.opened(&ids(0), false, bench.now);
    (0..FAILURES_IN_ROW_MAX).for_each(|_| bench.fails(Job::Register));
    let late = bench.admits(0, false);
    assert_eq!(late.standing(bench.now), Standing::Unreached, "presence is known to be away");
    bench.now += PROBE_MAX;
    bench.does(Job::Register, Outcome::Done);
    let reached = bench.now + REACH.lookup_lifetime;
    assert_eq!(late.standing(reached), Standing::Reached, "it counts when it comes");

    let mut full = Bench { queue: Queue::new(limits(0)), now: bench.now };
    assert_eq!(full.admits(0, false).standing(full.now), Standing::Unreached);
}

#[derive(Clone, Debug)]
enum Step {
    Opened(usize),
    Ended(usize),
    Refresh(usize),
    Begin,
    /// A call under way is carried out or not, and answered or not.
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

/// Carries a call out the way the presence service does.
fn carry_out(registered: &mut HashSet<SessionIds>, ids: &SessionIds, job: Job) {
    match job {
        Job::Register => drop(registered.insert(ids.clone())),
        Job::Unregister => drop(registered.remove(ids)),
        Job::Refresh { .. } => {}
    }
}

proptest! {
    #[test]
    fn presence_ends_up_with_what_is_connected(steps in steps()) {
        let mut queue = Queue::new(limits(100));
        let mut now = Instant::now();
        let mut connected = HashSet::new();
        let mut registered = HashSet::new();
        let mut under_way = Vec::new();
        for step in steps {
            match step {
                Step::Opened(user) => {
                    let replaced = !connected.insert(ids(user));
                    prop_assert!(queue.opened(&ids(user), replaced, now));
                }
                Step::Ended(user) => {
                    if connected.remove(&ids(user)) {
                        prop_assert!(queue.ended(&ids(user), now));
                    }
                }
                Step::Refresh(user) => {
                    if connected.contains(&ids(user)) {
                        prop_assert!(queue.refresh(&ids(user), false, now));
                    }
                }
                Step::Begin => {
                    if let Next::Do(ids, job) = queue.next(now) {
                        prop_assert!(under_way.iter().all(|(other, _)| *other != ids));
                        under_way.push((ids, job));
                    }
                }
                Step::End { which, carried_out, answered } => {
                    if which < under_way.len() {
                        let (ids, job) = under_way.remove(which);
                        if carried_out || answered {
                            carry_out(&mut registered, &ids, job);
                        }
                        let outcome = if answered { Outcome::Done } else { Outcome::Failed };
                        queue.finish(ids, job, outcome, 0.5, now);
                    }
                }
                Step::Pass(ms) => now += Duration::from_millis(ms),
            }
            let placed = queue.waiting.len() + queue.delayed.len() + under_way.len();
            prop_assert_eq!(queue.entries.len(), placed);
            let ends = queue.entries.values().filter(|entry| entry.want == Want::Offline).count();
            prop_assert_eq!(queue.ends, ends);
        }
        for (ids, job) in under_way {
            queue.finish(ids, job, Outcome::Failed, 0.5, now);
        }
        loop {
            match queue.next(now) {
                Next::Do(ids, job) => {
                    carry_out(&mut registered, &ids, job);
                    queue.finish(ids, job, Outcome::Done, 0.5, now);
                }
                Next::At(at) => now = at,
                Next::Nothing => break,
            }
        }
        prop_assert_eq!(queue.len(), 0);
        prop_assert_eq!(registered, connected);
    }
}
