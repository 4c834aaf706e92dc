//! One pass over the tails of a router, for all pulls that wait.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use hashbrown::HashMap;
use slab::Slab;

use crate::domain::cursor::CursorExpired;
use crate::domain::members::Members;
use crate::service::cluster::tail::{TailEntry, TailRecord};
use crate::service::cluster::wire::{self, RangeStatus, ReplayAnswer};
use crate::service::events::envelope::{self, EventBody};
use crate::service::members::user_lists::UserList;
use crate::service::routing::replays::ReplayedRecord;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::in_flight::LaneKey;
use crate::service::routing::router::lane::Lane;
use crate::service::routing::router::lane_tail::LaneTail;
use crate::service::routing::router::record::named_conversation;
use crate::service::routing::router::replay_requests::{
    Answers, PullAnswer, PulledRecords, ReplayChunkMax, ReplayRange, answered, to_wire,
};

/// Records that one step of a pass looks at, and members. A step takes about 100 µs.
const STEP_WORK: usize = 4_096;
/// The work for a record whose members are not known: it has to be decoded.
const UNRESOLVED_WORK: usize = 16;
/// Bytes that one step copies at most; one record may exceed it.
const STEP_BYTES: usize = 256 << 10;
/// Records of a filled tail whose members are looked up at a time.
const RESOLVED_AT_ONCE: usize = 256;

/// A pull, in a pass or waiting for the next one.
pub(super) struct ActivePull {
    pub(super) user: Arc<str>,
    pub(super) ranges: Vec<ReplayRange>,
    pub(super) max: ReplayChunkMax,
    /// Taken when it is answered.
    pub(super) answer: Option<PullAnswer>,
    pub(super) records: Vec<ReplayedRecord>,
    pub(super) bytes: usize,
    /// The conversations of the user, if they were needed.
    pub(super) list: Option<UserList>,
    /// Since when it waits until it is known which records are the user's, steady time in ms.
    pub(super) unready_since_ms: Option<u64>,
}

impl ActivePull {
    pub(super) fn new(
        user: Arc<str>,
        ranges: Vec<ReplayRange>,
        max: ReplayChunkMax,
        answer: PullAnswer,
        list: Option<UserList>,
    ) -> Self {
        let (answer, records, unready_since_ms) = (Some(answer), Vec::new(), None);
        Self { user, ranges, max, answer, records, bytes: 0, list, unready_since_ms }
    }

    pub(super) fn answer(&mut self, result: Result<(), CursorExpired>, answers: &mut Answers) {
        let Some(answer) = self.answer.take() else { return };
        let (records, mut ranges) =
            (std::mem::take(&mut self.records), std::mem::take(&mut self.ranges));
        match answer {
            PullAnswer::Reader(answer) => {
                ranges.retain(|range| range.next < range.to);
                let list = self.list.take();
                // Fails only if the session has ended.
                let _ = answer.send(result.map(|()| PulledRecords { records, ranges, list }));
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
                .filter(|range| range.lane == lane && (range.next..range.to).contains(&offset))
                .any(|range| range.parked.binary_search(&offset).is_err())
    }

    /// Leaves the pass, with what it has got.
    fn withdraw(&mut self) -> Self {
        Self {
            user: Arc::clone(&self.user),
            ranges: std::mem::take(&mut self.ranges),
            max: self.max,
            answer: self.answer.take(),
            records: std::mem::take(&mut self.records),
            bytes: self.bytes,
            list: self.list.take(),
            unready_since_ms: self.unready_since_ms,
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.records.is_empty()
            || (self.records.len() < self.max.records && self.bytes + bytes <= self.max.bytes)
    }
}

/// A pass over the tails for some pulls.
pub(super) struct ReplayPass {
    pub(super) pulls: Vec<ActivePull>,
    by_user: HashMap<Arc<str>, Vec<u32>>,
    /// Which pulls want the records of a list. Keeps the list, so that its address is not used again.
    by_list: HashMap<usize, (Members, Vec<u32>)>,
    /// Those whose user's own list is known, by its conversations.
    by_conversation: HashMap<Arc<str>, Vec<u32>>,
    /// The lanes that are not done, each with the offset at which it continues. The first one is in progress.
    lanes: VecDeque<(LaneKey, i64)>,
    pub(super) answers: Answers,
    /// Pulls that have left the pass, because it is not known after all which records are theirs.
    pub(super) unready: Vec<ActivePull>,
}

/// Result of a step of a pass.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PassStep {
    Progressed,
    Done,
}

impl ReplayPass {
    pub(super) fn new(pulls: Vec<ActivePull>) -> Self {
        let mut by_user: HashMap<Arc<str>, Vec<u32>> = HashMap::new();
        let mut by_conversation: HashMap<Arc<str>, Vec<u32>> = HashMap::new();
        let mut lanes: VecDeque<(LaneKey, i64)> = VecDeque::new();
        for (index, pull) in (0..).zip(&pulls) {
            by_user.entry(Arc::clone(&pull.user)).or_default().push(index);
            for conversation in pull.list.iter().flat_map(|list| list.iter()) {
                by_conversation.entry(Arc::clone(conversation)).or_default().push(index);
            }
            for range in &pull.ranges {
                match lanes.iter_mut().find(|(lane, _)| *lane == range.lane) {
                    Some((_, next)) => *next = range.next.min(*next),
                    None => lanes.push_back((range.lane, range.next)),
                }
            }
        }
        let (by_list, answers, unready) = (HashMap::new(), Vec::new(), Vec::new());
        Self { pulls, by_user, by_list, by_conversation, lanes, answers, unready }
    }

    /// Looks at some records of the lane in progress.
    pub(super) fn step(
        &mut self,
        core: &mut RouterCore,
        lanes: &mut Slab<Lane>,
        now_ms: u64,
    ) -> PassStep {
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
        let routed_from = lane.tail().map_or(i64::MIN, LaneTail::routed_from);
        self.fail_doubtful(core, key, routed_from);
        let (next, unresolved) = self.collect(core, lane, key, from);
        if let Some(front) = self.lanes.front_mut() {
            front.1 = next;
        }
        if unresolved {
            if !core.resolve_some(lane, next, now_ms) {
                // The members are not cached any more.
                let leaves = |pull: &&mut ActivePull| pull.list.is_none() && pull.wants(key, next);
                let leaving = self.pulls.iter_mut().filter(leaves);
                self.unready.extend(leaving.map(ActivePull::withdraw));
            }
            return PassStep::Progressed;
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

    /// Pulls that want records which this lane has not routed fail if their user may have joined or left a conversation
    /// since: the list of then is not certain.
    fn fail_doubtful(&mut self, core: &RouterCore, lane: LaneKey, routed_from: i64) {
        let Self { pulls, answers, .. } = self;
        for pull in pulls {
            let wants_some = |range: &mut ReplayRange| range.next < range.to.min(routed_from);
            if pull.answer.is_some()
                && pull.range(lane).is_some_and(wants_some)
                && core.membership.may_have_changed(&pull.user)
            {
                pull.answer(Err(CursorExpired::MembersUnknown), answers);
            }
        }
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

    /// Copies what is wanted of the next records from `from` on. Returns where to continue, and whether the members of
    /// the record there are not known.
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
            let (interested, cost) = match entry.members {
                Some(members) => self.interested(members, &entry),
                None if self.is_wanted_without_list(key, entry.record.offset) => {
                    return self.continue_at(key, entry.record.offset, true);
                }
                None => (self.interested_by_list(entry.record), UNRESOLVED_WORK),
            };
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

    /// Whether a pull wants this record whose user's own list is not known.
    fn is_wanted_without_list(&self, lane: LaneKey, offset: i64) -> bool {
        self.pulls.iter().any(|pull| pull.list.is_none() && pull.wants(lane, offset))
    }

    /// The pulls of users to whom their own lists, or the record itself, give this record.
    fn interested_by_list(&self, record: TailRecord<'_>) -> Vec<u32> {
        let Ok(event) = envelope::decode(record.value) else { return Vec::new() };
        let conversation = named_conversation(&event, record.into());
        let of_conversation = match &event.body {
            // It has its members.
            EventBody::ConversationCreated { .. } => None,
            _ => conversation.and_then(|conversation| self.by_conversation.get(conversation)),
        };
        let mut interested: Vec<u32> = of_conversation.cloned().unwrap_or_default();
        let named: &[&str] = match &event.body {
            EventBody::ConversationCreated { members, .. } => members,
            EventBody::MembershipChanged { user, .. } => std::slice::from_ref(user),
            _ => &[],
        };
        let named = named.iter().filter_map(|user| self.by_user.get(*user));
        interested.extend(named.flatten());
        interested.sort_unstable();
        interested.dedup();
        interested
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
    /// Finds out who received the next records of a filled tail from `from` on. Returns whether the first one is known
    /// now.
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
