//! The simulated logs: events, sessions, hand-offs, and the offsets that the group has committed.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use prost::Message as _;

use super::trace;
use crate::service::cluster::ports::{NodeEpoch, SessionsRecord};
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::cluster::wire::{HandOffHeader, SessionBegun, SessionsKey};
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::message::v1::{Message, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventType;
use crate::service::routing::router::{RawRecord, RecordSource};

/// The topic of events.
pub(super) const TOPIC: &str = "events";
/// A user and one of their devices.
pub(super) type Device = (usize, usize);

/// Partitions of the topic of events.
pub(super) const PARTITIONS: usize = 3;
/// Partitions of the hand-off topic.
pub(super) const HAND_OFF_PARTITIONS: usize = 3;
/// Conversations: as many as users. Each has the users whose number has no common bit with its own.
const CONVERSATIONS: usize = 24;

/// An event of the log.
#[derive(Clone, Debug)]
struct LoggedEvent {
    conversation: usize,
    at_ms: u64,
    value: Bytes,
}

/// A stored hand-off.
#[derive(Clone, Debug)]
pub(super) struct StoredHandOff {
    pub(super) to: NodeEpoch,
    pub(super) header: HandOffHeader,
    pub(super) value: Bytes,
}

/// A stored hand-off, for the trace.
fn describe(record: &StoredHandOff) -> (&'static str, [i64; 4]) {
    let HandOffHeader { partition, offset, table, .. } = record.header;
    let about = |last| [(record.to.0 >> 16) as i64, i64::from(partition), offset, last];
    match record.header.content {
        Some(Content::Live(_)) => ("live: process, partition, offset, table", about(table)),
        Some(Content::Replay(serial)) => {
            ("replay: process, partition, offset, serial", about(serial as i64))
        }
        Some(Content::Gap(serial)) => ("gap: process, partition, -, serial", about(serial as i64)),
        Some(Content::Missed(_)) => ("missed: process, partition, offset, table", about(table)),
        Some(Content::Lost(ref lost)) => {
            ("lost: process, partition, offset, from", about(lost.from))
        }
        _ => ("other hand-off: process, partition, offset, table", about(table)),
    }
}

/// A committed offset and its metadata.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Commit {
    pub(super) offset: i64,
    pub(super) generation: i64,
    pub(super) table: i64,
}

/// A partition of the topic of events.
#[derive(Debug, Default)]
struct EventLog {
    /// The lowest offset that is retained. (The checks know what was below it.)
    low: usize,
    events: Vec<LoggedEvent>,
}

type Partition = Arc<Mutex<EventLog>>;

/// A partition of the hand-off topic.
#[derive(Default)]
pub(super) struct HandOffLog {
    /// The lowest offset that is retained.
    low: usize,
    retained: VecDeque<(u64, StoredHandOff)>,
}

impl HandOffLog {
    pub(super) fn end(&self) -> usize {
        self.low + self.retained.len()
    }

    pub(super) fn low(&self) -> usize {
        self.low
    }

    /// The record at this offset.
    pub(super) fn get(&self, offset: usize) -> Option<&StoredHandOff> {
        self.retained.get(offset.checked_sub(self.low)?).map(|(_, record)| record)
    }
}

#[derive(Default)]
pub(super) struct Logs {
    pub(super) now_ms: u64,
    events: [Partition; PARTITIONS],
    /// `None`: removed by compaction.
    pub(super) sessions: Vec<Option<SessionsRecord>>,
    pub(super) hand_offs: [HandOffLog; HAND_OFF_PARTITIONS],
    committed: [Commit; PARTITIONS],
    /// The offsets of the records that concern each user, by partition.
    by_user: [[Vec<i64>; super::USERS]; PARTITIONS],
    /// For each epoch: when its last lease was stored, and the longest time between two, ms.
    leases: BTreeMap<u64, (u64, u64)>,
    /// Of each device: the epochs and serials of all its sessions, in the order of their beginnings.
    begun: BTreeMap<Device, Vec<(u64, u64)>>,
}

/// The members of a conversation.
pub(super) fn members(conversation: usize) -> Vec<usize> {
    (0..super::USERS).filter(|user| user % 5 != conversation % 5).collect()
}

/// The name of a user; sorts as its number.
pub(super) fn user_name(user: usize) -> String {
    format!("user-{user:02}")
}

/// The id of a conversation.
pub(super) fn conversation_name(conversation: usize) -> String {
    format!("conversation-{conversation}")
}

/// All conversations.
pub(super) fn conversations() -> impl Iterator<Item = usize> {
    0..CONVERSATIONS
}

impl Logs {
    /// Appends a message of a conversation with a text of `bytes`. Its sequence is its offset.
    pub(super) fn append(&mut self, conversation: usize, bytes: usize) {
        let mut partition = self.events[conversation % PARTITIONS].lock().expect("one thread");
        let sequence = partition.events.len() as i64;
        for user in members(conversation) {
            self.by_user[conversation % PARTITIONS][user].push(sequence);
        }
        let message = Message {
            conversation_id: conversation_name(conversation),
            sequence,
            content: "x".repeat(bytes),
            ..Message::default()
        };
        let payload = MessageSentEvent { message: Some(message) }.encode_to_vec();
        let value = encode_envelope(EventType::MessageSent, None, payload).into();
        partition.events.push(LoggedEvent { conversation, at_ms: self.now_ms, value });
    }

    /// Stores a hand-off.
    pub(super) fn hand_off(&mut self, partition: i32, record: StoredHandOff) {
        let (what, about) = describe(&record);
        trace::note(what, about);
        self.hand_offs[partition as usize].retained.push_back((self.now_ms, record));
    }

    /// Stores a record of the sessions topic.
    pub(super) fn session(&mut self, key: SessionsKey, value: Option<Bytes>) {
        if key.user.is_empty() {
            let (last, longest) = self.leases.entry(key.epoch).or_insert((self.now_ms, 0));
            *longest = (self.now_ms - *last).max(*longest);
            *last = self.now_ms;
        } else if let Some(value) = &value {
            let begun = SessionBegun::decode(value.clone()).expect("ours");
            let number = |name: &str| name.rsplit('-').next().and_then(|it| it.parse().ok());
            let device = number(&key.user).zip(number(&key.device)).expect("ours");
            let (user, number) = (device.0 as i64, begun.serial as i64);
            let about = [(key.epoch >> 16) as i64, self.sessions.len() as i64, number, user];
            trace::note("begun: process, offset, serial, user", about);
            self.begun.entry(device).or_default().push((key.epoch, begun.serial));
        }
        self.sessions.push(Some(SessionsRecord {
            offset: self.sessions.len() as i64,
            appended_at_ms: self.now_ms as i64,
            key: Some(key),
            value,
        }));
    }

    /// Deletes hand-offs that are older than the retention.
    pub(super) fn expire(&mut self, retention_ms: u64) {
        for log in &mut self.hand_offs {
            while log.retained.front().is_some_and(|(at, _)| at + retention_ms < self.now_ms) {
                log.retained.pop_front();
                log.low += 1;
            }
        }
    }

    /// Compacts the sessions topic: of records older than `lag_ms`, only the last of each key stays, and no
    /// tombstone.
    pub(super) fn compact(&mut self, lag_ms: u64) {
        let mut later = HashSet::new();
        let limit = self.now_ms.saturating_sub(lag_ms) as i64;
        for slot in self.sessions.iter_mut().rev() {
            let Some(record) = slot else { continue };
            let key = record.key.as_ref().expect("all have one").encode_to_vec();
            let is_last = later.insert(key);
            if record.appended_at_ms < limit && (!is_last || record.value.is_none()) {
                *slot = None;
            }
        }
    }

    /// The first offset of a partition that was appended at or after a time.
    pub(super) fn appended_since(&self, partition: usize, at_ms: u64) -> i64 {
        let log = self.events[partition].lock().expect("one thread");
        log.events.partition_point(|event| event.at_ms < at_ms) as i64
    }

    /// Deletes the events of a partition below an offset.
    pub(super) fn expire_events(&mut self, partition: usize, below: i64) {
        let mut log = self.events[partition].lock().expect("one thread");
        log.low = log.low.max(below as usize);
    }

    /// The lowest offset of a partition that is retained.
    pub(super) fn low(&self, partition: usize) -> i64 {
        self.events[partition].lock().expect("one thread").low as i64
    }

    /// The end of each partition.
    pub(super) fn ends(&self) -> [i64; PARTITIONS] {
        self.events
            .each_ref()
            .map(|partition| partition.lock().expect("one thread").events.len() as i64)
    }

    /// The conversations of these records of a partition.
    pub(super) fn conversations_of(&self, partition: usize, offsets: &[i64]) -> Vec<(i64, usize)> {
        let log = self.events[partition].lock().expect("one thread");
        let conversation = |offset: i64| log.events[offset as usize].conversation;
        offsets.iter().map(|offset| (*offset, conversation(*offset))).collect()
    }

    /// The offsets at or above `from` of the records that concern a user.
    pub(super) fn concerned(&self, partition: usize, from: i64, user: usize) -> &[i64] {
        let all = &self.by_user[partition][user];
        &all[all.partition_point(|offset| *offset < from)..]
    }

    /// The longest time for which an epoch has stored no lease, ms.
    pub(super) fn longest_silence(&self, epoch: u64) -> u64 {
        self.leases
            .get(&epoch)
            .map_or(u64::MAX, |(last, longest)| (self.now_ms - last).max(*longest))
    }

    /// Whether another session of a device is stored behind this one.
    pub(super) fn is_replaced(&self, device: Device, epoch: u64, serial: u64) -> bool {
        let Some(begun) = self.begun.get(&device) else { return false };
        let own = begun.iter().position(|its| *its == (epoch, serial));
        own.is_some_and(|own| begun[own..].iter().any(|(its, _)| *its != epoch))
    }

    /// A reader of a partition.
    pub(super) fn source(&self, partition: usize, from: i64) -> EventSource {
        EventSource {
            partition: Arc::clone(&self.events[partition]),
            next: from as usize,
            has_expired: Arc::default(),
        }
    }

    pub(super) fn committed(&self, partition: usize) -> Commit {
        self.committed[partition]
    }

    pub(super) fn commit(&mut self, partition: usize, commit: Commit) {
        assert!(commit.generation >= self.committed[partition].generation);
        self.committed[partition] = commit;
    }
}

/// Reads a partition for its router.
pub(super) struct EventSource {
    partition: Partition,
    next: usize,
    /// Set when the next record was deleted.
    pub(super) has_expired: Arc<AtomicBool>,
}

impl RecordSource for EventSource {
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool {
        let event = {
            let log = self.partition.lock().expect("one thread");
            if self.next < log.low {
                self.has_expired.store(true, Ordering::Relaxed);
                return false;
            }
            log.events.get(self.next).cloned()
        };
        let Some(event) = event else { return false };
        let key = conversation_name(event.conversation);
        let offset = self.next as i64;
        self.next += 1;
        take(RawRecord {
            offset,
            appended_at_ms: event.at_ms,
            key: Some(key.as_bytes()),
            value: &event.value,
            traceparent: None,
        });
        true
    }

    fn is_at_end(&self) -> bool {
        self.next >= self.partition.lock().expect("one thread").events.len()
    }
}
