//! Where a session is in each of its conversations, while it catches up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::CatchUpScope;
use crate::domain::ids::ConversationPosition;
use crate::service::events::conversation_key::conversation_key;

/// A conversation, and the last sequence that the client has of it.
pub(super) type Wanted = (Arc<str>, i64);

/// How far a conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConversationProgress {
    /// Named by the client, who may be no member.
    Named,
    /// He is none: it is not his to read.
    Refused,
    /// To be caught up.
    Wanted,
    /// Caught up, but what happened since may come neither live nor by itself.
    Provisional,
    /// Caught up, and what happens from then on comes live; or nothing more may be read of it.
    Final,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Positions {
    /// The user's list of conversations counts too.
    pub(super) is_session: bool,
    by_conversation: BTreeMap<Arc<str>, (i64, ConversationProgress)>,
}

impl Positions {
    pub(super) fn new(scope: CatchUpScope) -> Self {
        let (is_session, named) = match scope {
            CatchUpScope::Session(named) => (true, named),
            CatchUpScope::Conversation { conversation, after } => {
                (false, vec![super::LastSequence { conversation, sequence: after }])
            }
        };
        let named = named.into_iter();
        let by_conversation = named
            .map(|named| {
                (Arc::from(named.conversation), (named.sequence, ConversationProgress::Named))
            })
            .collect();
        Self { is_session, by_conversation }
    }

    /// The user is a member of these.
    pub(super) fn listed(&mut self, conversations: &[Arc<str>]) {
        for conversation in conversations {
            match self.by_conversation.entry(Arc::clone(conversation)) {
                Entry::Vacant(position) => drop(position.insert((0, ConversationProgress::Wanted))),
                Entry::Occupied(mut position) => {
                    let progress = &mut position.get_mut().1;
                    if matches!(
                        progress,
                        ConversationProgress::Named | ConversationProgress::Refused
                    ) {
                        *progress = ConversationProgress::Wanted;
                    }
                }
            }
        }
    }

    /// Those of which it is not known, or no longer, whether the user is a member: all that go on
    /// but these.
    pub(super) fn doubtful(&self, listed: &[Arc<str>]) -> Vec<Arc<str>> {
        let goes_on = |progress| match progress {
            ConversationProgress::Named
            | ConversationProgress::Wanted
            | ConversationProgress::Provisional => true,
            ConversationProgress::Refused | ConversationProgress::Final => false,
        };
        self.by_conversation
            .iter()
            .filter(|(conversation, (_, progress))| {
                goes_on(*progress) && listed.binary_search(conversation).is_err()
            })
            .map(|(conversation, _)| Arc::clone(conversation))
            .collect()
    }

    /// The user is a member, or is not. Returns whether a conversation was refused that he had
    /// only named.
    pub(super) fn judged(&mut self, conversation: &str, is_member: bool) -> bool {
        let Some((_, progress)) = self.by_conversation.get_mut(conversation) else { return false };
        let was = *progress;
        *progress = match (was, is_member) {
            (ConversationProgress::Named, true) => ConversationProgress::Wanted,
            (ConversationProgress::Named, false) => ConversationProgress::Refused,
            // He was a member when the first part of it was sent.
            (ConversationProgress::Wanted | ConversationProgress::Provisional, false) => {
                ConversationProgress::Final
            }
            (
                ConversationProgress::Refused
                | ConversationProgress::Wanted
                | ConversationProgress::Provisional
                | ConversationProgress::Final,
                _,
            ) => was,
        };
        *progress == ConversationProgress::Refused && was != ConversationProgress::Refused
    }

    /// What is to be caught up.
    pub(super) fn wanted(&self) -> Vec<Wanted> {
        self.by_conversation
            .iter()
            .filter(|(_, (_, progress))| {
                matches!(
                    progress,
                    ConversationProgress::Named
                        | ConversationProgress::Wanted
                        | ConversationProgress::Provisional
                )
            })
            .map(|(conversation, (sequence, _))| (Arc::clone(conversation), *sequence))
            .collect()
    }

    /// A conversation was caught up to here. `is_final`: what happened after its last page was
    /// asked for comes live.
    pub(super) fn caught_up(&mut self, conversation: &str, sequence: i64, is_final: bool) {
        if let Some(position) = self.by_conversation.get_mut(conversation) {
            *position = (
                sequence,
                if is_final {
                    ConversationProgress::Final
                } else {
                    ConversationProgress::Provisional
                },
            );
        }
    }

    /// About what they take in memory, bytes.
    pub(super) fn bytes(&self) -> usize {
        let one = size_of::<(Arc<str>, i64, ConversationProgress)>() + 2 * size_of::<usize>();
        self.by_conversation.keys().map(|conversation| one + conversation.len()).sum()
    }

    /// What the client has now. A gRPC session is answered about its conversation whatever came of
    /// it.
    pub(super) fn delivered(&self) -> Box<[ConversationPosition]> {
        self.by_conversation
            .iter()
            .filter(|(_, (sequence, progress))| {
                !self.is_session || (*progress != ConversationProgress::Refused && *sequence > 0)
            })
            .map(|(conversation, (sequence, _))| ConversationPosition {
                conversation: conversation_key(conversation),
                sequence: *sequence,
            })
            .collect()
    }
}
