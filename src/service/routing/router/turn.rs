//! One step of one lane.

use crate::service::events::envelope::{self, EventBody};
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::core::{Arrival, RouteOutcome, RouterCore};
use crate::service::routing::router::dead_letter::DeadLetterReason;
use crate::service::routing::router::in_flight::{LaneKey, RecordId};
use crate::service::routing::router::lane::{Blocked, Intake, Lane, PartitionLane, WaitingRecord};
use crate::service::routing::router::record::{OwnedRecord, RawRecord};

impl PartitionLane {
    /// A record is done: tells how far the partition may be committed.
    pub(super) fn done(&mut self, record: RecordId) {
        if self.window.done(record.index) {
            self.committable.set(self.window.committable());
        }
    }
}

impl RouterCore {
    /// Routes the record at the front of a lane, or takes the next one of its partition. Returns
    /// whether anything moved.
    pub(super) fn turn_lane(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        if lane.is_empty() {
            return self.take(lane, now_ms);
        }
        let revoked = lane.log.as_ref().is_some_and(|log| log.revoked.is_some());
        !revoked && (self.turn_front(lane, now_ms) || self.look_ahead(lane, now_ms))
    }

    /// Routes the record at the front. Returns whether it has left the lane.
    pub(super) fn turn_front(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let still_blocked = match lane.blocked {
            Some(Blocked::RingFull(shard)) => !self.links.has_room(shard),
            Some(Blocked::HandOffs) => !self.other_nodes_have_room(),
            Some(Blocked::Members | Blocked::DeadLetter) | None => false,
        };
        if still_blocked || lane.is_empty() || !self.has_memory() {
            return false;
        }
        let (Some(pending), log) = lane.front() else { return false };
        let first = pending.since_ms.is_none();
        let since_ms = *pending.since_ms.get_or_insert(now_ms);
        let raw = pending.record.raw();
        let step = match (&pending.intake, log) {
            (Intake::ToUsers(users), _) => self.route_to_users(raw.value, users),
            (Intake::Partition(record), Some(log)) => {
                let arrival = Arrival::Partition { log: &log.log, record: *record };
                self.attempt(raw, arrival, since_ms, now_ms)
            }
            (Intake::OtherNode | Intake::Partition(_), _) => {
                self.attempt(raw, Arrival::OtherNode { first }, since_ms, now_ms)
            }
        };
        match step {
            RouteOutcome::Blocked(blocked) => {
                self.begin_wait(lane, blocked, now_ms);
                false
            }
            RouteOutcome::Done => {
                let (key, pending) = (lane.key, lane.pop());
                if let (Some(WaitingRecord { intake: Intake::Partition(record), .. }), Some(log)) =
                    (pending, &mut lane.log)
                    && record.lane == key
                {
                    log.done(record);
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

    /// Routes a record, or gives it up if it cannot be routed or has waited long enough.
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
            step => return step,
        };
        self.give_up(raw, arrival, reason)
    }

    /// Takes the next record of the lane's partition and routes it from where it lies: it is copied
    /// only if it has to wait.
    fn take(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let key = &mut lane.key;
        let Some(log) = lane.log.as_mut().filter(|log| log.takes()) else { return false };
        if !self.has_memory() {
            return false;
        }
        let PartitionLane { log, source, window, committable, .. } = log;
        let mut waits = None;
        let took = source.poll(&mut |raw| {
            self.counters.records.add(1);
            if raw.offset < window.next() {
                self.restart(key, window, raw.offset);
            }
            let record = RecordId { lane: *key, index: window.take(raw.offset) };
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
        if let Some((pending, blocked)) = waits {
            lane.push(pending);
            self.begin_wait(lane, blocked, now_ms);
        }
        took
    }

    /// The partition has gone back (it was truncated, or made anew): what was taken before does not
    /// count any more.
    fn restart(&mut self, key: &mut LaneKey, window: &mut OffsetWindow, offset: i64) {
        self.counters.records_repeated.add(1);
        *key = self.next_lane_key(key.slot());
        *window = OffsetWindow::new(offset, self.config.window_records_max);
    }

    fn begin_wait(&mut self, lane: &mut Lane, blocked: Blocked, now_ms: u64) {
        if lane.blocked == Some(blocked) {
            return;
        }
        lane.blocked = Some(blocked);
        if blocked == Blocked::Members {
            self.counters.waits_for_members.add(1);
            // Those behind it may have to be asked for again, if the service was away.
            lane.records().for_each(|record| self.ask_for_members(record, now_ms));
        }
    }

    /// While the front waits for members, asks for those of the records behind it.
    fn look_ahead(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        if lane.blocked != Some(Blocked::Members)
            || lane.len() >= self.config.lookahead_records_max
            || lane.bytes() >= self.config.lookahead_bytes_max
        {
            return false;
        }
        let key = &mut lane.key;
        let Some(log) = lane.log.as_mut().filter(|log| log.takes()) else { return false };
        let PartitionLane { source, window, .. } = log;
        let mut taken = None;
        let took = source.poll(&mut |raw| {
            self.counters.records.add(1);
            if raw.offset < window.next() {
                self.restart(key, window, raw.offset);
            }
            self.ask_for_members(raw, now_ms);
            let intake = Intake::Partition(RecordId { lane: *key, index: window.take(raw.offset) });
            taken = Some(WaitingRecord { record: OwnedRecord::new(raw), intake, since_ms: None });
        });
        if let Some(pending) = taken {
            lane.push(pending);
        }
        took
    }

    /// Only asks: what is found is found again when the record's turn comes.
    fn ask_for_members(&self, raw: RawRecord<'_>, now_ms: u64) {
        if let Ok(record) = envelope::decode(raw.value)
            && let Some(conversation) = record.conversation()
            // It brings its members along.
            && !matches!(record.body, EventBody::ConversationCreated { .. })
        {
            let _ = self.membership.lookup(conversation, None, now_ms);
        }
    }
}
