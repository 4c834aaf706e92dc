//! Replays from the tail of a lane to one session that has just begun.

use std::ops::Range;
use std::sync::Arc;

use crate::domain::members::Members;
use crate::service::cluster::holder::{Arrived, SessionSerial};
use crate::service::cluster::newcomers::Newcomer;
use crate::service::cluster::tail::{TailAudience, TailEntry, TailRecord};
use crate::service::events::conversation_key::log_position;
use crate::service::events::envelope::{self, EventBody};
use crate::service::members::membership::Lookup;
use crate::service::routing::router::claim::LaneClaim;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::in_flight::LaneKey;
use crate::service::routing::router::lane_tail::LaneTail;
use crate::service::routing::router::partition::TopicPartition;

/// Records of one tail whose members are requested at a time.
const LOOKUPS_MAX: usize = 64;

impl RouterCore {
    /// Replays to a newcomer what the lane routed, or skipped as routed before, between the position that
    /// was known when the session was admitted and `next`. Returns false if that is not possible now: the
    /// lane continues later where it has stopped.
    pub(super) fn replay_to(
        &mut self,
        newcomer: &Newcomer,
        (claim, tail): (&mut LaneClaim, &mut LaneTail),
        key: LaneKey,
        log: &TopicPartition,
        next: i64,
        now_ms: u64,
    ) -> bool {
        let Some(owner) = &mut self.owner else { return true };
        let is_own = newcomer.epoch == owner.parts.table.own_epoch();
        if !is_own {
            owner.owes(newcomer.node);
        } else if newcomer.serial > claim.direct_after {
            // It got everything directly, from the start of the lane on.
            return true;
        }
        let paused = claim.paused_replay.filter(|(begin, _)| *begin == newcomer.begin);
        let from = match paused {
            Some((_, from)) => Some(from),
            None => owner.wanted_from(newcomer, log),
        };
        if from.is_some_and(|from| from >= next) {
            return true;
        }
        let Some(from) = from.filter(|from| *from >= tail.tail.from()) else {
            self.report_gap(newcomer, claim, key, log);
            return true;
        };
        if !self.resolve(tail, log, from..next, now_ms) {
            return false;
        }
        let wanted = tail.tail.range(from, next).filter(|entry| entry.is_for(&newcomer.user));
        for TailEntry { record, .. } in wanted {
            let replayed = if is_own {
                self.replay_here(newcomer.serial, claim, log, record)
            } else {
                self.replay_elsewhere(newcomer, claim, key, log, record)
            };
            if !replayed {
                claim.paused_replay = Some((newcomer.begin, record.offset));
                return false;
            }
            self.counters.replays.add(1);
        }
        true
    }

    /// Finds out who received the records of the tail that this lane did not route. Returns false if some
    /// members are not known yet; what is known is kept.
    fn resolve(
        &self,
        LaneTail { tail, .. }: &mut LaneTail,
        log: &TopicPartition,
        range: Range<i64>,
        now_ms: u64,
    ) -> bool {
        let unresolved = tail.unresolved(range.start, range.end);
        let mut pending = 0;
        let mut resolved = Vec::new();
        for entry in unresolved {
            match self.audience_of(entry, log, now_ms) {
                Some(audience) => resolved.push((entry.offset, audience)),
                None => pending += 1,
            }
            if pending >= LOOKUPS_MAX {
                break;
            }
        }
        resolved.into_iter().for_each(|(offset, audience)| tail.resolve(offset, &audience));
        pending == 0
    }

    /// Who received a record that another node routed. `None`: not known yet.
    pub(super) fn audience_of(
        &self,
        entry: TailRecord<'_>,
        log: &TopicPartition,
        now_ms: u64,
    ) -> Option<TailAudience> {
        let audience = |members: Members, other| Some(TailAudience { members, other });
        let nobody = || audience(Members::default(), None);
        let Ok(record) = envelope::decode(entry.value) else { return nobody() };
        let mut other = None;
        match &record.body {
            EventBody::ConversationCreated { members, .. } => {
                return audience(members.iter().collect(), None);
            }
            EventBody::MembershipChanged { user, .. } => other = Some(Arc::from(*user)),
            _ => {}
        }
        let key = entry.key.and_then(|key| std::str::from_utf8(key).ok());
        let Some(conversation) = record.conversation().or(key) else { return nobody() };
        match self.membership.lookup(conversation, Some(log.position(entry.offset)), now_ms) {
            Lookup::Members(members) => audience(members, other),
            Lookup::Pending | Lookup::Failing { .. } => None,
            Lookup::Absent | Lookup::Unknown => audience(Members::default(), other),
        }
    }

    /// Returns false if the queue to other nodes is full.
    fn replay_elsewhere(
        &mut self,
        newcomer: &Newcomer,
        claim: &mut LaneClaim,
        key: LaneKey,
        log: &TopicPartition,
        record: TailRecord<'_>,
    ) -> bool {
        let Some(owner) = &mut self.owner else { return true };
        if !owner.has_room() {
            return false;
        }
        // Not there any more: its sessions have ended.
        let Some(to) = owner.parts.table.address(newcomer.node) else { return true };
        if to.epoch == newcomer.epoch {
            owner.replay(claim, key, log, record, (to, newcomer.serial.0));
        }
        true
    }

    /// Returns false if the ring is full.
    fn replay_here(
        &mut self,
        serial: SessionSerial,
        claim: &LaneClaim,
        log: &TopicPartition,
        raw: TailRecord<'_>,
    ) -> bool {
        let Some(owner) = &self.owner else { return true };
        let at = claim.at(log, raw.offset);
        let session = {
            let mut holder = owner.holder();
            if holder.arrive(at, claim.parked()) == Arrived::Zombie {
                return true;
            }
            holder.find(serial).filter(|session| holder.needs(*session, at))
        };
        let (Some(session), Ok(record)) = (session, envelope::decode(raw.value)) else {
            return true;
        };
        self.links.clear();
        self.links.gather(session);
        if self.links.full().is_some() {
            return false;
        }
        let place = log_position(&log.topic, log.partition, raw.offset);
        self.deliver(&record, Some(place), raw.appended_at_ms, None);
        if let Some(owner) = &self.owner {
            let mut holder = owner.holder();
            holder.delivered(at, claim.parked(), std::iter::once(session));
            holder.replayed(at);
        }
        true
    }

    /// Events of the session are not in the tail any more.
    pub(super) fn report_gap(
        &mut self,
        newcomer: &Newcomer,
        claim: &mut LaneClaim,
        key: LaneKey,
        log: &TopicPartition,
    ) {
        self.counters.gaps.add(1);
        let Some(owner) = &mut self.owner else { return };
        let is_own = newcomer.epoch == owner.parts.table.own_epoch();
        if is_own {
            let mut holder = owner.holder();
            if let Some(session) = holder.find(newcomer.serial) {
                // A later event would hide the gap.
                holder.ended(session);
                drop(holder);
                Arc::clone(&owner.parts.missed).missed(session);
            }
        } else if let Some(to) = owner.parts.table.address(newcomer.node)
            && to.epoch == newcomer.epoch
        {
            owner.gap(claim, key, log, (to, newcomer.serial.0));
        }
    }
}
