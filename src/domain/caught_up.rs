//! The messages that catch-up has delivered to a session, exactly: live events of other messages are never
//! taken for duplicates, however low their sequence is. The message service can commit a lower sequence
//! after a higher one (contract §2).

use std::sync::Arc;

use crate::domain::budget::{Charge, EventBudget};
use crate::domain::event::Event;
use crate::domain::ids::{ConversationKey, ConversationPosition};

/// Messages of one conversation with consecutive sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SequenceRun {
    /// The conversation.
    pub conversation: ConversationKey,
    /// The sequence of the first message.
    pub first: i64,
    /// The sequence of the last message; not below `first`.
    pub last: i64,
}

impl SequenceRun {
    /// One message.
    pub fn one(position: ConversationPosition) -> Self {
        let ConversationPosition { conversation, sequence } = position;
        Self { conversation, first: sequence, last: sequence }
    }

    /// Whether `later` overlaps this run or follows it without a hole. `later` does not begin before it.
    fn meets(self, later: Self) -> bool {
        self.conversation == later.conversation && later.first <= self.last.saturating_add(1)
    }
}

/// What a catch-up has delivered. A message that is not in it was not delivered, or is not remembered:
/// its live event is sent, because a repeated message is better than a lost one.
#[derive(Debug, Default)]
pub struct CaughtUp {
    /// The only conversation that was caught up (gRPC); `None`: all conversations of the session.
    pub conversation: Option<ConversationKey>,
    /// Sorted; no two of them meet.
    runs: Box<[SequenceRun]>,
    /// The share of the runs in the node's budget.
    charge: Option<Charge>,
}

impl CaughtUp {
    /// Memory of one run, bytes.
    pub const RUN_BYTES: usize = size_of::<SequenceRun>();

    /// Remembers these runs, in any order.
    pub fn new(conversation: Option<ConversationKey>, mut runs: Vec<SequenceRun>) -> Self {
        runs.sort_unstable();
        runs.dedup_by(|later, earlier| {
            let meet = earlier.meets(*later);
            if meet {
                earlier.last = earlier.last.max(later.last);
            }
            meet
        });
        Self { conversation, runs: runs.into_boxed_slice(), charge: None }
    }

    /// Charges the runs to a budget for as long as they are remembered.
    pub fn charged_to(mut self, budget: &Arc<EventBudget>) -> Self {
        let bytes = (self.runs.len() * Self::RUN_BYTES) as u64;
        self.charge = (bytes > 0).then(|| budget.charge(bytes));
        self
    }

    /// Whether catch-up has delivered this message.
    pub fn contains(&self, position: ConversationPosition) -> bool {
        let key = (position.conversation, position.sequence);
        let after = self.runs.partition_point(|run| (run.conversation, run.first) <= key);
        after.checked_sub(1).map(|index| self.runs[index]).is_some_and(|run| {
            run.conversation == position.conversation && position.sequence <= run.last
        })
    }

    /// Whether catch-up, or a replay since a cursor, has delivered this event.
    pub fn has(&self, event: &Event) -> bool {
        [event.position, event.log_position].into_iter().flatten().any(|at| self.contains(at))
    }

    /// The runs, sorted. No two of them overlap or follow each other without a hole.
    pub fn runs(&self) -> &[SequenceRun] {
        &self.runs
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    fn at(conversation: u64, sequence: i64) -> ConversationPosition {
        ConversationPosition { conversation: ConversationKey(conversation), sequence }
    }

    #[test]
    fn lower_sequence_that_was_not_delivered_is_no_duplicate() {
        let delivered = CaughtUp::new(None, [at(7, 1), at(7, 3)].map(SequenceRun::one).into());
        assert!(delivered.contains(at(7, 1)) && delivered.contains(at(7, 3)));
        assert!(!delivered.contains(at(7, 2)), "committed after the catch-up");
        assert!(!delivered.contains(at(7, 4)) && !delivered.contains(at(8, 1)));
    }

    #[test]
    fn event_is_recognised_by_its_sequence_or_by_its_position_in_the_log() {
        let delivered = CaughtUp::new(
            None,
            vec![
                SequenceRun::one(at(7, 3)),
                SequenceRun { conversation: ConversationKey(99), first: 0, last: 41 },
            ],
        );
        let event = |sequence, offset| {
            let message = Event::new(Some(at(7, sequence)), 0);
            message.at_log_position(at(99, offset))
        };
        assert!(delivered.has(&event(3, 42)), "from the message service, and live");
        assert!(delivered.has(&event(4, 41)) && !delivered.has(&event(4, 42)));
        assert!(delivered.has(&Event::default().at_log_position(at(99, 0))));
        assert!(!delivered.has(&Event::default()));
    }

    #[test]
    fn runs_are_charged_until_they_are_forgotten() {
        let budget = EventBudget::new(1_000);
        let delivered = CaughtUp::new(None, [at(1, 1), at(1, 3)].map(SequenceRun::one).into());
        let delivered = delivered.charged_to(&budget);
        assert_eq!(budget.charged(), 2 * CaughtUp::RUN_BYTES as u64);
        drop(delivered);
        assert_eq!(budget.charged(), 0);
    }

    proptest! {
        #[test]
        fn runs_are_the_set_of_what_was_delivered(
            all in prop::collection::vec((0..3u64, 1..30i64, 0..4i64), 0..40),
        ) {
            let runs = all.iter().map(|(conversation, first, more)| SequenceRun {
                conversation: ConversationKey(*conversation),
                first: *first,
                last: first + more,
            });
            let oracle: BTreeSet<(u64, i64)> = all.iter()
                .flat_map(|(conversation, first, more)| {
                    (*first..=first + more).map(|sequence| (*conversation, sequence))
                })
                .collect();
            let delivered = CaughtUp::new(None, runs.collect());
            for conversation in 0..3 {
                for sequence in -1..40 {
                    prop_assert_eq!(
                        delivered.contains(at(conversation, sequence)),
                        oracle.contains(&(conversation, sequence))
                    );
                }
            }
            let apart = |pair: &[SequenceRun]| !pair[0].meets(pair[1]);
            prop_assert!(delivered.runs().windows(2).all(apart));
        }
    }
}
