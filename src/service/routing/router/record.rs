//! Kafka records as a router reads them.

use crate::service::cluster::tail::TailRecord;
use std::sync::Arc;

use bytes::Bytes;

use crate::service::events::envelope::DecodedEvent;
use crate::service::routing::router::in_flight::RecordId;

/// One record of a partition, borrowed from its source.
#[derive(Clone, Copy, Debug)]
pub struct RawRecord<'a> {
    /// Its offset.
    pub offset: i64,
    /// The record's timestamp (`CreateTime` or `LogAppendTime`, as the topic is configured), Unix
    /// time in ms; 0 if it has none.
    pub appended_at_ms: u64,
    /// The key: the conversation's id (contract §2).
    pub key: Option<&'a [u8]>,
    /// The value: a serialized `EventEnvelope` (contract §2).
    pub value: &'a [u8],
    /// The header `traceparent`, if tracing is on.
    pub traceparent: Option<&'a str>,
}

/// The conversation that a record names, or its key.
pub(super) fn named_conversation<'a>(
    record: &DecodedEvent<'a>,
    raw: RawRecord<'a>,
) -> Option<&'a str> {
    let key = raw.key.and_then(|key| std::str::from_utf8(key).ok());
    record.conversation().or(key.filter(|key| !key.is_empty()))
}

impl<'a> From<TailRecord<'a>> for RawRecord<'a> {
    fn from(record: TailRecord<'a>) -> Self {
        let TailRecord { offset, appended_at_ms, key, value } = record;
        Self { offset, appended_at_ms, key, value, traceparent: None }
    }
}

/// The records of one partition. Owned by one router.
pub trait RecordSource: Send {
    /// Passes the next record to `take`, if there is one. Never blocks. When a record arrives at an
    /// empty source, the source rings the router's bell.
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool;

    /// Whether the end of the partition was reached since the last record. Known only to sources that
    /// have to fill a tail.
    fn is_at_end(&self) -> bool {
        false
    }
}

/// A copy of a record that has to wait.
#[derive(Clone, Debug)]
pub(super) struct OwnedRecord {
    pub(super) offset: i64,
    pub(super) appended_at_ms: u64,
    pub(super) key: Option<Box<[u8]>>,
    pub(super) value: Bytes,
    pub(super) traceparent: Option<Box<str>>,
}

impl OwnedRecord {
    pub(super) fn new(raw: RawRecord<'_>) -> Self {
        Self {
            offset: raw.offset,
            appended_at_ms: raw.appended_at_ms,
            key: raw.key.map(Box::from),
            value: Bytes::copy_from_slice(raw.value),
            traceparent: raw.traceparent.map(Box::from),
        }
    }

    /// A record that did not come from a partition.
    pub(super) fn of_value(value: Bytes) -> Self {
        Self { offset: 0, appended_at_ms: 0, key: None, value, traceparent: None }
    }

    pub(super) fn raw(&self) -> RawRecord<'_> {
        RawRecord {
            offset: self.offset,
            appended_at_ms: self.appended_at_ms,
            key: self.key.as_deref(),
            value: &self.value,
            traceparent: self.traceparent.as_deref(),
        }
    }

    /// Bytes held.
    pub(super) fn size(&self) -> usize {
        self.value.len() + self.key.as_ref().map_or(0, |key| key.len()) + size_of::<Self>()
    }
}

/// Where a waiting record came from.
#[derive(Debug)]
pub(super) enum Intake {
    /// From the lane's partition.
    Partition(RecordId),
    /// From another node, for the members of its conversation.
    OtherNode,
    /// From a part of this node (presence), for these users.
    ToUsers(Vec<Arc<str>>),
}

/// A record that waits in a lane.
#[derive(Debug)]
pub(super) struct WaitingRecord {
    pub(super) record: OwnedRecord,
    pub(super) intake: Intake,
    /// When it was first tried at the front of the lane, steady time in ms; `None`: not yet.
    pub(super) since_ms: Option<u64>,
}
