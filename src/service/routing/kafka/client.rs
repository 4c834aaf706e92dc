//! What all clients have in common: properties, log lines, errors, statistics.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use serde::Deserialize;
use tokio::time::Instant;

use crate::service::routing::kafka::{KafkaConfig, KafkaCounters, Shared};
use crate::service::routing::router::TopicPartition;

/// A broker that has not said a word for this long, although it is always being asked, is taken for
/// unreachable, µs.
const SILENCE_US_MAX: i64 = 15_000_000;

/// Brokers are taken for reachable, all of them, when no connection has failed for this long: more
/// than the longest wait of librdkafka before it connects again (`reconnect.backoff.max.ms`).
const CALM: Duration = Duration::from_secs(5);

/// What a partition may be sent in one answer of a broker, bytes; a larger record comes all the same.
const FETCH_BYTES: u64 = 1 << 20;
/// What librdkafka keeps for each record beside its bytes (`rd_kafka_op_t`).
pub(super) const RECORD_OVERHEAD_BYTES: u64 = 320;
/// A partition's queue holds one record for so many bytes of prefetch.
const PREFETCH_BYTES_PER_RECORD: u64 = 512;
/// Records are not smaller than this in the long run: an envelope with its ids, a key, the frame
/// around them.
const RECORD_BYTES_MIN: u64 = 128;

fn prefetch_records(prefetch_kib: u32) -> u64 {
    (u64::from(prefetch_kib) * 1024 / PREFETCH_BYTES_PER_RECORD).max(1)
}

/// What librdkafka holds at most of a partition whose records are not taken, bytes: a full queue, and
/// one answer that was under way when it became full. A record, and a batch that inflates, may exceed it.
pub fn partition_bytes_max(prefetch_kib: u32) -> u64 {
    let records = prefetch_records(prefetch_kib) + FETCH_BYTES / RECORD_BYTES_MIN;
    u64::from(prefetch_kib) * 1024 + FETCH_BYTES + records * RECORD_OVERHEAD_BYTES
}

/// Properties of every consumer, but for the user's own ([`KafkaConfig::properties`]); see
/// librdkafka's documentation for each.
pub fn consumer_properties(config: &KafkaConfig, group: &str) -> ClientConfig {
    let mut properties = common_properties(config);
    properties
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Without it a partition whose queue was full for a moment pauses for a whole second.
        .set("fetch.queue.backoff.ms", "10")
        .set("queued.max.messages.kbytes", config.prefetch_kib.to_string())
        // The bytes say nothing of what librdkafka keeps for each record beside it.
        .set("queued.min.messages", prefetch_records(config.prefetch_kib).to_string())
        .set("fetch.message.max.bytes", FETCH_BYTES.to_string())
        // A real broker answers as soon as something is appended; the embedded one of `dev` lets
        // every fetch wait this long.
        .set("fetch.wait.max.ms", "100")
        .set("topic.metadata.refresh.interval.ms", config.discovery_interval_ms.to_string())
        .set("statistics.interval.ms", "2000");
    properties
}

/// Properties of every client.
pub(super) fn common_properties(config: &KafkaConfig) -> ClientConfig {
    let mut properties = ClientConfig::new();
    properties
        .set("bootstrap.servers", &config.brokers)
        .set("client.id", &config.client_id)
        .set("socket.nagle.disable", "true")
        .set("socket.keepalive.enable", "true")
        .set("reconnect.backoff.max.ms", "2000")
        // Brokers close idle connections; that is no news.
        .set("log.connection.close", "false");
    properties
}

/// The user's own properties win. Also sets which log lines are made.
pub(super) fn with_user_properties(
    mut properties: ClientConfig,
    config: &KafkaConfig,
) -> ClientConfig {
    for (name, value) in &config.properties {
        properties.set(name, value);
    }
    // Which lines are written is for `tracing` to decide; but debug lines are made by the thousand,
    // so they are made only if somebody asked for a debug context.
    let debugging = config.properties.iter().any(|(name, _)| name == "debug");
    properties.set_log_level(if debugging {
        RDKafkaLogLevel::Debug
    } else {
        RDKafkaLogLevel::Info
    });
    properties
}

/// A log line of librdkafka.
pub(super) fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        // What becomes of its connections, which it makes again by itself: one line for each, for each
        // client. The error callback hears the same and says it in a way that can be read.
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning if facility == "FAIL" => {
            tracing::debug!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::error!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => {
            tracing::warn!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Notice => tracing::info!(target: "librdkafka", facility, "{message}"),
        RDKafkaLogLevel::Info => tracing::debug!(target: "librdkafka", facility, "{message}"),
        RDKafkaLogLevel::Debug => tracing::trace!(target: "librdkafka", facility, "{message}"),
    }
}

/// Counts what the error callback of a client is told. The callback hears every error, also each that
/// `poll` then returns, so nobody else counts. `false`: the end of a partition was reached, which
/// comes the same way and is no error.
pub(super) fn count_error(counters: &KafkaCounters, error: &KafkaError) -> bool {
    let is_error = error.rdkafka_error_code() != Some(RDKafkaErrorCode::PartitionEOF);
    if is_error {
        counters.errors.add(1);
    }
    is_error
}

/// Whether the error is about connections, or else about what was asked over them.
fn is_of_connections(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::Authentication
                | RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::Resolve
                | RDKafkaErrorCode::SSL
        )
    )
}

impl Shared {
    /// Counts what the error callback of a client was told, and says it as often as it can be read.
    /// Returns whether it is an error at all.
    pub(super) fn heard(&self, error: &KafkaError, reason: &str) -> bool {
        if !count_error(&self.counters, error) {
            return false;
        }
        if is_of_connections(error) {
            if let Some(away) = self.connections.failed(Instant::now()) {
                tracing::warn!(%error, reason, "Kafka is away, or part of it{away}");
            }
        } else if let Some(again) = self.errors.failed(Instant::now()) {
            tracing::warn!(%error, reason, "Kafka{again}");
        }
        true
    }
}

/// The part of librdkafka's statistics that is used.
#[derive(Deserialize)]
struct Statistics {
    #[serde(default)]
    brokers: HashMap<String, Broker>,
    #[serde(default)]
    topics: HashMap<String, Topic>,
}

#[derive(Deserialize)]
struct Broker {
    state: String,
    /// µs since the last bytes came; -1: none yet.
    #[serde(default)]
    rxidle: i64,
}

#[derive(Deserialize)]
struct Topic {
    #[serde(default)]
    partitions: HashMap<String, Partition>,
}

#[derive(Deserialize)]
struct Partition {
    partition: i32,
    /// Below 0: not known.
    #[serde(default)]
    hi_offset: i64,
    /// What the broker has accepted. Below 0: nothing.
    #[serde(default)]
    committed_offset: i64,
}

/// The reader's eyes and ears.
#[derive(Clone)]
pub(super) struct Observer {
    pub(super) shared: Arc<Shared>,
}

impl Observer {
    pub(super) fn error(&self, error: &KafkaError, reason: &str) {
        if !self.shared.heard(error, reason) {
            return;
        }
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.shared.status.unreachable(reason.to_owned());
        }
    }

    /// Calls `committed` with each partition and the offset that the broker has accepted for it.
    pub(super) fn statistics(&self, json: &[u8], mut committed: impl FnMut(TopicPartition, i64)) {
        let statistics: Statistics = match serde_json::from_slice(json) {
            Ok(statistics) => statistics,
            Err(error) => {
                tracing::warn!(%error, "statistics of librdkafka not understood");
                return;
            }
        };
        let heard =
            |broker: &Broker| broker.state == "UP" && (0..SILENCE_US_MAX).contains(&broker.rxidle);
        let status = &self.shared.status;
        if statistics.brokers.values().any(heard) {
            status.reached();
            if let Some(back) = self.shared.connections.works_after(CALM, Instant::now()) {
                tracing::info!("Kafka is back {back}");
            }
        } else {
            status.unreachable("no broker answers".to_owned());
        }
        for (topic, Topic { partitions }) in &statistics.topics {
            for partition in partitions.values().filter(|partition| partition.hi_offset >= 0) {
                if let Some(log) = self.shared.log_name(topic, partition.partition) {
                    status.ends_at(&log, partition.hi_offset);
                    committed(log, partition.committed_offset);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_a_partition_is_no_error() {
        let counters = KafkaCounters::default();
        assert!(!count_error(&counters, &KafkaError::Global(RDKafkaErrorCode::PartitionEOF)));
        assert_eq!(counters.errors.get(), 0);
        let transport = KafkaError::Global(RDKafkaErrorCode::BrokerTransportFailure);
        assert!(count_error(&counters, &transport));
        assert_eq!(counters.errors.get(), 1);
    }
}
