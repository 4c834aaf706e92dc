//! What all librdkafka clients share: properties, log lines, errors, statistics.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use serde::Deserialize;
use tokio::time::Instant;

use crate::service::routing::kafka::status::PartitionEnd;
use crate::service::routing::kafka::{KafkaConfig, KafkaCounters, ReaderResources};
use crate::service::routing::router::TopicPartition;

/// A broker that has sent nothing for this long counts as unreachable, µs. Fetches are always pending,
/// so a working broker answers sooner.
const SILENCE_US_MAX: i64 = 15_000_000;

/// All brokers count as reachable when no connection has failed for this long: more than librdkafka's
/// longest pause before it reconnects (`reconnect.backoff.max.ms`).
const RECOVERED_AFTER: Duration = Duration::from_secs(5);

/// Largest fetch of one partition, bytes (`fetch.message.max.bytes`). A larger record is still
/// fetched.
const FETCH_BYTES: u64 = 1 << 20;
/// Memory that librdkafka uses per record besides its bytes (`rd_kafka_op_t`).
pub(super) const RECORD_OVERHEAD_BYTES: u64 = 320;
/// A partition's queue holds one record for each of these bytes of prefetch.
const PREFETCH_BYTES_PER_RECORD: u64 = 512;
/// Smallest average size of a record: an envelope with its ids, a key, and Kafka's framing.
const RECORD_BYTES_MIN: u64 = 128;

const fn prefetch_records(prefetch_kib: u32) -> u64 {
    let records = prefetch_kib as u64 * 1024 / PREFETCH_BYTES_PER_RECORD;
    if records == 0 { 1 } else { records }
}

/// Memory bound of a partition in librdkafka, bytes: a full queue, and one fetch that was in flight when
/// it became full. A large record or a compressed batch may exceed it.
pub const fn partition_bytes_max(prefetch_kib: u32) -> u64 {
    let records = prefetch_records(prefetch_kib) + FETCH_BYTES / RECORD_BYTES_MIN;
    prefetch_kib as u64 * 1024 + FETCH_BYTES + records * RECORD_OVERHEAD_BYTES
}

/// Properties of every consumer, without the user's ([`KafkaConfig::properties`]). librdkafka's
/// `CONFIGURATION.md` describes each.
pub fn consumer_properties(config: &KafkaConfig, group: &str) -> ClientConfig {
    let mut properties = common_properties(config);
    properties
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // The default pauses a partition for a whole second when its queue was full for a moment.
        .set("fetch.queue.backoff.ms", "10")
        .set("queued.max.messages.kbytes", config.prefetch_kib.to_string())
        // The bound in bytes does not include the overhead per record.
        .set("queued.min.messages", prefetch_records(config.prefetch_kib).to_string())
        .set("fetch.message.max.bytes", FETCH_BYTES.to_string())
        // A real broker answers as soon as a record is appended. The embedded broker of `dev` delays
        // every fetch by this long.
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
        // Brokers close idle connections regularly.
        .set("log.connection.close", "false");
    if cfg!(feature = "kafka-tls") {
        // The folder that OpenSSL was built for may not exist here.
        properties.set("ssl.ca.location", "probe");
    }
    properties
}

/// Properties of members of a group. Most consumers read partitions of their own choice, without a group.
const OF_MEMBERS: [&str; 2] = ["group.protocol", "group.remote.assignor"];
/// What the brokers decide with `group.protocol=consumer` (KIP-848), and librdkafka refuses then.
const OF_CLASSIC_GROUPS: [&str; 3] =
    ["partition.assignment.strategy", "session.timeout.ms", "heartbeat.interval.ms"];

/// Whether the members of the group use the protocol of KIP-848.
pub(super) fn uses_consumer_protocol(config: &KafkaConfig) -> bool {
    let mut properties = config.properties.iter();
    properties
        .any(|(name, value)| name == "group.protocol" && value.eq_ignore_ascii_case("consumer"))
}

/// Like [`with_user_properties`], for a member of the group. `of_member`: its defaults.
pub(super) fn with_properties_of_member(
    properties: ClientConfig,
    config: &KafkaConfig,
    of_member: &[(&str, &str)],
) -> ClientConfig {
    let is_classic = !uses_consumer_protocol(config);
    let mut properties = properties;
    for (name, value) in of_member {
        if is_classic || !OF_CLASSIC_GROUPS.contains(name) {
            properties.set(*name, *value);
        }
    }
    let mut properties = with_user_properties(properties, config);
    for (name, value) in &config.properties {
        if OF_MEMBERS.contains(&name.as_str()) {
            properties.set(name, value);
        }
    }
    properties
}

/// Adds the user's properties, which override the others, and sets the log level.
pub(super) fn with_user_properties(
    mut properties: ClientConfig,
    config: &KafkaConfig,
) -> ClientConfig {
    for (name, value) in &config.properties {
        if !OF_MEMBERS.contains(&name.as_str()) {
            properties.set(name, value);
        }
    }
    // `tracing` filters the lines. There are thousands of debug lines, so librdkafka writes them
    // only if the property `debug` is set.
    let debugging = config.properties.iter().any(|(name, _)| name == "debug");
    properties.set_log_level(if debugging {
        RDKafkaLogLevel::Debug
    } else {
        RDKafkaLogLevel::Info
    });
    properties
}

/// Writes a log line of librdkafka.
pub(super) fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        // Connection failures: one line per connection and client. The error callback gets the same and
        // logs it at a bounded rate.
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning if facility == "FAIL" => {
            tracing::debug!(target: "librdkafka", facility, "{message}");
        }
        // One list of properties serves consumers and producers, and the rest is set on purpose.
        RDKafkaLogLevel::Warning
            if facility == "CONFWARN"
                && (message.contains("will be ignored by this")
                    || message.contains("is experimental")) =>
        {
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

/// Counts an error passed to a client's error callback. The callback gets every error, also those that
/// `poll` returns, so nothing else counts them. `false`: the end of a partition was reached, which is
/// reported the same way and is not an error.
pub(super) fn count_error(counters: &KafkaCounters, error: &KafkaError) -> bool {
    let is_error = error.rdkafka_error_code() != Some(RDKafkaErrorCode::PartitionEOF);
    if is_error {
        counters.errors.add(1);
    }
    is_error
}

/// Whether the error is about a connection, not about a request.
fn is_connection_error(error: &KafkaError) -> bool {
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

impl ReaderResources {
    /// Handles an error passed to a client's error callback: counts it, and logs at a bounded rate.
    /// Returns whether it is an error at all.
    pub(super) fn client_error(&self, error: &KafkaError, reason: &str) -> bool {
        if !count_error(&self.counters, error) {
            return false;
        }
        if is_connection_error(error) {
            if let Some(again) = self.connections.failed(Instant::now()) {
                tracing::warn!(%error, reason, "Kafka: brokers unreachable{again}");
            }
        } else if let Some(again) = self.errors.failed(Instant::now()) {
            tracing::warn!(%error, reason, "Kafka error{again}");
        }
        true
    }
}

/// librdkafka's statistics, as far as they are used (`STATISTICS.md`).
#[derive(Deserialize)]
struct Statistics {
    #[serde(default)]
    brokers: HashMap<String, BrokerStatistics>,
    #[serde(default)]
    topics: HashMap<String, TopicStatistics>,
}

#[derive(Deserialize)]
struct BrokerStatistics {
    state: String,
    /// µs since the last receive; -1: none yet.
    #[serde(default)]
    rxidle: i64,
}

#[derive(Deserialize)]
struct TopicStatistics {
    #[serde(default)]
    partitions: HashMap<String, PartitionStatistics>,
}

#[derive(Deserialize)]
struct PartitionStatistics {
    partition: i32,
    /// Negative: unknown.
    #[serde(default)]
    hi_offset: i64,
    /// The committed offset. Negative: none.
    #[serde(default)]
    committed_offset: i64,
    /// The next offset to fetch.
    #[serde(default)]
    next_offset: i64,
    /// Records fetched, and not taken by the application.
    #[serde(default)]
    fetchq_cnt: u64,
}

impl PartitionStatistics {
    /// Where the partition ends for its reader.
    fn end(&self) -> PartitionEnd {
        let is_drained = self.fetchq_cnt == 0 && self.next_offset >= self.hi_offset;
        if is_drained { PartitionEnd::Taken } else { PartitionEnd::At(self.hi_offset) }
    }
}

/// Handles the errors and statistics of the consumer of events.
#[derive(Clone)]
pub(super) struct Observer {
    pub(super) shared: Arc<ReaderResources>,
}

impl Observer {
    pub(super) fn error(&self, error: &KafkaError, reason: &str) {
        if !self.shared.client_error(error, reason) {
            return;
        }
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.shared.status.unreachable(reason.to_owned());
        }
    }

    /// Updates the status from statistics. Calls `committed` with each partition and its committed
    /// offset.
    pub(super) fn statistics(&self, json: &[u8], mut committed: impl FnMut(TopicPartition, i64)) {
        let statistics: Statistics = match serde_json::from_slice(json) {
            Ok(statistics) => statistics,
            Err(error) => {
                tracing::warn!(%error, "cannot parse the statistics of librdkafka");
                return;
            }
        };
        let responsive = |broker: &BrokerStatistics| {
            broker.state == "UP" && (0..SILENCE_US_MAX).contains(&broker.rxidle)
        };
        let status = &self.shared.status;
        if statistics.brokers.values().any(responsive) {
            status.reached();
            if let Some(back) =
                self.shared.connections.succeeded_after(RECOVERED_AFTER, Instant::now())
            {
                tracing::info!("Kafka: brokers reachable again {back}");
            }
        } else {
            status.unreachable("no broker answers".to_owned());
        }
        for (topic, TopicStatistics { partitions }) in &statistics.topics {
            for partition in partitions.values().filter(|partition| partition.hi_offset >= 0) {
                if let Some(log) = self.shared.topic_partition(topic, partition.partition) {
                    status.set_end_offset(&log, partition.end());
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
    fn partition_is_taken_once_all_is_fetched_and_nothing_waits() {
        let end = |next_offset, fetchq_cnt| {
            let (partition, hi_offset, committed_offset) = (0, 53, 0);
            PartitionStatistics { partition, hi_offset, committed_offset, next_offset, fetchq_cnt }
                .end()
        };
        assert_eq!(end(40, 0), PartitionEnd::At(53), "not all is fetched");
        assert_eq!(end(53, 3), PartitionEnd::At(53), "not all is taken");
        assert_eq!(end(53, 0), PartitionEnd::Taken);
    }

    #[test]
    fn end_of_a_partition_is_not_an_error() {
        let counters = KafkaCounters::default();
        assert!(!count_error(&counters, &KafkaError::Global(RDKafkaErrorCode::PartitionEOF)));
        assert_eq!(counters.errors.get(), 0);
        let transport = KafkaError::Global(RDKafkaErrorCode::BrokerTransportFailure);
        assert!(count_error(&counters, &transport));
        assert_eq!(counters.errors.get(), 1);
    }
}
