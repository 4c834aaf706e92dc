//! Where a session is in each of its conversations, while it catches up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::Scope;
use crate::domain::ids::StreamPosition;
use crate::service::events::stream_key::stream_key;

/// A conversation, and the last sequence that the client has of it.
pub(super) type Wanted = (Arc<str>, i64);

/// How far a conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
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
pub(super) struct Places {
    /// The user's list of conversations counts too.
    pub(super) is_session: bool,
    by_conversation: BTreeMap<Arc<str>, (i64, Progress)>,
}

impl Places {
    pub(super) fn new(scope: Scope) -> Self {
        let (is_session, named) = match scope {
            Scope::Session(named) => (true, named),
            Scope::Conversation { conversation, after } => {
                (false, vec![super::LastSequence { conversation, sequence: after }])
            }
        };
        let named = named.into_iter();
        let by_conversation = named
            .map(|named| (Arc::from(named.conversation), (named.sequence, Progress::Named)))
            .collect();
        Self { is_session, by_conversation }
    }

    /// The user is a member of these.
    pub(super) fn listed(&mut self, conversations: &[Arc<str>]) {
        for conversation in conversations {
            match self.by_conversation.entry(Arc::clone(conversation)) {
                Entry::Vacant(place) => drop(place.insert((0, Progress::Wanted))),
                Entry::Occupied(mut place) => {
                    let progress = &mut place.get_mut().1;
                    if matches!(progress, Progress::Named | Progress::Refused) {
                        *progress = Progress::Wanted;
                    }
                }
            }
        }
    }

    /// Those of which it is not known, or no longer, whether the user is a member: all that go on
    /// but these.
    pub(super) fn doubtful(&self, listed: &[Arc<str>]) -> Vec<Arc<str>> {
        let goes_on = |progress| match progress {
            Progress::Named | Progress::Wanted | Progress::Provisional => true,
            Progress::Refused | Progress::Final => false,
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
            (Progress::Named, true) => Progress::Wanted,
            (Progress::Named, false) => Progress::Refused,
            // He was a member when the first part of it was sent.
            (Progress::Wanted | Progress::Provisional, false) => Progress::Final,
            (Progress::Refused | Progress::Wanted | Progress::Provisional | Progress::Final, _) => {
                was
            }
        };
        *progress == Progress::Refused && was != Progress::Refused
    }

    /// What is to be caught up.
    pub(super) fn wanted(&self) -> Vec<Wanted> {
        self.by_conversation
            .iter()
            .filter(|(_, (_, progress))| {
                matches!(progress, Progress::Named | Progress::Wanted | Progress::Provisional)
            })
            .map(|(conversation, (sequence, _))| (Arc::clone(conversation), *sequence))
            .collect()
    }

    /// A conversation was caught up to here. `is_final`: what happened after its last page was
    /// asked for comes live.
    pub(super) fn caught_up(&mut self, conversation: &str, sequence: i64, is_final: bool) {
        if let Some(place) = self.by_conversation.get_mut(conversation) {
            *place = (sequence, if is_final { Progress::Final } else { Progress::Provisional });
        }
    }

    /// About what they take in memory, bytes.
    pub(super) fn bytes(&self) -> usize {
        let one = size_of::<(Arc<str>, i64, Progress)>() + 2 * size_of::<usize>();
        self.by_conversation.keys().map(|conversation| one + conversation.len()).sum()
    }

    /// What the client has now. A gRPC session is answered about its conversation whatever came of
    /// it.
    pub(super) fn delivered(&self) -> Box<[StreamPosition]> {
        self.by_conversation
            .iter()
            .filter(|(_, (sequence, progress))| {
                !self.is_session || (*progress != Progress::Refused && *sequence > 0)
            })
            .map(|(conversation, (sequence, _))| StreamPosition {
                stream: stream_key(conversation),
                sequence: *sequence,
            })
            .collect()
    }
}
