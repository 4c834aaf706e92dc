//! The owner's side of the hand-off through the log: hands records to other nodes, and replays to sessions
//! that began lately what it routed before it knew them.
//!
//! The rules are in [`newcomers`](crate::service::cluster::newcomers), and
//! [why they hold](crate::service::cluster#why-nothing-is-missed-and-nothing-arrives-twice). A new owner starts with
//! the
//! *T* of the last commit, waits for its barrier and until its table has reached that *T*, and fills its
//! tail from Kafka with what lies before its first record.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bytes::Bytes;

use crate::domain::command::Ticket;
use crate::domain::cursor::CursorExpired;
use crate::domain::cursor_schedule::{BURST_SETTLES_MS, POSITIONS_INTERVAL_MS};
use crate::handoff::Doorbell;
use crate::service::backends::ports::MissedEvents;
use crate::service::cluster::holder::{
    Holder, LossConcerns, RoutedPosition, SessionSerial, SourcePartition,
};
use crate::service::cluster::newcomers::{Newcomer, StatedPosition};
use crate::service::cluster::nodes::NodeIndex;
use crate::service::cluster::ports::{HandOffSink, NodeEpoch, OutgoingHandOff, Queued};
use crate::service::cluster::table::{NodeAddress, SessionTable};
use crate::service::cluster::tail::TailRecord;
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::cluster::wire::{
    HandOffHeader, LostRecords, MissedRange, PartitionPosition, Passed, RangeStatus, ReplayAnswer,
    TopicPositions, Users,
};
use crate::service::routing::router::answers::ReplayAnswers;
use crate::service::routing::router::claim::{LaneClaim, source_of};
use crate::service::routing::router::in_flight::{LaneKey, ReturnedTicket};
use crate::service::routing::router::partition::TopicPartition;
use crate::service::routing::router::record::RawRecord;
use crate::service::routing::router::{RouterCounters, WARNING_INTERVAL};

/// Time between two messages that tell a node what has passed, ms.
pub const PASSED_INTERVAL_MS: u64 = 1_000;
// The cursor after a burst covers it, also if another node owns its partition.
const _: () = assert!(PASSED_INTERVAL_MS + 2 * POSITIONS_INTERVAL_MS < BURST_SETTLES_MS);
/// How long a node is told what has passed after it has last said that its sessions use cursors, ms.
const CURSORS_USED_MS: u64 = 60_000;

/// What routers need to hand over through the log.
#[derive(Clone)]
pub struct ClusterParts {
    /// Who is where.
    pub table: Arc<SessionTable>,
    /// Which session of this node needs a record. Shared by all routers and the session manager.
    pub holder: Arc<Mutex<Holder>>,
    /// Where hand-offs go.
    pub sink: Arc<dyn HandOffSink>,
    /// Where sessions go that have missed events.
    pub missed: Arc<dyn MissedEvents>,
    /// The topics of events, by index.
    pub topics: Arc<[Arc<str>]>,
    /// Answers to the replay requests of this node.
    pub answers: Arc<ReplayAnswers>,
}

/// The value of a record for several nodes. It is copied only if the sink is full, and only once.
struct ForwardedValue<'a> {
    bytes: &'a [u8],
    kept: Option<Bytes>,
}

impl ForwardedValue<'_> {
    fn keep(&mut self) -> Bytes {
        self.kept.get_or_insert_with(|| Bytes::copy_from_slice(self.bytes)).clone()
    }
}

const NO_VALUE: ForwardedValue<'static> = ForwardedValue { bytes: &[], kept: None };

/// A hand-off that found the sink full.
struct UnsentHandOff {
    to: NodeAddress,
    header: HandOffHeader,
    key: Option<Box<[u8]>>,
    value: Bytes,
    returned: Option<ReturnedTicket>,
}

/// The owner's side of one router.
pub(super) struct OwnerSide {
    pub(super) parts: ClusterParts,
    counters: Arc<RouterCounters>,
    /// The users of the current record on other nodes.
    remote: Vec<(NodeIndex, Vec<String>)>,
    /// The same, with the addresses of the nodes.
    found: Vec<(NodeAddress, Vec<String>)>,
    /// At most one for each node, because nothing more is handed over while it is not empty.
    unsent: VecDeque<UnsentHandOff>,
    returned: Sender<ReturnedTicket>,
    bell: Arc<Doorbell>,
    /// When a record was last reported as too large.
    warned: Cell<Option<Instant>>,
    /// Nodes with sessions that began since they were last told what has passed.
    owed: BTreeSet<NodeIndex>,
    /// Nodes whose sessions use cursors, and until when they are told what has passed, steady time in ms.
    with_cursors: BTreeMap<NodeEpoch, u64>,
    next_passed_ms: u64,
}

impl OwnerSide {
    pub(super) fn new(
        parts: ClusterParts,
        counters: Arc<RouterCounters>,
        returned: Sender<ReturnedTicket>,
        bell: Arc<Doorbell>,
    ) -> Self {
        Self {
            parts,
            counters,
            remote: Vec::new(),
            found: Vec::new(),
            unsent: VecDeque::new(),
            returned,
            bell,
            warned: Cell::new(None),
            owed: BTreeSet::new(),
            with_cursors: BTreeMap::new(),
            next_passed_ms: 0,
        }
    }

    pub(super) fn holder(&self) -> MutexGuard<'_, Holder> {
        self.parts.holder.lock().expect("no holder panics")
    }

    /// A partition by the name of its topic; `None`: this node does not know the topic.
    pub(super) fn source(&self, topic: &str, partition: i32) -> Option<SourcePartition> {
        let index = self.parts.topics.iter().position(|known| **known == *topic)?;
        Some(SourcePartition { topic: u16::try_from(index).ok()?, partition })
    }

    /// Whether the hand-offs of one more record find room.
    pub(super) fn has_room(&self) -> bool {
        self.unsent.is_empty() && self.parts.sink.has_room()
    }

    /// Sends what found the sink full. Returns whether anything progressed.
    pub(super) fn flush(&mut self) -> bool {
        let mut progressed = false;
        while let Some(unsent) = self.unsent.pop_front() {
            let UnsentHandOff { to, header, key, value, returned } = unsent;
            let back = self.try_send(to, &header, key.as_deref(), &value, returned);
            if let Some(returned) = back {
                self.unsent.push_front(UnsentHandOff { to, header, key, value, returned });
                break;
            }
            progressed = true;
        }
        progressed
    }

    /// `Some`: the sink is full.
    fn try_send(
        &self,
        to: NodeAddress,
        header: &HandOffHeader,
        key: Option<&[u8]>,
        value: &[u8],
        returned: Option<ReturnedTicket>,
    ) -> Option<Option<ReturnedTicket>> {
        let queued = match self.offer(to, header, key, value, returned) {
            Queued::TooLarge => self.offer_without_record(to, header, returned),
            queued => queued,
        };
        match queued {
            Queued::Accepted => None,
            Queued::Full => Some(returned),
            // Without a record and without users it is small.
            Queued::TooLarge => unreachable!("a header without content is too large"),
        }
    }

    fn offer(
        &self,
        to: NodeAddress,
        header: &HandOffHeader,
        key: Option<&[u8]>,
        value: &[u8],
        returned: Option<ReturnedTicket>,
    ) -> Queued {
        let (sender, bell) = (self.returned.clone(), Arc::clone(&self.bell));
        let stored = Box::new(move || {
            if let Some(ticket) = returned {
                // Fails only if the router has ended.
                let _ = sender.send(ticket);
                bell.ring();
            }
        });
        let hand_off =
            OutgoingHandOff { target: to.epoch, partition: to.partition, header, key, value };
        self.parts.sink.send(hand_off, stored)
    }

    /// Hands over that a record is too large to be handed over: the sessions that need it are closed with
    /// 4409.
    fn offer_without_record(
        &self,
        to: NodeAddress,
        header: &HandOffHeader,
        returned: Option<ReturnedTicket>,
    ) -> Queued {
        let content = match &header.content {
            Some(Content::Replay(serial)) => Content::Gap(*serial),
            Some(Content::Live(users)) => Content::Missed(users.clone()),
            _ => Content::Missed(Users::default()),
        };
        let mut header = HandOffHeader { content: Some(content), ..header.clone() };
        let mut queued = self.offer(to, &header, None, &[], returned);
        if queued == Queued::TooLarge {
            header.content = Some(Content::Missed(Users::default()));
            queued = self.offer(to, &header, None, &[], returned);
        }
        if queued == Queued::Accepted {
            self.counters.hand_offs_too_large.add(1);
            let is_recent = |at: Instant| at.elapsed() < WARNING_INTERVAL;
            if !self.warned.get().is_some_and(is_recent) {
                self.warned.set(Some(Instant::now()));
                let (topic, partition, offset) = (&header.topic, header.partition, header.offset);
                tracing::error!(
                    topic,
                    partition,
                    offset,
                    "record too large to be handed over: the sessions that need it are closed with 4409 (at most \
                     one such line per second; the metrics count all)"
                );
            }
        }
        queued
    }

    fn send(
        &mut self,
        to: NodeAddress,
        header: HandOffHeader,
        key: Option<&[u8]>,
        value: &mut ForwardedValue<'_>,
        returned: Option<ReturnedTicket>,
    ) {
        let back = if self.unsent.is_empty() {
            self.try_send(to, &header, key, value.bytes, returned)
        } else {
            Some(returned)
        };
        if let Some(returned) = back {
            let (key, value) = (key.map(Box::from), value.keep());
            self.unsent.push_back(UnsentHandOff { to, header, key, value, returned });
        }
    }

    /// Finds the other nodes that hold a session of users, for [`OwnerSide::forward`]. `each_user` calls its argument
    /// for each of them, which returns whether the user has a session anywhere. Returns false if the table is being
    /// read again, and may have missed some.
    pub(super) fn find_remote(
        &mut self,
        at: RoutedPosition,
        each_user: impl FnOnce(&mut dyn FnMut(&str) -> bool),
    ) -> bool {
        let Self { remote, parts, found, .. } = self;
        let (table, own) = (&parts.table, parts.table.own_epoch());
        remote.clear();
        each_user(&mut |user| {
            let sessions = table.nodes_of(user, at.table, |node| {
                let known = remote.iter().position(|(known, _)| *known == node);
                let index = known.unwrap_or_else(|| {
                    remote.push((node, Vec::new()));
                    remote.len() - 1
                });
                let named = &mut remote[index].1;
                if named.last().is_none_or(|last| last != user) {
                    named.push(user.to_owned());
                }
            });
            sessions > 0
        });
        found.clear();
        found.extend(remote.drain(..).filter_map(|(node, ids)| {
            let to = table.address(node).filter(|to| to.epoch != own)?;
            Some((to, ids))
        }));
        table.next_offset() >= at.table
    }

    /// Hands a record to the nodes that were found. Returns the number of hand-offs, each of which returns the
    /// ticket.
    pub(super) fn forward(
        &mut self,
        raw: RawRecord<'_>,
        at: RoutedPosition,
        parked: &[i64],
        ticket: Ticket,
    ) -> u32 {
        let mut sent = 0;
        let mut value = ForwardedValue { bytes: raw.value, kept: None };
        for (to, ids) in std::mem::take(&mut self.found) {
            let content = Content::Live(Users { ids });
            let header = self.header(at, parked, raw.appended_at_ms, content);
            let returned = Some(ReturnedTicket::HandOff(ticket));
            self.send(to, header, raw.key, &mut value, returned);
            sent += 1;
        }
        sent
    }

    fn header(
        &self,
        at: RoutedPosition,
        parked: &[i64],
        appended_at_ms: u64,
        content: Content,
    ) -> HandOffHeader {
        HandOffHeader {
            parked: distances(at.offset, parked),
            topic: self.parts.topics[usize::from(at.source.topic)].to_string(),
            partition: at.source.partition,
            offset: at.offset,
            generation: at.generation,
            table: at.table,
            appended_at_ms: i64::try_from(appended_at_ms).unwrap_or(i64::MAX),
            content: Some(content),
        }
    }

    /// Replays the record to a session on another node.
    pub(super) fn replay(
        &mut self,
        lane: &mut LaneClaim,
        key: LaneKey,
        log: &TopicPartition,
        record: TailRecord<'_>,
        to: (NodeAddress, u64),
    ) {
        let (at, content) = (lane.at(log, record.offset), Content::Replay(to.1));
        let header = self.header(at, lane.parked(), record.appended_at_ms, content);
        lane.replays += 1;
        let returned = Some(ReturnedTicket::Replay(key));
        let mut value = ForwardedValue { bytes: record.value, kept: None };
        self.send(to.0, header, record.key, &mut value, returned);
    }

    /// Tells another node that events for one of its sessions are no longer available.
    pub(super) fn gap(
        &mut self,
        lane: &mut LaneClaim,
        key: LaneKey,
        log: &TopicPartition,
        to: (NodeAddress, u64),
    ) {
        let header = self.header(lane.at(log, 0), &[], 0, Content::Gap(to.1));
        lane.replays += 1;
        self.send(to.0, header, None, &mut { NO_VALUE }, Some(ReturnedTicket::Replay(key)));
    }

    /// The position from which a newcomer wants the records of a partition. `None`: not known any more.
    pub(super) fn wanted_from(&self, newcomer: &Newcomer, log: &TopicPartition) -> Option<i64> {
        match self.parts.table.routed(source_of(log), newcomer.as_of) {
            StatedPosition::At(next) => Some(next),
            // The first owner may have routed from anywhere on.
            StatedPosition::Never => Some(0),
            StatedPosition::Forgotten => None,
        }
    }

    /// Events for the sessions that began in this range of the sessions topic are no longer available.
    pub(super) fn missed_range(
        &mut self,
        lane: &mut LaneClaim,
        key: LaneKey,
        log: &TopicPartition,
        range: Range<i64>,
    ) {
        self.close_begun_in(range.clone());
        let missed = MissedRange { from: range.start, to: range.end };
        for to in self.parts.table.others() {
            lane.replays += 1;
            // With its partition, so that no later record of it overtakes this.
            let header = self.header(lane.at(log, 0), &[], 0, Content::MissedRange(missed));
            self.send(to, header, None, &mut { NO_VALUE }, Some(ReturnedTicket::Replay(key)));
        }
    }

    /// Records are gone that nobody has read: every node closes those of its sessions that may lack one of them. (On
    /// this node all were closed before the lane began.)
    pub(super) fn tell_loss(&mut self, lane: &mut LaneClaim, key: LaneKey, log: &TopicPartition) {
        let Some(from) = lane.ownership.lost_from.take() else { return };
        let at = lane.at(log, lane.ownership.start);
        self.lose(at, from, self.parts.table.next_offset());
        for to in self.parts.table.others() {
            lane.losses += 1;
            let header = self.header(at, &[], 0, Content::Lost(LostRecords { from }));
            self.send(to, header, None, &mut { NO_VALUE }, Some(ReturnedTicket::Loss(key)));
        }
    }

    /// Closes the sessions of this node that may lack a record that is gone. Returns their number; `None`: not known
    /// before this node has read more of the sessions topic. See [`Holder::lose`].
    pub(super) fn lose(&self, at: RoutedPosition, from: i64, read_to: i64) -> Option<usize> {
        let concerned = self.holder().lose(at, from, read_to);
        match concerned {
            LossConcerns::NotKnown => None,
            LossConcerns::Zombie => {
                self.counters.hand_offs_late.add(1);
                Some(0)
            }
            LossConcerns::Sessions(sessions) => {
                sessions.iter().for_each(|session| self.parts.missed.missed(*session));
                Some(sessions.len())
            }
        }
    }

    /// A record of a topic that this node does not know was handed over: the sessions that it names miss it.
    /// No users: all sessions.
    pub(super) fn missed_of_unknown_topic(&self, content: &Content) {
        match content {
            Content::Live(users) | Content::Missed(users) if !users.ids.is_empty() => {
                users.ids.iter().for_each(|user| self.parts.missed.missed_by_user(user));
            }
            Content::Replay(serial) => {
                let mut holder = self.holder();
                let session = holder.find(SessionSerial(*serial));
                session.into_iter().for_each(|session| holder.ended(session));
                drop(holder);
                session.into_iter().for_each(|session| self.parts.missed.missed(session));
            }
            _ => self.parts.missed.missed_by_all(),
        }
    }

    /// Closes the sessions of this node that began in this range. Returns their number.
    pub(super) fn close_begun_in(&self, range: Range<i64>) -> usize {
        let mut holder = self.holder();
        let sessions = holder.begun_in(range, self.parts.table.next_offset());
        // A later event would hide the gap.
        sessions.iter().for_each(|session| holder.ended(*session));
        drop(holder);
        sessions.iter().for_each(|session| self.parts.missed.missed(*session));
        sessions.len()
    }

    /// The node has to be told soon what has passed.
    pub(super) fn owes(&mut self, node: NodeIndex) {
        self.owed.insert(node);
    }

    /// Forgets nodes that have not used cursors for long. Returns whether it is time to tell nodes what has passed.
    pub(super) fn prepare_passed(&mut self, now_ms: u64) -> bool {
        self.with_cursors.retain(|_, until_ms| *until_ms > now_ms);
        let is_owed = !self.owed.is_empty() || !self.with_cursors.is_empty();
        is_owed && now_ms >= self.next_passed_ms && self.has_room()
    }

    /// A node has sessions that use cursors.
    pub(super) fn uses_cursors(&mut self, node: NodeEpoch, now_ms: u64) {
        self.with_cursors.insert(node, now_ms + CURSORS_USED_MS);
    }

    /// Answers a holder that has asked for a replay. If the queue is full there is no answer, and the holder asks
    /// again.
    pub(super) fn answer(&mut self, holder: NodeEpoch, answer: ReplayAnswer) {
        let Some(to) = self.parts.table.others().into_iter().find(|to| to.epoch == holder) else {
            return;
        };
        if !self.has_room() {
            return;
        }
        let send = |owner: &Self, answer| {
            let content = Some(Content::ReplayAnswer(answer));
            let header = HandOffHeader { content, ..HandOffHeader::default() };
            owner.offer(to, &header, None, &[], None)
        };
        let (id, mut ranges) = (answer.id, answer.ranges.clone());
        if send(self, answer) == Queued::TooLarge {
            // Nor could the record be handed over.
            for range in &mut ranges {
                range.set_status(RangeStatus::Expired);
                range.expired = CursorExpired::Overtaken as u32;
            }
            let _ = send(self, ReplayAnswer { id, ranges, records: Vec::new() });
        }
    }

    /// Tells the nodes that are owed it what has passed: everything below these positions was handed over
    /// by an owner that had applied beginnings below `table`.
    pub(super) fn tell_passed(
        &mut self,
        positions: &[(TopicPartition, i64, i64, Vec<i64>, u32)],
        table: i64,
        now_ms: u64,
    ) {
        self.next_passed_ms = now_ms + PASSED_INTERVAL_MS;
        let mut topics: Vec<TopicPositions> = Vec::new();
        for (log, next, generation, parked, check) in positions {
            let position = PartitionPosition {
                partition: log.partition,
                next: *next,
                generation: *generation,
                parked: distances(*next, parked),
                check: *check,
            };
            match topics.iter_mut().find(|known| *known.topic == *log.topic) {
                Some(known) => known.partitions.push(position),
                None => topics.push(TopicPositions {
                    topic: log.topic.to_string(),
                    partitions: vec![position],
                }),
            }
        }
        let own = self.parts.table.own_epoch();
        let owed = std::mem::take(&mut self.owed);
        let owed: BTreeSet<_> =
            owed.into_iter().filter_map(|node| self.parts.table.address(node)).collect();
        let others = self.parts.table.others().into_iter();
        let with_cursors = others.filter(|to| self.with_cursors.contains_key(&to.epoch));
        let told: BTreeSet<_> = owed.into_iter().chain(with_cursors).collect();
        for to in told.into_iter().filter(|to| to.epoch != own) {
            let content = Some(Content::Passed(Passed { positions: topics.clone() }));
            let header = HandOffHeader { table, content, ..HandOffHeader::default() };
            self.send(to, header, None, &mut { NO_VALUE }, None);
        }
    }
}

/// How far below `offset` each of these offsets is that is below it, as it is sent.
fn distances(offset: i64, parked: &[i64]) -> Vec<u64> {
    let below = parked.partition_point(|parked| *parked < offset);
    parked[..below].iter().map(|parked| offset.abs_diff(*parked)).collect()
}

/// The offsets of parked records, as they were sent with `offset`: ascending.
pub(super) fn parked_offsets(offset: i64, distances: &[u64]) -> Vec<i64> {
    distances.iter().map(|distance| offset.saturating_sub_unsigned(*distance)).collect()
}
