//! Bytes of the records in Kafka, from our own encoders.

use prost::Message as _;
use rdkafka::message::Headers as _;

use crate::service::cluster::ports::NodeEpoch;
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::cluster::wire::{
    HandOffHeader, Lease, PartitionPosition, Passed, SessionBegun, SessionsKey, TopicPositions,
    Users,
};
use crate::service::routing::kafka::hand_off_headers;

/// The header of a record batch (Kafka's message format, version 2), bytes.
pub(super) const BATCH_BYTES: f64 = 61.0;

/// Typical ids: UUIDs as text for users and conversations, 16 bytes for devices, the name of a pod for instances.
const USER: &str = "0b4cbd3e-6e0a-4e21-9f5f-0d2cf4c6a1b7";
const CONVERSATION_BYTES: usize = 36;
const DEVICE: &str = "phone-3f9c2a1b7d";
const INSTANCE: &str = "delivery-7d9c5b6f4-x2x8q";
const VERSION: &str = "0.1.0";
/// The topic of events with the longer name.
const TOPIC: &str = "conversation.events.v1";
/// Numbers of a cluster that has run for months, because small ones are encoded in fewer bytes: an offset,
/// Unix time in ms (which generations are too), sessions of one epoch, a partition.
const OFFSET: i64 = 50_000_000_000;
const TIME_MS: i64 = 1_796_000_000_000;
const SERIAL: u64 = 5_000_000;
const PARTITION: i32 = 200;
const EPOCH: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes of a number in a record: a zigzag varint.
fn number_bytes(number: i64) -> usize {
    let zigzag = ((number << 1) ^ (number >> 63)).unsigned_abs();
    (64 - (zigzag | 1).leading_zeros() as usize).div_ceil(7)
}

/// Bytes of a key, a value, or the name or the value of a header, with its length. `None`: a length of −1.
fn field_bytes(bytes: Option<usize>) -> usize {
    bytes.map_or(1, |bytes| number_bytes(bytes as i64) + bytes)
}

/// Bytes of a record without its share of the batch (Kafka's message format, version 2), before compression.
fn record_bytes(key: Option<usize>, value: Option<usize>, headers: &[(usize, usize)]) -> usize {
    let headers_bytes: usize = headers
        .iter()
        .map(|(name, value)| field_bytes(Some(*name)) + field_bytes(Some(*value)))
        .sum();
    // Attributes, and the differences to the time and the offset of the batch: one byte each in batches of
    // less than 64 ms and 64 records.
    let content = 3
        + field_bytes(key)
        + field_bytes(value)
        + number_bytes(headers.len() as i64)
        + headers_bytes;
    number_bytes(content as i64) + content
}

fn key(user: &str, device: &str) -> usize {
    SessionsKey { epoch: EPOCH, user: user.into(), device: device.into() }.encoded_len()
}

/// The beginning of a session, bytes.
pub(super) fn begun() -> f64 {
    let value = SessionBegun { serial: SERIAL, as_of: OFFSET };
    record_bytes(Some(key(USER, DEVICE)), Some(value.encoded_len()), &[]) as f64
}

/// The end of a session, bytes.
pub(super) fn ended() -> f64 {
    record_bytes(Some(key(USER, DEVICE)), None, &[]) as f64
}

/// The positions of this many partitions.
fn positions(partitions: f64) -> Vec<TopicPositions> {
    let position = PartitionPosition {
        partition: PARTITION,
        next: OFFSET,
        generation: TIME_MS,
        parked: Vec::new(),
        check: 0,
    };
    let partitions = vec![position; partitions.ceil() as usize];
    vec![TopicPositions { topic: TOPIC.into(), partitions }]
}

/// A lease of a node that owns this many partitions, bytes.
pub(super) fn lease(partitions: f64) -> f64 {
    let lease = Lease {
        instance: INSTANCE.into(),
        hand_off_partition: PARTITION,
        version: VERSION.into(),
        host: INSTANCE.into(),
        replaces: EPOCH,
        routed: positions(partitions),
        as_of: OFFSET,
        since: OFFSET,
        process: EPOCH,
        number: 1,
        answers_replays: true,
    };
    record_bytes(Some(key("", "")), Some(lease.encoded_len()), &[]) as f64
}

/// A record in the source topic, bytes. `value`: those of its value.
pub(super) fn source(value: usize) -> f64 {
    record_bytes(Some(CONVERSATION_BYTES), Some(value), &[]) as f64
}

fn hand_off(key: Option<usize>, value: usize, content: Content) -> usize {
    let header = HandOffHeader {
        parked: Vec::new(),
        topic: TOPIC.into(),
        partition: PARTITION,
        offset: OFFSET,
        generation: TIME_MS,
        table: OFFSET,
        appended_at_ms: TIME_MS,
        content: Some(content),
    };
    let (headers, _) = hand_off_headers(NodeEpoch(EPOCH), &header);
    let headers = headers.iter().map(|it| (it.key.len(), it.value.map_or(0, <[u8]>::len)));
    record_bytes(key, Some(value), &headers.collect::<Vec<_>>())
}

/// A record that is handed over for this many users, on average, bytes.
pub(super) fn live(value: usize, users: f64) -> f64 {
    let of = |users: f64| {
        let ids = vec![USER.to_owned(); users as usize];
        hand_off(Some(CONVERSATION_BYTES), value, Content::Live(Users { ids })) as f64
    };
    let (below, above) = (of(users.floor()), of(users.ceil()));
    below + (above - below) * users.fract()
}

/// A record that is replayed to one session, bytes.
pub(super) fn replay(value: usize) -> f64 {
    hand_off(Some(CONVERSATION_BYTES), value, Content::Replay(SERIAL)) as f64
}

/// What tells a node what has passed in this many partitions, bytes.
pub(super) fn passed(partitions: f64) -> f64 {
    hand_off(None, 0, Content::Passed(Passed { positions: positions(partitions) })) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By Kafka's rules the record of the key `k` and the value `v` is `10 00 00 00 02 6b 02 76 00`.
    #[test]
    fn record_has_the_bytes_of_the_message_format() {
        assert_eq!(record_bytes(Some(1), Some(1), &[]), 9);
        assert_eq!(record_bytes(None, Some(1), &[]), 8);
        assert_eq!(record_bytes(Some(1), Some(1), &[(1, 1)]), 9 + 4);
        // Lengths from 64 on have two bytes: the record's own and that of the value.
        assert_eq!(record_bytes(Some(1), Some(64), &[]), 9 + 63 + 2);
        assert_eq!([-1, 0, 63, 64, 8_191, 8_192].map(number_bytes), [1, 1, 1, 2, 2, 3]);
    }

    /// `docs/sizing.md` and `docs/operations.md` name these.
    #[test]
    fn sizes_are_those_of_the_documents() {
        assert_eq!([begun(), ended()], [86.0, 74.0]);
        assert_eq!([lease(0.0), lease(1.0), lease(4.0)], [142.0, 161.0, 218.0]);
        let hand_offs = [1.0, 2.0, 2.5, 100.0].map(|users| live(400, users));
        assert_eq!(hand_offs, [563.0, 601.0, 620.0, 4_326.0]);
        assert_eq!([source(400), replay(400), passed(4.0)], [445.0, 527.0, 190.0]);
    }
}
