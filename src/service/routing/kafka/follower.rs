//! Reads the membership topics on every node, for the membership cache alone: in `group` mode their
//! records go to one node of the group, but the lists of every node depend on them.
//!
//! With a conversation service to ask, reading begins at the end: what came before is in its
//! answers. Without one the topics are all there is, and reading begins at their beginning; records are
//! routed only when the end of that time has been reached.

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
use crate::service::routing::kafka::broadcast::{ASK, partition_count};
use crate::service::routing::kafka::client;
use crate::service::routing::kafka::source::appended_at_ms;
use crate::service::routing::kafka::{KafkaStartError, Shared};

/// One wait for a record.
const POLL: Duration = Duration::from_millis(100);
/// Pause after a question that failed.
const RETRY: Duration = Duration::from_millis(500);

pub(super) struct FollowerContext(Arc<Shared>);

impl ClientContext for FollowerContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.heard(&error, reason);
    }

    fn stats_raw(&self, _json: &[u8]) {}
}

impl ConsumerContext for FollowerContext {}

pub(super) struct Follower {
    shared: Arc<Shared>,
    consumer: BaseConsumer<FollowerContext>,
    topics: Vec<String>,
    /// Per topic how many partitions are read.
    known: HashMap<String, i32>,
    /// Partitions whose end at the start has not been reached, with that end.
    behind: HashMap<(String, i32), i64>,
    /// How often the end of a partition of this number was reached, whatever the topic.
    ends: HashMap<i32, usize>,
    followed: bool,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self, KafkaStartError> {
        // Nothing is committed to this group and nobody joins it.
        let group = format!("{}.{}.members", shared.config.group, shared.config.client_id);
        let mut properties = client::consumer_properties(&shared.config, &group);
        properties
            .set("enable.partition.eof", "true")
            // A place that is gone means that changes were missed: see `begin_anew`.
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
            followed: false,
        })
    }

    /// Reads until the node stops; says on `followed` when the cache can be relied upon.
    pub(super) fn run(mut self, followed: &SyncSender<()>) {
        let interval = Duration::from_millis(self.shared.config.discovery_interval_ms);
        let mut next = Instant::now();
        let mut all_known = false;
        while !self.shared.is_stopping() {
            if Instant::now() >= next {
                let discovered = self.discover();
                if let Err(error) = &discovered {
                    self.shared.not_told(error, self.followed);
                }
                all_known |= discovered.is_ok();
                next = Instant::now() + if discovered.is_ok() { interval } else { RETRY };
            }
            if all_known && self.behind.is_empty() && !self.followed {
                self.followed = true;
                self.shared.membership.follow();
                self.shared.status.following(true);
                // The first time the reader waits for it; later nobody does.
                let _ = followed.try_send(());
            }
            match self.consumer.poll(if all_known { POLL } else { RETRY }) {
                None => {}
                Some(Ok(message)) => self.shared.apply(&message),
                Some(Err(KafkaError::PartitionEOF(partition))) => self.reached_end(partition),
                Some(Err(error)) if is_gone(&error) => {
                    self.begin_anew();
                    all_known = false;
                    next = Instant::now();
                }
                // The error callback has counted it and told of it.
                Some(Err(error)) => tracing::debug!(%error, "membership topics"),
            }
            self.see_how_far();
        }
    }

    /// Reads the partitions that are new: at the start as the module says, later from their
    /// beginning.
    fn discover(&mut self) -> KafkaResult<()> {
        for topic in self.topics.clone() {
            let count = partition_count(&self.consumer, &topic)?;
            let known = self.known.get(&topic).copied();
            let mut added = TopicPartitionList::new();
            let mut ends = Vec::new();
            for partition in known.unwrap_or(0)..count {
                let (low, high) = self.consumer.fetch_watermarks(&topic, partition, ASK)?;
                let from_end = known.is_none() && self.shared.membership.can_ask();
                let start = if from_end { high } else { low };
                added.add_partition_offset(&topic, partition, Offset::Offset(start))?;
                ends.push((partition, start, high));
            }
            if added.count() > 0 {
                self.consumer.incremental_assign(&added)?;
            }
            for (partition, start, high) in ends {
                if let Some(log) = self.shared.log_name(&topic, partition) {
                    self.shared.membership.follow_from(log.position(start));
                }
                if start < high && !self.followed {
                    self.behind.insert((topic.clone(), partition), high);
                }
            }
            self.known.insert(topic, count);
        }
        Ok(())
    }

    /// librdkafka says that the end of a partition was reached, but not of which topic: it counts when
    /// it was said for as many as have such a partition. (The position tells of most; not of those
    /// whose last records are not for us to see: transaction markers, compacted ones.)
    fn reached_end(&mut self, partition: i32) {
        let topics = self.known.values().filter(|count| **count > partition).count();
        let ends = self.ends.entry(partition).or_default();
        *ends += 1;
        if *ends >= topics {
            self.behind.retain(|(_, behind), _| *behind != partition);
        }
    }

    /// Which partitions have reached the end that they had at the start.
    fn see_how_far(&mut self) {
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

    /// The place where this node stood is gone: what was missed nobody can tell.
    fn begin_anew(&mut self) {
        tracing::warn!("membership topics: the place is gone, the member lists begin anew");
        self.shared.counters.membership_restarts.add(1);
        self.shared.status.following(false);
        self.followed = false;
        self.shared.membership.forget_all();
        if let Err(error) = self.consumer.unassign() {
            tracing::warn!(%error, "membership topics");
        }
        self.known.clear();
        self.behind.clear();
        self.ends.clear();
    }
}

fn is_gone(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange)
    )
}

impl Shared {
    /// Tells the cache what a record says of membership.
    fn apply(&self, message: &BorrowedMessage<'_>) {
        self.counters.membership_records.add(1);
        let Some(log) = self.log_name(message.topic(), message.partition()) else { return };
        let Ok(record) = envelope::decode(message.payload().unwrap_or_default()) else {
            self.counters.membership_records_undecodable.add(1);
            return;
        };
        let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
        let Some(conversation) = record.conversation().or(key) else { return };
        let (now_ms, place) = (unix_ms(), log.position(message.offset()));
        let at_ms = match appended_at_ms(message) {
            0 => now_ms,
            at_ms => at_ms,
        };
        match &record.body {
            EventBody::ConversationCreated { members, .. } => {
                self.membership.created(conversation, members, place, at_ms, now_ms);
            }
            &EventBody::MembershipChanged { user, added, .. } => {
                self.membership.changed(conversation, user, added, Some(place), at_ms);
            }
            EventBody::MessageSent { .. }
            | EventBody::MessageDeleted { .. }
            | EventBody::ReadReceiptUpdated { .. }
            | EventBody::PresenceUpdated { .. }
            | EventBody::Unknown => {}
        }
    }
}
