//! The sending half of a session.
//!
//! Frames are sealed when they are sent, as many as fit into one record. A socket that takes only a part of a record
//! gets the rest later, and nothing is kept for it: the same frames are still at the front of the queue, and sealed
//! again they give the same bytes.

use crate::protocol::tls::alert::Alert;
use crate::protocol::tls::keys::{RecordKeys, Tag};
use crate::protocol::tls::record::{CONTENT_BYTES_MAX, ContentType, OVERHEAD_BYTES};

/// Records sealed with the same keys: fewer than the 2^24.5 of full size after which AES-GCM must get others
/// (RFC 8446 §5.5).
pub const RECORDS_PER_KEY_MAX: u64 = 1 << 24;
/// A key update that asks for none (§4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Seals what the server sends.
#[derive(Debug, Default)]
pub struct Sealing {
    /// `None`: before the end of the handshake.
    keys: Option<RecordKeys>,
    /// Bytes that are sent as they are, between records: those of the handshake, alerts and key updates, sealed
    /// already.
    ready: Option<Box<Ready>>,
    /// The record that is being sent; `None`: all that was sealed is sent.
    record: Option<Record>,
    /// The client has asked for a key update, and no record was sealed since.
    owes_key_update: bool,
    is_closed: bool,
}

/// In a box: idle sessions have none.
#[derive(Debug, Default)]
struct Ready(Vec<u8>);

/// A record that the socket has not taken, or not all of it.
#[derive(Clone, Copy, Debug)]
struct Record {
    /// The start of its tag.
    tag: [u8; 8],
    /// Bytes of its content: those at the front of the queue.
    content: u16,
    /// Bytes of the record that the socket has taken.
    sent: u16,
}

impl Record {
    fn has_tag(&self, tag: &Tag) -> bool {
        tag.starts_with(&self.tag)
    }
}

impl Sealing {
    /// Adds bytes of the handshake.
    pub fn push_handshake(&mut self, bytes: &[u8]) {
        self.push_ready(|ready, _| ready.extend_from_slice(bytes));
    }

    /// The handshake has failed: adds the last bytes of it, which end with an alert.
    pub fn fail_handshake(&mut self, bytes: &[u8]) {
        self.push_handshake(bytes);
        self.is_closed = true;
    }

    /// The handshake is complete. All bytes of it were added.
    pub fn establish(&mut self, keys: RecordKeys) {
        assert!(self.keys.is_none());
        self.keys = Some(keys);
    }

    /// Whether the handshake is complete.
    pub fn is_established(&self) -> bool {
        self.keys.is_some()
    }

    /// The client uses new keys, and asks for the same. Several requests before the next data get one answer (§4.6.3).
    pub fn answer_key_update(&mut self) {
        self.owes_key_update = true;
    }

    /// Adds an alert, after which nothing may be sealed. It comes behind a record that is being sent, and before all
    /// others. Only the first call does something.
    pub fn close(&mut self, alert: Alert) {
        if std::mem::replace(&mut self.is_closed, true) {
            return;
        }
        self.push_ready(|ready, keys| match keys {
            Some(keys) => drop(keys.seal(ContentType::Alert, ready, |out| {
                out.extend_from_slice(&alert.content());
            })),
            None => ready.extend_from_slice(&alert.plain_record()),
        });
    }

    /// Whether an alert was added.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Whether nothing waits to be sent but what is in the queue, and no record of that has begun.
    pub fn is_flushed(&self) -> bool {
        self.record.is_none() && self.ready.is_none()
    }

    /// Bytes at the front of the queue that are sealed: they must stay there.
    pub fn sealed_bytes(&self) -> usize {
        self.record.map_or(0, |record| usize::from(record.content))
    }

    /// Writes to `out`, which is empty and does not grow beyond `limit`, what is sent next. `queued` bytes are in the
    /// queue, and `copy` appends the first so many of them. Returns the index in `out` of the first byte to send;
    /// `None`: there is nothing to send.
    ///
    /// # Panics
    /// If the front of the queue has changed while it was being sent: two contents with the same number would give away
    /// both.
    pub fn next(
        &mut self,
        queued: usize,
        limit: usize,
        out: &mut Vec<u8>,
        copy: impl FnOnce(usize, &mut Vec<u8>),
    ) -> Option<usize> {
        if let Some(record) = &self.record {
            let keys = self.keys.as_ref().expect("a record was sealed with them");
            let content = usize::from(record.content);
            // An alert may have been sealed since, and nothing else.
            let number = keys.records() - 1 - u64::from(self.is_closed);
            let data = ContentType::ApplicationData;
            let tag = keys.seal_again(number, data, out, |out| copy(content, out));
            assert!(record.has_tag(&tag), "the content of a record has changed");
            return Some(usize::from(record.sent));
        }
        if self.ready.is_none() && queued > 0 && !self.is_closed {
            self.update_keys_if_due();
        }
        if let Some(ready) = &self.ready {
            out.extend_from_slice(&ready.0[..ready.0.len().min(limit)]);
            return Some(0);
        }
        let keys = self.keys.as_mut().filter(|_| queued > 0 && !self.is_closed)?;
        let content = queued.min(CONTENT_BYTES_MAX).min(limit - OVERHEAD_BYTES);
        let tag = keys.seal(ContentType::ApplicationData, out, |out| copy(content, out));
        let tag = *tag.first_chunk().expect("a tag is longer");
        self.record = Some(Record { tag, content: content as u16, sent: 0 });
        Some(0)
    }

    /// The socket has taken so many bytes of what [`Sealing::next`] has written. Returns how many bytes at the front of
    /// the queue are sent now.
    pub fn sent(&mut self, taken: usize) -> usize {
        if let Some(record) = &mut self.record {
            let (content, sent) = (usize::from(record.content), usize::from(record.sent) + taken);
            let whole = content + OVERHEAD_BYTES;
            assert!(sent <= whole, "sent {sent} of {whole}");
            if sent < whole {
                record.sent = sent as u16;
                return 0;
            }
            self.record = None;
            return content;
        }
        if let Some(ready) = &mut self.ready {
            ready.0.drain(..taken);
            self.ready.take_if(|ready| ready.0.is_empty());
        }
        0
    }

    fn update_keys_if_due(&mut self) {
        let owes = std::mem::take(&mut self.owes_key_update);
        let Some(keys) = &mut self.keys else { return };
        if owes || keys.records() >= RECORDS_PER_KEY_MAX {
            self.push_ready(|ready, keys| {
                let keys = keys.as_mut().expect("the handshake is complete");
                keys.seal(ContentType::Handshake, ready, |out| out.extend_from_slice(&KEY_UPDATE));
                keys.update();
            });
        }
    }

    fn push_ready(&mut self, push: impl FnOnce(&mut Vec<u8>, &mut Option<RecordKeys>)) {
        push(&mut self.ready.get_or_insert_default().0, &mut self.keys);
        self.ready.take_if(|ready| ready.0.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::tls::keys::Suite;
    use crate::protocol::tls::opening::{Content, Opening};

    fn keys() -> RecordKeys {
        RecordKeys::new(Suite::ChaCha20Poly1305, &[9; 32], 0)
    }

    /// A session, the queue of what it has to send, and the client's side.
    struct Rig {
        server: Sealing,
        queue: Vec<u8>,
        client: Opening,
        received: Vec<u8>,
        others: Vec<Content>,
    }

    impl Rig {
        fn new() -> Self {
            let mut server = Sealing::default();
            server.establish(keys());
            let (queue, received, others) = (Vec::new(), Vec::new(), Vec::new());
            Self { server, queue, client: Opening::new(keys()), received, others }
        }

        /// One send, of which the socket takes at most so many bytes. Returns whether there was something to send.
        fn send(&mut self, limit: usize, taken_max: usize) -> bool {
            let mut out = Vec::new();
            let queue = &self.queue;
            let copy = |length: usize, out: &mut Vec<u8>| out.extend_from_slice(&queue[..length]);
            let from = self.server.next(queue.len(), limit, &mut out, copy);
            let Some(from) = from else { return false };
            assert!(out.len() <= limit);
            let taken = taken_max.min(out.len() - from);
            let mut input = &mut out[from..from + taken];
            while !input.is_empty() {
                let opened = self.client.next(input, 0).unwrap();
                match opened.content {
                    Content::Data(at) => self.received.extend_from_slice(&input[at]),
                    Content::Assembled(data) => self.received.extend(data),
                    Content::Incomplete => {}
                    other => self.others.push(other),
                }
                input = &mut input[opened.consumed..];
            }
            let done = self.server.sent(taken);
            self.queue.drain(..done);
            true
        }
    }

    #[test]
    fn several_frames_are_one_record() {
        let mut rig = Rig::new();
        rig.queue.extend(b"one two three");
        assert!(rig.send(16_384, usize::MAX));
        assert_eq!((&rig.received[..], rig.queue.len()), (&b"one two three"[..], 0));
        assert!(!rig.send(16_384, usize::MAX) && rig.server.is_flushed());
    }

    #[test]
    fn key_update_is_answered_once_before_the_next_data() {
        let mut rig = Rig::new();
        rig.server.answer_key_update();
        rig.server.answer_key_update();
        assert!(!rig.send(16_384, usize::MAX), "nothing to say, so nothing is sent");
        rig.queue.extend(b"data");
        while rig.send(16_384, usize::MAX) {}
        assert_eq!(rig.others, [Content::KeyUpdate { asked: false }]);
        assert_eq!(rig.received, b"data");
    }

    #[test]
    fn keys_are_used_for_a_limited_number_of_records() {
        let mut rig = Rig::new();
        let at = RECORDS_PER_KEY_MAX - 1;
        rig.server.keys = Some(RecordKeys::new(Suite::ChaCha20Poly1305, &[9; 32], at));
        rig.client = Opening::new(RecordKeys::new(Suite::ChaCha20Poly1305, &[9; 32], at));
        for _ in 0..3 {
            rig.queue.extend(b"x");
            while rig.send(16_384, usize::MAX) {}
        }
        assert_eq!(
            (&rig.received[..], &rig.others[..]),
            (&b"xxx"[..], &[Content::KeyUpdate { asked: false }][..])
        );
    }

    #[test]
    fn alert_comes_behind_a_record_that_is_being_sent() {
        let mut rig = Rig::new();
        rig.queue.extend(b"half sent");
        rig.send(16_384, 10);
        rig.queue.extend(b"never sent");
        rig.server.close(Alert::CLOSE_NOTIFY);
        rig.server.close(Alert::INTERNAL_ERROR);
        assert_eq!(rig.server.sealed_bytes(), 9);
        while rig.send(16_384, 10) {}
        assert_eq!(
            (&rig.received[..], &rig.others[..]),
            (&b"half sent"[..], &[Content::Closed][..])
        );
        assert_eq!(rig.queue, b"never sent");
    }

    #[test]
    #[should_panic(expected = "the content of a record has changed")]
    fn nothing_is_sealed_twice_with_another_content() {
        let mut rig = Rig::new();
        rig.queue.extend(b"content");
        rig.send(16_384, 10);
        rig.queue[0] = b'C';
        rig.send(16_384, 10);
    }

    proptest! {
        /// However much a socket takes, the client receives what was queued, in order, with everything in between.
        #[test]
        fn client_receives_what_was_queued(
            steps in proptest::collection::vec((0usize..2000, 1usize..3000, 0u8..8), 1..60),
            limit in 100usize..3000,
        ) {
            let mut rig = Rig::new();
            rig.server.push_handshake(&[]);
            let mut expected = Vec::new();
            let mut asked = 0;
            for (number, (length, taken_max, what)) in steps.into_iter().enumerate() {
                let frame: Vec<u8> = (0..length).map(|at| (at * 31 + number) as u8).collect();
                expected.extend_from_slice(&frame);
                rig.queue.extend(frame);
                if what == 0 {
                    rig.server.answer_key_update();
                    asked += 1;
                }
                rig.send(limit, taken_max);
            }
            rig.queue.push(0);
            expected.push(0);
            while rig.send(limit, 7) {}
            prop_assert_eq!(rig.received, expected);
            prop_assert!(rig.others.len() <= asked && (asked == 0) == rig.others.is_empty());
            prop_assert!(rig.server.is_flushed());
        }
    }
}
