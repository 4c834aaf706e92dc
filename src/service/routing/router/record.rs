//! Records as a router takes them, and where it takes them from.

use bytes::Bytes;

/// One record of a partition, borrowed from whoever read it.
#[derive(Clone, Copy, Debug)]
pub struct RawRecord<'a> {
    /// Its offset.
    pub offset: i64,
    /// When it was appended (or made, as the topic is configured), Unix time in ms; 0 if the record
    /// does not say.
    pub appended_at_ms: u64,
    /// The key: by contract the conversation's id.
    pub key: Option<&'a [u8]>,
    /// The value: by contract a serialized `EventEnvelope`.
    pub value: &'a [u8],
    /// The header `traceparent`, where tracing is on.
    pub traceparent: Option<&'a str>,
}

/// One partition being read. Belongs to one router.
pub trait RecordSource: Send {
    /// Hands over the next record, if there is one, without waiting. Whoever adds one to an empty
    /// source rings the router's bell.
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool;
}

/// A record that waits, so it owns its bytes.
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

    /// One that did not come from a partition.
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
