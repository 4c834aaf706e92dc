//! Writer of the hand-off topic: records for the sessions of other nodes.
//!
//! | header | value |
//! | --- | --- |
//! | `to` | the epoch of the node, 8 bytes, big endian: a reader skips the records of others without decoding |
//! | `hand-off` | a `HandOffHeader` (`proto/delivery/cluster/v1/cluster.proto`) |

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};

use crate::service::cluster::ports::{
    HandOffSink, HandOffStored, NodeEpoch, OutgoingHandOff, Queued,
};
use crate::service::cluster::wire::HandOffHeader;
use crate::service::routing::kafka::outbox::{self, OutboxBounds, OutboxRecord, RecordOutbox};
use crate::service::routing::kafka::{ClusterLogCounters, KafkaConfig, KafkaStartError};

pub(super) const TO: &str = "to";
pub(super) const HAND_OFF: &str = "hand-off";
/// Time that a record waits for others, ms. It would be part of the latency of every event on another node. Not needed
/// for batches: while the five requests that may be in flight are unanswered, records collect in the next batch.
pub const HAND_OFF_LINGER_MS: u64 = 0;
/// Waiting records. [`HandOffSink::has_room`] leaves half of each for the routers that have begun a
/// record.
const BOUNDS: OutboxBounds = OutboxBounds { records_max: 131_072, bytes_max: 128 << 20 };
/// Memory of the hand-offs that wait to be stored, bytes.
pub const HAND_OFF_BYTES_MAX: u64 = BOUNDS.memory();

/// Properties of the producer of hand-offs. librdkafka's `CONFIGURATION.md` describes each.
pub fn hand_off_producer_properties(config: &KafkaConfig) -> ClientConfig {
    outbox::properties(config, HAND_OFF_LINGER_MS)
}

/// The headers of a hand-off, and their bytes.
pub fn hand_off_headers(target: NodeEpoch, header: &HandOffHeader) -> (OwnedHeaders, usize) {
    let header = header.encode_to_vec();
    let headers = OwnedHeaders::new_with_capacity(2)
        .insert(Header { key: TO, value: Some(&target.0.to_be_bytes()) })
        .insert(Header { key: HAND_OFF, value: Some(&header) });
    (headers, TO.len() + size_of::<u64>() + HAND_OFF.len() + header.len())
}

/// Stores hand-offs. Bounded; see [`HAND_OFF_BYTES_MAX`].
pub struct HandOffOutbox(RecordOutbox);

impl HandOffOutbox {
    /// A writer of `topic`, which exists.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: &KafkaConfig,
        topic: &str,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        RecordOutbox::start(config, topic, HAND_OFF_LINGER_MS, BOUNDS, counters).map(Self)
    }

    /// Waits at most `grace` until all hand-offs are stored. Returns the number of those that are not.
    /// Blocks. Nothing is stored afterwards.
    pub fn stop(&self, grace: Duration) -> u64 {
        self.0.stop(grace)
    }
}

impl HandOffSink for HandOffOutbox {
    fn send(&self, hand_off: OutgoingHandOff<'_>, stored: HandOffStored) -> Queued {
        let OutgoingHandOff { target, partition, header, key, value } = hand_off;
        let (headers, headers_bytes) = hand_off_headers(target, header);
        self.0.send(OutboxRecord {
            partition,
            key,
            value: Some(value),
            headers: Some(headers),
            headers_bytes,
            stored: Some(stored),
        })
    }

    fn has_room(&self) -> bool {
        self.0.is_half_empty()
    }
}
