//! One step of one lane: routes its front record, or takes the next record of its partition.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::service::cluster::newcomers::WINDOW_MAX;
use crate::service::events::envelope::{self, EventBody};
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::claim::LaneClaim;
use crate::service::routing::router::core::{Arrival, RouteOutcome, RouterCore};
use crate::service::routing::router::dead_letter::DeadLetterReason;
use crate::service::routing::router::in_flight::{LaneKey, RecordId};
use crate::service::routing::router::lane::{Blocked, Lane, PartitionLane};
use crate::service::routing::router::owner::OwnerSide;
use crate::service::routing::router::parked::ParkedRecords;
use crate::service::routing::router::record::{
    Intake, OwnedRecord, RawRecord, WaitingRecord, named_conversation,
};

/// How long a record that all sockets but some have taken may hold up its partition, ms. Long enough for a burst to all
/// clients.
const SOCKETS_MS_MAX: u64 = 1_000;

impl PartitionLane {
    /// Marks a record done and publishes the committable offset.
    pub(super) fn done(&mut self, record: RecordId) {
        if self.window.done(record.index) {
            self.committable.set(self.window.committable());
        }
    }

    /// A record that waited has been routed.
    fn routed(&mut self, record: RecordId, outcome: &RouteOutcome) {
        match outcome {
            RouteOutcome::Done => self.done(record),
            RouteOutcome::InFlight(ticket) => self.window.in_flight(record.index, *ticket),
            RouteOutcome::Blocked(_) | RouteOutcome::Waits { .. } | RouteOutcome::Unroutable(_) => {
            }
        }
    }
}

impl RouterCore {
    /// A partition that waits for its oldest record gives it up if only sockets have not taken it, and have had
    /// [`SOCKETS_MS_MAX`]: those who read do not wait for those who do not. Their events stay queued; the offset does
    /// not wait for them any more. Returns whether anything progressed.
    pub(super) fn give_up_sockets(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let Lane { key, partition: Some(partition), .. } = lane else { return false };
        let until_ms = now_ms.saturating_sub(SOCKETS_MS_MAX);
        let must_end = partition.revocation.as_ref().is_some_and(|it| it.since_ms <= until_ms);
        let mut progressed = false;
        while (must_end || !partition.window.has_room())
            && let Some((index, ticket)) = partition.window.oldest_in_flight()
            && self.in_flight.give_up_sockets(ticket, until_ms)
        {
            self.counters.records_not_awaited.add(1);
            partition.done(RecordId { lane: *key, index });
            progressed = true;
        }
        progressed
    }

    /// Routes the front record, or takes the next record of the partition. Returns whether anything
    /// progressed.
    pub(super) fn turn_lane(&mut self, lane: &mut Lane, handed_to: i64, now_ms: u64) -> bool {
        if lane.is_empty() {
            return self.take(lane, handed_to, now_ms);
        }
        !lane.is_revoked() && self.turn_front(lane, now_ms)
    }

    /// Routes the parked records whose members are known now, and gives up those that have waited for too long.
    /// Returns whether anything progressed.
    pub(super) fn turn_parked(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let Lane { key, partition: Some(partition), parked, .. } = lane else { return false };
        // A replay that is paused would miss a record that is routed below the place where it continues.
        let is_paused = |claim: &LaneClaim| claim.paused_replay.is_some();
        if partition.revocation.is_some() || partition.claim.as_ref().is_some_and(is_paused) {
            return false;
        }
        // The record that holds back the offset of its partition as far as possible is given up.
        let is_over =
            !partition.window.has_room() && parked.lowest() == Some(partition.window.committable());
        let due = parked.take_due(self.membership.arrivals(), is_over, now_ms);
        let mut progressed = false;
        self.routed_audience = None;
        for conversation in due {
            while let Some((waiting, has_too_many)) = parked.front(&conversation, &self.config) {
                if !self.has_memory() {
                    parked.retry_soon(now_ms);
                    return progressed;
                }
                let Intake::Partition(record) = waiting.intake else {
                    unreachable!("of a partition")
                };
                let raw = waiting.record.raw();
                let is_last =
                    !partition.window.has_room() && partition.window.committable() == raw.offset;
                let since_ms = waiting.since_ms.filter(|_| !has_too_many && !is_last);
                let outcome = {
                    let at = partition.claim.as_ref();
                    let at = at.map(|claim| claim.routes(&partition.log, raw.offset));
                    let gone_past =
                        partition.claim.as_ref().map_or(&[][..], |claim| claim.parked());
                    let log = &partition.log;
                    let arrival = Arrival::Partition { log, record, at, parked: gone_past };
                    self.attempt(raw, arrival, since_ms.unwrap_or(0), now_ms)
                };
                match outcome {
                    RouteOutcome::Waits { retry_ms } => {
                        parked.retry_at(&conversation, retry_ms);
                        break;
                    }
                    RouteOutcome::Blocked(_) => {
                        parked.retry_soon(now_ms);
                        return progressed;
                    }
                    RouteOutcome::Done
                    | RouteOutcome::InFlight(_)
                    | RouteOutcome::Unroutable(_) => {}
                }
                progressed = true;
                let audience = self.routed_audience.take();
                if let Some(tail) = &mut partition.tail {
                    tail.remember(raw, audience.as_ref(), true, now_ms);
                }
                if let Some(claim) = &mut partition.claim {
                    claim.unpark(raw.offset);
                }
                parked.pop(&conversation);
                if record.lane == *key {
                    partition.routed(record, &outcome);
                }
            }
        }
        progressed
    }

    /// Parks a record whose members are not known, behind the others of its conversation. Without others it is
    /// attempted again at `retry_ms`.
    fn park(
        &mut self,
        lane: &mut Lane,
        conversation: Arc<str>,
        waiting: WaitingRecord,
        retry_ms: u64,
    ) {
        self.counters.waits_for_members.add(1);
        if let Some(claim) = lane.partition.as_mut().and_then(|it| it.claim.as_mut()) {
            claim.park(waiting.record.offset);
        }
        lane.parked.push(conversation, waiting, retry_ms, &self.config);
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
                let at = partition.claim.as_ref();
                let at = at.map(|claim| claim.routes(&partition.log, raw.offset));
                let parked = partition.claim.as_ref().map_or(&[][..], |claim| claim.parked());
                let arrival =
                    Arrival::Partition { log: &partition.log, record: *record, at, parked };
                self.attempt(raw, arrival, since_ms, now_ms)
            }
            (Intake::OtherNode | Intake::Partition(_), _) => {
                self.attempt(raw, Arrival::OtherNode { first }, since_ms, now_ms)
            }
        };
        match outcome {
            RouteOutcome::Waits { retry_ms } if lane.partition.is_some() => {
                lane.blocked = None;
                let Some(waiting) = lane.pop() else { return false };
                match conversation_of(waiting.record.raw()) {
                    Some(conversation) => self.park(lane, conversation, waiting, retry_ms),
                    None => unreachable!("a record without a conversation waits for no members"),
                }
                true
            }
            RouteOutcome::Waits { .. } => {
                self.block(lane, Blocked::Members, now_ms);
                false
            }
            RouteOutcome::Blocked(blocked) => {
                self.block(lane, blocked, now_ms);
                false
            }
            RouteOutcome::Done | RouteOutcome::InFlight(_) | RouteOutcome::Unroutable(_) => {
                self.remember_front(lane, now_ms);
                let (key, waiting) = (lane.key, lane.pop());
                if let (
                    Some(WaitingRecord { intake: Intake::Partition(record), .. }),
                    Some(partition),
                ) = (waiting, &mut lane.partition)
                    && record.lane == key
                {
                    partition.routed(record, &outcome);
                }
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
            RouteOutcome::Waits { retry_ms } => {
                let deadline_ms = since_ms.saturating_add(self.config.route_retry_max_ms);
                if now_ms < deadline_ms {
                    return RouteOutcome::Waits { retry_ms: retry_ms.min(deadline_ms) };
                }
                DeadLetterReason::MembersUnavailable
            }
            outcome => return outcome,
        };
        self.give_up(raw, arrival, reason, now_ms)
    }

    /// Takes the next record of the partition and routes it in place. It is copied only if it has to
    /// wait.
    fn take(&mut self, lane: &mut Lane, handed_to: i64, now_ms: u64) -> bool {
        let Lane { key, partition, parked, .. } = lane;
        let Some(partition) = partition.as_mut().filter(|it| it.may_take()) else {
            return false;
        };
        if parked.is_full(&self.config) {
            return false;
        }
        let PartitionLane { log, source, window, committable, claim, tail, .. } = partition;
        let may_take = claim.as_mut().is_none_or(|claim| {
            if claim.owes_loss() {
                return false;
            }
            let table = self.owner.as_ref().map_or(0, |owner| owner.parts.table.next_offset());
            claim.may_take(log, (handed_to, table), now_ms, &self.counters)
        });
        if !may_take || !self.has_memory() {
            return false;
        }
        let mut waits = None;
        let took = source.poll(&mut |raw| {
            if let Some(tail) = tail.as_mut()
                && tail.fills(raw, now_ms)
            {
                return;
            }
            if committable.get().is_none() {
                // The first record of a lane whose start was not known.
                self.membership.lane_starts(log.position(raw.offset));
            }
            let at = claim.as_ref().map(|claim| claim.routes(log, raw.offset));
            let record = self.admit(key, window, raw.offset);
            committable.set_next(raw.offset + 1);
            let outcome = if !parked.is_empty() && is_behind(parked, raw) {
                RouteOutcome::Waits { retry_ms: u64::MAX }
            } else {
                let parked = claim.as_ref().map_or(&[][..], |claim| claim.parked());
                let arrival = Arrival::Partition { log, record, at, parked };
                self.attempt(raw, arrival, now_ms, now_ms)
            };
            let audience = self.routed_audience.take();
            if let Some(tail) = tail.as_mut()
                && !matches!(outcome, RouteOutcome::Blocked(_) | RouteOutcome::Waits { .. })
            {
                tail.remember(raw, audience.as_ref(), false, now_ms);
            }
            match outcome {
                RouteOutcome::Done => {
                    if window.done(record.index) {
                        committable.set(window.committable());
                    }
                }
                RouteOutcome::Blocked(_) | RouteOutcome::Waits { .. } => {
                    let intake = Intake::Partition(record);
                    let record = OwnedRecord::new(raw);
                    waits =
                        Some((WaitingRecord { record, intake, since_ms: Some(now_ms) }, outcome));
                }
                RouteOutcome::InFlight(ticket) => window.in_flight(record.index, ticket),
                RouteOutcome::Unroutable(_) => {}
            }
        });
        if let Some(tail) = tail
            && !took
            && source.is_at_end()
        {
            tail.set_filled();
        }
        match waits {
            Some((waiting, RouteOutcome::Waits { retry_ms })) => {
                let conversation = conversation_of(waiting.record.raw());
                let conversation = conversation.expect("without one it waits for no members");
                self.park(lane, conversation, waiting, retry_ms);
            }
            Some((waiting, RouteOutcome::Blocked(blocked))) => {
                lane.push(waiting);
                self.block(lane, blocked, now_ms);
            }
            Some(_) | None => {}
        }
        took
    }

    /// Puts the front record into the tail: it was routed or given up.
    fn remember_front(&mut self, lane: &mut Lane, now_ms: u64) {
        let audience = self.routed_audience.take();
        let Some((raw, tail)) = lane.front_and_tail() else { return };
        tail.remember(raw, audience.as_ref(), false, now_ms);
    }

    /// Applies the beginnings that the lane does not know yet: replays to each session what the lane
    /// routed before. Returns whether anything progressed.
    pub(super) fn apply_newcomers(&mut self, lane: &mut Lane, handed_to: i64, now_ms: u64) -> bool {
        let (key, next) = (lane.key, lane.next_offset());
        let Some(partition) = &mut lane.partition else { return false };
        let PartitionLane {
            log,
            claim: Some(claim),
            tail: Some(tail),
            revocation: None,
            window,
            committable,
            ..
        } = partition
        else {
            return false;
        };
        let Some(next) = next else { return false };
        claim.ownership.routed.store(next, Ordering::Release);
        tail.tail.trim(now_ms);
        let Some(owner) = &mut self.owner else { return false };
        let to = owner.parts.table.next_offset();
        if claim.owes_loss() {
            if claim.losses > 0 || !claim.may_route(handed_to, to) || !owner.has_room() {
                return false;
            }
            owner.tell_loss(claim, key, log);
            if !claim.owes_loss() {
                // There is no other node.
                committable.set(window.committable());
            }
            return true;
        }
        // A table that is behind the commit of the former owner catches up first.
        if claim.applied >= to || !tail.is_filled() || !claim.may_route(handed_to, to) {
            return false;
        }
        let window = owner.parts.table.newcomers(claim.applied, to);
        let from = claim.applied;
        if window.kept_from > from {
            // For too long no owner was there: who began meanwhile is forgotten.
            owner.missed_range(claim, key, log, from..window.kept_from);
        }
        // If the table is read again meanwhile, newcomers and nodes were missing in it.
        let is_whole = |core: &Self| {
            core.owner.as_ref().is_some_and(|owner| owner.parts.table.next_offset() >= to)
        };
        if !is_whole(self) {
            return false;
        }
        if window.kept_from > from {
            claim.apply(window.kept_from);
        }
        // One at a time, so that what blocks one does not repeat the others.
        for newcomer in &window.newcomers {
            if !self.owner.as_ref().is_some_and(OwnerSide::has_room) {
                return claim.applied > from;
            }
            if !self.replay_to(newcomer, (claim, tail), key, log, next, now_ms) {
                let since_ms = claim.blocked_since(newcomer.begin, now_ms);
                if now_ms < since_ms.saturating_add(self.config.route_retry_max_ms) {
                    return claim.applied > from;
                }
                // The members of what it needs are not to be had, and the sessions behind it wait.
                self.report_gap(newcomer, claim, key, log);
            }
            if !is_whole(self) {
                return claim.applied > from;
            }
            claim.apply(newcomer.begin + 1);
        }
        if window.newcomers.len() < WINDOW_MAX {
            claim.apply(to);
        }
        true
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
            // The records behind it may need a new request, if the service was unreachable. (Those of a partition
            // are parked instead, and request their members when they are taken.)
            lane.records().for_each(|record| self.request_members(record, now_ms));
        }
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

/// Whether earlier records of its conversation are parked.
fn is_behind(parked: &ParkedRecords, raw: RawRecord<'_>) -> bool {
    let Ok(record) = envelope::decode(raw.value) else { return false };
    named_conversation(&record, raw).is_some_and(|conversation| parked.has(conversation))
}

/// The conversation of a record. `None`: it is not an event of a conversation.
fn conversation_of(raw: RawRecord<'_>) -> Option<Arc<str>> {
    let record = envelope::decode(raw.value).ok()?;
    named_conversation(&record, raw).map(Arc::from)
}
