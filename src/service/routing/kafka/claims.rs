//! Claims: how the owner of a partition takes its generation.
//!
//! ```text
//!   owner        commit in the group                            coordinator
//!   first        offset 500, "g=7 t=12040 s=…"  ──────────────►  accepted
//!   (paused beyond its session timeout, its partition is assigned to the second)
//!   second       offset 500, "g=8 t=12040 s=…"  ──────────────►  accepted: it routes from 500 on
//!   first        offset 507, "g=7 t=12044 s=…"  ──────────────►  refused: no longer a member
//! ```
//!
//! The metadata of a committed offset holds the generation of the owner that committed it, and the table:
//! the offset in the sessions topic up to which its replays are acknowledged. (And since when the group reads the
//! topic, see [`starts`](super::starts).) An owner claims a partition by committing the same offset again with the next
//! generation, before it routes a record. The group coordinator refuses the commit of a member that has lost the
//! partition, so generations of one partition grow in the order of its owners. A zombie can therefore not take a
//! generation after its successor.
//!
//! A generation is never below the time of its claim. The group forgets committed offsets after a while, and
//! holders do not: without that, the generations of a forgotten partition would start again at 1, and holders
//! would discard everything as a zombie's.

use std::fmt;
use std::time::Duration;

use rdkafka::consumer::base_consumer::BaseConsumer;
use rdkafka::consumer::{CommitMode, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::routing::kafka::starts::GroupStart;
use crate::service::routing::router::TopicPartition;

/// What the metadata of a committed offset says. Displayed as that metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Claim {
    /// Generation of the owner that committed.
    pub(super) generation: i64,
    /// The table of the commit.
    pub(super) table: i64,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g={} t={}", self.generation, self.table)
    }
}

impl Claim {
    /// The metadata of a commit. `since_ms`: since when the group reads the topic.
    pub(super) fn metadata(self, since_ms: u64) -> String {
        format!("{self} s={since_ms}")
    }

    /// The claim in the metadata of a commit. `None`: something else, as of a node without claims.
    fn parse(metadata: &str) -> Option<Self> {
        let (generation, rest) = metadata.strip_prefix("g=")?.split_once(" t=")?;
        let table = rest.split_once(" s=").map_or(rest, |(table, _)| table);
        let number = |text: &str| text.parse().ok().filter(|number: &i64| *number >= 0);
        Some(Self { generation: number(generation)?, table: number(table)? })
    }

    /// The claim of the next owner. A generation is never below the time of its claim, so that generations
    /// still grow after the group has forgotten the last one.
    fn after(
        last: Option<Self>,
        log: &TopicPartition,
        start: &dyn ClaimStart,
    ) -> KafkaResult<Self> {
        let next = last.map_or(0, |last| last.generation.saturating_add(1));
        let table = start.table(last.map(|last| last.table))?;
        Ok(Self { generation: next.max(start.generation(log)), table })
    }
}

/// What a claim depends on besides the last one.
pub(super) trait ClaimStart {
    /// The least generation of a new owner: Unix time in ms, and above all that owners have stated.
    fn generation(&self, log: &TopicPartition) -> i64;

    /// The offset in the sessions topic from which the owner applies beginnings. `stated`: that of the last
    /// owner; `None`: nobody has routed with hand-off through the log before, so every session that is in the
    /// table already gets everything.
    ///
    /// # Errors
    /// The brokers do not answer.
    fn table(&self, stated: Option<i64>) -> KafkaResult<i64>;
}

/// A partition whose claim the coordinator has stored.
#[derive(Debug)]
pub(super) struct ClaimedPartition {
    pub(super) start: GroupStart,
    pub(super) claim: Claim,
}

impl ClaimedPartition {
    /// The offset that states the claim: it is that of the former owner, also if what was there is gone. So the
    /// next owner finds the loss as well, if this one ends before it has reported it.
    fn offset(&self) -> i64 {
        self.start.committed.unwrap_or(self.start.offset)
    }

    /// The metadata that states it.
    fn metadata(&self) -> String {
        self.claim.metadata(self.start.since_ms)
    }
}

/// Why partitions could not be claimed.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum ClaimError {
    /// The group has removed this member. It gets the partitions again, or not at all.
    #[error("this member is no longer in the group: {0}")]
    Fenced(KafkaError),
    /// May succeed later.
    #[error("{0}")]
    Failed(#[from] KafkaError),
}

impl ClaimError {
    fn of_commit(error: KafkaError) -> Self {
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::UnknownMemberId
                | RDKafkaErrorCode::IllegalGeneration
                | RDKafkaErrorCode::FencedInstanceId
                | RDKafkaErrorCode::FencedMemberEpoch
                | RDKafkaErrorCode::StaleMemberEpoch,
            ) => Self::Fenced(error),
            _ => Self::Failed(error),
        }
    }
}

/// Claims partitions for this member. Blocks for two requests. Returns the partitions whose claim is stored; the
/// others may be tried again.
///
/// # Errors
/// None was claimed. See [`ClaimError`].
pub(super) fn claim<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    starts: Vec<GroupStart>,
    timeout: Duration,
    first: &dyn ClaimStart,
) -> Result<Vec<ClaimedPartition>, ClaimError> {
    let mut wanted = Vec::with_capacity(starts.len());
    let mut commit = TopicPartitionList::with_capacity(starts.len());
    let mut list = TopicPartitionList::with_capacity(starts.len());
    for start in starts {
        let last = start.committed.and_then(|_| Claim::parse(&start.metadata));
        let claim = match Claim::after(last, &start.log, first) {
            Ok(claim) => claim,
            Err(error) => {
                tracing::debug!(%error, "the end of the sessions topic is not known");
                continue;
            }
        };
        let claimed = ClaimedPartition { start, claim };
        let log = &claimed.start.log;
        list.add_partition(&log.topic, log.partition);
        let mut element = commit.add_partition(&log.topic, log.partition);
        element.set_offset(Offset::Offset(claimed.offset()))?;
        element.set_metadata(claimed.metadata());
        wanted.push(claimed);
    }
    if wanted.is_empty() {
        return Ok(wanted);
    }
    // A lost member has no identity, and a group without members accepts commits of anybody.
    if consumer.assignment_lost() {
        let lost = KafkaError::ConsumerCommit(RDKafkaErrorCode::AssignmentLost);
        return Err(ClaimError::Fenced(lost));
    }
    consumer.commit(&commit, CommitMode::Sync).map_err(ClaimError::of_commit)?;
    // librdkafka reports an error only if all partitions have one, so the claims are read back.
    let after = consumer.committed_offsets(list, timeout)?;
    wanted.retain(|wanted| {
        let log = &wanted.start.log;
        let found = after.find_partition(&log.topic, log.partition);
        found.is_some_and(|found| {
            found.error().is_ok()
                && found.offset() == Offset::Offset(wanted.offset())
                && found.metadata() == wanted.metadata()
        })
    });
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_names_generation_and_table() {
        let claim = Claim { generation: 7, table: 12_040 };
        assert_eq!(claim.to_string(), "g=7 t=12040");
        assert_eq!(Claim::parse("g=7 t=12040"), Some(claim));
        assert_eq!(claim.metadata(1_700), "g=7 t=12040 s=1700");
        assert_eq!(Claim::parse("g=7 t=12040 s=1700"), Some(claim));
    }

    struct Start;

    impl ClaimStart for Start {
        fn generation(&self, _log: &TopicPartition) -> i64 {
            1_000
        }

        fn table(&self, stated: Option<i64>) -> KafkaResult<i64> {
            Ok(stated.unwrap_or(50))
        }
    }

    #[test]
    fn generations_grow_also_after_the_last_one_is_forgotten() {
        let claim = |generation, table| Claim { generation, table };
        let log = TopicPartition { topic: "events".into(), topic_index: 0, partition: 0 };
        assert_eq!(Claim::after(None, &log, &Start).unwrap(), claim(1_000, 50));
        assert_eq!(Claim::after(Some(claim(7, 40)), &log, &Start).unwrap(), claim(1_000, 40));
        assert_eq!(Claim::after(Some(claim(1_000, 40)), &log, &Start).unwrap(), claim(1_001, 40));
        assert_eq!(
            Claim::after(Some(claim(i64::MAX, 40)), &log, &Start).unwrap(),
            claim(i64::MAX, 40)
        );
    }

    #[test]
    fn other_metadata_is_no_claim() {
        for other in [
            "",
            "g=",
            "g=1",
            "g=1 t=",
            "g=-1 t=2",
            "g=1 t=-2",
            "g=1 t=2 x",
            "G=1 t=2",
            " g=1 t=2",
            "g=9223372036854775808 t=0",
            "t=2 g=1",
            "some tool",
            "s=1700",
            "g=7 s=1700 t=1",
        ] {
            assert_eq!(Claim::parse(other), None, "{other}");
        }
    }

    #[test]
    fn only_a_member_that_was_removed_is_fenced() {
        let commit = |code| ClaimError::of_commit(KafkaError::ConsumerCommit(code));
        let fenced = [RDKafkaErrorCode::UnknownMemberId, RDKafkaErrorCode::IllegalGeneration];
        assert!(fenced.into_iter().all(|code| matches!(commit(code), ClaimError::Fenced(_))));
        let failed = [RDKafkaErrorCode::RebalanceInProgress, RDKafkaErrorCode::RequestTimedOut];
        assert!(failed.into_iter().all(|code| matches!(commit(code), ClaimError::Failed(_))));
    }
}
