//! The queue of one partition, which a router polls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};

use crate::handoff::Doorbell;
use crate::service::routing::router::{RawRecord, RecordSource};

/// An empty queue is checked at every 16th poll, in case its notification was missed.
const POLLS_PER_CHECK: u32 = 16;
/// Header with the W3C trace context.
const TRACEPARENT: &str = "traceparent";

/// What the queue of a partition has reported, for the Kafka thread.
#[derive(Debug, Default)]
pub(super) struct SourceState {
    is_lost: AtomicBool,
    is_refused: AtomicBool,
}

impl SourceState {
    /// Whether the position is not in the log. Nothing is read until the partition is assigned again.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Acquire)
    }

    /// Whether the leader refuses to let this node read the partition.
    pub(super) fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Acquire)
    }

    fn failed(&self, error: &KafkaError) {
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::AutoOffsetReset
                | RDKafkaErrorCode::OffsetOutOfRange
                | RDKafkaErrorCode::LogTruncation,
            ) => self.is_lost.store(true, Ordering::Release),
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => {
                self.is_refused.store(true, Ordering::Release);
            }
            _ => {}
        }
    }

    fn works(&self) {
        if self.is_refused() {
            self.is_refused.store(false, Ordering::Release);
        }
    }
}

/// The records of one partition, apart from those of the others, for whoever is notified of them.
pub(super) struct PartitionTap<C: ConsumerContext + 'static> {
    queue: PartitionQueue<C>,
    /// Whether the queue may have records.
    ready: Arc<AtomicBool>,
    polls: u32,
}

impl<C: ConsumerContext + 'static> PartitionTap<C> {
    /// Splits the partition's queue off the consumer's common queue. Call it before the partition is
    /// assigned: records fetched earlier would stay in the common queue, out of order. `notify` is called from
    /// a thread of librdkafka when the queue is no longer empty.
    pub(super) fn new(
        consumer: &Arc<BaseConsumer<C>>,
        topic: &str,
        partition: i32,
        notify: impl Fn() + Send + Sync + 'static,
    ) -> Option<Self> {
        let mut queue = consumer.split_partition_queue(topic, partition)?;
        let ready = Arc::new(AtomicBool::new(true));
        queue.set_nonempty_callback({
            let ready = Arc::clone(&ready);
            move || {
                ready.store(true, Ordering::Release);
                notify();
            }
        });
        Some(Self { queue, ready, polls: 0 })
    }

    /// The next record or error, if there is one. Never blocks.
    pub(super) fn poll(&mut self) -> Option<KafkaResult<BorrowedMessage<'_>>> {
        if !self.ready.load(Ordering::Relaxed) {
            self.polls = self.polls.wrapping_add(1);
            if !self.polls.is_multiple_of(POLLS_PER_CHECK) {
                return None;
            }
        }
        // Cleared before the poll, so that a record that arrives meanwhile sets it again.
        self.ready.store(false, Ordering::Release);
        let polled = self.queue.poll(Duration::ZERO);
        if polled.is_some() {
            self.ready.store(true, Ordering::Release);
        }
        polled
    }
}

pub(super) struct PartitionSource<C: ConsumerContext + 'static> {
    tap: PartitionTap<C>,
    state: Arc<SourceState>,
    /// Whether the end of the partition was reached since the last record.
    at_end: bool,
    tracing: bool,
}

impl<C: ConsumerContext + 'static> PartitionSource<C> {
    /// The source of a partition for the router that this bell wakes. See [`PartitionTap::new`].
    pub(super) fn new(
        consumer: &Arc<BaseConsumer<C>>,
        topic: &str,
        partition: i32,
        bell: Arc<Doorbell>,
        tracing: bool,
    ) -> Option<Self> {
        let tap = PartitionTap::new(consumer, topic, partition, move || bell.ring())?;
        Some(Self { tap, state: Arc::default(), at_end: false, tracing })
    }

    pub(super) fn state(&self) -> &Arc<SourceState> {
        &self.state
    }
}

impl<C: ConsumerContext + 'static> RecordSource for PartitionSource<C> {
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool {
        while let Some(polled) = self.tap.poll() {
            match polled {
                Ok(message) => {
                    self.at_end = false;
                    self.state.works();
                    hand_over(&message, self.tracing, take);
                    return true;
                }
                Err(KafkaError::PartitionEOF(_)) => {
                    self.at_end = true;
                    self.state.works();
                }
                // The error callback has counted and logged it.
                Err(error) => {
                    self.state.failed(&error);
                    tracing::debug!(%error, "partition");
                }
            }
        }
        false
    }

    /// Reported only with `enable.partition.eof`.
    fn is_at_end(&self) -> bool {
        self.at_end
    }
}

fn hand_over(message: &BorrowedMessage<'_>, tracing: bool, take: &mut dyn FnMut(RawRecord<'_>)) {
    let traceparent = tracing
        .then(|| message.headers())
        .flatten()
        .and_then(|headers| headers.iter().find(|header| header.key == TRACEPARENT))
        .and_then(|header| std::str::from_utf8(header.value?).ok());
    take(RawRecord {
        offset: message.offset(),
        appended_at_ms: appended_at_ms(message),
        key: message.key(),
        value: message.payload().unwrap_or_default(),
        traceparent,
    });
}

/// The record's timestamp, Unix time in ms; 0 if it has none.
pub(super) fn appended_at_ms(message: &BorrowedMessage<'_>) -> u64 {
    message.timestamp().to_millis().and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0)
}
