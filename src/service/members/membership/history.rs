//! The cache against an oracle, for any interleaving of the follower, routers, requests and their answers.
//!
//! The oracle is the conversation service. It keeps the true list after each change, appends each change to
//! the log after it has stored it, and answers from a replica that lags by at most [`REPLICA_LAG_MAX`].

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::cache::{Part, ReadChange};
use super::changes::{REPLICA_LAG_MAX, RecordPosition};
use super::reading::ReadPositions;
use super::state::{AnswerOutcome, ListState};
use crate::domain::members::Members;
use crate::service::runtime::cache::Bounds;

const USERS: [&str; 4] = ["a", "b", "c", "d"];
const CONVERSATION: (u64, &str) = (7, "conversation");

/// One step of a history.
#[derive(Clone, Copy, Debug)]
enum HistoryStep {
    /// Time passes, seconds.
    Wait(u64),
    /// The service stores a change and appends it.
    Change { user: usize, added: bool },
    /// The follower reads one record.
    Follow,
    /// The router gets the partition, from this record on: any that exists, or the next one.
    Assign(usize),
    /// The router reads one record.
    Route,
    /// Another node hands over a change that it has read.
    HandOver(usize),
    /// A record needs the members.
    LookUp,
    /// The service answers. The replica is this many changes behind, as far as it may lag.
    Answer { behind: usize },
    /// The request fails.
    Fail,
    /// The list is evicted.
    Evict,
    /// The lifetime of the list ends, and it is fetched again.
    Expire,
}

fn steps() -> impl Strategy<Value = Vec<HistoryStep>> {
    let step = prop_oneof![
        2 => (0_u64..25).prop_map(HistoryStep::Wait),
        5 => (0..USERS.len(), any::<bool>())
            .prop_map(|(user, added)| HistoryStep::Change { user, added }),
        5 => Just(HistoryStep::Follow),
        1 => (0_usize..40).prop_map(HistoryStep::Assign),
        5 => Just(HistoryStep::Route),
        1 => (0_usize..40).prop_map(HistoryStep::HandOver),
        6 => Just(HistoryStep::LookUp),
        6 => (0_usize..4).prop_map(|behind| HistoryStep::Answer { behind }),
        1 => Just(HistoryStep::Fail),
        1 => Just(HistoryStep::Evict),
        1 => Just(HistoryStep::Expire),
    ];
    prop::collection::vec(step, 0..120)
}

/// A change in the log.
struct LoggedChange {
    user: &'static str,
    added: bool,
    stored_at: Instant,
}

struct History {
    /// Each change changes something, so the log says who was a member before it.
    is_effective: bool,
    now: Instant,
    part: Part,
    reading: ReadPositions,
    /// `truth[n]`: the members after the first `n` changes.
    truth: Vec<BTreeSet<&'static str>>,
    log: Vec<LoggedChange>,
    /// Records read by the follower.
    followed: usize,
    /// The next record of the router. `None`: it does not have the partition.
    routed: Option<usize>,
    /// The request in flight: its id, and when it was made.
    request: Option<(u64, Instant)>,
    requests: u64,
}

/// The offset of a record. Offsets have gaps.
fn position(index: usize) -> RecordPosition {
    RecordPosition { topic: 0, partition: 3, offset: 2 * i64::try_from(index).unwrap() }
}

impl History {
    fn new() -> Self {
        let bounds = Bounds { entries_max: 100, weight_max: 100 };
        let reading = ReadPositions::default();
        reading.follow_from(position(0));
        Self {
            is_effective: false,
            now: Instant::now(),
            part: Part::new(bounds, 1_000),
            reading,
            truth: vec![BTreeSet::from(["a", "b"])],
            log: Vec::new(),
            followed: 0,
            routed: None,
            request: None,
            requests: 0,
        }
    }

    fn state<T>(&mut self, act: impl FnOnce(&mut ListState) -> T) -> T {
        self.part.with(CONVERSATION, self.now, |_, state, _| act(state))
    }

    fn ask(&mut self, wanted: impl FnOnce(&ListState) -> bool) {
        let id = self.requests + 1;
        let started = self.part.with(CONVERSATION, self.now, |_, state, asked| {
            let is_wanted = wanted(state);
            if is_wanted {
                state.start_fetch(id, asked);
            }
            is_wanted
        });
        if started {
            self.requests = id;
            self.request = Some((id, self.now));
        }
    }

    fn read(&mut self, index: usize, by_router: bool) {
        let (LoggedChange { user, added, .. }, position) = (&self.log[index], position(index));
        if by_router && self.reading.is_followed(position) {
            return;
        }
        let (user, added) = (*user, *added);
        let change = ReadChange { conversation: CONVERSATION.1, user, added, position };
        self.part.changed(CONVERSATION.0, change, self.now);
    }

    fn step(&mut self, step: HistoryStep) {
        match step {
            HistoryStep::Wait(seconds) => self.now += Duration::from_secs(seconds),
            HistoryStep::Change { user, added } => {
                let user = USERS[user];
                let mut truth = self.truth.last().unwrap().clone();
                let added = if self.is_effective { !truth.contains(user) } else { added };
                let _ = if added { truth.insert(user) } else { truth.remove(user) };
                self.truth.push(truth);
                self.log.push(LoggedChange { user, added, stored_at: self.now });
            }
            HistoryStep::Follow => {
                if self.followed < self.log.len() {
                    self.read(self.followed, false);
                    self.reading.followed(position(self.followed));
                    self.followed += 1;
                }
            }
            HistoryStep::Assign(from) => {
                let from = from % (self.log.len() + 1);
                self.reading.lane_starts(position(from));
                self.routed = Some(from);
            }
            HistoryStep::Route => {
                if let Some(next) = self.routed.filter(|next| *next < self.log.len()) {
                    self.read(next, true);
                    self.routed = Some(next + 1);
                }
            }
            HistoryStep::HandOver(which) => {
                // The other node may be ahead or behind.
                if !self.log.is_empty() {
                    let LoggedChange { user, added, .. } = self.log[which % self.log.len()];
                    self.part.heard(CONVERSATION, user, added);
                }
            }
            HistoryStep::LookUp => {
                self.ask(|it| matches!(it, ListState::Unknown | ListState::Failing { .. }));
            }
            HistoryStep::Expire => self.ask(|it| matches!(it, ListState::Known(_))),
            HistoryStep::Answer { behind } => self.answer(behind),
            HistoryStep::Fail => {
                let Some((id, _)) = self.request.take() else { return };
                self.state(|state| state.failed(id, 0, |_| 0));
            }
            HistoryStep::Evict => self.state(|state| {
                if !matches!(state, ListState::Fetching(_)) {
                    *state = ListState::Unknown;
                }
            }),
        }
    }

    fn answer(&mut self, behind: usize) {
        let Some((id, asked_at)) = self.request.take() else { return };
        let must_have = |it: &&LoggedChange| it.stored_at + REPLICA_LAG_MAX <= asked_at;
        let oldest = self.log.iter().filter(must_have).count();
        let version = self.log.len().saturating_sub(behind).max(oldest);
        let answer: Members = self.truth[version].iter().collect();
        let outcome = self.part.answered(CONVERSATION, id, &answer, (self.now, 0));
        if outcome == AnswerOutcome::Repeat {
            self.request = Some((id, self.now));
        }
    }

    /// For each user, a list must be true at the position up to which the log was read, or at a later one that
    /// nobody has read: an answer may be newer than the log. The same holds for a record and the log up to it (if
    /// no change repeats what is so already: a repeated removal says that its user was a member until then), and such a
    /// record does not wait if the follower has read it. Returns the first user for whom this is wrong.
    fn wrong(&self) -> Option<String> {
        let newest = self.followed.max(self.routed.unwrap_or(0));
        let mut wanted = vec![(None, self.followed)];
        if let Some(next) = self.routed.filter(|next| *next > 0) {
            let at = position(next - 1);
            let is_covered = self.reading.is_covered(at);
            if !is_covered && next <= self.followed {
                return Some("waits for the follower, which has read the record".into());
            }
            if is_covered {
                wanted.push((None, newest));
            }
            if is_covered && self.is_effective {
                wanted.push((Some(at), next));
            }
        }
        for (at, read) in wanted {
            let Some(list) = self.part.read(CONVERSATION, at, |_| true) else { continue };
            for user in USERS {
                let is_listed = list.contains(user);
                let is_true = |truth: &BTreeSet<_>| truth.contains(user) == is_listed;
                let unread = self.truth.get(newest + 1..).unwrap_or_default();
                let newer = if at.is_some() { unread } else { &self.truth[read..] };
                if !is_true(&self.truth[read]) && !newer.iter().any(is_true) {
                    return Some(format!("{user} listed: {is_listed}, read {read} at {at:?}"));
                }
            }
        }
        None
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn list_is_never_behind_the_log_that_was_read(steps in steps()) {
        let mut history = History::new();
        for step in steps {
            history.step(step);
            let wrong = history.wrong();
            prop_assert!(wrong.is_none(), "{wrong:?} after {step:?}");
        }
    }

    /// Promise: “A record that waited for its members is routed by the list of its position.”
    #[test]
    fn record_is_routed_by_the_list_as_of_its_position(steps in steps()) {
        let mut history = History { is_effective: true, ..History::new() };
        for step in steps {
            history.step(step);
            let wrong = history.wrong();
            prop_assert!(wrong.is_none(), "{wrong:?} after {step:?}");
        }
    }

    /// Without a router, and without changes of unknown order, the newest list is exactly that of the log once
    /// everything was read.
    #[test]
    fn list_is_that_of_the_log_once_it_was_read(steps in steps()) {
        let mut history = History::new();
        for step in steps {
            if !matches!(step, HistoryStep::HandOver(_)) {
                history.step(step);
            }
        }
        while history.followed < history.log.len() {
            history.step(HistoryStep::Follow);
        }
        if let Some(list) = history.part.read(CONVERSATION, None, |_| true) {
            prop_assert_eq!(list, history.truth.last().unwrap().iter().collect());
        }
    }
}

/// The steps that do something now.
fn possible(history: &History) -> Vec<HistoryStep> {
    let end = history.log.len();
    let mut steps = Vec::new();
    if history.followed < end {
        steps.push(HistoryStep::Follow);
    }
    match history.routed {
        None => steps.extend((0..end).map(HistoryStep::Assign)),
        Some(next) if next < end => steps.push(HistoryStep::Route),
        Some(_) => {}
    }
    if history.request.is_some() {
        steps.extend([0, end].map(|behind| HistoryStep::Answer { behind }));
    } else if history.requests == 0 {
        steps.push(HistoryStep::LookUp);
    }
    steps
}

/// Every interleaving of the follower, a router that gets the partition at any place, and a request whose
/// answer has all changes or none.
#[test]
fn no_interleaving_loses_a_change() {
    const CHANGES: [[(usize, bool); 3]; 3] = [
        [(1, false), (1, true), (1, false)],
        [(1, false), (2, true), (1, true)],
        [(2, true), (1, false), (2, false)],
    ];
    for changes in CHANGES {
        let (mut paths, mut complete) = (vec![Vec::new()], 0);
        while let Some(path) = paths.pop() {
            let mut history = History { is_effective: true, ..History::new() };
            for (user, added) in changes {
                history.step(HistoryStep::Change { user, added });
            }
            for step in &path {
                history.step(*step);
            }
            let wrong = history.wrong();
            assert!(wrong.is_none(), "{wrong:?} after {path:?}");
            let steps = possible(&history);
            if steps.is_empty() {
                complete += 1;
                let list = history.part.read(CONVERSATION, None, |_| true);
                let truth = history.truth.last().unwrap().iter().collect();
                assert_eq!(list, Some(truth), "after {path:?}");
            }
            paths.extend(steps.into_iter().map(|step| [&path[..], &[step]].concat()));
        }
        assert!(complete > 2_000, "{complete}");
    }
}

/// The case that lost a change: the router has read change 10 before the follower reads change 8.
#[test]
fn change_that_is_read_late_is_not_lost() {
    let mut history = History::new();
    for (user, added) in [(1, false), (2, true)] {
        history.step(HistoryStep::Change { user, added });
    }
    // An answer from before both.
    history.step(HistoryStep::LookUp);
    history.step(HistoryStep::Answer { behind: 2 });
    history.step(HistoryStep::Assign(1));
    history.step(HistoryStep::Route);
    assert!(!history.reading.is_covered(position(1)), "the record waits for the change before it");
    history.step(HistoryStep::Follow);
    history.step(HistoryStep::Follow);
    assert!(history.reading.is_covered(position(1)));
    let list = history.part.read(CONVERSATION, Some(position(1)), |_| true).unwrap();
    assert_eq!(list, ["a", "c"].iter().collect(), "b left, c joined");
}

/// The record of a creation can be in the log twice.
#[test]
fn repeated_creation_event_does_not_bring_removed_members_back() {
    let mut history = History::new();
    let list: Members = ["a", "b"].iter().collect();
    assert!(history.part.created(CONVERSATION, &list, position(10), true, 0));
    let change = ReadChange {
        conversation: CONVERSATION.1,
        user: "b",
        added: false,
        position: position(11),
    };
    history.part.changed(CONVERSATION.0, change, history.now);
    for is_evicted in [false, true] {
        if is_evicted {
            history.step(HistoryStep::Evict);
        }
        assert!(!history.part.created(CONVERSATION, &list, position(12), true, 0));
    }
    // The first one, read late: the change after it is applied.
    assert!(history.part.created(CONVERSATION, &list, position(10), true, 0));
    let known = history.part.read(CONVERSATION, None, |_| true);
    assert_eq!(known, Some(["a"].iter().collect()));
}
