//! What presence has yet to be told, newest state only.
//!
//! An entry exists only while something is to be done for its session:
//!
//! ```text
//!   opened, ended, refresh
//!            │
//!            ▼        next            finish: done, and nothing newer is wanted
//!         waiting ─────────► under way ─────────────────────────────────────────► gone
//!            ▲                  │
//!            │ due              │ finish: failed, or something newer is wanted
//!            └──── delayed ◄────┘
//! ```
//!
//! Time and chance are arguments.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::reach::Pledge;
use crate::service::directory::SessionIds;

/// First wait before a failed call is tried again; doubles each time.
const RETRY_MIN: Duration = Duration::from_millis(500);
/// Longest such wait.
const RETRY_MAX: Duration = Duration::from_secs(15);
/// Failures in a row after which the whole queue slows down to one call at a time.
const FAILURES_IN_ROW_MAX: u32 = 8;
/// First wait between such single calls; doubles each time.
const PROBE_MIN: Duration = Duration::from_millis(200);
/// Longest such wait.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// A refresh that waited this long is too late to count on: the registration (60 s, contract §4)
/// may be gone by the time it is carried out, so the session is registered again instead.
const REFRESH_AGE_MAX: Duration = Duration::from_secs(35);

/// What is to be done for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Register,
    /// With `check`: see whether it is still ours.
    Refresh {
        check: bool,
    },
    Unregister,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// The registration is another instance's: the session was replaced on another node.
    Elsewhere,
    /// There is no registration.
    Vanished,
    /// To be tried again.
    Failed,
    /// Trying again will not help.
    Rejected,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Do(SessionIds, Job),
    /// Nothing before then.
    At(Instant),
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Online,
    Offline,
}

/// What presence holds for the session, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Certainly nothing of ours.
    Absent,
    /// A call failed that may have been carried out.
    Unknown,
    Present,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting,
    Delayed,
    UnderWay,
}

#[derive(Debug)]
struct Entry {
    want: Want,
    held: Held,
    place: Place,
    check: bool,
    /// A session was admitted while a call for its predecessor was under way: whatever that found
    /// is no longer what is.
    anew: bool,
    attempts: u8,
    since: Instant,
    /// Who waits for the registration.
    pledge: Option<Pledge>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    entries: HashMap<SessionIds, Entry>,
    waiting: VecDeque<SessionIds>,
    delayed: BinaryHeap<Reverse<Due>>,
    under_way: usize,
    entries_max: usize,
    failures_in_row: u32,
    probe_at: Option<Instant>,
    /// Sessions found to be held by another node, until somebody asks.
    replaced: HashSet<SessionIds>,
    closing: bool,
}

#[derive(Debug)]
struct Due {
    at: Instant,
    ids: SessionIds,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// Doubling from `min` to `max`, at `chance` (0 to 1) between half and the whole of it.
fn backoff(min: Duration, max: Duration, attempt: u32, chance: f64) -> Duration {
    let whole = min.saturating_mul(1 << attempt.min(16)).min(max);
    whole.mul_f64(0.5 + chance / 2.0)
}

impl Queue {
    pub(super) fn new(entries_max: usize) -> Self {
        Self {
            entries: HashMap::new(),
            waiting: VecDeque::new(),
            delayed: BinaryHeap::new(),
            under_way: 0,
            entries_max,
            failures_in_row: 0,
            probe_at: None,
            replaced: HashSet::new(),
            closing: false,
        }
    }

    /// Sessions for which something is to be done.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// A session has been admitted. `registered`: presence holds it already, from a predecessor on
    /// this node. Returns false if there is no room.
    pub(super) fn opened(&mut self, ids: &SessionIds, registered: bool, now: Instant) -> bool {
        self.replaced.remove(ids);
        let room = self.entries.len() < self.entries_max && !self.closing;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                entry.want = Want::Online;
                if entry.place == Place::UnderWay {
                    entry.anew = true;
                } else if entry.held == Held::Present {
                    // Not a refresh of the predecessor: this one is to be registered.
                    entry.held = Held::Unknown;
                }
                true
            }
            None if !room => false,
            None => {
                let held = if registered { Held::Unknown } else { Held::Absent };
                self.insert(ids, Want::Online, held, false, now);
                true
            }
        }
    }

    /// To be kept when the session that was just [opened](Queue::opened) is registered.
    pub(super) fn pledge(&mut self, ids: &SessionIds, pledge: Pledge) {
        if let Some(entry) = self.entries.get_mut(ids) {
            if self.failures_in_row >= FAILURES_IN_ROW_MAX {
                pledge.put_off();
            }
            entry.pledge = Some(pledge);
        }
    }

    /// A session has ended and nobody took its place here. Returns false if there is no room: the
    /// registration will end by itself.
    pub(super) fn ended(&mut self, ids: &SessionIds, now: Instant) -> bool {
        let room = self.entries.len() < self.entries_max;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                entry.want = Want::Offline;
                true
            }
            None if !room => false,
            None => {
                self.insert(ids, Want::Offline, Held::Present, false, now);
                true
            }
        }
    }

    /// A session is to be refreshed. Refreshes take no more than half of the room. Returns false
    /// if there is none.
    pub(super) fn refresh(&mut self, ids: &SessionIds, check: bool, now: Instant) -> bool {
        let room = self.entries.len() < self.entries_max / 2 && !self.closing;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                entry.check |= check;
                true
            }
            None if !room => false,
            None => {
                self.insert(ids, Want::Online, Held::Present, check, now);
                true
            }
        }
    }

    fn insert(&mut self, ids: &SessionIds, want: Want, held: Held, check: bool, now: Instant) {
        let place = Place::Waiting;
        let entry =
            Entry { want, held, place, check, anew: false, attempts: 0, since: now, pledge: None };
        self.entries.insert(ids.clone(), entry);
        self.waiting.push_back(ids.clone());
    }

    /// The next thing to do, if one may be done now. Must be answered with [`Queue::finish`].
    pub(super) fn next(&mut self, now: Instant) -> Next {
        while let Some(Reverse(due)) = self.delayed.peek() {
            if due.at > now {
                break;
            }
            let Some(Reverse(Due { ids, .. })) = self.delayed.pop() else { break };
            if let Some(entry) = self.entries.get_mut(&ids) {
                entry.place = Place::Waiting;
            }
            self.waiting.push_back(ids);
        }
        while let Some(ids) = self.waiting.front() {
            let Some(entry) = self.entries.get_mut(ids) else {
                self.waiting.pop_front();
                continue;
            };
            let Some(job) = job(entry, self.closing, now) else {
                self.entries.remove(ids);
                self.waiting.pop_front();
                continue;
            };
            if self.failures_in_row >= FAILURES_IN_ROW_MAX {
                if self.under_way > 0 {
                    return Next::Nothing; // Its outcome decides.
                }
                if let Some(at) = self.probe_at.filter(|at| *at > now) {
                    return Next::At(at);
                }
            }
            entry.place = Place::UnderWay;
            entry.check = false;
            self.under_way += 1;
            let Some(ids) = self.waiting.pop_front() else { return Next::Nothing };
            return Next::Do(ids, job);
        }
        self.delayed.peek().map_or(Next::Nothing, |Reverse(due)| Next::At(due.at))
    }

    /// Takes the outcome of what [`Queue::next`] gave out. `chance`: 0 to 1.
    pub(super) fn finish(
        &mut self,
        ids: SessionIds,
        job: Job,
        outcome: Outcome,
        chance: f64,
        now: Instant,
    ) {
        self.under_way -= 1;
        self.pace(outcome, chance, now);
        let Some(entry) = self.entries.get_mut(&ids) else {
            debug_assert!(false, "an entry stays while it is under way");
            return;
        };
        let anew = std::mem::take(&mut entry.anew);
        if (outcome, job, anew) == (Outcome::Done, Job::Register, false)
            && let Some(pledge) = entry.pledge.take()
        {
            pledge.keep(now);
        }
        let settled = match (outcome, job) {
            (Outcome::Done, Job::Register | Job::Refresh { .. }) => {
                entry.held = if anew { Held::Unknown } else { Held::Present };
                // A check that was asked for meanwhile is still to be made.
                entry.want == Want::Online && !anew && !entry.check
            }
            (Outcome::Done | Outcome::Elsewhere | Outcome::Vanished, Job::Unregister)
            | (Outcome::Vanished, Job::Register | Job::Refresh { .. }) => {
                entry.held = Held::Absent;
                entry.want == Want::Offline
            }
            (Outcome::Elsewhere, Job::Register | Job::Refresh { .. }) => {
                entry.held = Held::Absent;
                if entry.want == Want::Online && !anew {
                    self.replaced.insert(ids.clone());
                }
                !anew || entry.want == Want::Offline
            }
            (Outcome::Rejected, _) => true,
            (Outcome::Failed, _) => {
                if anew || matches!(job, Job::Register | Job::Unregister) {
                    entry.held = Held::Unknown;
                }
                entry.check |= job == Job::Refresh { check: true };
                let wait = backoff(RETRY_MIN, RETRY_MAX, u32::from(entry.attempts), chance);
                entry.attempts = entry.attempts.saturating_add(1);
                entry.place = Place::Delayed;
                self.delayed.push(Reverse(Due { at: now + wait, ids }));
                return;
            }
        };
        if settled {
            self.entries.remove(&ids);
            self.shrink();
        } else {
            entry.place = Place::Waiting;
            entry.attempts = 0;
            entry.since = now;
            self.waiting.push_back(ids);
        }
    }

    /// The sessions found to be held by another node since the last time.
    pub(super) fn take_replaced(&mut self) -> Vec<SessionIds> {
        self.replaced.drain().collect()
    }

    /// Whether the other side is there at all, from how the last calls went.
    fn pace(&mut self, outcome: Outcome, chance: f64, now: Instant) {
        if outcome == Outcome::Failed {
            self.failures_in_row = self.failures_in_row.saturating_add(1);
            if let Some(over) = self.failures_in_row.checked_sub(FAILURES_IN_ROW_MAX) {
                self.probe_at = Some(now + backoff(PROBE_MIN, PROBE_MAX, over, chance));
            }
        } else {
            self.failures_in_row = 0;
            self.probe_at = None;
        }
    }

    /// From here on only ends are told, and what failed before is tried once more at once.
    pub(super) fn close(&mut self) {
        self.closing = true;
        for Reverse(Due { ids, .. }) in std::mem::take(&mut self.delayed) {
            if let Some(entry) = self.entries.get_mut(&ids) {
                entry.place = Place::Waiting;
            }
            self.waiting.push_back(ids);
        }
    }

    /// Ends that presence has not been told of.
    pub(super) fn ends_untold(&self) -> usize {
        let untold = |entry: &&Entry| {
            entry.place == Place::UnderWay
                || (entry.want == Want::Offline && entry.held != Held::Absent)
        };
        self.entries.values().filter(untold).count()
    }

    /// Gives back what a storm took.
    fn shrink(&mut self) {
        if self.entries.capacity() > 1024 && self.entries.len() < self.entries.capacity() / 8 {
            self.entries.shrink_to(self.entries.len() * 2);
            self.waiting.shrink_to(self.waiting.len() * 2);
            self.delayed.shrink_to(self.delayed.len() * 2);
        }
    }
}

/// What an entry asks for; `None`: nothing any more.
fn job(entry: &Entry, closing: bool, now: Instant) -> Option<Job> {
    match (entry.want, entry.held) {
        (Want::Offline, Held::Absent) => None,
        (Want::Offline, Held::Unknown | Held::Present) => Some(Job::Unregister),
        (Want::Online, _) if closing => None,
        (Want::Online, Held::Present) if now - entry.since < REFRESH_AGE_MAX => {
            Some(Job::Refresh { check: entry.check })
        }
        (Want::Online, Held::Absent | Held::Unknown | Held::Present) => Some(Job::Register),
    }
}

#[cfg(test)]
mod tests {
    use super::super::reach::{Reach, ReachConfig, Standing};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn ids(user: usize) -> SessionIds {
        SessionIds::new(&format!("user-{user}"), "phone")
    }

    const REACH: ReachConfig = ReachConfig {
        lookup_lifetime: Duration::from_secs(1),
        registration_wait: Duration::from_secs(2),
    };

    /// A queue, and its time, which passes only when told to.
    struct Bench {
        queue: Queue,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { queue: Queue::new(100), now: Instant::now() }
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
        let mut queue = Queue::new(1000);
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
        let mut queue = Queue::new(10);
        let now = Instant::now();
        assert_eq!((0..10).filter(|user| queue.refresh(&ids(*user), false, now)).count(), 5);
        assert_eq!((10..20).filter(|user| queue.opened(&ids(*user), false, now)).count(), 5);
        assert!(!queue.ended(&ids(30), now));
        assert!(queue.ended(&ids(0), now), "coalesced: no room needed");
        assert_eq!(queue.len(), 10);
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

        let mut full = Bench { queue: Queue::new(0), now: bench.now };
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
            (0..4_usize, any::<bool>(), any::<bool>()).prop_map(
                |(which, carried_out, answered)| Step::End { which, carried_out, answered }
            ),
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
            let mut queue = Queue::new(100);
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
}
