//! One step of one lane.

use crate::service::events::envelope::{self, Body};
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::core::{Core, Place, Step};
use crate::service::routing::router::dead_letter::Reason;
use crate::service::routing::router::flight::{LaneKey, LogRecord};
use crate::service::routing::router::lane::{Lane, LogLane, Origin, Pending, Wait};
use crate::service::routing::router::record::{OwnedRecord, RawRecord};

impl LogLane {
    /// A record is done: tells how far the partition may be committed.
    pub(super) fn done(&mut self, record: LogRecord) {
        if self.window.done(record.taken) {
            self.progress.set(self.window.committable());
        }
    }
}

impl Core {
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
        let in_vain = match lane.waiting {
            Some(Wait::Room(shard)) => !self.links.has_room(shard),
            Some(Wait::HandOffs) => !self.other_nodes_have_room(),
            Some(Wait::Members | Wait::DeadLetter) | None => false,
        };
        if in_vain || lane.is_empty() || !self.has_memory() {
            return false;
        }
        let (Some(pending), log) = lane.front() else { return false };
        let first = pending.since_ms.is_none();
        let since_ms = *pending.since_ms.get_or_insert(now_ms);
        let raw = pending.record.raw();
        let step = match (&pending.origin, log) {
            (Origin::Users(users), _) => self.route_to_users(raw.value, users),
            (Origin::Log(record), Some(log)) => {
                let place = Place::Log { log: &log.log, record: *record };
                self.attempt(raw, place, since_ms, now_ms)
            }
            (Origin::Remote | Origin::Log(_), _) => {
                self.attempt(raw, Place::Remote { first }, since_ms, now_ms)
            }
        };
        match step {
            Step::Wait(wait) => {
                self.begin_wait(lane, wait, now_ms);
                false
            }
            Step::Done => {
                let (key, pending) = (lane.key, lane.pop());
                if let (Some(Pending { origin: Origin::Log(record), .. }), Some(log)) =
                    (pending, &mut lane.log)
                    && record.lane == key
                {
                    log.done(record);
                }
                lane.waiting = None;
                true
            }
            Step::Flying | Step::Unroutable(_) => {
                lane.pop();
                lane.waiting = None;
                true
            }
        }
    }

    /// Routes a record, or gives it up if it cannot be routed or has waited long enough.
    fn attempt(
        &mut self,
        raw: RawRecord<'_>,
        place: Place<'_>,
        since_ms: u64,
        now_ms: u64,
    ) -> Step {
        let reason = match self.route(raw, place, since_ms, now_ms) {
            Step::Unroutable(reason) => reason,
            Step::Wait(Wait::Members)
                if now_ms >= since_ms.saturating_add(self.config.route_retry_max_ms) =>
            {
                Reason::MembersUnavailable
            }
            step => return step,
        };
        self.give_up(raw, place, reason)
    }

    /// Takes the next record of the lane's partition and routes it from where it lies: it is copied
    /// only if it has to wait.
    fn take(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        let key = &mut lane.key;
        let Some(log) = lane.log.as_mut().filter(|log| log.takes()) else { return false };
        if !self.has_memory() {
            return false;
        }
        let LogLane { log, source, window, progress, .. } = log;
        let mut waits = None;
        let took = source.poll(&mut |raw| {
            self.counters.records.add(1);
            if raw.offset < window.next() {
                self.restart(key, window, raw.offset);
            }
            let record = LogRecord { lane: *key, taken: window.take(raw.offset) };
            match self.attempt(raw, Place::Log { log, record }, now_ms, now_ms) {
                Step::Done => {
                    if window.done(record.taken) {
                        progress.set(window.committable());
                    }
                }
                Step::Wait(wait) => {
                    let origin = Origin::Log(record);
                    let record = OwnedRecord::new(raw);
                    waits = Some((Pending { record, origin, since_ms: Some(now_ms) }, wait));
                }
                Step::Flying | Step::Unroutable(_) => {}
            }
        });
        if let Some((pending, wait)) = waits {
            lane.push(pending);
            self.begin_wait(lane, wait, now_ms);
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

    fn begin_wait(&mut self, lane: &mut Lane, wait: Wait, now_ms: u64) {
        if lane.waiting == Some(wait) {
            return;
        }
        lane.waiting = Some(wait);
        if wait == Wait::Members {
            self.counters.waits_for_members.add(1);
            // Those behind it may have to be asked for again, if the service was away.
            lane.records().for_each(|record| self.ask_for_members(record, now_ms));
        }
    }

    /// While the front waits for members, asks for those of the records behind it.
    fn look_ahead(&mut self, lane: &mut Lane, now_ms: u64) -> bool {
        if lane.waiting != Some(Wait::Members)
            || lane.len() >= self.config.lookahead_records_max
            || lane.bytes() >= self.config.lookahead_bytes_max
        {
            return false;
        }
        let key = &mut lane.key;
        let Some(log) = lane.log.as_mut().filter(|log| log.takes()) else { return false };
        let LogLane { source, window, .. } = log;
        let mut taken = None;
        let took = source.poll(&mut |raw| {
            self.counters.records.add(1);
            if raw.offset < window.next() {
                self.restart(key, window, raw.offset);
            }
            self.ask_for_members(raw, now_ms);
            let origin = Origin::Log(LogRecord { lane: *key, taken: window.take(raw.offset) });
            taken = Some(Pending { record: OwnedRecord::new(raw), origin, since_ms: None });
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
            && !matches!(record.body, Body::ConversationCreated { .. })
        {
            let _ = self.membership.lookup(conversation, None, now_ms);
        }
    }
}
