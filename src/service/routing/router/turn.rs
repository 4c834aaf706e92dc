//! One step of one lane: routes its front record, or takes the next record of its partition.

use crate::service::events::envelope::{self, EventBody};
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::core::{Arrival, RouteOutcome, RouterCore};
use crate::service::routing::router::dead_letter::DeadLetterReason;
use crate::service::routing::router::in_flight::{LaneKey, RecordId};
use crate::service::routing::router::lane::{Blocked, Intake, Lane, PartitionLane, WaitingRecord};
use crate::service::routing::router::record::{OwnedRecord, RawRecord};

impl PartitionLane {
    /// Marks a record done and publishes the committable offset.
    pub(super) fn done(&mut self, record: RecordId) {
        if self.window.done(record.index) {
            self.committable.set(self.window.committable());
        }
    }
}

impl RouterCore {
    /// Routes the front record, or takes the next record of the partition. Returns whether anything
    /// progressed.
    pub(super) fn turn_lane(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        if lane.is_empty() {
            return self.take(lane, now_ms);
        }
        !lane.is_revoked() && (self.turn_front(lane, now_ms) || self.look_ahead(lane, now_ms))
    }

    /// Routes the front record. Returns whether it has left the lane.
    pub(super) fn turn_front(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let still_blocked = match lane.blocked {
            Some(Blocked::RingFull(shard)) => !self.links.has_room(shard),
            Some(Blocked::HandOffs) => !self.other_nodes_have_room(),
            Some(Blocked::Members | Blocked::DeadLetter) | None => false,
        };
        if still_blocked || lane.is_empty() || !self.has_memory() {
            return false;
        }
        let (Some(waiting), partition) = lane.front() else { return false };
        let first = waiting.since_ms.is_none();
        let since_ms = *waiting.since_ms.get_or_insert(now_ms);
        let raw = waiting.record.raw();
        let outcome = match (&waiting.intake, partition) {
            (Intake::ToUsers(users), _) => self.route_to_users(raw.value, users),
            (Intake::Partition(record), Some(partition)) => {
                let arrival = Arrival::Partition { log: &partition.log, record: *record };
                self.attempt(raw, arrival, since_ms, now_ms)
            }
            (Intake::OtherNode | Intake::Partition(_), _) => {
                self.attempt(raw, Arrival::OtherNode { first }, since_ms, now_ms)
            }
        };
        match outcome {
            RouteOutcome::Blocked(blocked) => {
                self.block(lane, blocked, now_ms);
                false
            }
            RouteOutcome::Done => {
                let (key, waiting) = (lane.key, lane.pop());
                if let (
                    Some(WaitingRecord { intake: Intake::Partition(record), .. }),
                    Some(partition),
                ) = (waiting, &mut lane.partition)
                    && record.lane == key
                {
                    partition.done(record);
                }
                lane.blocked = None;
                true
            }
            RouteOutcome::InFlight | RouteOutcome::Unroutable(_) => {
                lane.pop();
                lane.blocked = None;
                true
            }
        }
    }

    /// Routes a record, or gives it up if it cannot be routed or has waited for too long.
    fn attempt(
        &mut self,
        raw: RawRecord<'_>,
        arrival: Arrival<'_>,
        since_ms: u64,
        now_ms: u64,
    ) -> RouteOutcome {
        let reason = match self.route(raw, arrival, since_ms, now_ms) {
            RouteOutcome::Unroutable(reason) => reason,
            RouteOutcome::Blocked(Blocked::Members)
                if now_ms >= since_ms.saturating_add(self.config.route_retry_max_ms) =>
            {
                DeadLetterReason::MembersUnavailable
            }
            outcome => return outcome,
        };
        self.give_up(raw, arrival, reason)
    }

    /// Takes the next record of the partition and routes it in place. It is copied only if it has to
    /// wait.
    fn take(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let key = &mut lane.key;
        let Some(partition) = lane.partition.as_mut().filter(|it| it.may_take()) else {
            return false;
        };
        if !self.has_memory() {
            return false;
        }
        let PartitionLane { log, source, window, committable, .. } = partition;
        let mut waits = None;
        let took = source.poll(&mut |raw| {
            let record = self.admit(key, window, raw.offset);
            match self.attempt(raw, Arrival::Partition { log, record }, now_ms, now_ms) {
                RouteOutcome::Done => {
                    if window.done(record.index) {
                        committable.set(window.committable());
                    }
                }
                RouteOutcome::Blocked(blocked) => {
                    let intake = Intake::Partition(record);
                    let record = OwnedRecord::new(raw);
                    waits =
                        Some((WaitingRecord { record, intake, since_ms: Some(now_ms) }, blocked));
                }
                RouteOutcome::InFlight | RouteOutcome::Unroutable(_) => {}
            }
        });
        if let Some((waiting, blocked)) = waits {
            lane.push(waiting);
            self.block(lane, blocked, now_ms);
        }
        took
    }

    /// Takes a record into the window. If the partition went back to an earlier offset (truncated or
    /// recreated), the window restarts there, and reports for earlier records become stale.
    fn admit(&mut self, key: &mut LaneKey, window: &mut OffsetWindow, offset: i64) -> RecordId {
        self.counters.records.add(1);
        if offset < window.next() {
            self.counters.records_repeated.add(1);
            *key = self.next_lane_key(key.slot());
            *window = OffsetWindow::new(offset, self.config.window_records_max);
        }
        RecordId { lane: *key, index: window.take(offset) }
    }

    fn block(&mut self, lane: &mut Lane, blocked: Blocked, now_ms: u64) {
        if lane.blocked == Some(blocked) {
            return;
        }
        lane.blocked = Some(blocked);
        if blocked == Blocked::Members {
            self.counters.waits_for_members.add(1);
            // The records behind it may need a new request, if the service was unreachable.
            lane.records().for_each(|record| self.request_members(record, now_ms));
        }
    }

    /// While the front record waits for members, takes one more record and requests its members.
    fn look_ahead(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        if lane.blocked != Some(Blocked::Members)
            || lane.len() >= self.config.lookahead_records_max
            || lane.bytes() >= self.config.lookahead_bytes_max
        {
            return false;
        }
        let key = &mut lane.key;
        let Some(partition) = lane.partition.as_mut().filter(|it| it.may_take()) else {
            return false;
        };
        let PartitionLane { source, window, .. } = partition;
        let mut taken = None;
        let took = source.poll(&mut |raw| {
            let intake = Intake::Partition(self.admit(key, window, raw.offset));
            self.request_members(raw, now_ms);
            taken = Some(WaitingRecord { record: OwnedRecord::new(raw), intake, since_ms: None });
        });
        if let Some(waiting) = taken {
            lane.push(waiting);
        }
        took
    }

    /// Requests the members of a record early. The result is looked up again when it is routed.
    fn request_members(&self, raw: RawRecord<'_>, now_ms: u64) {
        if let Ok(record) = envelope::decode(raw.value)
            && let Some(conversation) = record.conversation()
            // It contains its members.
            && !matches!(record.body, EventBody::ConversationCreated { .. })
        {
            let _ = self.membership.lookup(conversation, None, now_ms);
        }
    }
}
