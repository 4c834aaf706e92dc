//! What a session has of each of its conversations during catch-up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::{CatchUpScope, LastSequence};
use crate::domain::caught_up::SequenceRun;
use crate::domain::ids::ConversationKey;
use crate::service::events::conversation_key::conversation_key;

/// Runs of consecutive sequences that one session remembers: one for each conversation that a client can
/// name. Beyond that the lowest are forgotten, so that their live events may repeat them.
pub(super) const RUNS_PER_SESSION_MAX: usize = 4096;

/// State of one conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConversationState {
    /// Named by the client; membership not verified yet.
    Named,
    /// The user is not a member: nothing is sent.
    Refused,
    /// To be caught up.
    Verified,
    /// Caught up, but later events may not be delivered live yet.
    Provisional,
    /// Caught up, and later events are delivered live, or the user was removed.
    Final,
}

impl ConversationState {
    fn is_unfinished(self) -> bool {
        match self {
            Self::Named | Self::Verified | Self::Provisional => true,
            Self::Refused | Self::Final => false,
        }
    }
}

/// The next thing to do for a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum ConversationStep {
    /// Ask whether the user is a member.
    Verify(Arc<str>),
    /// Fetch the page after this sequence.
    Fetch(Arc<str>, i64),
}

/// The result of [`Positions::set_membership`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadDecision {
    /// Fetch the page after this sequence.
    Fetch(i64),
    /// The user named it and is not a member.
    Refused,
    /// The user was a member when the first part was sent: nothing more is sent.
    Left,
}

/// The position in one conversation.
#[derive(Debug)]
struct Position {
    /// What the client has, as it says.
    named: i64,
    /// First and last sequences of what was sent, ascending, with holes between them.
    sent: Vec<(i64, i64)>,
    state: ConversationState,
}

impl Position {
    fn new(named: i64, state: ConversationState) -> Self {
        Self { named, sent: Vec::new(), state }
    }

    /// The sequence up to which the client has everything that can be known of. A lower sequence that
    /// is committed late is above it.
    fn complete_to(&self) -> i64 {
        match self.sent.first() {
            Some((first, last)) if *first == self.named + 1 => *last,
            Some(_) | None => self.named,
        }
    }

    fn has(&self, sequence: i64) -> bool {
        let after = self.sent.partition_point(|(first, _)| *first <= sequence);
        after.checked_sub(1).is_some_and(|index| sequence <= self.sent[index].1)
    }

    /// Adds a sequence that is not there yet.
    fn add(&mut self, sequence: i64) {
        let at = self.sent.partition_point(|(first, _)| *first <= sequence);
        let follows = at > 0 && self.sent[at - 1].1 + 1 == sequence;
        let precedes = self.sent.get(at).is_some_and(|(first, _)| *first == sequence + 1);
        match (follows, precedes) {
            (true, true) => {
                self.sent[at - 1].1 = self.sent[at].1;
                self.sent.remove(at);
            }
            (true, false) => self.sent[at - 1].1 = sequence,
            (false, true) => self.sent[at].0 = sequence,
            (false, false) => self.sent.insert(at, (sequence, sequence)),
        }
    }
}

/// What the client has of each conversation, and the conversation's state.
#[derive(Debug)]
pub(super) struct Positions {
    /// The whole session is caught up, so the user's list of conversations counts too.
    pub(super) is_session: bool,
    by_conversation: BTreeMap<Arc<str>, Position>,
    /// Runs of all conversations.
    runs: usize,
    /// Runs that were forgotten because there were too many.
    pub(super) forgotten: u64,
}

impl Positions {
    pub(super) fn new(scope: CatchUpScope) -> Self {
        let (is_session, named) = match scope {
            CatchUpScope::Session(named) => (true, named),
            CatchUpScope::SinceCursor => (false, Vec::new()),
            CatchUpScope::Conversation { conversation, after } => {
                (false, vec![LastSequence { conversation, sequence: after }])
            }
        };
        let position = |sequence| Position::new(sequence, ConversationState::Named);
        let by_conversation =
            named.into_iter().map(|one| (Arc::from(one.conversation), position(one.sequence)));
        let by_conversation = by_conversation.collect();
        Self { is_session, by_conversation, runs: 0, forgotten: 0 }
    }

    /// The user is a member of these.
    pub(super) fn add_listed(&mut self, conversations: &[Arc<str>]) {
        for conversation in conversations {
            match self.by_conversation.entry(Arc::clone(conversation)) {
                Entry::Vacant(entry) => {
                    entry.insert(Position::new(0, ConversationState::Verified));
                }
                Entry::Occupied(mut entry) => {
                    let state = &mut entry.get_mut().state;
                    if matches!(state, ConversationState::Named | ConversationState::Refused) {
                        *state = ConversationState::Verified;
                    }
                }
            }
        }
    }

    /// The steps of a round, one for each unfinished conversation. `listed`: the user is a member of
    /// these, sorted; of the others it is not known. `None`: membership is not checked.
    ///
    /// A further round begins where the first one knows of a hole: what was committed late may have been
    /// routed before the session was visible.
    pub(super) fn steps(&self, listed: Option<&[Arc<str>]>) -> Vec<ConversationStep> {
        let step = |conversation: &Arc<str>, position: &Position| {
            let is_member = listed.is_none_or(|listed| listed.binary_search(conversation).is_ok());
            match is_member {
                true => ConversationStep::Fetch(Arc::clone(conversation), position.complete_to()),
                false => ConversationStep::Verify(Arc::clone(conversation)),
            }
        };
        let unfinished = self.by_conversation.iter().filter(|(_, it)| it.state.is_unfinished());
        unfinished.map(|(conversation, position)| step(conversation, position)).collect()
    }

    /// Whether the user is a member of a conversation that is not listed.
    pub(super) fn set_membership(&mut self, conversation: &str, is_member: bool) -> ReadDecision {
        use ConversationState::{Final, Named, Provisional, Refused, Verified};
        let Some(position) = self.by_conversation.get_mut(conversation) else {
            return ReadDecision::Refused;
        };
        match (position.state, is_member) {
            (Named | Verified | Provisional, true) => {
                if position.state == Named {
                    position.state = Verified;
                }
                ReadDecision::Fetch(position.complete_to())
            }
            (Named | Refused, _) => {
                position.state = Refused;
                ReadDecision::Refused
            }
            (Verified | Provisional | Final, _) => {
                position.state = Final;
                ReadDecision::Left
            }
        }
    }

    /// Whether this message was sent in this catch-up.
    pub(super) fn was_sent(&self, conversation: &str, sequence: i64) -> bool {
        self.by_conversation.get(conversation).is_some_and(|position| position.has(sequence))
    }

    /// A message was sent that was not sent before.
    pub(super) fn sent(&mut self, conversation: &str, sequence: i64) {
        let Some(position) = self.by_conversation.get_mut(conversation) else { return };
        let before = position.sent.len();
        position.add(sequence);
        self.runs = self.runs - before + position.sent.len();
        if self.runs > RUNS_PER_SESSION_MAX {
            position.sent.remove(0);
            self.runs -= 1;
            self.forgotten += 1;
        }
    }

    /// A conversation was caught up. `is_final`: events that were routed after the request for its last
    /// page are delivered live.
    pub(super) fn caught_up(&mut self, conversation: &str, is_final: bool) {
        if let Some(position) = self.by_conversation.get_mut(conversation) {
            position.state =
                if is_final { ConversationState::Final } else { ConversationState::Provisional };
        }
    }

    /// Approximate memory, bytes.
    pub(super) fn bytes(&self) -> usize {
        let one = size_of::<(Arc<str>, Position)>() + 2 * size_of::<usize>();
        let names = self.by_conversation.keys().map(|conversation| one + conversation.len());
        names.sum::<usize>() + self.runs * size_of::<(i64, i64)>()
    }

    /// The messages that were sent, and the only conversation that was caught up; `None`: all.
    pub(super) fn into_runs(self) -> (Option<ConversationKey>, Vec<SequenceRun>) {
        let key = |conversation: &Arc<str>| conversation_key(conversation);
        let only = self.by_conversation.keys().next().filter(|_| !self.is_session).map(key);
        let run = |conversation: ConversationKey| {
            move |(first, last)| SequenceRun { conversation, first, last }
        };
        let runs = self.by_conversation.into_iter().flat_map(|(conversation, position)| {
            position.sent.into_iter().map(run(key(&conversation)))
        });
        (only, runs.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::caught_up::CaughtUp;
    use crate::domain::ids::ConversationPosition;
    use proptest::prelude::*;

    fn named(conversation: &str, sequence: i64) -> Positions {
        let one = LastSequence { conversation: conversation.into(), sequence };
        Positions::new(CatchUpScope::Session(vec![one]))
    }

    fn into_caught_up(positions: Positions) -> CaughtUp {
        let (conversation, runs) = positions.into_runs();
        CaughtUp::new(conversation, runs)
    }

    fn at(conversation: &str, sequence: i64) -> ConversationPosition {
        ConversationPosition { conversation: conversation_key(conversation), sequence }
    }

    #[test]
    fn only_what_was_sent_counts_as_delivered() {
        let mut positions = named("c", 10);
        for sequence in [11, 12, 14] {
            positions.sent("c", sequence);
        }
        assert!(positions.was_sent("c", 12) && !positions.was_sent("c", 13));
        assert_eq!(
            positions.steps(None),
            [ConversationStep::Fetch("c".into(), 12)],
            "the hole may be filled"
        );
        let delivered = into_caught_up(positions);
        let known = [9, 10, 11, 12, 13, 14, 15].map(|it| delivered.contains(at("c", it)));
        assert_eq!(known, [false, false, true, true, false, true, false]);
    }

    #[test]
    fn runs_are_bounded_and_the_lowest_are_forgotten() {
        let mut positions = named("c", 0);
        let last = 2 * RUNS_PER_SESSION_MAX as i64 + 2;
        for sequence in (2..=last).step_by(2) {
            positions.sent("c", sequence);
        }
        assert_eq!((positions.runs, positions.forgotten), (RUNS_PER_SESSION_MAX, 1));
        let delivered = into_caught_up(positions);
        assert!(!delivered.contains(at("c", 2)), "may be repeated, but is not lost");
        assert!(delivered.contains(at("c", 4)) && delivered.contains(at("c", last)));
    }

    proptest! {
        #[test]
        fn runs_are_the_set_of_what_was_sent(all in prop::collection::btree_set(1..60i64, 0..50)) {
            let mut positions = named("c", 0);
            // In any order: a second round fills holes.
            let (odd, even): (Vec<_>, Vec<_>) = all.iter().partition(|it| *it % 3 == 1);
            for sequence in odd.into_iter().chain(even) {
                positions.sent("c", sequence);
            }
            for sequence in 0..62 {
                prop_assert_eq!(positions.was_sent("c", sequence), all.contains(&sequence));
            }
            let runs = all.iter().filter(|it| !all.contains(&(*it - 1))).count();
            prop_assert_eq!(positions.runs, runs);
            let delivered = into_caught_up(positions);
            prop_assert_eq!(delivered.runs().len(), runs);
        }
    }
}
