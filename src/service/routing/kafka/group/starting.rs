//! Finds where the partitions that the group assigns start, and what to do when a position or a log is lost.

use std::sync::Weak;

use rdkafka::consumer::base_consumer::BaseConsumer;
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::ClaimParts;
use crate::service::routing::kafka::group::{
    CLAIMED_REVOKE_GRACE, GroupContext, GroupReader, REQUEST_TIMEOUT, is_incremental, list_of,
};
use crate::service::routing::kafka::starts::{self, GroupStart, GroupStarts};
use crate::service::routing::router::TopicPartition;

impl GroupContext {
    /// Where the unclaimed partitions start, as far as it is known now.
    pub(super) fn find_starts(
        &self,
        consumer: &BaseConsumer<Self>,
    ) -> KafkaResult<Vec<GroupStart>> {
        let shared = self.shared();
        let logs: Vec<_> = self.unclaimed().iter().cloned().collect();
        if logs.iter().any(|log| shared.catalogue.partition(log).is_none()) {
            // The leader of the group has found it first.
            shared.catalogue.look_soon();
            shared.look(consumer)?;
        }
        let started_at_ms = i64::try_from(shared.started_at_ms).unwrap_or(i64::MAX);
        let first_start_ms = started_at_ms - starts::FIRST_START_MS;
        let has_run = |claims: &ClaimParts| claims.table.is_older_than(first_start_ms);
        let find = GroupStarts {
            catalogue: &shared.catalogue,
            has_run: shared.claims.as_ref().is_some_and(has_run),
            started_at_ms: shared.started_at_ms,
            now_ms: unix_ms(),
            timeout: REQUEST_TIMEOUT,
        };
        find.find(consumer, &logs, |log| self.replaced().contains(log))
    }

    /// Reports what is gone before the first record of a partition. To be called before its router gets it.
    pub(super) fn report_lost(&self, start: &GroupStart) {
        if let Some(lost) = start.lost {
            self.shared().lost_records(&start.log, lost);
        }
    }

    /// Starts to read the unclaimed partitions, as far as it is known where they start. Returns their number.
    pub(super) fn start_unclaimed(&self, consumer: &BaseConsumer<Self>) -> KafkaResult<usize> {
        let shared = self.shared();
        if shared.claims.is_some() {
            return self.start_claimed(consumer);
        }
        let starts = match self.find_starts(consumer) {
            Ok(starts) => starts,
            Err(error) => {
                if let Some(again) = shared.errors.failed(tokio::time::Instant::now()) {
                    tracing::warn!(%error, "cannot find where the partitions start; retrying{again}");
                }
                Vec::new()
            }
        };
        if starts.is_empty() {
            self.update_unclaimed();
            return Ok(0);
        }
        let mut added = TopicPartitionList::with_capacity(starts.len());
        let mut sources = Vec::with_capacity(starts.len());
        for start in starts {
            // The queue is split off before the first fetch: see `PartitionSource::new`.
            let reader = self.consumer.get().and_then(Weak::upgrade);
            let log = &start.log;
            let Some(source) = reader.and_then(|reader| shared.source(&reader, log)) else {
                continue;
            };
            added.add_partition_offset(&log.topic, log.partition, Offset::Offset(start.offset))?;
            sources.push((start, source));
        }
        if is_incremental(consumer) {
            consumer.incremental_assign(&added)?;
        } else {
            consumer.assign(&added)?;
        }
        for (start, source) in sources {
            self.unclaimed().remove(&start.log);
            self.report_lost(&start);
            self.route(start, None, source);
        }
        self.update_unclaimed();
        Ok(added.count())
    }
}

impl GroupReader {
    /// Asks the brokers about the topics, and no longer reads logs that are not the present ones.
    pub(super) fn look(&self) {
        let (shared, context) = (&self.shared, self.consumer.context());
        for (log, owned) in &*context.owned() {
            // A log that ends before the position is another one.
            if let Some(position) = owned.committable.get() {
                shared.catalogue.reached(log, owned.incarnation, position);
            }
            shared.catalogue.set_refused(log, owned.source.is_refused());
        }
        if let Err(error) = shared.look(&self.consumer) {
            shared.discovery_failed(&error, shared.catalogue.is_complete());
        }
        let mut replaced = Vec::new();
        for (log, owned) in &*context.owned() {
            let known = shared.catalogue.partition(log);
            if known.is_some_and(|known| known.incarnation != owned.incarnation) {
                replaced.push(log.clone());
            }
        }
        if !replaced.is_empty() {
            // Positions in the former log are not committed any more.
            context.replaced().extend(replaced.iter().cloned());
            self.start_again(&replaced);
        }
    }

    /// Reads partitions again whose position is not in the log.
    pub(super) fn mend(&self) {
        let (shared, context) = (&self.shared, self.consumer.context());
        let mut lost: Vec<(TopicPartition, u64, Option<i64>)> = Vec::new();
        for (log, owned) in &*context.owned() {
            if owned.source.is_lost() {
                lost.push((log.clone(), owned.incarnation, owned.committable.get()));
            }
        }
        if lost.is_empty() {
            return;
        }
        let logs: Vec<_> = lost.iter().map(|(log, ..)| log.clone()).collect();
        let bounds = match starts::bounds(&self.consumer, &logs, REQUEST_TIMEOUT) {
            Ok(bounds) => bounds,
            Err(error) => {
                if let Some(again) = shared.errors.failed(tokio::time::Instant::now()) {
                    tracing::warn!(%error, "cannot find the start of a partition; retrying{again}");
                }
                return;
            }
        };
        let mut expired = Vec::new();
        for (log, incarnation, position) in lost {
            let Some(bounds) = bounds.get(&log) else { continue };
            match position {
                Some(position) if position > bounds.end => {
                    // The next look finds that it is another log.
                    shared.catalogue.reached(&log, incarnation, position);
                    shared.catalogue.look_soon();
                }
                _ => expired.push(log),
            }
        }
        self.start_again(&expired);
    }

    /// Takes partitions back from their routers, to be started again from where it is possible.
    fn start_again(&self, logs: &[TopicPartition]) {
        if logs.is_empty() {
            return;
        }
        let context = self.consumer.context();
        context.shared().revoke(logs, CLAIMED_REVOKE_GRACE);
        let is_replaced = |log: &TopicPartition| context.replaced().contains(log);
        let commits = |log: &TopicPartition| logs.contains(log) && !is_replaced(log);
        context.commit(&self.consumer, commits, CommitMode::Sync);
        for log in logs {
            context.forget(log);
        }
        if is_incremental(&self.consumer)
            && let Err(error) = self.consumer.incremental_unassign(&list_of(logs))
        {
            self.shared.counters.errors.add(1);
            tracing::warn!(%error, "cannot start partitions again");
        }
        context.unclaimed().extend(logs.iter().cloned());
        context.update_unclaimed();
    }
}
