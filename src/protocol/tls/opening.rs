//! The receiving half of a session.

use std::ops::Range;

use crate::protocol::tls::alert::{Alert, TlsError};
use crate::protocol::tls::keys::RecordKeys;
use crate::protocol::tls::record::{ContentType, HEADER_BYTES, SEALED_BYTES_MAX, decode_header};

/// A key update: type, length and request (RFC 8446 §4.6.3).
const KEY_UPDATE_BYTES: usize = 5;
const KEY_UPDATE_TYPE: u8 = 24;

/// Opens what the client sends. Idle, it has no memory but its own.
#[derive(Debug)]
pub struct Opening {
    keys: RecordKeys,
    /// The bytes of a record that is incomplete.
    partial: Option<Box<Partial>>,
    /// The start of a message in the next record: `message_bytes` of it.
    message: [u8; KEY_UPDATE_BYTES],
    message_bytes: u8,
    is_closed: bool,
}

#[derive(Debug)]
struct Partial {
    /// Header included.
    bytes: Vec<u8>,
    /// When it began, as the caller says.
    since: u64,
}

/// What [`Opening::next`] has taken.
#[derive(Debug)]
pub struct Opened {
    /// Bytes of the input; at least one.
    pub consumed: usize,
    /// Bytes of the whole record; 0: it is incomplete.
    pub record_bytes: usize,
    /// What they were.
    pub content: Content,
}

/// The content of a record.
#[derive(Debug, PartialEq, Eq)]
pub enum Content {
    /// All the input is the part of a record, and is kept.
    Incomplete,
    /// A record without anything for the application.
    Nothing,
    /// Data, opened in this part of the input.
    Data(Range<usize>),
    /// Data of a record that came in parts.
    Assembled(Vec<u8>),
    /// The client uses its next keys from now on. If it asks for it, [`Sealing::answer_key_update`] is next.
    ///
    /// [`Sealing::answer_key_update`]: crate::protocol::tls::Sealing::answer_key_update
    KeyUpdate {
        /// Whether it asks the server to do the same.
        asked: bool,
    },
    /// The client sends nothing more (§6.1). All further input is ignored.
    Closed,
    /// The client gives up (§6.2). All further input is ignored.
    Failed(Alert),
}

impl Opened {
    fn incomplete(consumed: usize) -> Self {
        Self { consumed, record_bytes: 0, content: Content::Incomplete }
    }
}

impl Opening {
    /// Heap memory of a record that is incomplete, bytes, at most: it grows by doubling.
    pub const BYTES_MAX: usize =
        size_of::<Partial>() + (HEADER_BYTES + SEALED_BYTES_MAX).next_power_of_two();

    /// Opens records of these keys.
    pub fn new(keys: RecordKeys) -> Self {
        let message = [0; KEY_UPDATE_BYTES];
        Self { keys, partial: None, message, message_bytes: 0, is_closed: false }
    }

    /// Takes the next record of `input`, which is not empty, or the part of one. A record that is here as a whole is
    /// opened in place. `now` is for [`Opening::incomplete_since`].
    ///
    /// # Errors
    /// The client violated the protocol: send the alert and close (§6.2).
    pub fn next(&mut self, input: &mut [u8], now: u64) -> Result<Opened, TlsError> {
        if self.is_closed {
            let consumed = input.len();
            return Ok(Opened { consumed, record_bytes: consumed, content: Content::Nothing });
        }
        if self.partial.is_some() {
            return self.continue_partial(input);
        }
        let Some(header) = input.first_chunk().copied() else {
            return Ok(self.keep(input, now));
        };
        let sealed_bytes = decode_header(header)?;
        let whole = HEADER_BYTES + sealed_bytes;
        let Some(record) = input.get_mut(..whole) else {
            return Ok(self.keep(input, now));
        };
        let content = match self.open(header, &mut record[HEADER_BYTES..])? {
            Plain::Data(length) => Content::Data(HEADER_BYTES..HEADER_BYTES + length),
            Plain::Other(content) => content,
        };
        Ok(Opened { consumed: whole, record_bytes: whole, content })
    }

    /// Since when a record is incomplete, as [`Opening::next`] was told.
    pub fn incomplete_since(&self) -> Option<u64> {
        Some(self.partial.as_ref()?.since)
    }

    /// Heap memory, bytes: zero unless a record is incomplete.
    pub fn held_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |it| size_of::<Partial>() + it.bytes.capacity())
    }

    fn keep(&mut self, input: &[u8], now: u64) -> Opened {
        self.partial = Some(Box::new(Partial { bytes: input.to_vec(), since: now }));
        Opened::incomplete(input.len())
    }

    fn continue_partial(&mut self, input: &[u8]) -> Result<Opened, TlsError> {
        let partial = &mut self.partial.as_mut().expect("the caller has checked it").bytes;
        let mut consumed = 0;
        let mut take_until = |partial: &mut Vec<u8>, length: usize| {
            let missing = length.saturating_sub(partial.len());
            let taken = missing.min(input.len() - consumed);
            partial.extend_from_slice(&input[consumed..consumed + taken]);
            consumed += taken;
            taken == missing
        };
        if !take_until(partial, HEADER_BYTES) {
            return Ok(Opened::incomplete(consumed));
        }
        let header = *partial.first_chunk().expect("the header is here");
        if !take_until(partial, HEADER_BYTES + decode_header(header)?) {
            return Ok(Opened::incomplete(consumed));
        }
        let mut bytes = self.partial.take().expect("the caller has checked it").bytes;
        let record_bytes = bytes.len();
        let content = match self.open(header, &mut bytes[HEADER_BYTES..])? {
            Plain::Data(length) => {
                bytes.truncate(HEADER_BYTES + length);
                bytes.drain(..HEADER_BYTES);
                Content::Assembled(bytes)
            }
            Plain::Other(content) => content,
        };
        Ok(Opened { consumed, record_bytes, content })
    }

    fn open(&mut self, header: [u8; HEADER_BYTES], sealed: &mut [u8]) -> Result<Plain, TlsError> {
        let (content_type, length) = self.keys.open(header, sealed)?;
        let content = &sealed[..length];
        if content_type == ContentType::Handshake {
            return self.message(content).map(Plain::Other);
        }
        // Messages must not be interleaved with other records (§5.1).
        if self.message_bytes > 0 {
            return Err(TlsError::UnexpectedMessage);
        }
        match (content_type, content) {
            (ContentType::ApplicationData, _) => Ok(Plain::Data(length)),
            (_, []) => Err(TlsError::UnexpectedMessage),
            (_, &[_level, description]) => Ok(Plain::Other(self.alert(Alert(description)))),
            _ => Err(TlsError::DecodeError),
        }
    }

    fn alert(&mut self, alert: Alert) -> Content {
        if alert == Alert::USER_CANCELED {
            return Content::Nothing;
        }
        self.is_closed = true;
        if alert == Alert::CLOSE_NOTIFY { Content::Closed } else { Content::Failed(alert) }
    }

    /// A key update, or the part of one: after the handshake a client without a certificate may send no other message
    /// (§4.6). The record must end with it (§5.1).
    fn message(&mut self, content: &[u8]) -> Result<Content, TlsError> {
        if content.is_empty() {
            return Err(TlsError::UnexpectedMessage);
        }
        let before = usize::from(self.message_bytes);
        let all = before + content.len();
        let taken = all.min(KEY_UPDATE_BYTES) - before;
        self.message[before..before + taken].copy_from_slice(&content[..taken]);
        if self.message[0] != KEY_UPDATE_TYPE {
            return Err(TlsError::UnexpectedMessage);
        }
        let length_bytes = before + taken - 1;
        if !self.message[1..].starts_with(&[0, 0, 1][..length_bytes.min(3)]) {
            return Err(TlsError::DecodeError);
        }
        if all < KEY_UPDATE_BYTES {
            self.message_bytes = all as u8;
            return Ok(Content::Nothing);
        }
        if all > KEY_UPDATE_BYTES {
            return Err(TlsError::UnexpectedMessage);
        }
        let asked = match self.message[4] {
            0 => false,
            1 => true,
            _ => return Err(TlsError::IllegalParameter),
        };
        self.message_bytes = 0;
        self.keys.update();
        Ok(Content::KeyUpdate { asked })
    }
}

/// The content of an opened record.
enum Plain {
    /// Data of this length.
    Data(usize),
    Other(Content),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::tls::keys::Suite;
    use crate::protocol::tls::record::{CONTENT_BYTES_MAX, TAG_BYTES, encode_header};

    fn keys() -> RecordKeys {
        RecordKeys::new(Suite::Aes128Gcm, &[7; 32], 0)
    }

    /// The client's side, and the server's.
    fn pair() -> (RecordKeys, Opening) {
        (keys(), Opening::new(keys()))
    }

    fn sealed(client: &mut RecordKeys, content_type: ContentType, content: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        client.seal(content_type, &mut out, |out| out.extend_from_slice(content));
        out
    }

    fn one(server: &mut Opening, mut record: Vec<u8>) -> Result<Content, TlsError> {
        let opened = server.next(&mut record, 0)?;
        assert_eq!(opened.consumed, record.len());
        Ok(match opened.content {
            Content::Data(at) => Content::Assembled(record[at].to_vec()),
            other => other,
        })
    }

    /// What a client may send, and what a server makes of it. The client's keys follow its key updates.
    fn after(records: &[(ContentType, &[u8])]) -> Result<Content, TlsError> {
        let (mut client, mut server) = pair();
        let mut last = Ok(Content::Nothing);
        for (content_type, content) in records {
            let record = sealed(&mut client, *content_type, content);
            last = one(&mut server, record);
            if matches!(last, Ok(Content::KeyUpdate { .. })) {
                client.update();
            }
        }
        last
    }

    #[test]
    fn contents() {
        use ContentType::{Alert as A, ApplicationData as D, Handshake as H};
        let data = |content: &[u8]| Ok(Content::Assembled(content.to_vec()));
        let update = |asked| Ok(Content::KeyUpdate { asked });
        type Case<'a> = (&'a str, &'a [(ContentType, &'a [u8])], Result<Content, TlsError>);
        let cases: &[Case<'_>] = &[
            ("data", &[(D, b"hello")], data(b"hello")),
            ("data without content (§5.1)", &[(D, b"")], data(b"")),
            ("data that ends with zeros", &[(D, &[1, 0, 0])], data(&[1, 0, 0])),
            ("close_notify", &[(A, &[1, 0])], Ok(Content::Closed)),
            ("the level is ignored (§6)", &[(A, &[2, 0])], Ok(Content::Closed)),
            ("a fatal alert", &[(A, &[2, 40])], Ok(Content::Failed(Alert(40)))),
            ("user_canceled", &[(A, &[1, 90])], Ok(Content::Nothing)),
            ("half an alert", &[(A, &[1])], Err(TlsError::DecodeError)),
            ("two alerts", &[(A, &[1, 90, 1, 0])], Err(TlsError::DecodeError)),
            ("no alert (§5.1)", &[(A, &[])], Err(TlsError::UnexpectedMessage)),
            ("after close_notify (§6.1)", &[(A, &[1, 0]), (D, b"x")], Ok(Content::Nothing)),
            ("key update", &[(H, &[24, 0, 0, 1, 0])], update(false)),
            ("key update, asked", &[(H, &[24, 0, 0, 1, 1])], update(true)),
            ("data after it", &[(H, &[24, 0, 0, 1, 1]), (D, b"new")], data(b"new")),
            ("half of it", &[(H, &[24, 0])], Ok(Content::Nothing)),
            ("in two records", &[(H, &[24, 0]), (H, &[0, 1, 0])], update(false)),
            ("data within it", &[(H, &[24]), (D, b"")], Err(TlsError::UnexpectedMessage)),
            ("an alert within it", &[(H, &[24]), (A, &[1, 0])], Err(TlsError::UnexpectedMessage)),
            ("bytes behind it", &[(H, &[24, 0, 0, 1, 0, 24])], Err(TlsError::UnexpectedMessage)),
            ("unknown request", &[(H, &[24, 0, 0, 1, 2])], Err(TlsError::IllegalParameter)),
            ("wrong length", &[(H, &[24, 0, 0, 2, 0, 0])], Err(TlsError::DecodeError)),
            ("length in two records", &[(H, &[24]), (H, &[1])], Err(TlsError::DecodeError)),
            ("no message (§5.1)", &[(H, &[])], Err(TlsError::UnexpectedMessage)),
            ("a client hello", &[(H, &[1, 0, 0, 0])], Err(TlsError::UnexpectedMessage)),
        ];
        for (name, records, expected) in cases {
            assert_eq!(after(records), *expected, "{name}");
        }
    }

    /// A record whose inner part is given as it is, sealed or not.
    fn raw(client: &mut RecordKeys, inner: &[u8]) -> Vec<u8> {
        let (last, content) = inner.split_last().unwrap();
        let mut record = sealed(client, ContentType::ApplicationData, content);
        if *last != ContentType::ApplicationData as u8 {
            // GCM encrypts byte by byte, but the tag is another one then: use the oracle of the tests in `rustls.rs`.
            let at = record.len() - TAG_BYTES - 1;
            record[at] ^= *last ^ ContentType::ApplicationData as u8;
        }
        record
    }

    #[test]
    fn changed_records_are_refused() {
        let (mut client, mut server) = pair();
        let record = raw(&mut client, &[1, 2, 22]);
        assert_eq!(one(&mut server, record), Err(TlsError::BadRecordMac));
        for header in [[20, 3, 3, 0, 1], [21, 3, 3, 0, 2], [22, 3, 3, 0, 5], [71, 69, 84, 32, 47]] {
            let (_, mut server) = pair();
            assert_eq!(one(&mut server, header.to_vec()), Err(TlsError::UnexpectedMessage));
        }
        let (_, mut server) = pair();
        assert_eq!(one(&mut server, vec![23, 3, 3, 0x41, 1]), Err(TlsError::RecordOverflow));
        // Shorter than a tag.
        let (_, mut server) = pair();
        assert_eq!(one(&mut server, vec![23, 3, 3, 0, 2, 1, 2]), Err(TlsError::BadRecordMac));
    }

    #[test]
    fn version_of_a_record_is_ignored() {
        // It is part of what the tag covers, so a client must seal it so.
        let (mut client, mut server) = pair();
        let mut record = sealed(&mut client, ContentType::ApplicationData, b"x");
        record[2] = 1;
        assert_eq!(one(&mut server, record), Err(TlsError::BadRecordMac));
        assert_eq!(encode_header(17), [23, 3, 3, 0, 17]);
    }

    #[test]
    fn longest_content_is_opened() {
        let (mut client, mut server) = pair();
        let content = vec![1; CONTENT_BYTES_MAX];
        let record = sealed(&mut client, ContentType::ApplicationData, &content);
        assert_eq!(one(&mut server, record), Ok(Content::Assembled(content)));
    }

    proptest! {
        /// However the stream is cut, the contents are the same, and nothing is kept between records.
        #[test]
        fn contents_do_not_depend_on_how_the_stream_is_cut(
            contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..600), 1..6),
            cuts in proptest::collection::vec(1usize..700, 1..30),
        ) {
            let (mut client, mut server) = pair();
            let stream: Vec<u8> = contents.iter()
                .flat_map(|content| sealed(&mut client, ContentType::ApplicationData, content))
                .collect();
            let mut received: Vec<Vec<u8>> = Vec::new();
            let mut cuts = cuts.into_iter().cycle();
            let mut rest = &stream[..];
            let mut now = 0;
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                rest = more;
                now += 1;
                let mut piece = piece.to_vec();
                let mut input = &mut piece[..];
                while !input.is_empty() {
                    let opened = server.next(input, now).unwrap();
                    match opened.content {
                        Content::Data(at) => received.push(input[at].to_vec()),
                        Content::Assembled(data) => received.push(data),
                        other => prop_assert_eq!(other, Content::Incomplete),
                    }
                    input = &mut input[opened.consumed..];
                }
                prop_assert_eq!(server.incomplete_since().is_some(), server.held_bytes() > 0);
            }
            prop_assert_eq!(received, contents);
            prop_assert_eq!(server.held_bytes(), 0);
        }

        #[test]
        fn any_bytes_are_refused_or_kept(mut bytes in proptest::collection::vec(any::<u8>(), 1..100)) {
            let (_, mut server) = pair();
            if let Ok(opened) = server.next(&mut bytes, 0) {
                prop_assert_eq!(opened.content, Content::Incomplete);
            }
        }
    }
}
