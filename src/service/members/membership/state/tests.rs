//! The oracle is the conversation service itself: it keeps the truth after each change, answers
//! with a truth from between the question and the answer, and appends each change to the log with a
//! clock of its own.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const SKEW_MS: u64 = 50;
const RULES: Rules = Rules { clock_skew_ms: SKEW_MS, can_ask: true };
const USERS: [&str; 4] = ["a", "b", "c", "d"];

fn members<'a>(ids: impl IntoIterator<Item = &'a str>) -> Members {
    ids.into_iter().map(Arc::from).collect()
}

#[derive(Clone, Debug)]
enum Step {
    /// Time passes.
    Wait(u64),
    /// The service stores a change and appends it; its clock is off by so much.
    Change {
        user: usize,
        added: bool,
        clock_ms: i64,
    },
    /// The follower reads one record, or a router does, which reads the log again from its start.
    Read {
        router: bool,
    },
    /// Another node hands over a change that it has read.
    HandOver(prop::sample::Index),
    /// A record needs the members.
    LookUp,
    /// The service answers with a truth from since the question.
    Answer(prop::sample::Index),
    Fail,
    /// The list is dropped (bounds).
    Evict,
    /// The list comes to the end of its lifetime and is asked for again.
    Outlive,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (1u64..200).prop_map(Step::Wait),
        4 => (0..USERS.len(), any::<bool>(), -(SKEW_MS as i64)..=SKEW_MS as i64)
            .prop_map(|(user, added, clock_ms)| Step::Change { user, added, clock_ms }),
        6 => any::<bool>().prop_map(|router| Step::Read { router }),
        1 => any::<prop::sample::Index>().prop_map(Step::HandOver),
        6 => Just(Step::LookUp),
        6 => any::<prop::sample::Index>().prop_map(Step::Answer),
        1 => Just(Step::Fail),
        1 => Just(Step::Evict),
        1 => Just(Step::Outlive),
    ];
    prop::collection::vec(step, 0..120)
}

struct World {
    now_ms: u64,
    state: State,
    /// `truth[n]`: the members after the first `n` changes.
    truth: Vec<BTreeSet<&'static str>>,
    log: Vec<Change>,
    marks: Marks,
    /// Records read by the follower and by the router.
    read: [usize; 2],
    /// The question under way: its id, and how many changes had been made when it was asked.
    question: Option<(u64, usize)>,
    questions: u64,
}

impl World {
    fn new() -> Self {
        Self {
            now_ms: 1_000_000,
            state: State::Unknown,
            truth: vec![BTreeSet::from(["a", "b"])],
            log: Vec::new(),
            marks: Marks::default(),
            read: [0, 0],
            question: None,
            questions: 0,
        }
    }

    fn ask(&mut self) {
        self.questions += 1;
        self.question = Some((self.questions, self.log.len()));
        self.state.ask(self.questions, self.now_ms);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Wait(ms) => self.now_ms += ms,
            Step::Change { user, added, clock_ms } => {
                let user = USERS[user];
                let mut truth = self.truth.last().unwrap().clone();
                let _ = if added { truth.insert(user) } else { truth.remove(user) };
                self.truth.push(truth);
                self.log.push(Change {
                    user: user.into(),
                    added,
                    place: Some(place(self.log.len())),
                    appended_at_ms: self.now_ms.checked_add_signed(clock_ms).unwrap(),
                });
            }
            Step::Read { router } => {
                let read = &mut self.read[usize::from(router)];
                if let Some(change) = self.log.get(*read) {
                    *read += 1;
                    if self.marks.advance(change.place.unwrap()) {
                        self.state.change(change.clone(), RULES);
                    }
                }
            }
            Step::HandOver(which) => {
                // Another node reads the log too, ahead or behind.
                if !self.log.is_empty() {
                    let change = self.log[which.index(self.log.len())].clone();
                    self.state.change(Change { place: None, ..change }, RULES);
                }
            }
            Step::LookUp => {
                if matches!(self.state, State::Unknown | State::Failing { .. }) {
                    self.ask();
                }
            }
            Step::Outlive => {
                if matches!(self.state, State::Known(_)) {
                    self.ask();
                }
            }
            Step::Answer(which) => {
                let Some((id, asked_at)) = self.question.take() else { return };
                let version = asked_at + which.index(self.log.len() + 1 - asked_at);
                let answer = members(self.truth[version].iter().copied());
                match self.state.answered(id, answer, self.now_ms, RULES) {
                    Answered::AskAgain => self.question = Some((id, self.log.len())),
                    Answered::Settled | Answered::Stale => {}
                }
            }
            Step::Fail => {
                let Some((id, _)) = self.question.take() else { return };
                self.state.failed(id, self.now_ms, |_| 0);
            }
            Step::Evict => {
                if !matches!(self.state, State::Fetching(_)) {
                    self.state = State::Unknown;
                }
            }
        }
    }

    /// A list that is used says of each user what the truth was at the place up to which the log has
    /// been read, or at a later one: nothing that was read is ever missing from it. The same holds
    /// for a record of the log and what the router has read before it.
    fn check(&self) -> Result<(), TestCaseError> {
        let [follower, router] = self.read;
        let next = place(router);
        let between = LogPosition { offset: next.offset - 1, ..next };
        for (at, read) in [(None, follower.max(router)), (Some(between), router)] {
            let Some(list) = self.state.members(at) else { continue };
            for user in USERS {
                let listed = list.iter().any(|member| &**member == user);
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
        let mut world = World::new();
        for step in steps {
            world.step(step);
            world.check()?;
        }
    }
}

fn place(index: usize) -> LogPosition {
    LogPosition { topic: 0, partition: 3, offset: 2 * i64::try_from(index).unwrap() }
}

fn change(user: &str, added: bool, appended_at_ms: u64) -> Change {
    Change { user: user.into(), added, place: Some(place(0)), appended_at_ms }
}

fn answered_at(ms: u64, ids: &[&str]) -> State {
    let mut state = State::Unknown;
    state.ask(1, ms);
    let answer = members(ids.iter().copied());
    assert_eq!(state.answered(1, answer, ms, RULES), Answered::Settled);
    state
}

#[test]
fn change_counts_when_it_is_read_first() {
    let at = |partition, offset| LogPosition { topic: 0, partition, offset };
    let mut marks = Marks::default();
    assert!(marks.advance(at(0, 5)));
    assert!(!marks.advance(at(0, 5)));
    assert!(!marks.advance(at(0, 4)));
    assert!(marks.advance(at(1, 4)));
    assert!(marks.advance(at(0, 6)));
}

#[test]
fn change_long_after_the_answer_is_applied() {
    let mut state = answered_at(1000, &["a"]);
    assert!(!state.change(change("b", true, 2000), RULES));
    assert!(!state.change(change("a", false, 2001), RULES));
    assert_eq!(state.members(None), Some(members(["b"])));
}

#[test]
fn change_long_before_the_question_is_in_the_answer() {
    let mut state = answered_at(1000, &["a"]);
    assert!(!state.change(change("a", false, 900), RULES));
    assert_eq!(state.members(None), Some(members(["a"])));
}

#[test]
fn change_near_the_answer_makes_it_doubtful() {
    let mut state = answered_at(1000, &["a"]);
    assert!(state.change(change("b", true, 1010), RULES));
    assert_eq!(state.members(None), None);
}

#[test]
fn conversation_that_changes_faster_than_it_is_asked_for_is_settled_after_some_rounds() {
    let mut state = State::Unknown;
    state.ask(1, 1000);
    for _ in 1..FETCH_ROUNDS_MAX {
        state.change(change("x", true, 1000), RULES);
        assert_eq!(state.answered(1, members(["a"]), 1000, RULES), Answered::AskAgain);
    }
    state.change(change("b", true, 1000), RULES);
    state.change(change("a", false, 1000), RULES);
    assert_eq!(state.answered(1, members(["a"]), 1000, RULES), Answered::Settled);
    assert_eq!(state.members(None), Some(members(["b"])));
}

#[test]
fn outlived_list_serves_until_the_answer_and_on_if_none_comes() {
    let mut state = answered_at(1000, &["a"]);
    state.ask(2, 5000);
    assert_eq!(state.members(None), Some(members(["a"])));
    state.change(change("b", true, 4000), RULES);
    assert_eq!(state.members(None), Some(members(["a", "b"])));
    state.failed(2, 5001, |_| unreachable!("there is a list"));
    assert_eq!(state.members(None), Some(members(["a", "b"])));
}

#[test]
fn old_creation_is_not_trusted_where_one_can_ask() {
    let mut state = State::Unknown;
    state.created(members(["a"]), 1000, 1000 + SKEW_MS + 1, RULES);
    assert_eq!(state.members(None), None);
    let alone = Rules { can_ask: false, ..RULES };
    state.created(members(["a"]), 1000, 1000 + SKEW_MS + 1, alone);
    assert_eq!(state.members(None), Some(members(["a"])));
    // Another node's word stands in the log, which is all there is.
    let handed = Change { place: None, ..change("a", false, 1000) };
    assert!(!state.change(handed, alone));
    assert!(!state.change(change("b", true, 1000), alone));
    assert_eq!(state.members(None), Some(members(["a", "b"])));
}

#[test]
fn absent_conversation_that_is_changed_meanwhile_is_asked_for_again() {
    let mut state = State::Unknown;
    state.ask(1, 1000);
    state.absent(1, 3000);
    assert!(matches!(state, State::Absent { until_ms: 3000 }));
    state.change(change("a", true, 1000), RULES);
    assert!(matches!(state, State::Unknown));
    state.ask(2, 1000);
    state.change(change("a", true, 1000), RULES);
    state.absent(2, 3000);
    assert!(matches!(state, State::Unknown));
}

/// The follower has read a departure and an arrival; a router is still at records before them.
#[test]
fn record_before_a_change_concerns_those_who_were_members_then() {
    let mut state = answered_at(1000, &["a", "b"]);
    let at_ms = 1000 + 10 * SKEW_MS;
    let left = Change { place: Some(place(5)), ..change("b", false, at_ms) };
    let came = Change { place: Some(place(6)), ..change("c", true, at_ms) };
    let again = Change { place: Some(place(7)), ..change("c", true, at_ms) };
    for change in [left, came, again] {
        state.change(change, RULES);
    }
    assert_eq!(state.members(Some(place(4))), Some(members(["a", "b"])));
    assert_eq!(state.members(Some(place(5))), Some(members(["a"])));
    assert_eq!(state.members(Some(place(6))), Some(members(["a", "c"])));
    assert_eq!(state.members(None), Some(members(["a", "c"])));
    // Between partitions there is no order.
    let elsewhere = LogPosition { partition: 9, ..place(0) };
    assert_eq!(state.members(Some(elsewhere)), Some(members(["a", "c"])));
}
