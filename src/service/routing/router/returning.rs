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
//! **A filled tail.** Its lane has not routed these records, so who received them is found out when the first pulls
//! need them ([`unready`](super::unready)). Members that are known then are kept in the tail.

use std::sync::Arc;

use slab::Slab;
use tokio::sync::oneshot;

use crate::domain::cursor::{
    Cursor, CursorExpired, LogPosition, TopicId, UNCHECKED, Verified, record_check,
};
use crate::domain::ids::ShardId;
use crate::service::cluster::wire::{RangeStatus, ReplayAnswer, ReplayRequest};
use crate::service::members::user_lists::UserList;
use crate::service::routing::replays::CoveredLog;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::lane::Lane;
use crate::service::routing::router::links::RouterLinks;
use crate::service::routing::router::replay_pass::{ActivePull, PassStep, ReplayPass};
use crate::service::routing::router::replay_requests::{
    AnswerTo, Answers, PullAnswer, PulledRecords, ReplayChunkMax, ReplayRange, answered,
    check_range,
};
use crate::service::routing::router::shard_positions::ShardPositions;
use crate::service::routing::router::unready::UnreadyPulls;

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

/// A lane's answer to a check.
#[derive(Clone, Debug)]
pub(super) struct CheckedLane {
    pub(super) topic: TopicId,
    pub(super) partition: u32,
    pub(super) verified: Verified,
    /// What the client has when its range is replayed.
    pub(super) covered: CoveredLog,
}

/// Answer to a check.
#[derive(Debug)]
pub(super) struct CheckedLanes {
    pub(super) lanes: Vec<CheckedLane>,
    pub(super) ranges: Vec<ReplayRange>,
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
        /// As the answer to the last pull had it.
        list: Option<UserList>,
        answer: oneshot::Sender<Result<PulledRecords, CursorExpired>>,
    },
    /// In group mode: a check or a pull of some partitions that this router may own.
    Request {
        request: ReplayRequest,
        to: AnswerTo,
    },
    Fence(ShardFence),
}

/// Answered when the shard has a position of each of these partitions, and has taken everything that this router has
/// given it until then.
pub(super) struct ShardFence {
    pub(super) shard: ShardId,
    /// Without one of them, a cursor would be worth less than the one that its client came with.
    pub(super) partitions: Vec<(TopicId, u32)>,
    pub(super) answer: oneshot::Sender<()>,
}

/// A fence that is not answered.
struct WaitingFence {
    fence: ShardFence,
    /// What the router had pushed to the shard when all shards had the positions.
    mark: Option<u64>,
}

struct WaitingCheck {
    since: Arc<Cursor>,
    answer: oneshot::Sender<Result<CheckedLanes, CursorExpired>>,
    /// Steady time, ms.
    since_ms: u64,
}

/// The replays of one router.
#[derive(Default)]
pub(super) struct Returning {
    checks: Vec<WaitingCheck>,
    /// When they are tried again, steady time in ms.
    checks_at_ms: u64,
    pulls: Vec<ActivePull>,
    /// When the first of them arrived, steady time in ms.
    pulled_at_ms: u64,
    unready: UnreadyPulls,
    pass: Option<ReplayPass>,
    requests: Vec<(ReplayRequest, AnswerTo)>,
    /// A shard, and what it has to have taken; `None`: the positions first.
    fences: Vec<WaitingFence>,
}

impl Returning {
    pub(super) fn add(&mut self, input: ReplayInput, now_ms: u64) {
        match input {
            ReplayInput::Check { since, answer } => {
                self.checks.push(WaitingCheck { since, answer, since_ms: now_ms });
                self.checks_at_ms = now_ms;
            }
            ReplayInput::Pull { user, ranges, max, list, answer } => {
                if self.pulls.is_empty() {
                    self.pulled_at_ms = now_ms;
                }
                let answer = PullAnswer::Reader(answer);
                self.pulls.push(ActivePull::new(user, ranges, max, answer, list));
            }
            ReplayInput::Request { request, to } => self.requests.push((request, to)),
            ReplayInput::Fence(fence) => self.fences.push(WaitingFence { fence, mark: None }),
        }
    }

    /// Whether a session waits until the shards have the positions.
    pub(super) fn awaits_positions(&self) -> bool {
        self.fences.iter().any(|fence| fence.mark.is_none())
    }

    /// The shards have been given the positions.
    pub(super) fn positions_told(&mut self, links: &RouterLinks, positions: &ShardPositions) {
        for WaitingFence { fence, mark } in &mut self.fences {
            if mark.is_none() && fence.partitions.iter().all(|it| positions.has(*it)) {
                *mark = Some(links.pushed(fence.shard));
            }
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
                        // It ends below what is parked.
                        parked: Arc::default(),
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
                let answer = PullAnswer::Request { id, to };
                self.pulls.push(ActivePull::new(Arc::from(user), ready, max, answer, None));
            }
        }
        answers
    }

    /// Sessions that wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        let in_pass = self.pass.as_ref().map_or(0, |pass| pass.pulls.len());
        let pulls = self.pulls.len() + self.unready.len() + in_pass;
        self.checks.len() + pulls + self.fences.len() + self.requests.len()
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
        let is_over = |WaitingFence { fence, mark }: &mut WaitingFence| {
            let is_taken = mark.is_some_and(|mark| core.links.taken(fence.shard) >= mark);
            is_taken || fence.answer.is_closed()
        };
        for WaitingFence { fence, .. } in self.fences.extract_if(.., is_over) {
            // Fails only if the session has ended.
            let _ = fence.answer.send(());
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
        if self.pass.is_none() {
            let mut pulls = if is_due { std::mem::take(&mut self.pulls) } else { Vec::new() };
            self.unready.add(&mut pulls, lanes, now_ms);
            pulls.append(&mut self.unready.take_ready(core, lanes, now_ms, &mut answers));
            if !pulls.is_empty() {
                self.pass = Some(ReplayPass::new(pulls));
                core.counters.replay_passes.add(1);
            }
        }
        if let Some(pass) = &mut self.pass {
            let step = pass.step(core, lanes, now_ms);
            answers.append(&mut pass.answers);
            self.unready.add(&mut pass.unready, lanes, now_ms);
            self.pulls.append(&mut pass.unready);
            if step == PassStep::Done {
                self.pass = None;
            }
            progressed = true;
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
            // The log ends before the position, or this node lags.
            Ok(Checked::Behind) => Err(CursorExpired::Unverified),
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
        let verified = Verified::of(next, check, lane.check_before(next), to);
        if verified == Verified::No {
            return Err(CursorExpired::OtherLog);
        }
        let (log, parked) = (partition.log.clone(), lane.parked_below(to));
        let covered = CoveredLog {
            topic: Arc::clone(&log.topic),
            partition: log.partition,
            below: to,
            // What precedes the cursor it has, although this node has not routed it yet.
            except: parked.iter().copied().filter(|offset| *offset >= next).collect(),
        };
        checked.lanes.push(CheckedLane { topic, partition: number, verified, covered });
        if next < to {
            checked.ranges.push(ReplayRange { lane: lane.key, log, next, to, parked });
        }
    }
    Ok(match (is_filling, is_behind) {
        (true, _) => Checked::Filling,
        (false, true) => Checked::Behind,
        (false, false) => Checked::Usable(checked),
    })
}

impl RouterCore {
    /// Gives the shards the positions that have moved, behind the records below them. Returns whether all of them have
    /// everything.
    pub(super) fn tell_routed(&mut self, lanes: &Slab<Lane>, handed_to: i64) -> bool {
        let Self { owner, positions, links, .. } = self;
        let mut holder = owner.as_ref().map(|owner| owner.holder());
        for (_, lane) in lanes {
            let Some(position) = lane.position() else { continue };
            let claimed =
                lane.partition.as_ref().and_then(|it| Some((&it.log, it.claim.as_ref()?)));
            let is_for_all = claimed.zip(holder.as_mut()).is_none_or(|((log, claim), holder)| {
                // What the former owner has handed over to this node is delivered.
                claim.has_barrier_behind(handed_to)
                    && holder.counts_for_cursors(claim.at(log, position.next))
            });
            positions.passed(position, is_for_all);
        }
        drop(holder);
        positions.tell(links)
    }
}

impl Lane {
    /// The position of the lane for cursors: everything below it was given to all shards. `None`: not known yet, or
    /// this node keeps no tails.
    pub(super) fn position(&self) -> Option<LogPosition> {
        let tail = self.tail().filter(|tail| tail.is_filled())?;
        let next = self.next_offset()?;
        let next = self.parked.lowest().map_or(next, |parked| next.min(parked));
        let partition = self.partition.as_ref()?.log.partition.unsigned_abs();
        let check = self.check_before(next);
        Some(LogPosition { topic: tail.topic, partition, next, check })
    }

    /// The check of the record right before this offset, or [`UNCHECKED`].
    pub(super) fn check_before(&self, next: i64) -> u32 {
        let Some(tail) = self.tail() else { return UNCHECKED };
        if next == 0 {
            return tail.start_check;
        }
        if next < tail.tail.from() {
            return UNCHECKED;
        }
        let (offset, check) = tail.tail.before(next);
        match self.parked.last_below(next) {
            // It is not in the tail yet.
            Some(parked) if offset.is_none_or(|offset| parked.offset > offset) => {
                record_check(parked.appended_at_ms, parked.key)
            }
            _ => check,
        }
    }

    /// The offsets below this one that are parked, ascending.
    fn parked_below(&self, to: i64) -> Arc<[i64]> {
        if self.parked.is_empty() {
            return Arc::default();
        }
        let mut parked: Vec<_> = self.parked.offsets().filter(|offset| *offset < to).collect();
        parked.sort_unstable();
        parked.into()
    }
}
