//! Routes one record: finds its members, their sessions, and the rings to their shards.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use crate::domain::budget::EventBudget;
use crate::domain::command::Ticket;
use crate::domain::members::Members;
use crate::handoff::Doorbell;
use crate::service::backends::ports::{Forwarding, RemoteNodes};
use crate::service::cluster::holder::{Arrived, RoutedPosition};
use crate::service::cluster::tail::{TailAudience, TailBudget};
use crate::service::events::conversation_key::log_position;
use crate::service::events::encode::Encoder;
use crate::service::events::envelope::{self, DecodedEvent, EventBody};
use crate::service::members::directory::Directory;
use crate::service::members::membership::{Lookup, Membership, ReadBy};
use crate::service::members::user_lists::UserLists;
use crate::service::routing::router::audience::Audiences;
use crate::service::routing::router::claim::LanePosition;
use crate::service::routing::router::dead_letter::{DeadLetterReason, DeadLetterSink};
use crate::service::routing::router::in_flight::{InFlight, LaneKey, RecordId, ReturnedTicket};
use crate::service::routing::router::lane::Blocked;
use crate::service::routing::router::links::RouterLinks;
use crate::service::routing::router::owner::OwnerSide;
use crate::service::routing::router::partition::TopicPartition;
use crate::service::routing::router::record::{RawRecord, named_conversation};
use crate::service::routing::router::shard_positions::ShardPositions;
use crate::service::routing::router::{RouterConfig, RouterCounters};

/// Time after which a record is attempted again whose members are being requested, ms. The end of the request rings the
/// doorbell; this bounds the delay if a ring is ever missed.
const PENDING_RETRY_MS: u64 = 100;

/// Result of routing a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RouteOutcome {
    /// The record is done.
    Done,
    /// The record is in flight, with this ticket.
    InFlight(Ticket),
    /// The record blocks its lane.
    Blocked(Blocked),
    /// The members are not known yet. The next attempt is worthwhile when a list has arrived
    /// ([`Membership::arrivals`]), or at this time, steady time in ms.
    Waits { retry_ms: u64 },
    /// The record cannot be routed.
    Unroutable(DeadLetterReason),
}

/// How the record being routed arrived.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arrival<'a> {
    /// From a partition.
    Partition {
        log: &'a TopicPartition,
        record: RecordId,
        /// If hand-offs go through the log.
        at: Option<LanePosition>,
        /// The offsets of the parked records of its lane, if hand-offs go through the log.
        parked: &'a [i64],
    },
    /// From another node.
    OtherNode {
        /// Whether this is the first attempt, which applies a membership change. (For a partition the
        /// offset prevents applying it twice.)
        first: bool,
    },
}

/// Times of the first attempt to route a record and of this one. Steady time, ms.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    since_ms: u64,
    now_ms: u64,
}

/// The router without its lanes.
pub(super) struct RouterCore {
    pub(super) config: RouterConfig,
    pub(super) counters: Arc<RouterCounters>,
    pub(super) links: RouterLinks,
    pub(super) in_flight: InFlight,
    pub(super) directory: Arc<Directory>,
    pub(super) audiences: Audiences,
    pub(super) membership: Arc<Membership>,
    /// The conversations of users who return. `None`: the members of each conversation are requested instead.
    pub(super) user_lists: Option<Arc<UserLists>>,
    pub(super) remote: Option<Arc<dyn RemoteNodes>>,
    /// Hand-off through the log.
    pub(super) owner: Option<OwnerSide>,
    /// Bounds of the tails. `None`: this node keeps none.
    pub(super) tails: Option<Arc<TailBudget>>,
    /// Who received the record that was routed last, if this node keeps tails.
    pub(super) routed_audience: Option<TailAudience>,
    pub(super) dead_letters: Option<Arc<dyn DeadLetterSink>>,
    pub(super) encoder: Encoder,
    /// Memory of the live events of all routers.
    pub(super) budget: Arc<EventBudget>,
    pub(super) returned: Sender<ReturnedTicket>,
    pub(super) bell: Arc<Doorbell>,
    pub(super) warned: Option<Instant>,
    /// What the shards are told to be routed.
    pub(super) positions: ShardPositions,
    pub(super) lane_serial: u32,
}

/// The users who receive an event.
enum EventAudience<'a> {
    /// The members, and the user whom the event adds or removes if they are not in the list.
    Members(Members, Option<&'a str>),
    /// The users in the creation event.
    Named(&'a [&'a str]),
}

impl EventAudience<'_> {
    fn users(&self) -> impl Iterator<Item = &str> {
        let (members, other, named): (_, _, &[&str]) = match self {
            Self::Members(members, other) => (Some(members), *other, &[]),
            Self::Named(users) => (None, None, users),
        };
        let members = members.into_iter().flat_map(Members::iter);
        members.chain(other).chain(named.iter().copied())
    }

    /// Calls `visit` for each user who may be connected: of a large conversation those whom `connected` passes to its
    /// argument. `visit` returns whether the user is connected.
    fn each(
        &self,
        is_large: bool,
        connected: impl FnOnce(&mut dyn FnMut(&str) -> bool),
        mut visit: impl FnMut(&str) -> bool,
    ) {
        match self {
            Self::Members(_, other) if is_large => {
                connected(&mut visit);
                if let Some(user) = other {
                    visit(user);
                }
            }
            Self::Members(..) | Self::Named(_) => {
                for user in self.users() {
                    visit(user);
                }
            }
        }
    }

    fn into_tail(self) -> TailAudience {
        match self {
            Self::Members(members, other) => TailAudience { members, other: other.map(Arc::from) },
            Self::Named(users) => TailAudience { members: users.iter().collect(), other: None },
        }
    }
}

impl RouterCore {
    /// A key for a new lane in this slot.
    pub(super) fn next_lane_key(&mut self, slot: usize) -> LaneKey {
        self.lane_serial = self.lane_serial.wrapping_add(1);
        LaneKey::new(self.lane_serial, slot)
    }

    /// Routes a record of a partition or of another node. `since_ms` is the time of the first attempt.
    pub(super) fn route(
        &mut self,
        raw: RawRecord<'_>,
        arrival: Arrival<'_>,
        since_ms: u64,
        now_ms: u64,
    ) -> RouteOutcome {
        let record = match envelope::decode(raw.value) {
            Ok(record) => record,
            Err(error) => return RouteOutcome::Unroutable(DeadLetterReason::Undecodable(error)),
        };
        let Some(conversation) = named_conversation(&record, raw) else {
            return RouteOutcome::Unroutable(DeadLetterReason::NoConversation);
        };
        self.trace(raw, arrival, conversation);
        let attempt = Attempt { since_ms, now_ms };
        let audience = match self.audience(raw, arrival, &record, conversation, attempt) {
            Ok(audience) => audience,
            Err(step) => return step,
        };
        self.links.clear();
        let (claimed, parked) = match arrival {
            Arrival::Partition { at, parked, .. } => (at, parked),
            Arrival::OtherNode { .. } => (None, &[][..]),
        };
        let large = self.prepare(conversation, &audience).then_some(conversation);
        if !self.gather_all(&audience, large, claimed, parked) {
            self.counters.hand_offs_late.add(1);
            return RouteOutcome::Done;
        }
        if let Some(shard) = self.links.full() {
            self.counters.waits_for_room.add(1);
            return RouteOutcome::Blocked(Blocked::RingFull(shard));
        }
        if matches!(arrival, Arrival::Partition { .. }) && !self.other_nodes_have_room() {
            self.counters.waits_for_hand_offs.add(1);
            return RouteOutcome::Blocked(Blocked::HandOffs);
        }
        if let Some(LanePosition { at, .. }) = claimed
            && !self.find_remote(&audience, large, at)
        {
            return RouteOutcome::Blocked(Blocked::HandOffs);
        }
        match arrival {
            Arrival::Partition { log, record: id, at: claimed, parked } => {
                let ticket = self.in_flight.open(id, now_ms);
                let at = Some(log_position(&log.topic, log.partition, raw.offset));
                for _ in 0..self.deliver(&record, at, raw.appended_at_ms, Some(ticket)) {
                    self.in_flight.expect(ticket);
                }
                if let Some(LanePosition { at, .. }) = claimed {
                    self.hand_off(raw, at, parked, ticket);
                }
                self.forward(raw.value, &audience, ticket, now_ms);
                self.routed_audience = self.tails.is_some().then(|| audience.into_tail());
                match self.in_flight.seal(ticket) {
                    Some(_) => RouteOutcome::Done,
                    None => RouteOutcome::InFlight(ticket),
                }
            }
            Arrival::OtherNode { .. } => {
                self.deliver(&record, None, raw.appended_at_ms, None);
                RouteOutcome::Done
            }
        }
    }

    /// Routes an envelope to the given users.
    pub(super) fn route_to_users(&mut self, value: &[u8], users: &[Arc<str>]) -> RouteOutcome {
        let Ok(record) = envelope::decode(value) else {
            self.counters.records_undecodable.add(1);
            return RouteOutcome::Done;
        };
        self.links.clear();
        users.iter().for_each(|user| self.gather(user));
        if let Some(shard) = self.links.full() {
            self.counters.waits_for_room.add(1);
            return RouteOutcome::Blocked(Blocked::RingFull(shard));
        }
        self.deliver(&record, None, 0, None);
        RouteOutcome::Done
    }

    /// Applies the membership change in the event, if any, and returns the recipients.
    fn audience<'a>(
        &mut self,
        raw: RawRecord<'_>,
        arrival: Arrival<'_>,
        record: &'a DecodedEvent<'a>,
        conversation: &str,
        attempt: Attempt,
    ) -> Result<EventAudience<'a>, RouteOutcome> {
        let now_ms = attempt.now_ms;
        let log_place = match arrival {
            Arrival::Partition { log, .. } => Some(log.position(raw.offset)),
            Arrival::OtherNode { .. } => None,
        };
        let mut other = None;
        match &record.body {
            EventBody::ConversationCreated { members, .. } => {
                if let Some(place) = log_place {
                    self.membership.created(conversation, members, ReadBy::Router(place), now_ms);
                }
                return Ok(EventAudience::Named(members));
            }
            &EventBody::MembershipChanged { user, added, .. } => {
                if !matches!(arrival, Arrival::OtherNode { first: false }) {
                    let by = log_place.map_or(ReadBy::OtherNode, ReadBy::Router);
                    self.membership.changed(conversation, user, added, by);
                }
                other = Some(user);
            }
            EventBody::MessageSent { .. }
            | EventBody::MessageDeleted { .. }
            | EventBody::ReadReceiptUpdated { .. }
            | EventBody::PresenceUpdated { .. }
            | EventBody::Unknown => {}
        }
        match self.membership.lookup(conversation, log_place, now_ms) {
            Lookup::Members(members) => {
                let other = other.filter(|user| !user.is_empty() && !members.contains(user));
                Ok(EventAudience::Members(members, other))
            }
            Lookup::Pending => Err(RouteOutcome::Waits { retry_ms: now_ms + PENDING_RETRY_MS }),
            Lookup::Failing { retry_at_ms } => Err(RouteOutcome::Waits { retry_ms: retry_at_ms }),
            Lookup::Absent => Err(RouteOutcome::Unroutable(DeadLetterReason::NoSuchConversation)),
            // No conversation service. The creation event may still arrive on another partition. If
            // it does not, the user named in the event still receives it.
            Lookup::Unknown if now_ms < self.comes_until_ms(raw, attempt) => {
                Err(RouteOutcome::Waits { retry_ms: self.comes_until_ms(raw, attempt) })
            }
            Lookup::Unknown => match other {
                Some(user) if !user.is_empty() => {
                    self.counters.records_members_unknown.add(1);
                    Ok(EventAudience::Members(Members::default(), Some(user)))
                }
                _ => Err(RouteOutcome::Unroutable(DeadLetterReason::MembersUnknown)),
            },
        }
    }

    /// Until when the creation event may still arrive, Unix time in ms. The wait is counted from the append, so that a
    /// backlog is not delayed at every such record. If the publisher's clock is ahead, it is
    /// counted from the first attempt.
    fn comes_until_ms(&self, raw: RawRecord<'_>, attempt: Attempt) -> u64 {
        let from_ms = raw.appended_at_ms.min(attempt.since_ms);
        from_ms.saturating_add(self.config.creation_wait_ms)
    }

    fn gather(&mut self, user: &str) {
        let links = &mut self.links;
        self.directory.sessions_of(user, |session| links.gather(session));
    }

    /// Brings the cached audience of a large conversation up to date. Returns false if every user has to be looked up.
    fn prepare(&mut self, conversation: &str, audience: &EventAudience<'_>) -> bool {
        let EventAudience::Members(members, _) = audience else { return false };
        let table = self.owner.as_ref().map(|owner| &*owner.parts.table);
        self.audiences.prepare(conversation, members, &self.directory, table, &self.counters)
    }

    /// Gathers the sessions of the audience on this node. `large`: the conversation, if its audience is cached. `at`:
    /// only those that still need the record. Returns false if the record comes from a lane that has lost its
    /// partition.
    fn gather_all(
        &mut self,
        audience: &EventAudience<'_>,
        large: Option<&str>,
        at: Option<LanePosition>,
        parked: &[i64],
    ) -> bool {
        let Self { audiences, directory, links, owner, .. } = self;
        let here = |visit: &mut dyn FnMut(&str) -> bool| {
            large.into_iter().for_each(|conversation| audiences.here(conversation, &mut *visit));
        };
        let Some((owner, LanePosition { at, direct_after })) = owner.as_ref().zip(at) else {
            audience.each(large.is_some(), here, |user| {
                directory.sessions_of(user, |session| links.gather(session)) > 0
            });
            return true;
        };
        let mut holder = owner.holder();
        if holder.arrive(at, parked) == Arrived::Zombie {
            return false;
        }
        holder.looks_up(at);
        audience.each(large.is_some(), here, |user| {
            let sessions = directory.sessions_of(user, |session| {
                if holder.needs_of_lane(session, at, direct_after) {
                    links.gather(session);
                }
            });
            sessions > 0
        });
        true
    }

    /// Finds the other nodes that hold a session of the audience. Returns false if the table may have missed some.
    fn find_remote(
        &mut self,
        audience: &EventAudience<'_>,
        large: Option<&str>,
        at: RoutedPosition,
    ) -> bool {
        let Self { audiences, owner: Some(owner), .. } = self else { return true };
        let anywhere = |visit: &mut dyn FnMut(&str) -> bool| {
            large
                .into_iter()
                .for_each(|conversation| audiences.anywhere(conversation, &mut *visit));
        };
        owner.find_remote(at, |find| audience.each(large.is_some(), anywhere, find))
    }

    /// Hands a record of a claimed partition to other nodes, after the deliveries on this node.
    fn hand_off(&mut self, raw: RawRecord<'_>, at: RoutedPosition, parked: &[i64], ticket: Ticket) {
        let Some(owner) = &mut self.owner else { return };
        {
            let mut holder = owner.holder();
            holder.delivered(at, parked, self.links.sessions());
            holder.passed(at);
        }
        let sent = owner.forward(raw, at, parked, ticket);
        for _ in 0..sent {
            self.in_flight.expect_elsewhere(ticket);
        }
        self.counters.hand_offs.add(u64::from(sent));
    }

    /// Whether there is memory for another event.
    pub(super) fn has_memory(&self) -> bool {
        let has_room = self.budget.has_room();
        if !has_room {
            self.counters.waits_for_memory.add(1);
        }
        has_room
    }

    /// Whether the queue to other nodes has room. Checked before any delivery on this node, because a
    /// blocked record is routed again from the start.
    pub(super) fn other_nodes_have_room(&self) -> bool {
        self.remote.as_ref().is_none_or(|remote| remote.has_room())
            && self.owner.as_ref().is_none_or(|owner| owner.has_room())
    }

    /// Hands the value off to other nodes, after the deliveries on this node. Names every member,
    /// because a user on this node may have another device on another node. With hand-off through the log
    /// these are only the nodes without it.
    fn forward(&mut self, value: &[u8], audience: &EventAudience<'_>, ticket: Ticket, now_ms: u64) {
        let Some(remote) = self.remote.as_ref().filter(|remote| remote.may_exist()) else {
            return;
        };
        let is_full = self.in_flight.forwards() >= self.config.forwards_max;
        let (returned, bell) = (self.returned.clone(), Arc::clone(&self.bell));
        let done = Box::new(move || {
            // Fails only if the router has ended.
            let _ = returned.send(ReturnedTicket::Forward(ticket));
            bell.ring();
        });
        let users: Vec<&str> = audience.users().collect();
        let forwarding = if is_full {
            remote.lost(&users);
            Forwarding::Refused
        } else {
            remote.forward(value, &users, done)
        };
        match forwarding {
            Forwarding::Nobody => {}
            Forwarding::Refused => self.counters.forwards_refused.add(1),
            Forwarding::Pending => {
                self.counters.forwards.add(1);
                self.in_flight.expect_forward(ticket, now_ms + self.config.forward_deadline_ms);
            }
        }
    }

    fn trace(&self, raw: RawRecord<'_>, arrival: Arrival<'_>, conversation: &str) {
        if let (Some(traceparent), Arrival::Partition { log, .. }) = (raw.traceparent, arrival) {
            tracing::debug!(
                traceparent,
                topic = &*log.topic,
                partition = log.partition,
                offset = raw.offset,
                conversation,
                "routing"
            );
        }
    }
}
