//! Claims the partitions that the group assigns, and gives them to their routers.

use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Weak};

use rdkafka::consumer::Consumer as _;
use rdkafka::consumer::base_consumer::BaseConsumer;
use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::cluster::holder::SourcePartition;
use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::ClaimParts;
use crate::service::routing::kafka::claims::{
    self, Claim, ClaimError, ClaimStart, ClaimedPartition,
};
use crate::service::routing::kafka::group::{GroupContext, REQUEST_TIMEOUT};
use crate::service::routing::kafka::starts::GroupStart;
use crate::service::routing::router::Ownership;
use crate::service::routing::router::{CommittableTable, TopicPartition};

/// Where a claim starts in the sessions topic.
struct TableStart<'a> {
    consumer: &'a BaseConsumer<GroupContext>,
    parts: &'a ClaimParts,
}

impl ClaimStart for TableStart<'_> {
    fn generation(&self, log: &TopicPartition) -> i64 {
        let source = SourcePartition { topic: log.topic_index, partition: log.partition };
        let stated = self.parts.table.generation(source).saturating_add(1);
        stated.max(i64::try_from(unix_ms()).unwrap_or(i64::MAX))
    }

    fn table(&self, stated: Option<i64>) -> KafkaResult<i64> {
        let known = self.parts.table.next_offset();
        let Some(stated) = stated.filter(|stated| *stated > known) else {
            return Ok(stated.unwrap_or(known));
        };
        // The table is behind, unless the topic was deleted and created again.
        let topic = &self.parts.sessions_topic;
        let (_, end) = self.consumer.fetch_watermarks(topic, 0, REQUEST_TIMEOUT)?;
        Ok(if end < stated { known } else { stated })
    }
}

impl GroupContext {
    /// Claims the unclaimed partitions. What cannot be claimed stays unclaimed, to be tried again.
    fn claim(&self, consumer: &BaseConsumer<Self>) -> Vec<ClaimedPartition> {
        let wanted = self.unclaimed().len();
        if wanted == 0 {
            return Vec::new();
        }
        let counters = &self.shared().counters;
        let Some(parts) = &self.shared().claims else { return Vec::new() };
        let start = TableStart { consumer, parts };
        let claimed = self
            .find_starts(consumer)
            .map_err(ClaimError::Failed)
            .and_then(|starts| claims::claim(consumer, starts, REQUEST_TIMEOUT, &start));
        let count = claimed.as_ref().map_or(0, Vec::len);
        counters.claims.add(count as u64);
        counters.claims_failed.add((wanted - count) as u64);
        match claimed {
            Ok(claimed) if count == wanted => claimed,
            Ok(claimed) => {
                if let Some(again) = self.shared().errors.failed(tokio::time::Instant::now()) {
                    let unclaimed = wanted - count;
                    tracing::warn!(unclaimed, "some partitions cannot be claimed; retrying{again}");
                }
                claimed
            }
            Err(error @ ClaimError::Fenced(_)) => {
                // The group revokes them, or the member joins again. librdkafka may also keep them without a
                // new assignment, if the group's generation changed meanwhile: they are tried again.
                if let Some(again) = self.shared().errors.failed(tokio::time::Instant::now()) {
                    tracing::warn!(%error, "cannot claim partitions; retrying{again}");
                }
                Vec::new()
            }
            Err(error @ ClaimError::Failed(_)) => {
                if let Some(again) = self.shared().errors.failed(tokio::time::Instant::now()) {
                    tracing::warn!(%error, "cannot claim partitions; retrying{again}");
                }
                Vec::new()
            }
        }
    }

    /// The first offset to read of each claimed partition, and its ownership. Empty: the barrier is not known, so they
    /// are claimed again later.
    fn ownerships(
        &self,
        consumer: &BaseConsumer<Self>,
        claimed: Vec<ClaimedPartition>,
    ) -> Vec<(GroupStart, i64, Ownership)> {
        let Some(parts) = &self.shared().claims else { return Vec::new() };
        if claimed.is_empty() {
            return Vec::new();
        }
        // After the claim: what the former owner has handed over to this node is below it.
        let Some(barrier) = parts.barrier.end_offset() else {
            if let Some(again) = self.shared().errors.failed(tokio::time::Instant::now()) {
                tracing::warn!("the hand-offs to this node are not readable; retrying{again}");
            }
            return Vec::new();
        };
        let starts: Vec<_> = claimed.iter().map(|it| (&it.start.log, it.start.offset)).collect();
        let tails = parts.owned.len() + claimed.len();
        let fill_from = self.shared().fill_from(consumer, &starts, tails);
        let ownerships = claimed.into_iter().zip(fill_from).map(|(claimed, fill_from)| {
            let ClaimedPartition { start, claim: Claim { generation, table } } = claimed;
            let ownership = Ownership {
                generation,
                start: start.offset,
                table,
                barrier,
                settled: Arc::new(CommittableTable::new(table)),
                routed: Arc::new(AtomicI64::new(start.offset)),
                lost_from: start.committed.filter(|_| start.lost.is_some()),
            };
            (start, fill_from, ownership)
        });
        ownerships.collect()
    }

    /// Claims the unclaimed partitions, starts to read those that are claimed, and gives them to their
    /// routers. Returns their number.
    pub(super) fn start_claimed(&self, consumer: &BaseConsumer<Self>) -> KafkaResult<usize> {
        let mut claimed = self.claim(consumer);
        // The claim states where the other log starts. This node ends, see `ClaimParts::failed`.
        claimed.retain(|claimed| !self.replaced().contains(&claimed.start.log));
        let ownerships = self.ownerships(consumer, claimed);
        if ownerships.is_empty() {
            self.update_unclaimed();
            return Ok(0);
        }
        // An assignment hides that the last one was lost meanwhile, and the partitions with it.
        if consumer.assignment_lost() {
            return Ok(0);
        }
        let shared = self.shared();
        let mut added = TopicPartitionList::with_capacity(ownerships.len());
        let mut sources = Vec::with_capacity(ownerships.len());
        for (start, fill_from, ownership) in ownerships {
            // The queue is split off before the first fetch: see `PartitionSource::new`.
            let reader = self.consumer.get().and_then(Weak::upgrade);
            let log = &start.log;
            let Some(source) = reader.and_then(|reader| shared.source(&reader, log)) else {
                continue;
            };
            let first = Offset::Offset(fill_from);
            added.add_partition_offset(&log.topic, log.partition, first)?;
            sources.push((start, Some((fill_from, ownership)), source));
        }
        let count = added.count();
        consumer.incremental_assign(&added)?;
        for (start, fill, source) in sources {
            self.unclaimed().remove(&start.log);
            self.report_lost(&start);
            self.route(start, fill, source);
        }
        self.update_unclaimed();
        Ok(count)
    }

    pub(super) fn update_unclaimed(&self) {
        let unclaimed = self.unclaimed().len() as u64;
        self.shared().counters.partitions_unclaimed.set(unclaimed);
        if unclaimed == 0 {
            self.shared().status.assigned();
        }
    }
}
