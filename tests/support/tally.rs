//! Counts what one session received, per conversation, and compares it with what was published.

use std::collections::{BTreeMap, BTreeSet};

use delivery_testkit::proto::message::v1::MessageSentEvent;
use delivery_testkit::proto::shared::v1::{EventEnvelope, EventType};
use prost::Message as _;

/// The messages of one conversation in their order of arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// The highest sequence seen; 0 before the first.
    pub last: i64,
    /// Messages received more than once.
    pub duplicates: u64,
    /// Sequences that were skipped and have not arrived since.
    pub missing: BTreeSet<i64>,
    /// Messages that arrived after a later one.
    pub out_of_order: u64,
}

impl Stream {
    /// Returns whether the message is new.
    fn saw(&mut self, sequence: i64) -> bool {
        if sequence > self.last {
            self.missing.extend(self.last + 1..sequence);
            self.last = sequence;
        } else if self.missing.remove(&sequence) {
            self.out_of_order += 1;
        } else {
            self.duplicates += 1;
            return false;
        }
        true
    }
}

/// Counts of one session.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// By conversation id.
    pub streams: BTreeMap<String, Stream>,
    /// All messages.
    pub messages: u64,
    /// Other events, by type.
    pub others: BTreeMap<i32, u64>,
}

/// Sums of many tallies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Messages received.
    pub received: u64,
    /// Published but never received.
    pub lost: u64,
    /// Received again.
    pub duplicates: u64,
    /// Received after a later one of the same conversation.
    pub out_of_order: u64,
}

impl Tally {
    /// Counts a payload, which is a serialized envelope. Returns the content of a message that is
    /// new.
    pub fn saw(&mut self, payload: &[u8]) -> Option<String> {
        let envelope = EventEnvelope::decode(payload).expect("an EventEnvelope");
        assert_eq!(envelope.schema_version, 1);
        if envelope.event_type() != EventType::MessageSent {
            *self.others.entry(envelope.event_type).or_default() += 1;
            return None;
        }
        let event = MessageSentEvent::decode(envelope.payload).expect("a MessageSentEvent");
        let message = event.message.expect("has a message");
        self.messages += 1;
        let fresh = if let Some(stream) = self.streams.get_mut(&message.conversation_id) {
            stream.saw(message.sequence)
        } else {
            self.streams.entry(message.conversation_id).or_default().saw(message.sequence)
        };
        fresh.then_some(message.content)
    }

    /// Messages missing below the last one received.
    pub fn gaps(&self) -> u64 {
        self.streams.values().map(|stream| stream.missing.len() as u64).sum()
    }

    /// Adds the counts to `totals`. `published` has the last published sequence of each conversation
    /// that this session should have received completely.
    pub fn add_to(&self, totals: &mut Totals, published: &BTreeMap<String, i64>) {
        for (conversation, stream) in &self.streams {
            let last = published.get(conversation).copied();
            assert!(last.is_some(), "received {conversation}, but the user is not a member");
            assert!(stream.last <= last.unwrap_or(0), "{conversation}: more than was published");
            totals.duplicates += stream.duplicates;
            totals.out_of_order += stream.out_of_order;
        }
        for (conversation, last) in published {
            let stream = self.streams.get(conversation);
            let seen = stream.map_or(0, |stream| stream.last - stream.missing.len() as i64);
            totals.lost += (last - seen) as u64;
        }
        totals.received += self.messages;
    }
}

/// A client's first message: the last sequence of each conversation.
pub fn resume_request(tally: &Tally) -> String {
    let positions: serde_json::Map<_, _> = tally
        .streams
        .iter()
        .map(|(conversation, stream)| (conversation.clone(), contiguous(stream).into()))
        .collect();
    serde_json::json!({ "last_sequences": positions }).to_string()
}

/// The sequence up to which nothing is missing.
fn contiguous(stream: &Stream) -> i64 {
    stream.missing.first().map_or(stream.last, |first| first - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_duplicates_and_disorder_are_counted_apart() {
        let mut stream = Stream::default();
        for sequence in [1, 2, 2, 5, 4, 1] {
            stream.saw(sequence);
        }
        assert_eq!((stream.last, stream.duplicates, stream.out_of_order), (5, 2, 1));
        assert_eq!(stream.missing, BTreeSet::from([3]));
        assert_eq!(contiguous(&stream), 2);
    }
}
