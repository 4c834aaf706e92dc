//! The event that all servers push: a serialized `EventEnvelope` of an exact length, with a stamp that
//! the client finds in any encoding.
//!
//! ```text
//! … metadata_json = "bench:" | sequence: 16 hex digits | intended time, ns: 16 hex digits
//! ```

/// Prefix of the stamp.
const MARK: &[u8] = b"bench:";
const DIGITS: usize = 16;
/// Shortest value that a [`Template`] can make.
pub const BYTES_MIN: usize = 80;

/// The sequence and time in an event, which the client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Counts the events of one session, from 1.
    pub sequence: u64,
    /// Time at which the event was due, [`now_ns`](crate::clock::now_ns). Latency counts from here, so
    /// that a late generator does not improve it.
    pub intended_ns: u64,
}

impl Stamp {
    /// The text of the stamp.
    pub fn text(self) -> String {
        format!("bench:{:016x}{:016x}", self.sequence, self.intended_ns)
    }

    /// Finds the stamp in a payload.
    pub fn find(payload: &[u8]) -> Option<Self> {
        // At the end of a binary payload; JSON has more text after it.
        let length = MARK.len() + 2 * DIGITS;
        let tail = payload.len().checked_sub(length)?;
        let at = if payload[tail..].starts_with(MARK) {
            tail
        } else {
            memchr::memmem::find(payload, MARK)?
        };
        let digits = payload.get(at + MARK.len()..at + length)?;
        Some(Self { sequence: hex(&digits[..DIGITS])?, intended_ns: hex(&digits[DIGITS..])? })
    }
}

fn hex(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |number, digit| {
        Some(number << 4 | u64::from(char::from(*digit).to_digit(16)?))
    })
}

/// Words of the generated messages. As in a chat, short ones are frequent, so that deflate halves the
/// text, as it does with a chat. A run of one letter would compress to nearly nothing.
const WORDS: &str = "the to and you it is that in we on for be at this have not me so do but can just \
    what they all will was get like out up one now know time there good see go come back when how our \
    about then them really maybe think still need right later today tomorrow morning evening meeting \
    lunch office train station ticket friday weekend photo video report draft review release server \
    customer invoice budget question answer problem idea plan people family kids school weather rain \
    coffee dinner kitchen garden music movie game score team project deadline please thanks sorry yes \
    hello great perfect sure okay wait call send check look found start finish open close first last";

/// `bytes` of text.
fn prose(bytes: usize) -> Vec<u8> {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut text = Vec::with_capacity(bytes + 16);
    let mut state = 1_u64;
    while text.len() < bytes {
        // Knuth's generator; the minimum of two draws makes the first words the most frequent.
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % words.len()
        };
        text.extend_from_slice(words[draw().min(draw())].as_bytes());
        text.push(b' ');
    }
    text.truncate(bytes);
    text
}

/// A value of an exact length, built once and stamped for each event.
#[derive(Clone, Debug)]
pub struct Template {
    value: Vec<u8>,
    conversation_at: usize,
    sequence_at: usize,
    stamp_at: usize,
}

const CONVERSATION_DIGITS: usize = 7;
/// `Message.sequence` is a varint stretched to this many bytes, so that lengths do not depend on it.
const SEQUENCE_BYTES: usize = 5;

impl Template {
    /// A `MESSAGE_SENT` of exactly `bytes` (at least [`BYTES_MIN`]), with padding in `content`.
    pub fn new(bytes: usize) -> Self {
        assert!(bytes >= BYTES_MIN, "{bytes}");
        // One more byte of content can add two or three bytes, where a length field grows. Nanoseconds
        // of another size compensate for that.
        for padding in (0..=bytes - BYTES_MIN).rev() {
            for nanos in [None, Some(1), Some(200), Some(20_000), Some(3_000_000)] {
                let value = build(padding, nanos);
                if value.len() == bytes {
                    return Self::locate(value);
                }
            }
        }
        unreachable!("every length from {BYTES_MIN} on is possible");
    }

    fn locate(value: Vec<u8>) -> Self {
        let find = |what: &[u8]| memchr::memmem::find(&value, what).expect("it is in every value");
        Self {
            conversation_at: find(b"c0000000") + 1,
            sequence_at: find(&[4 << 3, 0x80, 0x80, 0x80, 0x80, 0]) + 1,
            stamp_at: find(MARK),
            value,
        }
    }

    /// The event of one conversation with a stamp.
    pub fn envelope(&self, conversation: usize, stamp: Stamp) -> Vec<u8> {
        let mut value = self.value.clone();
        let name = format!("{conversation:0CONVERSATION_DIGITS$}");
        value[self.conversation_at..][..CONVERSATION_DIGITS].copy_from_slice(name.as_bytes());
        for (n, byte) in value[self.sequence_at..][..SEQUENCE_BYTES].iter_mut().enumerate() {
            let more = if n + 1 < SEQUENCE_BYTES { 0x80 } else { 0 };
            *byte = (stamp.sequence >> (7 * n)) as u8 & 0x7f | more;
        }
        let text = stamp.text();
        value[self.stamp_at..][..text.len()].copy_from_slice(text.as_bytes());
        value
    }
}

/// The id of conversation number `conversation`.
pub fn conversation_id(conversation: usize) -> String {
    format!("c{conversation:0CONVERSATION_DIGITS$}")
}

/// The number of the conversation with this id.
pub fn conversation_number(id: &str) -> Option<usize> {
    id.strip_prefix('c')?.parse().ok()
}

/// The number of the conversation in an event of any encoding: the first `c` with seven digits.
pub fn conversation_in(payload: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'c', payload).find_map(|at| {
        let digits = payload.get(at + 1..at + 1 + CONVERSATION_DIGITS)?;
        let is_number = digits.iter().all(u8::is_ascii_digit);
        is_number.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
    })
}

/// `CONVERSATION_CREATED` for conversation number `conversation` with these members.
pub fn creation(conversation: usize, members: impl Iterator<Item = String>) -> Vec<u8> {
    let mut named = Vec::new();
    text(&mut named, 1, conversation_id(conversation).as_bytes());
    let mut event = Vec::new();
    text(&mut event, 1, &named);
    for member in members {
        text(&mut event, 2, member.as_bytes());
    }
    let mut envelope = Vec::with_capacity(event.len() + 32);
    varint_field(&mut envelope, 1, 1);
    varint_field(&mut envelope, 2, 1);
    text(&mut envelope, 4, &event);
    envelope
}

fn build(padding: usize, nanos: Option<u64>) -> Vec<u8> {
    let mut message = Vec::with_capacity(96 + padding);
    text(&mut message, 1, b"m");
    text(&mut message, 2, format!("c{:0CONVERSATION_DIGITS$}", 0).as_bytes());
    text(&mut message, 3, b"u");
    varint(&mut message, 4 << 3);
    message.extend_from_slice(&[0x80, 0x80, 0x80, 0x80, 0]);
    text(&mut message, 6, &prose(padding));
    text(&mut message, 7, Stamp { sequence: 0, intended_ns: 0 }.text().as_bytes());
    let mut event = Vec::with_capacity(message.len() + 8);
    text(&mut event, 1, &message);
    let mut timestamp = Vec::new();
    varint_field(&mut timestamp, 1, 1_700_000_000);
    if let Some(nanos) = nanos {
        varint_field(&mut timestamp, 2, nanos);
    }
    let mut envelope = Vec::with_capacity(event.len() + 32);
    varint_field(&mut envelope, 1, 10);
    varint_field(&mut envelope, 2, 1);
    text(&mut envelope, 3, &timestamp);
    text(&mut envelope, 4, &event);
    envelope
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn text(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_possible_and_has_its_stamp() {
        for bytes in (BYTES_MIN..600).chain([1024, 16_384, 16_500, 20_000]) {
            let template = Template::new(bytes);
            for sequence in [1, 127, 128, 1 << 34] {
                let stamp = Stamp { sequence, intended_ns: 0xdead_beef };
                let value = template.envelope(12, stamp);
                assert_eq!((value.len(), Stamp::find(&value)), (bytes, Some(stamp)));
            }
        }
    }

    #[test]
    fn conversation_of_an_event_is_found() {
        let stamp = Stamp { sequence: 3, intended_ns: 4 };
        let value = Template::new(300).envelope(1_234_567, stamp);
        assert_eq!(conversation_in(&value), Some(1_234_567));
        let json = br#"{"content":"chance","conversationId":"c0000012"}"#;
        assert_eq!(conversation_in(json), Some(12));
        assert_eq!(conversation_in(b"chance"), None);
    }

    #[test]
    fn conversation_ids_contain_their_numbers() {
        assert_eq!(conversation_id(12), "c0000012");
        assert_eq!(conversation_number("c0000012"), Some(12));
        assert_eq!(conversation_number("general"), None);
    }

    #[test]
    fn stamp_is_found_within_json() {
        let stamp = Stamp { sequence: 3, intended_ns: 4 };
        let json = format!(r#"{{"metadataJson":"{}","sentAt":null}}"#, stamp.text());
        assert_eq!(Stamp::find(json.as_bytes()), Some(stamp));
        assert_eq!(Stamp::find(b"{}"), None);
    }
}
