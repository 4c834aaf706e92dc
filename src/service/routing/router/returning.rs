//! Replays from the tails of a router to sessions that return with a cursor.
//!
//! ```text
//! reader of a session                router
//!   Check { cursor }  ─────────────►  when every lane has filled its tail and has reached the cursor: the records that
//!   ranges, or expired ◄────────────  the session has missed, as a range of each lane
//!   Pull { ranges }   ─────────────►  collected for a few ms: one pass over the tails serves all pulls
//!   a chunk, the rest ◄────────────
//! ```
//!
//! A range ends where its lane was at the check: later records are live for the session, because it was in the
//! directory before. A record that is parked at the check is routed later, so it is live as well.
//!
//! **One pass.** Records of a tail share their lists of members. For each list the pass looks up once which of the
//! waiting users it contains; then each record costs one look-up by the address of its list. A pass is cut into steps,
//! between which live records are routed.
//!
//! **A filled tail.** Its lane has not routed these records, so their members are looked up when the first pass needs them,
//! many at a time. What is known then is kept in the tail.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use hashbrown::HashMap;
use slab::Slab;
use tokio::sync::oneshot;

use crate::domain::cursor::{Cursor, CursorExpired, LogPosition, TopicId, UNCHECKED};
use crate::domain::ids::ShardId;
use crate::domain::members::Members;
use crate::service::cluster::ports::NodeEpoch;
use crate::service::cluster::tail::TailEntry;
use crate::service::cluster::wire::{
    self, AnsweredRange, RangeStatus, ReplayAnswer, ReplayRequest,
};
use crate::service::routing::replays::ReplayedRecord;
use crate::service::routing::router::answers::ReplayAnswers;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::in_flight::LaneKey;
use crate::service::routing::router::lane::Lane;
use crate::service::routing::router::links::RouterLinks;
use crate::service::routing::router::partition::TopicPartition;

/// How long a check waits for the lanes to reach the cursor, ms. Another node may have been ahead of this one by so
/// much.
const BEHIND_WAIT_MS: u64 = 5_000;
/// How long a check waits for the tails of a node that has just started, ms.
const FILLING_WAIT_MS: u64 = 30_000;
/// Time between two attempts to answer the checks that wait, ms.
const CHECK_RETRY_MS: u64 = 10;
/// How long pulls are collected for one pass, ms.
const COLLECT_MS: u64 = 10;
/// So many pulls are not collected any longer.
const COLLECTED_MAX: usize = 64;
/// Records that one step of a pass looks at, and members. A step takes about 100 µs.
const STEP_WORK: usize = 4_096;
/// Bytes that one step copies at most; one record may exceed it.
const STEP_BYTES: usize = 256 << 10;
/// Records of a filled tail whose members are looked up at a time.
const RESOLVED_AT_ONCE: usize = 256;

/// The records of one lane that a session has missed.
#[derive(Clone, Debug)]
pub(super) struct ReplayRange {
    lane: LaneKey,
    log: TopicPartition,
    /// The first offset that is not replayed yet.
    next: i64,
    /// The first offset that the session gets live.
    to: i64,
}

/// A lane's answer to a check.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckedLane {
    pub(super) topic: TopicId,
    pub(super) partition: u32,
    pub(super) verified: Verified,
}

/// What the check of a position says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verified {
    /// It is of this log.
    Yes,
    /// Nothing precedes the position.
    Needless,
    /// The record before the position is not known any more.
    NotKnown,
}

/// Answer to a check.
#[derive(Debug)]
pub(super) struct CheckedLanes {
    pub(super) lanes: Vec<CheckedLane>,
    pub(super) ranges: Vec<ReplayRange>,
}

/// Answer to a pull.
#[derive(Debug)]
pub(super) struct PulledRecords {
    pub(super) records: Vec<ReplayedRecord>,
    /// What is left.
    pub(super) ranges: Vec<ReplayRange>,
}

/// Bounds of one chunk. A single record may be longer.
#[derive(Clone, Copy, Debug)]
pub struct ReplayChunkMax {
    /// Records.
    pub records: usize,
    /// Bytes of their values.
    pub bytes: usize,
}

/// What readers ask a router for.
pub(super) enum ReplayInput {
    Check {
        since: Arc<Cursor>,
        answer: oneshot::Sender<Result<CheckedLanes, CursorExpired>>,
    },
    Pull {
        user: Arc<str>,
        ranges: Vec<ReplayRange>,
        max: ReplayChunkMax,
        answer: oneshot::Sender<Result<PulledRecords, CursorExpired>>,
    },
    /// In group mode: a check or a pull of some partitions that this router may own.
    Request {
        request: ReplayRequest,
        to: AnswerTo,
    },
    /// Answered when the shard has taken everything that this router has given it until now.
    Fence {
        shard: ShardId,
        answer: oneshot::Sender<()>,
    },
}

/// Where the answer to a request goes.
#[derive(Clone)]
pub(super) enum AnswerTo {
    ThisNode(Arc<ReplayAnswers>),
    Node(NodeEpoch),
}

/// Where the records of a pull go.
enum PullAnswer {
    Reader(oneshot::Sender<Result<PulledRecords, CursorExpired>>),
    Request { id: u64, to: AnswerTo },
}

/// Answers to requests, to be sent.
type Answers = Vec<(AnswerTo, ReplayAnswer)>;

struct WaitingCheck {
    since: Arc<Cursor>,
    answer: oneshot::Sender<Result<CheckedLanes, CursorExpired>>,
    /// Unix time, ms.
    since_ms: u64,
}

/// A pull, in a pass or waiting for the next one.
struct ActivePull {
    user: Arc<str>,
    ranges: Vec<ReplayRange>,
    max: ReplayChunkMax,
    /// Taken when it is answered.
    answer: Option<PullAnswer>,
    records: Vec<ReplayedRecord>,
    bytes: usize,
}

impl ActivePull {
    fn answer(&mut self, result: Result<(), CursorExpired>, answers: &mut Answers) {
        let Some(answer) = self.answer.take() else { return };
        let (records, mut ranges) =
            (std::mem::take(&mut self.records), std::mem::take(&mut self.ranges));
        match answer {
            PullAnswer::Reader(answer) => {
                ranges.retain(|range| range.next < range.to);
                // Fails only if the session has ended.
                let _ = answer.send(result.map(|()| PulledRecords { records, ranges }));
            }
            PullAnswer::Request { id, to } => {
                let ranges = ranges.iter().map(|range| {
                    let ReplayRange { log, next, to, .. } = range;
                    let (topic, partition) = (log.topic.to_string(), log.partition);
                    let range =
                        wire::ReplayRange { topic, partition, next: *next, to: *to, check: 0 };
                    answered(range, result.map(|()| RangeStatus::Verified))
                });
                let records = records.into_iter().map(to_wire).collect();
                answers.push((to, ReplayAnswer { id, ranges: ranges.collect(), records }));
            }
        }
    }

    fn range(&mut self, lane: LaneKey) -> Option<&mut ReplayRange> {
        self.ranges.iter_mut().find(|range| range.lane == lane)
    }

    /// Whether it wants this record.
    fn wants(&self, lane: LaneKey, offset: i64) -> bool {
        self.answer.is_some()
            && self
                .ranges
                .iter()
                .any(|range| range.lane == lane && (range.next..range.to).contains(&offset))
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.records.is_empty()
            || (self.records.len() < self.max.records && self.bytes + bytes <= self.max.bytes)
    }
}

/// A pass over the tails for some pulls.
struct ReplayPass {
    pulls: Vec<ActivePull>,
    by_user: HashMap<Arc<str>, Vec<u32>>,
    /// Which pulls want the records of a list. Keeps the list, so that its address is not used again.
    by_list: HashMap<usize, (Members, Vec<u32>)>,
    /// The lanes that are not done, each with the offset at which it continues. The first one is in progress.
    lanes: VecDeque<(LaneKey, i64)>,
    /// When the look-ups of members are tried again, and since when they have not succeeded. Unix time, ms.
    blocked: Option<(u64, u64)>,
    answers: Answers,
}

/// Result of a step of a pass.
#[derive(Debug, PartialEq, Eq)]
enum PassStep {
    Progressed,
    /// The members of some records are not known yet.
    Waits,
    Done,
}

/// The replays of one router.
#[derive(Default)]
pub(super) struct Returning {
    checks: Vec<WaitingCheck>,
    /// When they are tried again, Unix time in ms.
    checks_at_ms: u64,
    pulls: Vec<ActivePull>,
    /// When the first of them arrived, Unix time in ms.
    pulled_at_ms: u64,
    pass: Option<ReplayPass>,
    requests: Vec<(ReplayRequest, AnswerTo)>,
    /// A shard, and what it has to have taken; `None`: the positions first.
    fences: Vec<(ShardId, Option<u64>, oneshot::Sender<()>)>,
}

impl Returning {
    pub(super) fn add(&mut self, input: ReplayInput, now_ms: u64) {
        match input {
            ReplayInput::Check { since, answer } => {
                self.checks.push(WaitingCheck { since, answer, since_ms: now_ms });
                self.checks_at_ms = now_ms;
            }
            ReplayInput::Pull { user, ranges, max, answer } => {
                if self.pulls.is_empty() {
                    self.pulled_at_ms = now_ms;
                }
                let answer = Some(PullAnswer::Reader(answer));
                let records = Vec::new();
                self.pulls.push(ActivePull { user, ranges, max, answer, records, bytes: 0 });
            }
            ReplayInput::Request { request, to } => self.requests.push((request, to)),
            ReplayInput::Fence { shard, answer } => {
                self.fences.push((shard, None, answer));
            }
        }
    }

    /// Whether a session waits until the shards have the positions.
    pub(super) fn awaits_positions(&self) -> bool {
        self.fences.iter().any(|(_, mark, _)| mark.is_none())
    }

    /// The shards have been given the positions.
    pub(super) fn positions_told(&mut self, links: &RouterLinks) {
        for (shard, mark, _) in &mut self.fences {
            mark.get_or_insert_with(|| links.pushed(*shard));
        }
    }

    /// Answers the checks of group mode, and adds its pulls to those that wait for a pass.
    fn take_requests(
        &mut self,
        core: &RouterCore,
        lanes: &Slab<Lane>,
        handed_to: i64,
        now_ms: u64,
    ) -> Answers {
        let mut answers = Vec::new();
        for (request, to) in std::mem::take(&mut self.requests) {
            let (user, id) = (request.user.as_str(), request.id);
            let is_check = request.records_max == 0;
            let mut ready = Vec::new();
            let mut ranges = Vec::new();
            for range in request.ranges {
                let lane = lanes.iter().map(|(_, lane)| lane).find(|lane| {
                    lane.partition.as_ref().is_some_and(|it| {
                        *it.log.topic == *range.topic && it.log.partition == range.partition
                    })
                });
                if is_check {
                    ranges.push(match lane {
                        Some(lane) => {
                            check_range((core, handed_to), lane, range, request.begin, user)
                        }
                        None => answered(range, Ok(RangeStatus::NotYet)),
                    });
                    continue;
                }
                // A successor routes the records below again, which the holder drops: it has them in its tail then.
                let is_there = |lane: &&Lane| lane.position().is_some_and(|it| it.next >= range.to);
                match lane.filter(is_there) {
                    Some(lane) => ready.extend(lane.partition.as_ref().map(|it| ReplayRange {
                        lane: lane.key,
                        log: it.log.clone(),
                        next: range.next,
                        to: range.to,
                    })),
                    None => ranges.push(answered(range, Ok(RangeStatus::NotYet))),
                }
            }
            if !ranges.is_empty() {
                answers.push((to.clone(), ReplayAnswer { id, ranges, records: Vec::new() }));
            }
            if !ready.is_empty() {
                if self.pulls.is_empty() {
                    self.pulled_at_ms = now_ms;
                }
                let max = ReplayChunkMax {
                    records: request.records_max as usize,
                    bytes: request.bytes_max as usize,
                };
                self.pulls.push(ActivePull {
                    user: Arc::from(user),
                    ranges: ready,
                    max,
                    answer: Some(PullAnswer::Request { id, to }),
                    records: Vec::new(),
                    bytes: 0,
                });
            }
        }
        answers
    }

    /// Sessions that wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        let in_pass = self.pass.as_ref().map_or(0, |pass| pass.pulls.len());
        self.checks.len() + self.pulls.len() + in_pass + self.fences.len() + self.requests.len()
    }

    /// One bounded step. Returns whether anything progressed.
    pub(super) fn turn(
        &mut self,
        core: &mut RouterCore,
        lanes: &mut Slab<Lane>,
        handed_to: i64,
        now_ms: u64,
    ) -> bool {
        let mut progressed = !self.requests.is_empty();
        let mut answers = self.take_requests(core, lanes, handed_to, now_ms);
        let is_open = |(shard, mark, answer): &mut (ShardId, Option<u64>, oneshot::Sender<()>)| {
            let is_taken = mark.is_some_and(|mark| core.links.taken(*shard) >= mark);
            !is_taken && !answer.is_closed()
        };
        for (_, _, answer) in self.fences.extract_if(.., |fence| !is_open(fence)) {
            // Fails only if the session has ended.
            let _ = answer.send(());
            progressed = true;
        }
        if !self.checks.is_empty() && now_ms >= self.checks_at_ms {
            self.checks_at_ms = now_ms + CHECK_RETRY_MS;
            let before = self.checks.len();
            self.checks = std::mem::take(&mut self.checks)
                .into_iter()
                .filter_map(|check| check.attempt(lanes, now_ms))
                .collect();
            progressed |= self.checks.len() < before;
        }
        let is_due = self.pulls.len() >= COLLECTED_MAX || now_ms >= self.pulled_at_ms + COLLECT_MS;
        if self.pass.is_none() && !self.pulls.is_empty() && is_due {
            self.pass = Some(ReplayPass::new(std::mem::take(&mut self.pulls)));
            core.counters.replay_passes.add(1);
        }
        if let Some(pass) = &mut self.pass {
            let step = pass.step(core, lanes, now_ms);
            answers.append(&mut pass.answers);
            match step {
                PassStep::Progressed => progressed = true,
                PassStep::Waits => {}
                PassStep::Done => {
                    self.pass = None;
                    progressed = true;
                }
            }
        }
        answers.into_iter().for_each(|(to, answer)| send(core, to, answer));
        progressed
    }
}

fn send(core: &mut RouterCore, to: AnswerTo, answer: ReplayAnswer) {
    match to {
        AnswerTo::ThisNode(answers) => answers.arrived(answer),
        AnswerTo::Node(epoch) => {
            if let Some(owner) = &mut core.owner {
                owner.answer(epoch, answer);
            }
        }
    }
}

fn answered(range: wire::ReplayRange, result: Result<RangeStatus, CursorExpired>) -> AnsweredRange {
    let (status, expired) = match result {
        Ok(status) => (status, 0),
        Err(why) => (RangeStatus::Expired, why as u32),
    };
    AnsweredRange { range: Some(range), status: status.into(), expired, position: -1 }
}

fn to_wire(record: ReplayedRecord) -> wire::ReplayedRecord {
    let ReplayedRecord { topic, partition, offset, appended_at_ms, key, value } = record;
    wire::ReplayedRecord {
        topic: topic.to_string(),
        partition,
        offset,
        appended_at_ms: i64::try_from(appended_at_ms).unwrap_or(i64::MAX),
        key: key.map(Vec::from),
        value: value.into(),
    }
}

/// Checks one position for the session of a user that began at `begin`: it gets everything from *V* on live, so what is
/// replayed has to reach *V*. And the lane has to know it, so that it gets everything that the lane passes from now on.
fn check_range(
    (core, handed_to): (&RouterCore, i64),
    lane: &Lane,
    mut range: wire::ReplayRange,
    begin: i64,
    user: &str,
) -> AnsweredRange {
    let (Some(owner), Some(partition)) = (&core.owner, &lane.partition) else {
        return answered(range, Err(CursorExpired::NotSupported));
    };
    let (Some(claim), Some(tail), Some(position), Some(next)) =
        (&partition.claim, &partition.tail, lane.position(), lane.next_offset())
    else {
        return answered(range, Ok(RangeStatus::NotYet));
    };
    if claim.applied <= begin
        || partition.revocation.is_some()
        || !claim.has_barrier_behind(handed_to)
    {
        return answered(range, Ok(RangeStatus::NotYet));
    }
    let (at, theirs) = (position.next, std::mem::replace(&mut range.check, position.check));
    if range.next < 0 {
        // It wants nothing of what precedes its 101.
        range.to = range.next;
        return AnsweredRange { position: at, ..answered(range, Ok(RangeStatus::Needless)) };
    }
    let newcomer = owner.parts.table.newcomer(begin).filter(|it| *it.user == *user);
    let wanted = newcomer.and_then(|newcomer| owner.wanted_from(&newcomer, &partition.log));
    let Some(live_from) = wanted else {
        // The beginning is forgotten.
        return answered(range, Err(CursorExpired::TooOld));
    };
    if at < live_from || next < range.next {
        return answered(range, Ok(RangeStatus::NotYet));
    }
    if range.next < tail.tail.from() {
        return answered(range, Err(CursorExpired::TooOld));
    }
    range.to = at.max(range.next);
    let result = match (theirs, lane.check_before(range.next)) {
        _ if range.next == 0 => Ok(RangeStatus::Needless),
        (UNCHECKED, _) | (_, UNCHECKED) => Ok(RangeStatus::NotKnown),
        (theirs, ours) if theirs == ours => Ok(RangeStatus::Verified),
        _ => Err(CursorExpired::OtherLog),
    };
    AnsweredRange { position: at, ..answered(range, result) }
}

impl WaitingCheck {
    /// Answers it. `Some`: it has to wait.
    fn attempt(self, lanes: &Slab<Lane>, now_ms: u64) -> Option<Self> {
        let behind_until_ms = self.since_ms + BEHIND_WAIT_MS;
        let filling_until_ms = self.since_ms + FILLING_WAIT_MS;
        let is_closed = self.answer.is_closed();
        let result = match check(lanes, &self.since) {
            Ok(Checked::Behind) if now_ms < behind_until_ms && !is_closed => return Some(self),
            Ok(Checked::Filling) if now_ms < filling_until_ms && !is_closed => return Some(self),
            Ok(Checked::Usable(checked)) => Ok(checked),
            // The log ends before the position.
            Ok(Checked::Behind) => Err(CursorExpired::OtherLog),
            Ok(Checked::Filling) => Err(CursorExpired::TooOld),
            Err(expired) => Err(expired),
        };
        // Fails only if the session has ended.
        let _ = self.answer.send(result);
        None
    }
}

enum Checked {
    Usable(CheckedLanes),
    /// A lane has not reached the cursor.
    Behind,
    /// A tail is not filled yet.
    Filling,
}

fn check(lanes: &Slab<Lane>, since: &Cursor) -> Result<Checked, CursorExpired> {
    let mut checked = CheckedLanes { lanes: Vec::new(), ranges: Vec::new() };
    let (mut is_behind, mut is_filling) = (false, false);
    for (_, lane) in lanes {
        let Some(partition) = &lane.partition else { continue };
        let Some(tail) = &partition.tail else { return Err(CursorExpired::NotSupported) };
        let (topic, number) = (tail.topic, partition.log.partition.unsigned_abs());
        if !since.has_topic(topic) {
            return Err(CursorExpired::NewTopic);
        }
        let (next, check) =
            since.get(topic, number).map_or((0, UNCHECKED), |it| (it.next, it.check));
        if !tail.is_filled() {
            is_filling = true;
            continue;
        }
        let Some(to) = lane.next_offset().filter(|to| next <= *to) else {
            is_behind = true;
            continue;
        };
        if next < tail.tail.from() {
            return Err(CursorExpired::TooOld);
        }
        let verified = match (check, lane.check_before(next)) {
            _ if next == 0 => Verified::Needless,
            (UNCHECKED, _) | (_, UNCHECKED) => Verified::NotKnown,
            (theirs, ours) if theirs == ours => Verified::Yes,
            _ => return Err(CursorExpired::OtherLog),
        };
        checked.lanes.push(CheckedLane { topic, partition: number, verified });
        if next < to {
            let log = partition.log.clone();
            checked.ranges.push(ReplayRange { lane: lane.key, log, next, to });
        }
    }
    Ok(match (is_filling, is_behind) {
        (true, _) => Checked::Filling,
        (false, true) => Checked::Behind,
        (false, false) => Checked::Usable(checked),
    })
}

impl ReplayPass {
    fn new(pulls: Vec<ActivePull>) -> Self {
        let mut by_user: HashMap<Arc<str>, Vec<u32>> = HashMap::new();
        let mut lanes: VecDeque<(LaneKey, i64)> = VecDeque::new();
        for (index, pull) in (0..).zip(&pulls) {
            by_user.entry(Arc::clone(&pull.user)).or_default().push(index);
            for range in &pull.ranges {
                match lanes.iter_mut().find(|(lane, _)| *lane == range.lane) {
                    Some((_, next)) => *next = range.next.min(*next),
                    None => lanes.push_back((range.lane, range.next)),
                }
            }
        }
        let (by_list, answers) = (HashMap::new(), Vec::new());
        Self { pulls, by_user, by_list, lanes, blocked: None, answers }
    }

    /// Looks at some records of the lane in progress.
    fn step(&mut self, core: &mut RouterCore, lanes: &mut Slab<Lane>, now_ms: u64) -> PassStep {
        if let Some((retry_ms, _)) = self.blocked
            && now_ms < retry_ms
        {
            return PassStep::Waits;
        }
        let Some(&(key, from)) = self.lanes.front() else {
            self.pulls.iter_mut().for_each(|pull| pull.answer(Ok(()), &mut self.answers));
            return PassStep::Done;
        };
        let lane = lanes.get_mut(key.slot());
        let Some(lane) = lane.filter(|lane| lane.key == key && lane.tail().is_some()) else {
            // The partition is read by another lane now. In group mode its next owner is asked.
            self.fail(key, i64::MIN..i64::MAX, None);
            self.lanes.pop_front();
            return PassStep::Progressed;
        };
        let tail_from = lane.tail().map_or(i64::MAX, |tail| tail.tail.from());
        self.fail(key, i64::MIN..tail_from, Some(CursorExpired::Overtaken));
        let (next, unresolved) = self.collect(core, lane, key, from);
        if let Some(front) = self.lanes.front_mut() {
            front.1 = next;
        }
        if unresolved {
            if core.resolve_some(lane, next, now_ms) {
                self.blocked = None;
                return PassStep::Progressed;
            }
            let since_ms = self.blocked.map_or(now_ms, |(_, since_ms)| since_ms);
            self.blocked = Some((now_ms + CHECK_RETRY_MS, since_ms));
            if now_ms >= since_ms.saturating_add(core.config.route_retry_max_ms) {
                self.fail(key, i64::MIN..next + 1, Some(CursorExpired::MembersUnknown));
                self.lanes[0].1 = next + 1;
                self.blocked = None;
            }
            return PassStep::Waits;
        }
        if self.pulls.iter_mut().all(|pull| pull.answer.is_none()) {
            return PassStep::Done;
        }
        let is_done = |pull: &mut ActivePull| {
            pull.answer.is_none() || pull.range(key).is_none_or(|range| range.next >= range.to)
        };
        if self.pulls.iter_mut().all(is_done) {
            self.lanes.pop_front();
        }
        PassStep::Progressed
    }

    /// The pulls that continue in this range of the lane fail. `None`: the lane has ended.
    fn fail(&mut self, lane: LaneKey, within: std::ops::Range<i64>, why: Option<CursorExpired>) {
        let Self { pulls, answers, .. } = self;
        for pull in pulls {
            let continues =
                |range: &mut ReplayRange| range.next < range.to && within.contains(&range.next);
            if pull.answer.is_some() && pull.range(lane).is_some_and(continues) {
                let result = match (why, &pull.answer) {
                    (None, Some(PullAnswer::Request { .. })) => Ok(()),
                    (why, _) => Err(why.unwrap_or(CursorExpired::Overtaken)),
                };
                pull.answer(result, answers);
            }
        }
    }

    /// Copies what is wanted of the next records from `from` on. Returns where to continue, and whether the members of the
    /// record there are not known.
    fn collect(&mut self, core: &RouterCore, lane: &Lane, key: LaneKey, from: i64) -> (i64, bool) {
        let Some((tail, partition)) = lane.tail().zip(lane.partition.as_ref()) else {
            return (from, false);
        };
        let wanted = self.pulls.iter_mut().filter(|pull| pull.answer.is_some());
        let to = wanted.filter_map(|pull| pull.range(key).map(|range| range.to)).max();
        let to = to.unwrap_or(from);
        let (mut work, mut bytes) = (0, 0);
        for entry in tail.tail.range(from, to) {
            if work >= STEP_WORK || bytes >= STEP_BYTES {
                return self.continue_at(key, entry.record.offset, false);
            }
            let Some(members) = entry.members else {
                return self.continue_at(key, entry.record.offset, true);
            };
            let (interested, cost) = self.interested(members, &entry);
            work += cost;
            for index in interested {
                let pull = &mut self.pulls[index as usize];
                if !pull.wants(key, entry.record.offset) {
                    continue;
                }
                let size = entry.record.value.len();
                if !pull.has_room(size) {
                    if let Some(range) = pull.range(key) {
                        range.next = entry.record.offset;
                    }
                    pull.answer(Ok(()), &mut self.answers);
                    continue;
                }
                bytes += size;
                pull.bytes += size;
                pull.records.push(ReplayedRecord {
                    topic: Arc::clone(&partition.log.topic),
                    partition: partition.log.partition,
                    offset: entry.record.offset,
                    appended_at_ms: entry.record.appended_at_ms,
                    key: entry.record.key.map(Box::from),
                    value: Bytes::copy_from_slice(entry.record.value),
                });
                core.counters.cursor_replays.add(1);
            }
        }
        self.continue_at(key, to, false)
    }

    /// What precedes `next` in this lane is looked at.
    fn continue_at(&mut self, lane: LaneKey, next: i64, is_unresolved: bool) -> (i64, bool) {
        for range in self.pulls.iter_mut().filter_map(|pull| pull.range(lane)) {
            range.next = range.next.max(next.min(range.to));
        }
        (next, is_unresolved)
    }

    /// The pulls of users who received the record, and the work to find them.
    fn interested(&mut self, members: &Members, entry: &TailEntry<'_>) -> (Vec<u32>, usize) {
        let Self { by_user, by_list, .. } = self;
        let mut work = 1;
        let (_, interested) = by_list.entry(members.address()).or_insert_with(|| {
            let mut interested = Vec::new();
            // Whichever is shorter: a search in a list takes several times longer than one in the map.
            let (read, searched) = (members.len(), by_user.len() * 8);
            work += read.min(searched);
            if read <= searched {
                let found = members.iter().filter_map(|member| by_user.get(member));
                found.for_each(|pulls| interested.extend(pulls));
            } else {
                let found = by_user.iter().filter(|(user, _)| members.contains(user));
                found.for_each(|(_, pulls)| interested.extend(pulls));
            }
            (members.clone(), interested)
        });
        let mut interested = interested.clone();
        // In a filled tail the list may contain the user.
        if let Some(other) = entry.other.filter(|other| !members.contains(other))
            && let Some(pulls) = by_user.get(other)
        {
            interested.extend(pulls);
        }
        (interested, work)
    }
}

impl RouterCore {
    /// Finds out who received the next records of a filled tail from `from` on. Returns whether the first one is known now.
    fn resolve_some(&self, lane: &mut Lane, from: i64, now_ms: u64) -> bool {
        let Some(partition) = &mut lane.partition else { return true };
        let Some(tail) = &mut partition.tail else { return true };
        let unresolved = tail.tail.unresolved(from, i64::MAX).take(RESOLVED_AT_ONCE);
        let found: Vec<_> = unresolved
            .map(|record| (record.offset, self.audience_of(record, &partition.log, now_ms)))
            .collect();
        let is_known = found.first().is_none_or(|(_, audience)| audience.is_some());
        for (offset, audience) in found {
            if let Some(audience) = audience {
                tail.tail.resolve(offset, &audience);
            }
        }
        is_known
    }
}

impl Lane {
    /// The position of the lane for cursors: everything below it was given to all shards. `None`: not known yet, or this
    /// node keeps no tails.
    pub(super) fn position(&self) -> Option<LogPosition> {
        let tail = self.tail().filter(|tail| tail.is_filled())?;
        let next = self.next_offset()?;
        let next = self.parked.lowest().map_or(next, |parked| next.min(parked));
        let partition = self.partition.as_ref()?.log.partition.unsigned_abs();
        let check = self.check_before(next);
        Some(LogPosition { topic: tail.topic, partition, next, check })
    }

    /// The check of the record right before this offset, or [`UNCHECKED`].
    fn check_before(&self, next: i64) -> u32 {
        let Some(tail) = self.tail() else { return UNCHECKED };
        if next < tail.tail.from() {
            return UNCHECKED;
        }
        let (offset, check) = tail.tail.before(next);
        match self.parked.highest_below(next) {
            // It is not in the tail yet.
            Some(parked) if offset.is_none_or(|offset| parked > offset) => UNCHECKED,
            _ => check,
        }
    }
}
