//! The holder's side of the hand-off through the log: delivers what owners hand over to this node.
//!
//! Hand-offs of one source partition go to the router that would own its lane, in the order of the log. So
//! the holder's state of a partition has one user, whichever role the node has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::mpsc::TrySendError;

use bytes::Bytes;

use crate::domain::cursor::{LogPosition, TopicId};
use crate::domain::ids::SessionAddress;
use crate::handoff::{Doorbell, Pushed};
use crate::service::cluster::holder::{
    Arrived, Holder, LiveNeed, RoutedPosition, SessionSerial, SourcePartition,
};
use crate::service::cluster::ports::{ArrivedHandOffs, HandOffReceiver, IncomingHandOff};
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::cluster::wire::{AnsweredRange, HandOffHeader, Passed, TopicPositions};
use crate::service::events::conversation_key::log_position;
use crate::service::events::envelope;
use crate::service::routing::router::RouterControl;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::owner::parked_offsets;

/// What the reader of the hand-off topic passes to a router.
pub(super) enum HandOffInput {
    Record(IncomingHandOff),
    /// Every hand-off below this offset of the node's partition was passed before.
    ReadTo(i64),
}

/// How far the node's partition was read, for a router that is told through its queue of hand-offs. Only one
/// message waits in the queue; what is read meanwhile is noted here, and holds once the queue is empty.
#[derive(Debug, Default)]
pub(super) struct ReadTo {
    waits: AtomicBool,
    latest: AtomicI64,
}

impl ReadTo {
    /// The message was taken from the queue.
    pub(super) fn taken(&self) {
        self.waits.store(false, Ordering::Release);
    }

    /// What was read at the latest. Everything below it was put into the queue before this call.
    pub(super) fn latest(&self) -> i64 {
        self.latest.load(Ordering::Acquire)
    }
}

/// The routers of a node, as the receiver of hand-offs.
pub struct HandOffInboxes {
    /// The routers, at least one.
    pub routers: Vec<RouterControl>,
    /// The topics of events, by index.
    pub topics: Arc<[Arc<str>]>,
    /// Called if records for this node were deleted before they were read.
    pub missed: Box<dyn Fn() + Send + Sync>,
}

impl HandOffInboxes {
    /// The number of the router that would own the lane of this partition.
    fn number(&self, topic: &str, partition: i32) -> usize {
        let known = self.topics.iter().position(|known| **known == *topic);
        // Of a topic that this node does not know: any router counts it.
        (known.unwrap_or(0) + partition.unsigned_abs() as usize) % self.routers.len()
    }

    fn send(&self, number: usize, hand_off: IncomingHandOff) -> Pushed<IncomingHandOff> {
        let router = &self.routers[number];
        let bytes = hand_off.bytes();
        // Counted before sending, because the router may subtract immediately.
        let waiting = router.hand_off_bytes.fetch_add(bytes, Ordering::Relaxed);
        if waiting > 0 && waiting + bytes > router.inbox_bytes_max {
            router.hand_off_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Pushed::Full(hand_off);
        }
        let sent = router.hand_offs.try_send(HandOffInput::Record(hand_off));
        if sent.is_err() {
            router.hand_off_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        match sent {
            Ok(()) => {
                router.bell.ring();
                Pushed::Accepted
            }
            Err(TrySendError::Full(HandOffInput::Record(back))) => Pushed::Full(back),
            Err(TrySendError::Disconnected(HandOffInput::Record(back))) => Pushed::Closed(back),
            Err(_) => unreachable!("a record was sent"),
        }
    }

    /// Sends each router what concerns its partitions: a position must not overtake the records before it,
    /// which wait in the queue of that router. If one queue is full, all are sent it again later, which
    /// changes nothing.
    fn receive_passed(
        &self,
        hand_off: IncomingHandOff,
        passed: &Passed,
    ) -> Pushed<IncomingHandOff> {
        for number in 0..self.routers.len() {
            let mut positions = passed.positions.clone();
            for topic in &mut positions {
                let TopicPositions { topic, partitions } = topic;
                partitions.retain(|position| self.number(topic, position.partition) == number);
            }
            positions.retain(|topic| !topic.partitions.is_empty());
            if positions.is_empty() {
                continue;
            }
            let content = Some(Content::Passed(Passed { positions }));
            let header = HandOffHeader { content, ..hand_off.header.clone() };
            match self.send(number, IncomingHandOff { header, value: Bytes::new() }) {
                Pushed::Accepted => {}
                Pushed::Full(_) => return Pushed::Full(hand_off),
                Pushed::Closed(_) => return Pushed::Closed(hand_off),
            }
        }
        Pushed::Accepted
    }
}

impl HandOffInboxes {
    /// What of a request or an answer concerns the partitions of each router. A request without partitions concerns
    /// all.
    fn parts_of(&self, content: &Content) -> Vec<(usize, Content)> {
        let parts = (0..self.routers.len()).filter_map(|number| {
            let is_its = |topic: &str, partition| self.number(topic, partition) == number;
            let part = match content {
                Content::ReplayRequest(request) => {
                    let mut request = request.clone();
                    let was_empty = request.ranges.is_empty();
                    request.ranges.retain(|range| is_its(&range.topic, range.partition));
                    let is_concerned = was_empty || !request.ranges.is_empty();
                    is_concerned.then_some(Content::ReplayRequest(request))
                }
                Content::ReplayAnswer(answer) => {
                    let mut answer = answer.clone();
                    answer.ranges.retain(|it| {
                        it.range.as_ref().is_some_and(|it| is_its(&it.topic, it.partition))
                    });
                    answer.records.retain(|record| is_its(&record.topic, record.partition));
                    (!answer.ranges.is_empty()).then_some(Content::ReplayAnswer(answer))
                }
                _ => None,
            };
            part.map(|part| (number, part))
        });
        parts.collect()
    }

    /// If one queue is full, all parts are sent again later, which changes nothing: the holder drops what it has.
    fn receive_parts(
        &self,
        hand_off: IncomingHandOff,
        parts: Vec<(usize, Content)>,
    ) -> Pushed<IncomingHandOff> {
        for (number, content) in parts {
            let header = HandOffHeader { content: Some(content), ..hand_off.header.clone() };
            match self.send(number, IncomingHandOff { header, value: Bytes::new() }) {
                Pushed::Accepted => {}
                Pushed::Full(_) => return Pushed::Full(hand_off),
                Pushed::Closed(_) => return Pushed::Closed(hand_off),
            }
        }
        Pushed::Accepted
    }
}

impl HandOffReceiver for HandOffInboxes {
    /// A single router takes the hand-offs itself, which saves the time to wake it. Of several, the one that takes
    /// them would delay those of the others whenever it is busy.
    fn opened(&self, log: Arc<dyn ArrivedHandOffs>) -> Option<Arc<Doorbell>> {
        match &*self.routers {
            [router] => Some(router.take_hand_offs(log)),
            _ => None,
        }
    }

    fn receive(&self, hand_off: IncomingHandOff) -> Pushed<IncomingHandOff> {
        if let Some(Content::Passed(passed)) = &hand_off.header.content {
            let passed = passed.clone();
            return self.receive_passed(hand_off, &passed);
        }
        if let Some(content @ (Content::ReplayRequest(_) | Content::ReplayAnswer(_))) =
            &hand_off.header.content
        {
            let parts = self.parts_of(content);
            return self.receive_parts(hand_off, parts);
        }
        self.send(self.number(&hand_off.header.topic, hand_off.header.partition), hand_off)
    }

    fn read_to(&self, next: i64) {
        for router in &self.routers {
            router.read_to.latest.store(next, Ordering::Release);
            if !router.read_to.waits.swap(true, Ordering::AcqRel)
                && router.hand_offs.try_send(HandOffInput::ReadTo(next)).is_err()
            {
                router.read_to.waits.store(false, Ordering::Release);
            }
            router.bell.ring();
        }
    }

    fn missed(&self) {
        (self.missed)();
    }

    fn gone(&self) {
        (self.missed)();
    }
}

impl RouterCore {
    /// Delivers a hand-off. Returns false if it has to wait: for room in a ring, or for the table.
    pub(super) fn take_hand_off(&mut self, hand_off: &IncomingHandOff) -> bool {
        let Some(owner) = &self.owner else { return true };
        let header = &hand_off.header;
        // Before the holder is locked: what is not in it then is stored at or behind this offset.
        let read_to = owner.parts.table.next_offset();
        let mut holder = owner.holder();
        match &header.content {
            None => {
                // Of a newer version: nobody knows whom it concerns.
                drop(holder);
                self.counters.hand_offs_unreadable.add(1);
                owner.parts.missed.missed_by_all();
            }
            Some(Content::Passed(passed)) => {
                for topic in &passed.positions {
                    for position in &topic.partitions {
                        let Some(source) = owner.source(&topic.topic, position.partition) else {
                            continue;
                        };
                        let at = RoutedPosition {
                            source,
                            offset: position.next,
                            generation: position.generation,
                            table: header.table,
                        };
                        let parked = parked_offsets(position.next, &position.parked);
                        if holder.arrive(at, &parked) != Arrived::InTurn {
                            continue;
                        }
                        holder.passed_below(at);
                        let lowest = parked.first().copied().unwrap_or(position.next);
                        let passed = LogPosition {
                            topic: TopicId::of(&topic.topic),
                            partition: position.partition.unsigned_abs(),
                            next: lowest.min(position.next).max(0),
                            check: position.check,
                        };
                        let at = RoutedPosition { offset: passed.next, ..at };
                        let counts = holder.counts_for_cursors(at);
                        self.positions.passed(passed, counts);
                    }
                }
            }
            // Taken by the router itself.
            Some(Content::ReplayRequest(_)) => {}
            Some(Content::ReplayAnswer(answer)) => {
                for AnsweredRange { range, position, .. } in &answer.ranges {
                    let Some(range) = range.as_ref().filter(|_| *position >= 0) else { continue };
                    // Only if it is lower: the owner may not know all sessions.
                    let passed = LogPosition {
                        topic: TopicId::of(&range.topic),
                        partition: range.partition.unsigned_abs(),
                        next: *position,
                        check: range.check,
                    };
                    self.positions.passed(passed, false);
                    if let Some(source) = owner.source(&range.topic, range.partition) {
                        holder.lower_counted(source, *position);
                    }
                }
                drop(holder);
                owner.parts.answers.arrived(answer.clone());
            }
            Some(Content::MissedRange(missed)) => {
                drop(holder);
                let closed = owner.close_begun_in(missed.from..missed.to);
                self.counters.gaps.add(closed as u64);
            }
            Some(content @ Content::Lost(lost)) => {
                drop(holder);
                let Some(source) = owner.source(&header.topic, header.partition) else {
                    self.counters.hand_offs_unreadable.add(1);
                    owner.missed_of_unknown_topic(content);
                    return true;
                };
                let Some(closed) = owner.lose(position(header, source), lost.from, read_to) else {
                    return false;
                };
                self.counters.gaps.add(closed as u64);
                let HandOffHeader { topic, partition, offset: next, .. } = header;
                let first = lost.from;
                tracing::error!(
                    topic,
                    partition,
                    first,
                    next,
                    "records were gone before their owner read them: {closed} sessions of this node that may lack one \
                     are closed with 4409"
                );
            }
            Some(Content::Gap(serial)) => {
                let session = holder.find(SessionSerial(*serial));
                // A later event would hide the gap.
                session.into_iter().for_each(|session| holder.ended(session));
                drop(holder);
                if let Some(session) = session {
                    owner.parts.missed.missed(session);
                }
            }
            Some(content @ Content::Missed(users)) => {
                let Some(source) = owner.source(&header.topic, header.partition) else {
                    drop(holder);
                    self.counters.hand_offs_unreadable.add(1);
                    owner.missed_of_unknown_topic(content);
                    return true;
                };
                let at = position(header, source);
                let parked = parked_offsets(header.offset, &header.parked);
                if holder.arrive(at, &parked) == Arrived::Zombie {
                    self.counters.hand_offs_late.add(1);
                    return true;
                }
                // The record has not passed: the next one says that it has.
                let mut named: Vec<SessionAddress> = Vec::new();
                if users.ids.is_empty() {
                    named.extend(holder.sessions());
                }
                for user in &users.ids {
                    self.directory.sessions_of(user, |session| named.push(session));
                }
                let Some(sessions) = needing(&holder, named, at, read_to) else { return false };
                // A later event would hide the gap.
                sessions.iter().for_each(|session| holder.ended(*session));
                drop(holder);
                sessions.iter().for_each(|session| owner.parts.missed.missed(*session));
            }
            Some(content @ (Content::Live(_) | Content::Replay(_))) => {
                let Some(source) = owner.source(&header.topic, header.partition) else {
                    drop(holder);
                    self.counters.hand_offs_unreadable.add(1);
                    owner.missed_of_unknown_topic(content);
                    return true;
                };
                let at = position(header, source);
                let parked = parked_offsets(header.offset, &header.parked);
                if holder.arrive(at, &parked) == Arrived::Zombie {
                    self.counters.hand_offs_late.add(1);
                    return true;
                }
                let sessions: Vec<SessionAddress> = match content {
                    Content::Replay(serial) => {
                        let session = holder.find(SessionSerial(*serial));
                        session.into_iter().filter(|session| holder.needs(*session, at)).collect()
                    }
                    Content::Live(users) => {
                        holder.looks_up(at);
                        let mut named = Vec::new();
                        for user in &users.ids {
                            self.directory.sessions_of(user, |session| named.push(session));
                        }
                        let Some(sessions) = needing(&holder, named, at, read_to) else {
                            return false;
                        };
                        sessions
                    }
                    Content::Gap(_)
                    | Content::ReplayRequest(_)
                    | Content::ReplayAnswer(_)
                    | Content::Passed(_)
                    | Content::Missed(_)
                    | Content::MissedRange(_)
                    | Content::Lost(_) => Vec::new(),
                };
                drop(holder);
                if !self.deliver_hand_off(hand_off, &sessions) {
                    return false;
                }
                let Some(owner) = &self.owner else { return true };
                let mut holder = owner.holder();
                holder.delivered(at, &parked, sessions.iter().copied());
                match content {
                    Content::Live(_) => holder.passed(at),
                    _ => holder.replayed(at),
                }
            }
        }
        true
    }

    /// Pushes the event to these sessions. Returns false if a ring is full.
    fn deliver_hand_off(
        &mut self,
        hand_off: &IncomingHandOff,
        sessions: &[SessionAddress],
    ) -> bool {
        if sessions.is_empty() {
            return true;
        }
        let Ok(record) = envelope::decode(&hand_off.value) else {
            self.counters.hand_offs_unreadable.add(1);
            return true;
        };
        self.links.clear();
        sessions.iter().for_each(|session| self.links.gather(*session));
        if self.links.full().is_some() {
            self.counters.waits_for_room.add(1);
            return false;
        }
        let appended_at_ms = u64::try_from(hand_off.header.appended_at_ms).unwrap_or(0);
        let HandOffHeader { topic, partition, offset, .. } = &hand_off.header;
        let at = log_position(topic, *partition, *offset);
        self.deliver(&record, Some(at), appended_at_ms, None);
        true
    }
}

/// The sessions among these that need a live record. `None`: not known before this node has read more of the
/// sessions topic.
fn needing(
    holder: &Holder,
    mut named: Vec<SessionAddress>,
    at: RoutedPosition,
    read_to: i64,
) -> Option<Vec<SessionAddress>> {
    let mut all_known = true;
    named.retain(|session| {
        let need = holder.needs_live(*session, at, read_to);
        all_known &= need != LiveNeed::NotKnown;
        need == LiveNeed::Yes
    });
    all_known.then_some(named)
}

fn position(header: &HandOffHeader, source: SourcePartition) -> RoutedPosition {
    RoutedPosition {
        source,
        offset: header.offset,
        generation: header.generation,
        table: header.table,
    }
}
