//! The follower: reads the membership topics on every node, for the membership cache only. In `group`
//! mode each of their records is delivered by one node, but every node's member lists depend on them.
//!
//! With a conversation service the follower starts at the end of the topics, because the service's
//! answers contain all earlier changes. Without one it starts at the beginning, and the node routes no
//! record until the follower has reached the end that the topics had at the start. It finds the partitions in the
//! [`catalogue`](super::catalogue), as the reader of events does, and reads those that appear later from their
//! start.

use std::collections::{HashMap, HashSet};
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
use crate::service::members::membership::{ReadBy, RecordPosition};
use crate::service::routing::kafka::catalogue::{KnownPartition, Origin, REQUEST_TIMEOUT};
use crate::service::routing::kafka::client;
use crate::service::routing::kafka::starts::{self, StartRule};
use crate::service::routing::kafka::{KafkaStartError, ReaderResources};
use crate::service::routing::router::TopicPartition;
use crate::service::runtime::clock::steady_ms;

/// Producers append with their own clocks: so much more is read.
const CLOCKS_MS: u64 = 60_000;

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
    topics: HashSet<String>,
    /// The partitions that are read, and their incarnations.
    read: HashMap<TopicPartition, u64>,
    /// Partitions that have not reached the end offset they had at the start, with that offset.
    behind: HashMap<TopicPartition, i64>,
    /// How often the end of a partition with this number was reached, over all topics.
    ends: HashMap<i32, usize>,
    /// Whether all partitions are read.
    all_read: bool,
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
        let topics = shared.config.membership_topics().into_iter().collect();
        Ok(Self {
            shared,
            consumer,
            topics,
            read: HashMap::new(),
            behind: HashMap::new(),
            ends: HashMap::new(),
            all_read: false,
            following: false,
        })
    }

    /// Reads until the node stops. Signals `followed` when the cache is complete for the first time.
    pub(super) fn run(mut self, followed: &SyncSender<()>) {
        let mut next = Instant::now();
        while !self.shared.is_stopping() {
            if Instant::now() >= next {
                next = Instant::now() + RETRY_PAUSE;
                if let Err(error) = self.discover() {
                    self.shared.discovery_failed(&error, self.following);
                }
            }
            if self.all_read && self.behind.is_empty() && !self.following {
                self.following = true;
                self.shared.membership.follow();
                self.shared.status.set_following(true);
                // Only the first signal is awaited.
                let _ = followed.try_send(());
            }
            match self.consumer.poll(if self.all_read { POLL_TIMEOUT } else { RETRY_PAUSE }) {
                None => {}
                Some(Ok(message)) => self.shared.apply(&message),
                Some(Err(KafkaError::PartitionEOF(partition))) => self.reached_end(partition),
                Some(Err(error)) if is_offset_lost(&error) => {
                    self.restart();
                    next = Instant::now();
                }
                // The error callback has counted and logged it.
                Some(Err(error)) => tracing::debug!(%error, "membership topics: error"),
            }
            self.check_positions();
        }
    }

    /// Reads the partitions that the catalogue has and that are not read yet.
    fn discover(&mut self) -> KafkaResult<()> {
        self.shared.look(&self.consumer)?;
        let mut known = self.shared.catalogue.partitions();
        known.retain(|known| self.topics.contains(&*known.log.topic));
        let is_other = |(log, incarnation): (&TopicPartition, &u64)| {
            let current = known.iter().find(|known| known.log == *log);
            current.is_none_or(|known| known.incarnation != *incarnation)
        };
        if self.read.iter().any(is_other) {
            self.restart();
        }
        known.retain(|known| !self.read.contains_key(&known.log));
        let all_read = known.is_empty() || self.read_all(&known)?;
        self.all_read |= all_read && self.shared.catalogue.is_complete();
        Ok(())
    }

    /// Starts to read these partitions. Returns whether all of them could be started.
    fn read_all(&mut self, new: &[KnownPartition]) -> KafkaResult<bool> {
        let logs: Vec<_> = new.iter().map(|known| known.log.clone()).collect();
        let bounds = starts::bounds(&self.consumer, &logs, REQUEST_TIMEOUT)?;
        let rules = new.iter().filter_map(|known| {
            let rule = match known.origin {
                Origin::Old if self.shared.membership.has_source() => self.start_of_old(),
                Origin::Old | Origin::New => StartRule::Start,
                Origin::Since(ms) if self.shared.membership.has_source() => StartRule::Since(ms),
                Origin::Since(_) => StartRule::Start,
            };
            Some((known.log.clone(), rule, *bounds.get(&known.log)?))
        });
        let rules: Vec<_> = rules.collect();
        let chosen = starts::choose(&self.consumer, &rules, REQUEST_TIMEOUT)?;
        let mut added = TopicPartitionList::new();
        for (log, start) in &chosen {
            added.add_partition_offset(&log.topic, log.partition, Offset::Offset(*start))?;
        }
        if added.count() > 0 {
            self.consumer.incremental_assign(&added)?;
        }
        for KnownPartition { log, incarnation, .. } in new {
            let (Some(&start), Some(bounds)) = (chosen.get(log), bounds.get(log)) else { continue };
            self.read.insert(log.clone(), *incarnation);
            self.shared.membership.follow_from(log.position(start));
            if start < bounds.end && !self.following {
                self.behind.insert(log.clone(), bounds.end);
            }
        }
        Ok(chosen.len() == new.len())
    }

    /// Where a partition is read that existed before, if the conversation service has the lists: from where the tails
    /// of this node begin, so that it is known who joined or left since the records in them.
    fn start_of_old(&self) -> StartRule {
        let Some(tails) = &self.shared.tails else { return StartRule::End };
        StartRule::Since(unix_ms().saturating_sub(tails.age_max_ms() + CLOCKS_MS))
    }

    /// Handles the end of a partition. librdkafka reports the partition number without the topic, so the
    /// end counts once as many ends were reported as topics have that partition. (`check_positions`
    /// finds most of them, but not partitions that end with transaction markers or compacted records.)
    fn reached_end(&mut self, partition: i32) {
        let topics = self.read.keys().filter(|log| log.partition == partition).count();
        let ends = self.ends.entry(partition).or_default();
        *ends += 1;
        if *ends >= topics {
            self.behind.retain(|log, _| log.partition != partition);
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
                self.behind.retain(|log, end| {
                    let is_it =
                        *log.topic == *element.topic() && log.partition == element.partition();
                    !is_it || next < *end
                });
            }
        }
    }

    /// Rebuilds the member lists after the offset was lost, because missed changes are unknown.
    fn restart(&mut self) {
        tracing::warn!("membership topics: offset lost; rebuilding member lists");
        self.shared.counters.membership_restarts.add(1);
        self.shared.status.set_following(false);
        self.all_read = false;
        self.following = false;
        self.shared.membership.clear();
        if let Err(error) = self.consumer.unassign() {
            tracing::warn!(%error, "membership topics: error");
        }
        self.read.clear();
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
        let position = log.position(message.offset());
        self.apply_at(position, message);
        self.membership.followed(position);
    }

    fn apply_at(&self, position: RecordPosition, message: &BorrowedMessage<'_>) {
        let Ok(record) = envelope::decode(message.payload().unwrap_or_default()) else {
            self.counters.membership_records_undecodable.add(1);
            return;
        };
        let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
        let Some(conversation) = record.conversation().or(key) else { return };
        let by = ReadBy::Follower(position);
        match &record.body {
            EventBody::ConversationCreated { members, .. } => {
                self.membership.created(conversation, members, by, steady_ms());
            }
            &EventBody::MembershipChanged { user, added, .. } => {
                self.membership.changed(conversation, user, added, by);
            }
            EventBody::MessageSent { .. }
            | EventBody::MessageDeleted { .. }
            | EventBody::ReadReceiptUpdated { .. }
            | EventBody::PresenceUpdated { .. }
            | EventBody::Unknown => {}
        }
    }
}
