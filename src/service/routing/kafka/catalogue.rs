//! The catalogue: what the brokers say about the topics of events. The readers of all modes and the follower
//! share it, so all of them find the same partitions.
//!
//! # From where a partition is read
//!
//! | the partition | `broadcast` | `group`, if the group has committed no offset of it |
//! | --- | --- | --- |
//! | existed when this node looked first ([`Origin::Old`]) | its end | by the group's other commits: [`starts`](super::starts) |
//! | appeared later ([`Origin::New`]) | its start | its start |
//! | was denied for a moment, or forbidden ([`Origin::Since`]) | the first record since | the first record since |
//!
//! `Since` protects from a broker that has just started and does not know an old topic yet: a false denial must
//! not replay the whole retention. Producers append with their own clocks, so it begins [`CLOCK_ERROR_MS`]
//! earlier.
//!
//! # A log that is another one
//!
//! A topic that all brokers deny for [`GONE_AFTER`] is deleted: if there is one with its name later, it is another one.
//! A log whose end is lower than before, or a topic with fewer partitions, was created again, or has lost its last
//! records. In all cases the partitions get a new `incarnation`, and positions in the former one mean nothing. (If a
//! topic is created again between two looks, and then has as many records as before, nobody can see it: the client
//! library does not show the id of a topic.)

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::time::Instant;

use crate::service::routing::router::TopicPartition;

/// Timeout of one request.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// How long all brokers have to deny a topic until it counts as deleted.
pub(super) const GONE_AFTER: Duration = Duration::from_secs(5);
/// Longest time between two looks while a topic is denied or not answered.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How long the end of a log has to stay below the former one: a broker that has lost the leadership of a partition and
/// does not know it yet answers with an older end.
const LOWER_FOR: Duration = Duration::from_secs(1);
/// Largest error of the clocks of producers, ms.
pub(super) const CLOCK_ERROR_MS: u64 = 600_000;

/// What is known of the age of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// It existed when this node looked first.
    Old,
    /// It appeared while this node looked on.
    New,
    /// It may be old, but nothing before this time is missing: Unix time in ms.
    Since(u64),
}

/// A partition that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KnownPartition {
    pub(super) log: TopicPartition,
    pub(super) origin: Origin,
    /// Another number: another log, in which earlier positions mean nothing.
    pub(super) incarnation: u64,
}

/// Why the events of a topic cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicTrouble {
    /// No broker knows it.
    Missing,
    /// This node may not describe or read it.
    Forbidden,
}

impl TopicTrouble {
    /// As a sentence.
    pub(super) fn of(self, topic: &str) -> String {
        match self {
            Self::Missing => format!("the topic {topic} does not exist"),
            Self::Forbidden => format!("this node may not read the topic {topic}"),
        }
    }

    /// As the value of a label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Forbidden => "forbidden",
        }
    }
}

/// What the brokers answered about one topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Exists(i32),
    Denied(TopicTrouble),
}

/// What has happened to a topic. In both cases records may be gone that nobody has read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TopicChange {
    /// It was deleted.
    Deleted(Arc<str>),
    /// It has another log, or has lost its last records.
    Replaced(Arc<str>),
}

#[derive(Clone, Copy, Debug)]
struct PartitionState {
    origin: Origin,
    incarnation: u64,
    /// The highest end offset seen, or position reached.
    end: i64,
    /// Since when its end is lower.
    lower_since: Option<Instant>,
    /// Whether its leader refuses to let this node read it.
    is_refused: bool,
}

/// The present series of denials of a topic.
#[derive(Clone, Copy, Debug)]
struct Denial {
    trouble: TopicTrouble,
    since: Instant,
    since_ms: u64,
    /// Whether the brokers said in all of them that it does not exist.
    is_certain: bool,
}

#[derive(Debug)]
struct TopicState {
    topic: Arc<str>,
    /// Whether any broker has answered.
    is_answered: bool,
    denial: Option<Denial>,
    partitions: Vec<PartitionState>,
}

impl TopicState {
    /// A broker has answered at `now`, which is `now_ms` of Unix time.
    fn answered(
        &mut self,
        answer: Answer,
        (now, now_ms): (Instant, u64),
        incarnations: &mut u64,
    ) -> Option<TopicChange> {
        let topic = Arc::clone(&self.topic);
        let is_first = !std::mem::replace(&mut self.is_answered, true);
        match answer {
            Answer::Denied(trouble) => {
                let is_missing = trouble == TopicTrouble::Missing;
                let begun =
                    Denial { trouble, since: now, since_ms: now_ms, is_certain: is_missing };
                let denial = self.denial.get_or_insert(begun);
                denial.trouble = trouble;
                denial.is_certain &= is_missing;
                let is_gone = denial.is_certain && now.duration_since(denial.since) >= GONE_AFTER;
                if !is_gone || self.partitions.is_empty() {
                    return None;
                }
                self.partitions.clear();
                Some(TopicChange::Deleted(topic))
            }
            Answer::Exists(count) => {
                let denial = self.denial.take();
                let count = usize::try_from(count).unwrap_or(0);
                let is_other = count < self.partitions.len();
                if is_other {
                    self.partitions.clear();
                }
                let origin = match denial {
                    _ if !self.partitions.is_empty() => Origin::New,
                    Some(denial)
                        if denial.is_certain && now.duration_since(denial.since) >= GONE_AFTER =>
                    {
                        Origin::New
                    }
                    Some(denial) => Origin::Since(denial.since_ms.saturating_sub(CLOCK_ERROR_MS)),
                    None if is_first => Origin::Old,
                    // It had more partitions a moment ago.
                    None => Origin::Since(now_ms.saturating_sub(CLOCK_ERROR_MS)),
                };
                while self.partitions.len() < count {
                    *incarnations += 1;
                    let incarnation = *incarnations;
                    self.partitions.push(PartitionState {
                        origin,
                        incarnation,
                        end: 0,
                        lower_since: None,
                        is_refused: false,
                    });
                }
                is_other.then_some(TopicChange::Replaced(topic))
            }
        }
    }

    /// Whether the next look is not urgent.
    fn is_calm(&self) -> bool {
        let mut partitions = self.partitions.iter();
        self.denial.is_none() && partitions.all(|partition| partition.lower_since.is_none())
    }

    /// Why the topic cannot be read. Not for a denial of a moment, by a broker that has just started.
    fn trouble(&self) -> Option<(Arc<str>, TopicTrouble)> {
        let is_refused = self.partitions.iter().any(|partition| partition.is_refused);
        let trouble = match self.denial {
            Some(Denial { trouble, is_certain, .. })
                if self.partitions.is_empty() || !is_certain =>
            {
                trouble
            }
            _ if is_refused => TopicTrouble::Forbidden,
            _ => return None,
        };
        Some((Arc::clone(&self.topic), trouble))
    }

    /// The log of a partition ends at `end`. Returns whether it is another log than before.
    fn ends_at(
        &mut self,
        partition: usize,
        end: i64,
        (now, now_ms): (Instant, u64),
        incarnations: &mut u64,
    ) -> bool {
        let Some(known) = self.partitions.get_mut(partition) else { return false };
        if end >= known.end {
            known.end = end;
            known.lower_since = None;
            return false;
        }
        let since = *known.lower_since.get_or_insert(now);
        if now.duration_since(since) < LOWER_FOR {
            return false;
        }
        *incarnations += 1;
        // If it was created again, all of it is younger; if it has lost its last records, older ones are
        // not repeated.
        let origin = Origin::Since(now_ms.saturating_sub(CLOCK_ERROR_MS));
        *known =
            PartitionState { origin, incarnation: *incarnations, end, lower_since: None, ..*known };
        true
    }
}

#[derive(Debug)]
struct CatalogueState {
    topics: Vec<TopicState>,
    incarnations: u64,
    /// No look before this time.
    next: Option<Instant>,
}

/// The topics of events and their partitions.
#[derive(Debug)]
pub(super) struct Catalogue {
    topics: Vec<Arc<str>>,
    interval: Duration,
    state: Mutex<CatalogueState>,
    /// Held during a look, which takes some requests.
    looking: Mutex<()>,
}

impl Catalogue {
    /// `topics`: by index. `interval`: time between two looks.
    pub(super) fn new(topics: Vec<Arc<str>>, interval: Duration) -> Self {
        let state = topics.iter().map(|topic| TopicState {
            topic: Arc::clone(topic),
            is_answered: false,
            denial: None,
            partitions: Vec::new(),
        });
        let state = CatalogueState { topics: state.collect(), incarnations: 0, next: None };
        Self { topics, interval, state: Mutex::new(state), looking: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, CatalogueState> {
        self.state.lock().expect("no holder panics")
    }

    /// Whether the brokers have answered about each topic.
    pub(super) fn is_complete(&self) -> bool {
        self.state().topics.iter().all(|topic| topic.is_answered)
    }

    /// The topics that cannot be read now.
    pub(super) fn troubles(&self) -> Vec<(Arc<str>, TopicTrouble)> {
        let state = self.state();
        let troubled = state.topics.iter().filter_map(TopicState::trouble);
        troubled.collect()
    }

    /// All partitions.
    pub(super) fn partitions(&self) -> Vec<KnownPartition> {
        let state = self.state();
        let mut all = Vec::new();
        for (index, topic) in state.topics.iter().enumerate() {
            for (partition, known) in topic.partitions.iter().enumerate() {
                let log = TopicPartition {
                    topic: Arc::clone(&topic.topic),
                    topic_index: u16::try_from(index).unwrap_or(u16::MAX),
                    partition: i32::try_from(partition).unwrap_or(i32::MAX),
                };
                let PartitionState { origin, incarnation, .. } = *known;
                all.push(KnownPartition { log, origin, incarnation });
            }
        }
        all
    }

    /// Origin and incarnation of a partition; `None`: not known.
    pub(super) fn partition(&self, log: &TopicPartition) -> Option<KnownPartition> {
        let state = self.state();
        let topic = state.topics.get(usize::from(log.topic_index))?;
        let known = topic.partitions.get(usize::try_from(log.partition).ok()?)?;
        let PartitionState { origin, incarnation, .. } = *known;
        Some(KnownPartition { log: log.clone(), origin, incarnation })
    }

    fn update(&self, log: &TopicPartition, update: impl FnOnce(&mut PartitionState)) {
        let mut state = self.state();
        let topic = state.topics.get_mut(usize::from(log.topic_index));
        let index = usize::try_from(log.partition).unwrap_or(usize::MAX);
        topic.and_then(|topic| topic.partitions.get_mut(index)).map(update);
    }

    /// A reader of this incarnation has reached this position: a log that ends below it is another one. A position in a
    /// former log says nothing.
    pub(super) fn reached(&self, log: &TopicPartition, incarnation: u64, position: i64) {
        self.update(log, |known| {
            if known.incarnation == incarnation {
                known.end = known.end.max(position);
            }
        });
    }

    /// Whether the leader of a partition refuses to let this node read it.
    pub(super) fn set_refused(&self, log: &TopicPartition, is_refused: bool) {
        self.update(log, |known| known.is_refused = is_refused);
    }

    /// The next look is due at once.
    pub(super) fn look_soon(&self) {
        self.state().next = None;
    }

    /// Asks the brokers, if that is due and nobody else does. Blocks for some requests. Returns what has
    /// happened; `None`: it was not due.
    ///
    /// # Errors
    /// A topic was not answered.
    pub(super) fn look<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        now_ms: impl Fn() -> u64,
    ) -> Result<Option<Vec<TopicChange>>, KafkaError> {
        let Ok(_looking) = self.looking.try_lock() else { return Ok(None) };
        if self.state().next.is_some_and(|next| Instant::now() < next) {
            return Ok(None);
        }
        let mut changes = Vec::new();
        let mut outcome = Ok(());
        for (index, topic) in self.topics.iter().enumerate() {
            match ask(consumer, topic) {
                Ok(answer) => {
                    let CatalogueState { topics, incarnations, .. } = &mut *self.state();
                    let now = (Instant::now(), now_ms());
                    changes.extend(topics[index].answered(answer, now, incarnations));
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        changes.extend(self.compare_ends(consumer, (Instant::now(), now_ms())));
        let mut state = self.state();
        let is_calm = outcome.is_ok() && state.topics.iter().all(TopicState::is_calm);
        let pause = if is_calm { self.interval } else { self.interval.min(LOOK_AGAIN) };
        state.next = Some(Instant::now() + pause);
        outcome.map(|()| Some(changes))
    }

    /// Compares the end offsets with those of the last look.
    fn compare_ends<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        now: (Instant, u64),
    ) -> Vec<TopicChange> {
        let mut list = TopicPartitionList::new();
        for KnownPartition { log, .. } in self.partitions() {
            // Fails for an invalid offset only.
            let _ = list.add_partition_offset(&log.topic, log.partition, Offset::End);
        }
        if list.count() == 0 {
            return Vec::new();
        }
        let Ok(ends) = consumer.offsets_for_times(list, REQUEST_TIMEOUT) else { return Vec::new() };
        let mut changes = Vec::new();
        let CatalogueState { topics, incarnations, .. } = &mut *self.state();
        for topic in topics {
            let mut is_other = false;
            for partition in 0..topic.partitions.len() {
                let number = i32::try_from(partition).unwrap_or(i32::MAX);
                let found = ends.find_partition(&topic.topic, number);
                let Some(found) = found.filter(|found| found.error().is_ok()) else { continue };
                if let Offset::Offset(end) = found.offset() {
                    is_other |= topic.ends_at(partition, end, now, incarnations);
                }
            }
            if is_other {
                changes.push(TopicChange::Replaced(Arc::clone(&topic.topic)));
            }
        }
        changes
    }
}

/// Asks about one topic.
fn ask<C: ConsumerContext>(consumer: &BaseConsumer<C>, topic: &str) -> Result<Answer, KafkaError> {
    let metadata = consumer.fetch_metadata(Some(topic), REQUEST_TIMEOUT)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let Some(found) = found else { return Ok(Answer::Denied(TopicTrouble::Missing)) };
    let code = found.error().map(RDKafkaErrorCode::from);
    match code {
        Some(code) => match trouble(code) {
            Some(trouble) => Ok(Answer::Denied(trouble)),
            None => Err(KafkaError::MetadataFetch(code)),
        },
        // Created a moment ago.
        None if found.partitions().is_empty() => {
            Err(KafkaError::MetadataFetch(RDKafkaErrorCode::LeaderNotAvailable))
        }
        None => Ok(Answer::Exists(i32::try_from(found.partitions().len()).unwrap_or(i32::MAX))),
    }
}

/// What an error says about a topic; `None`: nothing.
pub(super) fn trouble(code: RDKafkaErrorCode) -> Option<TopicTrouble> {
    match code {
        RDKafkaErrorCode::UnknownTopicOrPartition
        | RDKafkaErrorCode::UnknownTopic
        | RDKafkaErrorCode::InvalidTopic => Some(TopicTrouble::Missing),
        RDKafkaErrorCode::TopicAuthorizationFailed => Some(TopicTrouble::Forbidden),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A topic, and a clock that the test moves.
    struct Observed {
        state: TopicState,
        incarnations: u64,
        start: Instant,
    }

    /// Unix time of the start, ms.
    const START_MS: u64 = 1_000_000_000;

    impl Observed {
        fn new() -> Self {
            let state = TopicState {
                topic: "events".into(),
                is_answered: false,
                denial: None,
                partitions: Vec::new(),
            };
            Self { state, incarnations: 0, start: Instant::now() }
        }

        fn answer(&mut self, at_ms: u64, answer: Answer) -> Option<TopicChange> {
            let now = (self.start + Duration::from_millis(at_ms), START_MS + at_ms);
            self.state.answered(answer, now, &mut self.incarnations)
        }

        fn trouble(&self) -> Option<TopicTrouble> {
            self.state.trouble().map(|(_, trouble)| trouble)
        }

        fn origins(&self) -> Vec<Origin> {
            self.state.partitions.iter().map(|partition| partition.origin).collect()
        }

        fn incarnations(&self) -> Vec<u64> {
            self.state.partitions.iter().map(|partition| partition.incarnation).collect()
        }
    }

    const MISSING: Answer = Answer::Denied(TopicTrouble::Missing);
    const FORBIDDEN: Answer = Answer::Denied(TopicTrouble::Forbidden);

    #[test]
    fn partitions_that_appear_later_are_new() {
        let mut topic = Observed::new();
        assert_eq!(topic.answer(0, Answer::Exists(2)), None);
        assert_eq!(topic.answer(5_000, Answer::Exists(2)), None);
        assert_eq!(topic.answer(10_000, Answer::Exists(3)), None);
        assert_eq!(topic.origins(), [Origin::Old, Origin::Old, Origin::New]);
    }

    #[test]
    fn topic_that_was_missing_is_new_and_one_that_was_denied_for_a_moment_may_be_old() {
        let mut topic = Observed::new();
        assert_eq!(topic.answer(0, MISSING), None);
        assert_eq!(topic.trouble(), Some(TopicTrouble::Missing), "at once");
        topic.answer(4_999, MISSING);
        topic.answer(5_000, Answer::Exists(1));
        assert_eq!((topic.origins(), topic.trouble()), (vec![Origin::New], None));

        let mut topic = Observed::new();
        topic.answer(0, MISSING);
        topic.answer(4_999, Answer::Exists(1));
        assert_eq!(topic.origins(), [Origin::Since(START_MS - CLOCK_ERROR_MS)]);

        let mut topic = Observed::new();
        topic.answer(0, FORBIDDEN);
        topic.answer(60_000, MISSING);
        topic.answer(120_000, Answer::Exists(1));
        assert_eq!(topic.origins(), [Origin::Since(START_MS - CLOCK_ERROR_MS)]);
    }

    #[test]
    fn topic_that_is_denied_for_a_moment_keeps_its_partitions() {
        let mut topic = Observed::new();
        topic.answer(0, Answer::Exists(2));
        let before = topic.incarnations();
        topic.answer(1_000, MISSING);
        assert_eq!(topic.answer(5_999, MISSING), None);
        assert_eq!((topic.incarnations(), topic.trouble()), (before.clone(), None));
        topic.answer(6_000, Answer::Exists(3));
        assert_eq!(topic.incarnations()[..2], before);
        assert_eq!(topic.origins(), [Origin::Old, Origin::Old, Origin::New]);
    }

    #[test]
    fn topic_that_is_denied_for_longer_was_deleted_and_the_next_one_is_new() {
        let mut topic = Observed::new();
        topic.answer(0, Answer::Exists(2));
        let before = topic.incarnations();
        topic.answer(1_000, MISSING);
        assert_eq!(topic.answer(6_000, MISSING), Some(TopicChange::Deleted("events".into())));
        assert_eq!((topic.origins(), topic.trouble()), (Vec::new(), Some(TopicTrouble::Missing)));
        assert_eq!(topic.answer(7_000, MISSING), None, "once");
        topic.answer(8_000, Answer::Exists(2));
        assert_eq!(topic.origins(), [Origin::New; 2]);
        assert!(topic.incarnations().iter().all(|new| !before.contains(new)));
    }

    #[test]
    fn forbidden_topic_is_not_deleted() {
        let mut topic = Observed::new();
        topic.answer(0, Answer::Exists(1));
        let before = topic.incarnations();
        topic.answer(1_000, FORBIDDEN);
        assert_eq!(topic.trouble(), Some(TopicTrouble::Forbidden));
        assert_eq!(topic.answer(60_000, FORBIDDEN), None);
        topic.answer(61_000, Answer::Exists(1));
        assert_eq!((topic.incarnations(), topic.trouble()), (before, None));
        topic.state.partitions[0].is_refused = true;
        assert_eq!(topic.trouble(), Some(TopicTrouble::Forbidden), "it may be seen, but not read");
    }

    /// A reader goes on for a moment after its log was found to be another one.
    #[test]
    fn topic_created_again_is_noticed_once() {
        let catalogue = Catalogue::new(vec!["events".into()], Duration::ZERO);
        let start = Instant::now();
        let log = TopicPartition { topic: "events".into(), topic_index: 0, partition: 0 };
        let incarnation = || catalogue.partition(&log).expect("known").incarnation;
        let ends_at = |at_ms, end| {
            let CatalogueState { topics, incarnations, .. } = &mut *catalogue.state();
            let now = (start + Duration::from_millis(at_ms), START_MS);
            topics[0].ends_at(0, end, now, incarnations)
        };
        {
            let CatalogueState { topics, incarnations, .. } = &mut *catalogue.state();
            topics[0].answered(Answer::Exists(1), (start, START_MS), incarnations);
        }
        let former = incarnation();
        catalogue.reached(&log, former, 31);
        assert!(!ends_at(0, 2) && ends_at(1_000, 3));
        catalogue.reached(&log, former, 31);
        assert!(!ends_at(2_000, 4) && !ends_at(10_000, 4));
        let present = incarnation();
        assert_ne!(former, present);
        catalogue.reached(&log, present, 5);
        assert!(!ends_at(20_000, 4) && ends_at(21_000, 4), "it was created again once more");
    }

    #[test]
    fn lower_end_or_fewer_partitions_are_another_log() {
        let mut topic = Observed::new();
        topic.answer(0, Answer::Exists(2));
        let before = topic.incarnations();
        let ends_at = |topic: &mut Observed, at_ms, end| {
            let now = (topic.start + Duration::from_millis(at_ms), START_MS);
            topic.state.ends_at(1, end, now, &mut topic.incarnations)
        };
        assert!(!ends_at(&mut topic, 0, 7));
        assert!(!ends_at(&mut topic, 5_000, 7));
        assert!(!ends_at(&mut topic, 10_000, 6) && !topic.state.is_calm());
        assert!(!ends_at(&mut topic, 10_500, 7), "a broker that was no leader any more");
        assert!(!ends_at(&mut topic, 15_000, 6));
        assert!(!ends_at(&mut topic, 15_999, 6));
        assert_eq!(topic.incarnations(), before);
        assert!(ends_at(&mut topic, 16_000, 6));
        assert_eq!(topic.origins(), [Origin::Old, Origin::Since(START_MS - CLOCK_ERROR_MS)]);
        assert!(topic.incarnations()[0] == before[0] && topic.incarnations()[1] > before[1]);
        assert!(!ends_at(&mut topic, 20_000, 6), "once");

        let change = topic.answer(5_000, Answer::Exists(1));
        assert_eq!(change, Some(TopicChange::Replaced("events".into())));
        assert!(!before.contains(&topic.incarnations()[0]));
    }
}
