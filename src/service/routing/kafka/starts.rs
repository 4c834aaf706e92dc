//! From where partitions are read: after which offset, and what is gone before it.
//!
//! # A committed offset
//!
//! | the committed offset is | read from | what is gone |
//! | --- | --- | --- |
//! | in the log | there | nothing |
//! | below its start: retention or `DeleteRecords` | its start | the records between the two (holes of compaction and of transactions below the start count, too) |
//! | above its end: the log has lost its last records | the first record of the last [`CLOCK_ERROR_MS`], so that not all of retention is repeated | unknown |
//!
//! # No committed offset, in a group
//!
//! | the partition | read from |
//! | --- | --- |
//! | appeared while this node looked on ([`Origin::New`]) | its start |
//! | of a topic of which the group has committed other partitions | the first record since the group has read this topic: it was added later, or another node is about to commit the first offset of the group |
//! | of a topic that is new to the group, which has committed offsets of other topics | the first record since [`CLOCK_ERROR_MS`] before this node started, or since the group has read anything: either it was just created, or it is old and was just added to `KAFKA_TOPICS`, and must not be repeated from the start of its retention |
//! | of a group that has committed nothing, but whose sessions topic is older: all its topics were deleted, and its commits with them | the first record since [`CLOCK_ERROR_MS`] before this node started |
//! | of a group that has committed nothing: its very first start | its end |
//!
//! "Since the group has read this topic" is stated in the metadata of each commit (`s=`, Unix time in ms). Commits
//! without it are of other programs: they have read the topic for ever.

use std::collections::HashMap;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::routing::kafka::catalogue::{CLOCK_ERROR_MS, Catalogue, Origin};
use crate::service::routing::router::TopicPartition;

/// Largest difference between the clocks of nodes and producers that a group which has just begun allows
/// for, ms.
const CLOCK_SKEW_MS: u64 = 5_000;

/// A sessions topic that is older than this when a node starts is not that of the group's very first start, ms.
pub(super) const FIRST_START_MS: i64 = 60_000;

/// The start and the end of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogBounds {
    pub(super) start: i64,
    pub(super) end: i64,
}

/// From where a partition is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartRule {
    At(i64),
    Start,
    End,
    /// The first record appended since this Unix time in ms.
    Since(u64),
}

/// Records that are gone, and were not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogLoss {
    /// So many were deleted.
    Expired(u64),
    /// The log ends before the position.
    Truncated,
}

impl LogBounds {
    /// From where a reader at this position reads on, and what is gone.
    pub(super) fn resume(self, position: i64, now_ms: u64) -> (StartRule, Option<LogLoss>) {
        if position < self.start {
            let expired = self.start.abs_diff(position);
            (StartRule::Start, Some(LogLoss::Expired(expired)))
        } else if position > self.end {
            let since = StartRule::Since(now_ms.saturating_sub(CLOCK_ERROR_MS));
            (since, Some(LogLoss::Truncated))
        } else {
            (StartRule::At(position), None)
        }
    }
}

/// The offsets of these partitions at a time; `when` may be [`Offset::Beginning`] or [`Offset::End`]. `None`: not
/// known now. One request to each leader.
fn offsets_at<'a, C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    wanted: impl ExactSizeIterator<Item = (&'a TopicPartition, Offset)>,
    timeout: Duration,
) -> KafkaResult<HashMap<TopicPartition, Option<i64>>> {
    if wanted.len() == 0 {
        return Ok(HashMap::new());
    }
    let mut list = TopicPartitionList::with_capacity(wanted.len());
    let mut logs = Vec::with_capacity(wanted.len());
    for (log, when) in wanted {
        list.add_partition_offset(&log.topic, log.partition, when)?;
        logs.push(log);
    }
    let found = consumer.offsets_for_times(list, timeout)?;
    let offsets = logs.into_iter().filter_map(|log| {
        let found = found.find_partition(&log.topic, log.partition)?;
        found.error().ok()?;
        match found.offset() {
            Offset::Offset(offset) => Some((log.clone(), Some(offset))),
            // No record is as young.
            Offset::End => Some((log.clone(), None)),
            _ => None,
        }
    });
    Ok(offsets.collect())
}

/// The bounds of logs. Those that are not known now are missing. Blocks for two requests.
pub(super) fn bounds<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    logs: &[TopicPartition],
    timeout: Duration,
) -> KafkaResult<HashMap<TopicPartition, LogBounds>> {
    let at = |when| offsets_at(consumer, logs.iter().map(|log| (log, when)), timeout);
    let (starts, ends) = (at(Offset::Beginning)?, at(Offset::End)?);
    let bounds = starts.into_iter().filter_map(|(log, start)| {
        let end = (*ends.get(&log)?)?;
        // Not of the same moment: records may be deleted in between.
        let start = start?.min(end);
        Some((log, LogBounds { start, end }))
    });
    Ok(bounds.collect())
}

/// The offsets that the rules choose. Those that are not known now are missing. Blocks for at most one request.
pub(super) fn choose<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    rules: &[(TopicPartition, StartRule, LogBounds)],
    timeout: Duration,
) -> KafkaResult<HashMap<TopicPartition, i64>> {
    let since: Vec<_> = rules
        .iter()
        .filter_map(|(log, rule, _)| match rule {
            StartRule::Since(ms) => {
                Some((log, Offset::Offset(i64::try_from(*ms).unwrap_or(i64::MAX))))
            }
            StartRule::At(_) | StartRule::Start | StartRule::End => None,
        })
        .collect();
    let first_since = offsets_at(consumer, since.into_iter(), timeout)?;
    let chosen = rules.iter().filter_map(|(log, rule, bounds)| {
        let offset = match rule {
            StartRule::At(offset) => *offset,
            StartRule::Start => bounds.start,
            StartRule::End => bounds.end,
            StartRule::Since(_) => {
                first_since.get(log)?.unwrap_or(bounds.end).clamp(bounds.start, bounds.end)
            }
        };
        Some((log.clone(), offset))
    });
    Ok(chosen.collect())
}

/// Since when the group reads the topic, as the metadata of a commit states. 0: for ever.
pub(super) fn since_of(metadata: &str) -> u64 {
    let stated = metadata.split(' ').find_map(|word| word.strip_prefix("s="));
    stated.and_then(|since| since.parse().ok()).unwrap_or(0)
}

/// Since when the group reads a topic, and since when any other topic, Unix time in ms; `None`: it has no
/// commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct GroupAge {
    topic: Option<u64>,
    others: Option<u64>,
    /// Whether the group is known to have run before, whatever it has committed.
    has_run: bool,
}

impl GroupAge {
    /// From the commits of all partitions.
    fn of(commits: &TopicPartitionList, topic: &str, has_run: bool) -> Self {
        let mut age = Self { has_run, ..Self::default() };
        for element in commits.elements() {
            if !matches!(element.offset(), Offset::Offset(_)) {
                continue;
            }
            let since = since_of(element.metadata());
            let known = if element.topic() == topic { &mut age.topic } else { &mut age.others };
            *known = Some(known.map_or(since, |known| known.min(since)));
        }
        age
    }

    /// From where a partition without a commit is read.
    fn rule(self, origin: Origin, started_at_ms: u64) -> StartRule {
        match (origin, self) {
            (Origin::New, _) => StartRule::Start,
            (Origin::Since(ms), _) => StartRule::Since(ms),
            (Origin::Old, Self { topic: Some(0), .. }) => StartRule::Start,
            (Origin::Old, Self { topic: Some(since), .. }) => {
                StartRule::Since(since.saturating_sub(CLOCK_SKEW_MS))
            }
            (Origin::Old, Self { topic: None, others: Some(since), .. }) => {
                StartRule::Since(since.max(started_at_ms.saturating_sub(CLOCK_ERROR_MS)))
            }
            (Origin::Old, Self { topic: None, others: None, has_run: true }) => {
                StartRule::Since(started_at_ms.saturating_sub(CLOCK_ERROR_MS))
            }
            (Origin::Old, Self { topic: None, others: None, has_run: false }) => StartRule::End,
        }
    }
}

/// Where a member of the group begins with a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GroupStart {
    pub(super) log: TopicPartition,
    /// The first offset to read.
    pub(super) offset: i64,
    /// The committed offset, if there is one.
    pub(super) committed: Option<i64>,
    /// The metadata of the committed offset.
    pub(super) metadata: String,
    /// Since when the group reads the topic, Unix time in ms; 0: for ever.
    pub(super) since_ms: u64,
    /// What is gone.
    pub(super) lost: Option<LogLoss>,
}

/// What the starts of a group depend on.
pub(super) struct GroupStarts<'a> {
    pub(super) catalogue: &'a Catalogue,
    /// Unix time in ms.
    pub(super) started_at_ms: u64,
    pub(super) now_ms: u64,
    /// Whether the group has run before, as its sessions topic shows.
    pub(super) has_run: bool,
    pub(super) timeout: Duration,
}

impl GroupStarts<'_> {
    /// Where these partitions begin. Those that are not known now are missing. `is_replaced`: the committed
    /// offset is of a former log. Blocks for four requests.
    pub(super) fn find<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        logs: &[TopicPartition],
        is_replaced: impl Fn(&TopicPartition) -> bool,
    ) -> KafkaResult<Vec<GroupStart>> {
        let mut all = TopicPartitionList::new();
        for known in self.catalogue.partitions() {
            all.add_partition(&known.log.topic, known.log.partition);
        }
        let commits = consumer.committed_offsets(all, self.timeout)?;
        let bounds = bounds(consumer, logs, self.timeout)?;
        let mut starts = Vec::with_capacity(logs.len());
        let mut rules = Vec::with_capacity(logs.len());
        for log in logs {
            let (Some(known), Some(&bounds)) = (self.catalogue.partition(log), bounds.get(log))
            else {
                continue;
            };
            let Some(commit) = commits.find_partition(&log.topic, log.partition) else { continue };
            if let Err(error) = commit.error() {
                let (topic, partition) = (&*log.topic, log.partition);
                tracing::debug!(%error, topic, partition, "no committed offset");
                continue;
            }
            let committed = match commit.offset() {
                Offset::Offset(offset) if !is_replaced(log) => Some(offset),
                _ => None,
            };
            let age = GroupAge::of(&commits, &log.topic, self.has_run);
            let (rule, lost) = match committed {
                Some(committed) => bounds.resume(committed, self.now_ms),
                None => (age.rule(known.origin, self.started_at_ms), None),
            };
            let since_ms = match committed {
                Some(_) => since_of(commit.metadata()),
                None => age.topic.unwrap_or(self.now_ms),
            };
            let metadata = commit.metadata().to_owned();
            rules.push((log.clone(), rule, bounds));
            let log = log.clone();
            starts.push(GroupStart { log, offset: 0, committed, metadata, since_ms, lost });
        }
        let chosen = choose(consumer, &rules, self.timeout)?;
        starts.retain_mut(|start| match chosen.get(&start.log) {
            Some(offset) => {
                start.offset = *offset;
                true
            }
            None => false,
        });
        Ok(starts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_outside_of_the_log_is_moved_into_it_and_the_loss_is_counted() {
        let bounds = LogBounds { start: 100, end: 200 };
        let now_ms = 10 * CLOCK_ERROR_MS;
        assert_eq!(bounds.resume(100, now_ms), (StartRule::At(100), None));
        assert_eq!(bounds.resume(200, now_ms), (StartRule::At(200), None));
        assert_eq!(bounds.resume(58, now_ms), (StartRule::Start, Some(LogLoss::Expired(42))));
        assert_eq!(
            bounds.resume(201, now_ms),
            (StartRule::Since(9 * CLOCK_ERROR_MS), Some(LogLoss::Truncated))
        );
    }

    #[test]
    fn metadata_states_since_when_the_group_reads_the_topic() {
        assert_eq!(since_of("s=1700000000000"), 1_700_000_000_000);
        assert_eq!(since_of("g=7 t=12040 s=1700000000000"), 1_700_000_000_000);
        for other in ["", "g=7 t=12040", "s=", "s=-1", "s=x", "some tool"] {
            assert_eq!(since_of(other), 0, "{other}");
        }
    }

    #[test]
    fn age_of_a_group_is_that_of_its_oldest_commit() {
        let mut commits = TopicPartitionList::new();
        let mut commit = |topic: &str, partition, offset, metadata: &str| {
            let mut element = commits.add_partition(topic, partition);
            element.set_offset(offset).unwrap();
            element.set_metadata(metadata);
        };
        commit("a", 0, Offset::Offset(5), "g=7 t=1 s=300");
        commit("a", 1, Offset::Offset(0), "s=200");
        commit("a", 2, Offset::Invalid, "");
        commit("b", 0, Offset::Offset(5), "");
        commit("c", 0, Offset::Invalid, "");
        let age = |topic| GroupAge::of(&commits, topic, false);
        let aged = |topic, others| GroupAge { topic, others, has_run: false };
        assert_eq!(age("a"), aged(Some(200), Some(0)));
        assert_eq!(age("b"), aged(Some(0), Some(200)));
        assert_eq!(age("c"), aged(None, Some(0)));
    }

    #[test]
    fn partition_without_a_commit_is_read_as_the_age_of_the_group_says() {
        let started_at_ms = 10 * CLOCK_ERROR_MS;
        let rule_of = |age: GroupAge, origin| age.rule(origin, started_at_ms);
        let rule =
            |topic, others, origin| rule_of(GroupAge { topic, others, has_run: false }, origin);
        let month_ago = Some(1_000_000);
        for (topic, others) in [(None, None), (None, month_ago), (month_ago, None)] {
            assert_eq!(rule(topic, others, Origin::New), StartRule::Start);
            assert_eq!(rule(topic, others, Origin::Since(7)), StartRule::Since(7));
        }
        assert_eq!(rule(None, None, Origin::Old), StartRule::End, "the very first start");
        assert_eq!(
            rule_of(GroupAge { has_run: true, ..GroupAge::default() }, Origin::Old),
            StartRule::Since(9 * CLOCK_ERROR_MS),
            "all topics were deleted and created again while all nodes were stopped"
        );
        assert_eq!(
            rule(month_ago, None, Origin::Old),
            StartRule::Since(1_000_000 - CLOCK_SKEW_MS),
            "added while all nodes were stopped, or the very first start of another node"
        );
        assert_eq!(rule(Some(0), None, Origin::Old), StartRule::Start, "read by another program");
        assert_eq!(
            rule(None, month_ago, Origin::Old),
            StartRule::Since(9 * CLOCK_ERROR_MS),
            "not from the start of its retention"
        );
        let just_now = Some(started_at_ms - 1_000);
        assert_eq!(rule(None, just_now, Origin::Old), StartRule::Since(started_at_ms - 1_000));
    }
}
