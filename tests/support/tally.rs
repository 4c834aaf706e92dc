//! What one session received, conversation by conversation, held against what it should have.

use std::collections::{BTreeMap, BTreeSet};

use delivery_testkit::proto::message::v1::MessageSentEvent;
use delivery_testkit::proto::shared::v1::{EventEnvelope, EventType};
use prost::Message as _;

/// The messages of one conversation as they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// The highest sequence seen; 0 before the first.
    pub last: i64,
    /// Seen a second time, or again after later ones.
    pub duplicates: u64,
    /// Passed over, and not seen since.
    pub missing: BTreeSet<i64>,
    /// Seen only after a later one.
    pub out_of_order: u64,
}

impl Stream {
    /// Returns whether it was seen for the first time.
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

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// By conversation id.
    pub streams: BTreeMap<String, Stream>,
    /// Messages in all.
    pub messages: u64,
    /// Other events, by type.
    pub others: BTreeMap<i32, u64>,
}

/// Sums over many tallies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Messages received.
    pub received: u64,
    /// Never received although they should have been.
    pub lost: u64,
    /// Received again.
    pub duplicates: u64,
    /// Received after a later one of the same conversation.
    pub out_of_order: u64,
}

impl Tally {
    /// Takes a message's payload: the serialized envelope. Returns the content of a message that
    /// was seen for the first time.
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

    /// Messages that are missing below the last one seen.
    pub fn gaps(&self) -> u64 {
        self.streams.values().map(|stream| stream.missing.len() as u64).sum()
    }

    /// Adds up, where `published` says the last sequence published of each conversation that this
    /// session should have received whole.
    pub fn add_to(&self, totals: &mut Totals, published: &BTreeMap<String, i64>) {
        for (conversation, stream) in &self.streams {
            let last = published.get(conversation).copied();
            assert!(last.is_some(), "received {conversation}, of which the user is no member");
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

/// The last sequence of each conversation, as a client's first message.
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
    fn tally_tells_loss_from_duplicates_from_disorder() {
        let mut stream = Stream::default();
        for sequence in [1, 2, 2, 5, 4, 1] {
            stream.saw(sequence);
        }
        assert_eq!((stream.last, stream.duplicates, stream.out_of_order), (5, 2, 1));
        assert_eq!(stream.missing, BTreeSet::from([3]));
        assert_eq!(contiguous(&stream), 2);
    }
}
