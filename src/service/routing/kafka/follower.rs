//! The follower: reads the membership topics on every node, for the membership cache only. In `group`
//! mode each of their records is delivered by one node, but every node's member lists depend on them.
//!
//! With a conversation service the follower starts at the end of the topics, because the service's
//! answers contain all earlier changes. Without one it starts at the beginning, and the node routes no
//! record until the follower has reached the end that the topics had at the start.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::base_consumer::BaseConsumer;
use rdkafka::consumer::{Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::events::envelope::{self, EventBody};
use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::broadcast::{REQUEST_TIMEOUT, partition_count};
use crate::service::routing::kafka::client;
use crate::service::routing::kafka::source::appended_at_ms;
use crate::service::routing::kafka::{KafkaStartError, ReaderResources};

/// Timeout of one poll.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Pause after a failed request.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

pub(super) struct FollowerContext(Arc<ReaderResources>);

impl ClientContext for FollowerContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.client_error(&error, reason);
    }

    fn stats_raw(&self, _json: &[u8]) {}
}

impl ConsumerContext for FollowerContext {}

pub(super) struct Follower {
    shared: Arc<ReaderResources>,
    consumer: BaseConsumer<FollowerContext>,
    topics: Vec<String>,
    /// Number of partitions read, per topic.
    known: HashMap<String, i32>,
    /// Partitions that have not reached the end offset they had at the start, with that offset.
    behind: HashMap<(String, i32), i64>,
    /// How often the end of a partition with this number was reached, over all topics.
    ends: HashMap<i32, usize>,
    /// Whether the cache gets every change.
    following: bool,
}

impl Follower {
    pub(super) fn new(shared: Arc<ReaderResources>) -> Result<Self, KafkaStartError> {
        // Nothing is committed to this group, and no consumer joins it.
        let group = format!("{}.{}.members", shared.config.group, shared.config.client_id);
        let mut properties = client::consumer_properties(&shared.config, &group);
        properties
            .set("enable.partition.eof", "true")
            // A lost offset means missed changes: see `restart`.
            .set("auto.offset.reset", "error");
        let properties = client::with_user_properties(properties, &shared.config);
        let context = FollowerContext(Arc::clone(&shared));
        let consumer = BaseConsumer::from_config_and_context(&properties, context)?;
        let topics = shared.config.membership_topics();
        Ok(Self {
            shared,
            consumer,
            topics,
            known: HashMap::new(),
            behind: HashMap::new(),
            ends: HashMap::new(),
            following: false,
        })
    }

    /// Reads until the node stops. Signals `followed` when the cache is complete for the first time.
    pub(super) fn run(mut self, followed: &SyncSender<()>) {
        let interval = Duration::from_millis(self.shared.config.discovery_interval_ms);
        let mut next = Instant::now();
        let mut all_known = false;
        while !self.shared.is_stopping() {
            if Instant::now() >= next {
                let discovered = self.discover();
                if let Err(error) = &discovered {
                    self.shared.discovery_failed(error, self.following);
                }
                all_known |= discovered.is_ok();
                next = Instant::now() + if discovered.is_ok() { interval } else { RETRY_PAUSE };
            }
            if all_known && self.behind.is_empty() && !self.following {
                self.following = true;
                self.shared.membership.follow();
                self.shared.status.set_following(true);
                // Only the first signal is awaited.
                let _ = followed.try_send(());
            }
            match self.consumer.poll(if all_known { POLL_TIMEOUT } else { RETRY_PAUSE }) {
                None => {}
                Some(Ok(message)) => self.shared.apply(&message),
                Some(Err(KafkaError::PartitionEOF(partition))) => self.reached_end(partition),
                Some(Err(error)) if is_offset_lost(&error) => {
                    self.restart();
                    all_known = false;
                    next = Instant::now();
                }
                // The error callback has counted and logged it.
                Some(Err(error)) => tracing::debug!(%error, "membership topics: error"),
            }
            self.check_positions();
        }
    }

    /// Assigns new partitions: at the first discovery from the module's start offset, later from their
    /// beginning.
    fn discover(&mut self) -> KafkaResult<()> {
        for topic in self.topics.clone() {
            let count = partition_count(&self.consumer, &topic)?;
            let known = self.known.get(&topic).copied();
            let mut added = TopicPartitionList::new();
            let mut ends = Vec::new();
            for partition in known.unwrap_or(0)..count {
                let (low, high) =
                    self.consumer.fetch_watermarks(&topic, partition, REQUEST_TIMEOUT)?;
                let from_end = known.is_none() && self.shared.membership.has_source();
                let start = if from_end { high } else { low };
                added.add_partition_offset(&topic, partition, Offset::Offset(start))?;
                ends.push((partition, start, high));
            }
            if added.count() > 0 {
                self.consumer.incremental_assign(&added)?;
            }
            for (partition, start, high) in ends {
                if let Some(log) = self.shared.topic_partition(&topic, partition) {
                    self.shared.membership.follow_from(log.position(start));
                }
                if start < high && !self.following {
                    self.behind.insert((topic.clone(), partition), high);
                }
            }
            self.known.insert(topic, count);
        }
        Ok(())
    }

    /// Handles the end of a partition. librdkafka reports the partition number without the topic, so the
    /// end counts once as many ends were reported as topics have that partition. (`check_positions`
    /// finds most of them, but not partitions that end with transaction markers or compacted records.)
    fn reached_end(&mut self, partition: i32) {
        let topics = self.known.values().filter(|count| **count > partition).count();
        let ends = self.ends.entry(partition).or_default();
        *ends += 1;
        if *ends >= topics {
            self.behind.retain(|(_, behind), _| *behind != partition);
        }
    }

    /// Removes partitions from `behind` whose position has reached the end offset.
    fn check_positions(&mut self) {
        if self.behind.is_empty() {
            return;
        }
        let Ok(positions) = self.consumer.position() else { return };
        for element in positions.elements() {
            if let Offset::Offset(next) = element.offset() {
                let key = (element.topic().to_owned(), element.partition());
                if self.behind.get(&key).is_some_and(|end| next >= *end) {
                    self.behind.remove(&key);
                }
            }
        }
    }

    /// Rebuilds the member lists after the offset was lost, because missed changes are unknown.
    fn restart(&mut self) {
        tracing::warn!("membership topics: offset lost; rebuilding member lists");
        self.shared.counters.membership_restarts.add(1);
        self.shared.status.set_following(false);
        self.following = false;
        self.shared.membership.clear();
        if let Err(error) = self.consumer.unassign() {
            tracing::warn!(%error, "membership topics: error");
        }
        self.known.clear();
        self.behind.clear();
        self.ends.clear();
    }
}

fn is_offset_lost(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange)
    )
}

impl ReaderResources {
    /// Applies a membership event to the cache.
    fn apply(&self, message: &BorrowedMessage<'_>) {
        self.counters.membership_records.add(1);
        let Some(log) = self.topic_partition(message.topic(), message.partition()) else { return };
        let Ok(record) = envelope::decode(message.payload().unwrap_or_default()) else {
            self.counters.membership_records_undecodable.add(1);
            return;
        };
        let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
        let Some(conversation) = record.conversation().or(key) else { return };
        let (now_ms, position) = (unix_ms(), log.position(message.offset()));
        let at_ms = match appended_at_ms(message) {
            0 => now_ms,
            at_ms => at_ms,
        };
        match &record.body {
            EventBody::ConversationCreated { members, .. } => {
                self.membership.created(conversation, members, position, at_ms, now_ms);
            }
            &EventBody::MembershipChanged { user, added, .. } => {
                self.membership.changed(conversation, user, added, Some(position), at_ms);
            }
            EventBody::MessageSent { .. }
            | EventBody::MessageDeleted { .. }
            | EventBody::ReadReceiptUpdated { .. }
            | EventBody::PresenceUpdated { .. }
            | EventBody::Unknown => {}
        }
    }
}
