//! Requests of group mode: checks and pulls of the partitions that this router owns.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::domain::cursor::{CursorExpired, Verified};
use crate::service::cluster::ports::NodeEpoch;
use crate::service::cluster::wire::{self, AnsweredRange, RangeStatus, ReplayAnswer};
use crate::service::members::user_lists::UserList;
use crate::service::routing::replays::ReplayedRecord;
use crate::service::routing::router::answers::ReplayAnswers;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::in_flight::LaneKey;
use crate::service::routing::router::lane::Lane;
use crate::service::routing::router::partition::TopicPartition;

/// The records of one lane that a session has missed.
#[derive(Clone, Debug)]
pub(super) struct ReplayRange {
    pub(super) lane: LaneKey,
    pub(super) log: TopicPartition,
    /// The first offset that is not replayed yet.
    pub(super) next: i64,
    /// The first offset that the session gets live.
    pub(super) to: i64,
    /// Offsets below it that it gets live all the same, ascending: these records were parked at the check. Not
    /// replayed, so that a record of the same conversation is not before an earlier one.
    pub(super) parked: Arc<[i64]>,
}

/// Answer to a pull.
#[derive(Debug)]
pub(super) struct PulledRecords {
    pub(super) records: Vec<ReplayedRecord>,
    /// What is left.
    pub(super) ranges: Vec<ReplayRange>,
    /// The conversations of the user, for the next pull, if they were needed.
    pub(super) list: Option<UserList>,
}

/// Bounds of one chunk. A single record may be longer.
#[derive(Clone, Copy, Debug)]
pub struct ReplayChunkMax {
    /// Records.
    pub records: usize,
    /// Bytes of their values.
    pub bytes: usize,
}

/// Where the answer to a request goes.
#[derive(Clone)]
pub(super) enum AnswerTo {
    ThisNode(Arc<ReplayAnswers>),
    Node(NodeEpoch),
}

/// Where the records of a pull go.
pub(super) enum PullAnswer {
    Reader(oneshot::Sender<Result<PulledRecords, CursorExpired>>),
    Request { id: u64, to: AnswerTo },
}

/// Answers to requests, to be sent.
pub(super) type Answers = Vec<(AnswerTo, ReplayAnswer)>;

pub(super) fn answered(
    range: wire::ReplayRange,
    result: Result<RangeStatus, CursorExpired>,
) -> AnsweredRange {
    let (status, expired) = match result {
        Ok(status) => (status, 0),
        Err(why) => (RangeStatus::Expired, why as u32),
    };
    AnsweredRange {
        range: Some(range),
        status: status.into(),
        expired,
        position: -1,
        generation: 0,
    }
}

pub(super) fn to_wire(record: ReplayedRecord) -> wire::ReplayedRecord {
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
pub(super) fn check_range(
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
    let generation = claim.ownership.generation;
    let (at, theirs) = (position.next, std::mem::replace(&mut range.check, position.check));
    if range.next < 0 {
        // It wants nothing of what precedes its 101.
        range.to = range.next;
        let answered = answered(range, Ok(RangeStatus::Needless));
        return AnsweredRange { position: at, generation, ..answered };
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
    let result = match Verified::of(range.next, theirs, lane.check_before(range.next), next) {
        Verified::Yes => Ok(RangeStatus::Verified),
        Verified::NotKnown => Ok(RangeStatus::NotKnown),
        Verified::Needless => Ok(RangeStatus::Needless),
        Verified::No => Err(CursorExpired::OtherLog),
    };
    AnsweredRange { position: at, generation, ..answered(range, result) }
}
