//! What a session may receive: the oracle.

use std::collections::{BTreeSet, VecDeque};

use super::service::{CONVERSATIONS, ModelRecord};

/// One conversation of one session.
#[derive(Debug, Default)]
struct SessionConversation {
    /// Sequences that came with catch-up.
    caught_up: BTreeSet<i64>,
    /// Live records that were sent to the session and have not come: place in the log and sequence.
    sent: VecDeque<(u64, i64)>,
    /// Whether a live event has come.
    is_live: bool,
    /// The highest sequence that has come.
    highest: i64,
    /// The place of the last record that has come, live or replayed.
    last_place: Option<u64>,
    /// Sequences that were replayed.
    replayed: BTreeSet<i64>,
}

/// One session of a client.
#[derive(Debug, Default)]
pub(super) struct SessionOracle {
    conversations: [SessionConversation; CONVERSATIONS],
    /// It has returned with a cursor.
    has_cursor: bool,
}

/// What a message that came means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ArrivedMessage {
    /// It came with catch-up.
    pub(super) is_caught_up: bool,
    /// It was replayed.
    pub(super) is_replayed: bool,
    /// It is live, and the session has a higher sequence.
    pub(super) is_late: bool,
    /// Live records before it that were dropped, because catch-up had delivered their messages.
    pub(super) dropped: u64,
}

impl SessionOracle {
    /// The router sends a record to the session.
    pub(super) fn is_sent(&mut self, index: u64, record: &ModelRecord) {
        let sent = &mut self.conversations[record.conversation].sent;
        sent.push_back((index, record.sequence));
    }

    /// The session begins with a cursor.
    pub(super) fn returns_with_cursor(&mut self) {
        self.has_cursor = true;
    }

    /// Its cursor cannot be used: what comes next is a catch-up.
    pub(super) fn cursor_expires(&mut self) {
        assert!(std::mem::take(&mut self.has_cursor), "it has no cursor, or it expires twice");
        self.conversations.iter_mut().for_each(|it| it.is_live = false);
    }

    /// A message has come.
    ///
    /// # Panics
    /// It is out of order, was not sent to the session, comes twice, or something before it is missing.
    pub(super) fn receives(&mut self, of: usize, sequence: i64, content: &str) -> ArrivedMessage {
        let it = &mut self.conversations[of];
        let highest = it.highest;
        it.highest = highest.max(sequence);
        if content == "stored" {
            assert!(!it.is_live, "{of}/{sequence} of the catch-up comes after a live event");
            assert!(
                it.caught_up.last().is_none_or(|last| *last < sequence),
                "{of}/{sequence} of the catch-up is out of order"
            );
            it.caught_up.insert(sequence);
            return ArrivedMessage {
                is_caught_up: true,
                is_replayed: false,
                is_late: false,
                dropped: 0,
            };
        }
        let place = content.strip_prefix("live ").and_then(|place| place.parse().ok());
        let place: u64 = place.expect("a record of the model");
        assert!(!it.caught_up.contains(&sequence), "{of}/{sequence} came with catch-up and live");
        let mut arrival = ArrivedMessage {
            is_caught_up: false,
            is_replayed: false,
            is_late: sequence < highest,
            dropped: 0,
        };
        assert!(it.last_place < Some(place), "{of}/{sequence} at {place} is out of order");
        it.last_place = Some(place);
        it.is_live = true;
        while let Some(&(index, expected)) = it.sent.front().filter(|(index, _)| *index <= place) {
            it.sent.pop_front();
            if index == place {
                // It may be replayed as well: then its live event is the one that is dropped.
                it.replayed.insert(sequence);
                return arrival;
            }
            assert!(
                it.caught_up.contains(&expected) || it.replayed.contains(&expected),
                "{of}/{expected} at {index} is lost: the session has {of}/{sequence} at {place}"
            );
            arrival.dropped += 1;
        }
        assert!(self.has_cursor, "{of}/{sequence} at {place} was not sent to the session");
        it.replayed.insert(sequence);
        arrival.is_replayed = true;
        arrival
    }
}
