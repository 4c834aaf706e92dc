//! The oracle is the conversation service: it keeps the true list after each change, answers with a list
//! from between the request and the answer, and appends each change to the log with its own clock.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const SKEW_MS: u64 = 50;
const RULES: ReconcileRules = ReconcileRules { clock_skew_ms: SKEW_MS, has_source: true };
const USERS: [&str; 4] = ["a", "b", "c", "d"];

fn members<'a>(ids: impl IntoIterator<Item = &'a str>) -> Members {
    ids.into_iter().collect()
}

#[derive(Clone, Debug)]
enum HistoryStep {
    /// Time passes.
    Wait(u64),
    /// The service stores a change and appends it; its clock is off by `clock_ms`.
    Change {
        user: usize,
        added: bool,
        clock_ms: i64,
    },
    /// The follower or a router reads one record. Each reads the log from its start.
    Read {
        router: bool,
    },
    /// Another node hands off a change that it has read.
    HandOver(prop::sample::Index),
    /// A record needs the members.
    LookUp,
    /// The service answers with a true list since the request.
    Answer(prop::sample::Index),
    Fail,
    /// The list is evicted.
    Evict,
    /// The lifetime of the list ends, and it is fetched again.
    Expire,
}

fn steps() -> impl Strategy<Value = Vec<HistoryStep>> {
    let step = prop_oneof![
        2 => (1u64..200).prop_map(HistoryStep::Wait),
        4 => (0..USERS.len(), any::<bool>(), -(SKEW_MS as i64)..=SKEW_MS as i64)
            .prop_map(|(user, added, clock_ms)| HistoryStep::Change { user, added, clock_ms }),
        6 => any::<bool>().prop_map(|router| HistoryStep::Read { router }),
        1 => any::<prop::sample::Index>().prop_map(HistoryStep::HandOver),
        6 => Just(HistoryStep::LookUp),
        6 => any::<prop::sample::Index>().prop_map(HistoryStep::Answer),
        1 => Just(HistoryStep::Fail),
        1 => Just(HistoryStep::Evict),
        1 => Just(HistoryStep::Expire),
    ];
    prop::collection::vec(step, 0..120)
}

struct History {
    now_ms: u64,
    state: ListState,
    /// `truth[n]`: the members after the first `n` changes.
    truth: Vec<BTreeSet<&'static str>>,
    log: Vec<MemberChange>,
    watermarks: Watermarks,
    /// Records read by the follower and by the router.
    read: [usize; 2],
    /// The request in flight: its id, and the number of changes made before it.
    request: Option<(u64, usize)>,
    requests: u64,
}

impl History {
    fn new() -> Self {
        Self {
            now_ms: 1_000_000,
            state: ListState::Unknown,
            truth: vec![BTreeSet::from(["a", "b"])],
            log: Vec::new(),
            watermarks: Watermarks::default(),
            read: [0, 0],
            request: None,
            requests: 0,
        }
    }

    fn ask(&mut self) {
        self.requests += 1;
        self.request = Some((self.requests, self.log.len()));
        self.state.start_fetch(self.requests, self.now_ms);
    }

    fn step(&mut self, step: HistoryStep) {
        match step {
            HistoryStep::Wait(ms) => self.now_ms += ms,
            HistoryStep::Change { user, added, clock_ms } => {
                let user = USERS[user];
                let mut truth = self.truth.last().unwrap().clone();
                let _ = if added { truth.insert(user) } else { truth.remove(user) };
                self.truth.push(truth);
                self.log.push(MemberChange {
                    user: user.into(),
                    added,
                    position: Some(position(self.log.len())),
                    appended_at_ms: self.now_ms.checked_add_signed(clock_ms).unwrap(),
                });
            }
            HistoryStep::Read { router } => {
                let read = &mut self.read[usize::from(router)];
                if let Some(change) = self.log.get(*read) {
                    *read += 1;
                    if self.watermarks.advance(change.position.unwrap()) {
                        self.state.change(change.clone(), RULES);
                    }
                }
            }
            HistoryStep::HandOver(which) => {
                // The other node may be ahead or behind.
                if !self.log.is_empty() {
                    let change = self.log[which.index(self.log.len())].clone();
                    self.state.change(MemberChange { position: None, ..change }, RULES);
                }
            }
            HistoryStep::LookUp => {
                if matches!(self.state, ListState::Unknown | ListState::Failing { .. }) {
                    self.ask();
                }
            }
            HistoryStep::Expire => {
                if matches!(self.state, ListState::Known(_)) {
                    self.ask();
                }
            }
            HistoryStep::Answer(which) => {
                let Some((id, asked_at)) = self.request.take() else { return };
                let version = asked_at + which.index(self.log.len() + 1 - asked_at);
                let answer = members(self.truth[version].iter().copied());
                match self.state.answered(id, answer, self.now_ms, RULES) {
                    AnswerOutcome::Repeat => self.request = Some((id, self.log.len())),
                    AnswerOutcome::Finished | AnswerOutcome::Stale => {}
                }
            }
            HistoryStep::Fail => {
                let Some((id, _)) = self.request.take() else { return };
                self.state.failed(id, self.now_ms, |_| 0);
            }
            HistoryStep::Evict => {
                if !matches!(self.state, ListState::Fetching(_)) {
                    self.state = ListState::Unknown;
                }
            }
        }
    }

    /// For each user, a list must be true at the position up to which the log was read, or at a later
    /// one. The same holds for a record and the log before it, as the router has read it.
    fn check(&self) -> Result<(), TestCaseError> {
        let [follower, router] = self.read;
        let next = position(router);
        let between = LogPosition { offset: next.offset - 1, ..next };
        for (at, read) in [(None, follower.max(router)), (Some(between), router)] {
            let Some(list) = self.state.members(at) else { continue };
            for user in USERS {
                let listed = list.contains(user);
                let possible =
                    self.truth[read..].iter().any(|truth| truth.contains(user) == listed);
                prop_assert!(possible, "{user} listed: {listed}, read {read} at {at:?}");
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn list_is_never_behind_the_log_that_was_read(steps in steps()) {
        let mut history = History::new();
        for step in steps {
            history.step(step);
            history.check()?;
        }
    }
}

fn position(index: usize) -> LogPosition {
    LogPosition { topic: 0, partition: 3, offset: 2 * i64::try_from(index).unwrap() }
}

fn change(user: &str, added: bool, appended_at_ms: u64) -> MemberChange {
    MemberChange { user: user.into(), added, position: Some(position(0)), appended_at_ms }
}

fn answered_at(ms: u64, ids: &[&str]) -> ListState {
    let mut state = ListState::Unknown;
    state.start_fetch(1, ms);
    let answer = members(ids.iter().copied());
    assert_eq!(state.answered(1, answer, ms, RULES), AnswerOutcome::Finished);
    state
}

#[test]
fn change_is_applied_when_it_is_first_read() {
    let at = |partition, offset| LogPosition { topic: 0, partition, offset };
    let mut watermarks = Watermarks::default();
    assert!(watermarks.advance(at(0, 5)));
    assert!(!watermarks.advance(at(0, 5)));
    assert!(!watermarks.advance(at(0, 4)));
    assert!(watermarks.advance(at(1, 4)));
    assert!(watermarks.advance(at(0, 6)));
}

#[test]
fn change_long_after_the_answer_is_applied() {
    let mut state = answered_at(1000, &["a"]);
    assert!(!state.change(change("b", true, 2000), RULES));
    assert!(!state.change(change("a", false, 2001), RULES));
    assert_eq!(state.members(None), Some(members(["b"])));
}

#[test]
fn change_long_before_the_request_is_in_the_answer() {
    let mut state = answered_at(1000, &["a"]);
    assert!(!state.change(change("a", false, 900), RULES));
    assert_eq!(state.members(None), Some(members(["a"])));
}

#[test]
fn change_near_the_answer_drops_the_list() {
    let mut state = answered_at(1000, &["a"]);
    assert!(state.change(change("b", true, 1010), RULES));
    assert_eq!(state.members(None), None);
}

#[test]
fn conversation_that_changes_during_every_request_is_known_after_some_rounds() {
    let mut state = ListState::Unknown;
    state.start_fetch(1, 1000);
    for _ in 1..FETCH_ROUNDS_MAX {
        state.change(change("x", true, 1000), RULES);
        assert_eq!(state.answered(1, members(["a"]), 1000, RULES), AnswerOutcome::Repeat);
    }
    state.change(change("b", true, 1000), RULES);
    state.change(change("a", false, 1000), RULES);
    assert_eq!(state.answered(1, members(["a"]), 1000, RULES), AnswerOutcome::Finished);
    assert_eq!(state.members(None), Some(members(["b"])));
}

#[test]
fn expired_list_is_used_until_the_answer_and_longer_if_the_request_fails() {
    let mut state = answered_at(1000, &["a"]);
    state.start_fetch(2, 5000);
    assert_eq!(state.members(None), Some(members(["a"])));
    state.change(change("b", true, 4000), RULES);
    assert_eq!(state.members(None), Some(members(["a", "b"])));
    state.failed(2, 5001, |_| unreachable!("there is a list"));
    assert_eq!(state.members(None), Some(members(["a", "b"])));
}

#[test]
fn old_creation_event_is_ignored_with_a_conversation_service() {
    let mut state = ListState::Unknown;
    state.created(members(["a"]), 1000, 1000 + SKEW_MS + 1, RULES);
    assert_eq!(state.members(None), None);
    let no_source = ReconcileRules { has_source: false, ..RULES };
    state.created(members(["a"]), 1000, 1000 + SKEW_MS + 1, no_source);
    assert_eq!(state.members(None), Some(members(["a"])));
    // A change that another node hands off is in the log too, the only source here.
    let handed = MemberChange { position: None, ..change("a", false, 1000) };
    assert!(!state.change(handed, no_source));
    assert!(!state.change(change("b", true, 1000), no_source));
    assert_eq!(state.members(None), Some(members(["a", "b"])));
}

#[test]
fn absent_conversation_that_changes_is_fetched_again() {
    let mut state = ListState::Unknown;
    state.start_fetch(1, 1000);
    state.absent(1, 3000);
    assert!(matches!(state, ListState::Absent { until_ms: 3000 }));
    state.change(change("a", true, 1000), RULES);
    assert!(matches!(state, ListState::Unknown));
    state.start_fetch(2, 1000);
    state.change(change("a", true, 1000), RULES);
    state.absent(2, 3000);
    assert!(matches!(state, ListState::Unknown));
}

/// The follower has read changes; a router is still at records before them.
#[test]
fn record_before_a_change_goes_to_the_members_at_that_position() {
    let mut state = answered_at(1000, &["a", "b"]);
    let at_ms = 1000 + 10 * SKEW_MS;
    let left = MemberChange { position: Some(position(5)), ..change("b", false, at_ms) };
    let came = MemberChange { position: Some(position(6)), ..change("c", true, at_ms) };
    let again = MemberChange { position: Some(position(7)), ..change("c", true, at_ms) };
    for change in [left, came, again] {
        state.change(change, RULES);
    }
    assert_eq!(state.members(Some(position(4))), Some(members(["a", "b"])));
    assert_eq!(state.members(Some(position(5))), Some(members(["a"])));
    assert_eq!(state.members(Some(position(6))), Some(members(["a", "c"])));
    assert_eq!(state.members(None), Some(members(["a", "c"])));
    // Partitions have no common order.
    let other_partition = LogPosition { partition: 9, ..position(0) };
    assert_eq!(state.members(Some(other_partition)), Some(members(["a", "c"])));
}
