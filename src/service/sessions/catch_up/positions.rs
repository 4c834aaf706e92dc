//! The position of a session in each of its conversations during catch-up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::{CatchUpScope, LastSequence};
use crate::domain::ids::ConversationPosition;
use crate::service::events::conversation_key::conversation_key;

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

/// The last sequence that the client has of each conversation, and the conversation's state.
#[derive(Debug)]
pub(super) struct Positions {
    /// The whole session is caught up, so the user's list of conversations counts too.
    pub(super) is_session: bool,
    by_conversation: BTreeMap<Arc<str>, (i64, ConversationState)>,
}

impl Positions {
    pub(super) fn new(scope: CatchUpScope) -> Self {
        let (is_session, named) = match scope {
            CatchUpScope::Session(named) => (true, named),
            CatchUpScope::Conversation { conversation, after } => {
                (false, vec![LastSequence { conversation, sequence: after }])
            }
        };
        let by_conversation = (named.into_iter())
            .map(|one| (Arc::from(one.conversation), (one.sequence, ConversationState::Named)))
            .collect();
        Self { is_session, by_conversation }
    }

    /// The user is a member of these.
    pub(super) fn add_listed(&mut self, conversations: &[Arc<str>]) {
        for conversation in conversations {
            match self.by_conversation.entry(Arc::clone(conversation)) {
                Entry::Vacant(entry) => drop(entry.insert((0, ConversationState::Verified))),
                Entry::Occupied(mut entry) => {
                    let state = &mut entry.get_mut().1;
                    if matches!(state, ConversationState::Named | ConversationState::Refused) {
                        *state = ConversationState::Verified;
                    }
                }
            }
        }
    }

    /// Unfinished conversations outside `listed`: whether the user is still a member is not known.
    pub(super) fn unverified(&self, listed: &[Arc<str>]) -> Vec<Arc<str>> {
        self.by_conversation
            .iter()
            .filter(|(conversation, (_, state))| {
                state.is_unfinished() && listed.binary_search(conversation).is_err()
            })
            .map(|(conversation, _)| Arc::clone(conversation))
            .collect()
    }

    /// Returns whether the conversation is refused now: the user named it and is not a member.
    pub(super) fn set_membership(&mut self, conversation: &str, is_member: bool) -> bool {
        use ConversationState::{Final, Named, Provisional, Refused, Verified};
        let Some((_, state)) = self.by_conversation.get_mut(conversation) else { return false };
        let before = *state;
        *state = match (before, is_member) {
            (Named, true) => Verified,
            (Named, false) => Refused,
            // The user was still a member when the first part was sent.
            (Verified | Provisional, false) => Final,
            (Refused | Verified | Provisional | Final, _) => before,
        };
        *state == Refused && before != Refused
    }

    /// The conversations to catch up, each with the last sequence that the client has.
    pub(super) fn unfinished(&self) -> Vec<(Arc<str>, i64)> {
        self.by_conversation
            .iter()
            .filter(|(_, (_, state))| state.is_unfinished())
            .map(|(conversation, (sequence, _))| (Arc::clone(conversation), *sequence))
            .collect()
    }

    /// A conversation was caught up to this sequence. `is_final`: events that were routed after the
    /// request for its last page are delivered live.
    pub(super) fn caught_up(&mut self, conversation: &str, sequence: i64, is_final: bool) {
        if let Some(position) = self.by_conversation.get_mut(conversation) {
            let state =
                if is_final { ConversationState::Final } else { ConversationState::Provisional };
            *position = (sequence, state);
        }
    }

    /// Approximate memory, bytes.
    pub(super) fn bytes(&self) -> usize {
        let one = size_of::<(Arc<str>, i64, ConversationState)>() + 2 * size_of::<usize>();
        self.by_conversation.keys().map(|conversation| one + conversation.len()).sum()
    }

    /// What the client has now. A gRPC session gets the position of its conversation in any case.
    pub(super) fn delivered(&self) -> Box<[ConversationPosition]> {
        self.by_conversation
            .iter()
            .filter(|(_, (sequence, state))| {
                !self.is_session || (*state != ConversationState::Refused && *sequence > 0)
            })
            .map(|(conversation, (sequence, _))| ConversationPosition {
                conversation: conversation_key(conversation),
                sequence: *sequence,
            })
            .collect()
    }
}
