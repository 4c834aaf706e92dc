//! Records of TLS 1.3: what a client seals is opened, however it is cut, and what it must not send is refused. The
//! records are sealed here with keys derived here, so that both are checked against a second implementation.

use delivery::protocol::tls::keys::RecordKeys;
use delivery::protocol::tls::{Alert, Content, Opening, Sealing, Suite, TlsError};
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use ring::hkdf::{HKDF_SHA256, HKDF_SHA384, KeyType, Prk};

use super::input::FuzzInput;

/// Longest script that is sealed: longer ones find nothing else.
const RECORDS_MAX: usize = 64;
const STREAM_BYTES_MAX: usize = 20 * 1024;

/// Checks a script of records, the same bytes as they are, and the sending half.
pub fn check(data: &[u8]) {
    let mut input = FuzzInput(data);
    let suite = input.one_of(&Suite::ALL);
    let secret = vec![input.byte(); suite.secret_bytes()];
    let cut = usize::from(input.byte()) + 1;
    let (stream, expected) = script(&mut FuzzInput(input.0), suite, &secret);
    // Not thousands of pieces: they find nothing else.
    let cut = cut.max(stream.len() / 200);
    assert_eq!(opened(suite, &secret, &stream, cut), expected);
    assert_eq!(opened(suite, &secret, &stream, stream.len().max(1)), expected);
    // As it is, it opens with a probability of 2^-128.
    let raw = opened(suite, &secret, input.0, cut);
    assert!(raw.iter().all(Result::is_err), "{raw:?}");
    sealed(&mut input, suite, &secret);
}

#[derive(Debug, PartialEq)]
enum Event {
    Data(Vec<u8>),
    KeyUpdate(bool),
    Closed,
    Failed(u8),
}

type Events = Vec<Result<Event, TlsError>>;

/// What the receiving half makes of a stream, in pieces of `cut` bytes, until an error or the end of the session.
fn opened(suite: Suite, secret: &[u8], stream: &[u8], cut: usize) -> Events {
    let mut opening = Opening::new(RecordKeys::new(suite, secret, 0));
    let mut events = Vec::new();
    for piece in stream.chunks(cut) {
        let mut piece = piece.to_vec();
        let mut rest = &mut piece[..];
        while !rest.is_empty() {
            let opened = match opening.next(rest, 7) {
                Ok(opened) => opened,
                Err(error) => {
                    events.push(Err(error));
                    return events;
                }
            };
            assert!(opened.consumed > 0);
            let event = match opened.content {
                Content::Data(at) => Some(Event::Data(rest[at].to_vec())),
                Content::Assembled(data) => Some(Event::Data(data)),
                Content::KeyUpdate { asked } => Some(Event::KeyUpdate(asked)),
                Content::Closed => Some(Event::Closed),
                Content::Failed(Alert(description)) => Some(Event::Failed(description)),
                Content::Nothing | Content::Incomplete => None,
            };
            let is_over = matches!(event, Some(Event::Closed | Event::Failed(_)));
            events.extend(event.map(Ok));
            if is_over {
                return events;
            }
            rest = &mut rest[opened.consumed..];
        }
        assert_eq!(opening.incomplete_since().is_some(), opening.held_bytes() > 0);
        assert!(opening.held_bytes() <= 2 * (stream.len() + 64), "more is kept than came");
    }
    events
}

/// Builds a stream, and what must come of it.
fn script(input: &mut FuzzInput<'_>, suite: Suite, secret: &[u8]) -> (Vec<u8>, Events) {
    let mut keys = OwnKeys::new(suite, secret);
    let (mut stream, mut expected) = (Vec::new(), Events::new());
    let mut message = Vec::new();
    for _ in 0..RECORDS_MAX {
        if input.is_empty() || stream.len() > STREAM_BYTES_MAX {
            break;
        }
        let shape = input.byte();
        let content_type = match shape & 7 {
            0..4 => 23,
            4 => 21,
            5 | 6 => 22,
            _ => input.byte(),
        };
        let content = match shape >> 3 & 3 {
            0 => vec![24, 0, 0, 1, shape >> 7],
            1 => vec![1, input.byte()],
            2 => input.bytes(3).to_vec(),
            _ => vec![shape; usize::from(input.byte()) << (shape >> 5)],
        };
        let padding =
            if shape & 0x80 == 0 { 0 } else { usize::from(input.byte()) << (shape >> 5 & 3) };
        stream.extend(keys.seal(content_type, &content, padding));
        let is_too_long = content.len() + padding > 1 << 14;
        let verdict = match is_too_long {
            true => Err(TlsError::RecordOverflow),
            false => judge(content_type, &content, &mut message),
        };
        if matches!(verdict, Ok(Some(Event::KeyUpdate(_)))) {
            keys.update();
        }
        let is_over = matches!(verdict, Err(_) | Ok(Some(Event::Closed | Event::Failed(_))));
        expected.extend(verdict.transpose());
        if is_over {
            break;
        }
    }
    (stream, expected)
}

/// RFC 8446 §4.6.3, §5.1, §5.4 and §6, record by record.
fn judge(
    content_type: u8,
    content: &[u8],
    message: &mut Vec<u8>,
) -> Result<Option<Event>, TlsError> {
    // Without a type other than zero, the content itself ends with it.
    let (content_type, content) = match content_type {
        0 => {
            let end =
                content.iter().rposition(|byte| *byte != 0).ok_or(TlsError::UnexpectedMessage)?;
            (content[end], &content[..end])
        }
        other => (other, content),
    };
    if content_type != 22 && !message.is_empty() && (21..=23).contains(&content_type) {
        return Err(TlsError::UnexpectedMessage);
    }
    match (content_type, content) {
        (23, data) => Ok(Some(Event::Data(data.to_vec()))),
        (21 | 22, []) => Err(TlsError::UnexpectedMessage),
        (21, [_, 90]) => Ok(None),
        (21, [_, 0]) => Ok(Some(Event::Closed)),
        (21, [_, other]) => Ok(Some(Event::Failed(*other))),
        (21, _) => Err(TlsError::DecodeError),
        (22, more) => {
            message.extend_from_slice(more);
            if message[0] != 24 {
                return Err(TlsError::UnexpectedMessage);
            }
            if message[1..].iter().zip([0, 0, 1]).any(|(byte, expected)| *byte != expected) {
                return Err(TlsError::DecodeError);
            }
            match &std::mem::take(message)[..] {
                start if start.len() < 5 => {
                    *message = start.to_vec();
                    Ok(None)
                }
                [.., asked @ (0 | 1)] if message.is_empty() && more.len() <= 5 => {
                    Ok(Some(Event::KeyUpdate(*asked == 1)))
                }
                whole if whole.len() == 5 => Err(TlsError::IllegalParameter),
                _ => Err(TlsError::UnexpectedMessage),
            }
        }
        _ => Err(TlsError::UnexpectedMessage),
    }
}

/// What the sending half sends is what was queued, with whatever the socket takes, as a second implementation opens it.
fn sealed(input: &mut FuzzInput<'_>, suite: Suite, secret: &[u8]) {
    let mut sealing = Sealing::default();
    sealing.establish(RecordKeys::new(suite, secret, 0));
    let mut client = Opening::new(RecordKeys::new(suite, secret, 0));
    let (mut queue, mut expected, mut received) = (Vec::new(), Vec::new(), Vec::new());
    let limit = 64 + usize::from(input.byte()) * 8;
    let mut is_closed = false;
    let mut step = |sealing: &mut Sealing, queue: &mut Vec<u8>, taken_max: usize| {
        let mut out = Vec::new();
        let copy = |length: usize, out: &mut Vec<u8>| out.extend_from_slice(&queue[..length]);
        let Some(from) = sealing.next(queue.len(), limit, &mut out, copy) else { return false };
        assert!(out.len() <= limit && from < out.len());
        let taken = taken_max.min(out.len() - from);
        let mut rest = &mut out[from..from + taken];
        while !rest.is_empty() {
            assert!(!is_closed, "bytes after close_notify");
            let opened = client.next(rest, 0).expect("sealed by the same keys");
            match opened.content {
                Content::Data(at) => received.extend_from_slice(&rest[at]),
                Content::Assembled(data) => received.extend(data),
                Content::Closed => is_closed = true,
                Content::Incomplete | Content::KeyUpdate { asked: false } => {}
                other => panic!("{other:?}"),
            }
            rest = &mut rest[opened.consumed..];
        }
        queue.drain(..sealing.sent(taken));
        true
    };
    while !input.is_empty() && expected.len() < STREAM_BYTES_MAX / 4 {
        match input.byte() {
            0 => sealing.answer_key_update(),
            shape => {
                let frame = vec![shape; usize::from(shape) * 3];
                expected.extend_from_slice(&frame);
                queue.extend(frame);
                step(&mut sealing, &mut queue, usize::from(input.byte()) + 1);
            }
        }
    }
    while step(&mut sealing, &mut queue, usize::MAX) {}
    sealing.close(Alert::CLOSE_NOTIFY);
    while step(&mut sealing, &mut queue, 3) {}
    assert!(is_closed && received == expected && sealing.is_flushed());
}

/// Seals as RFC 8446 §5.2 and §7 say, record by record.
struct OwnKeys {
    suite: Suite,
    secret: Vec<u8>,
    key: LessSafeKey,
    iv: Vec<u8>,
    number: u64,
}

impl OwnKeys {
    fn new(suite: Suite, secret: &[u8]) -> Self {
        let aead: &Algorithm = match suite {
            Suite::Aes128Gcm => &AES_128_GCM,
            Suite::Aes256Gcm => &AES_256_GCM,
            Suite::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = expand(secret, "key", aead.key_len());
        let key = LessSafeKey::new(UnboundKey::new(aead, &key).expect("its length"));
        Self { suite, secret: secret.to_vec(), key, iv: expand(secret, "iv", 12), number: 0 }
    }

    fn update(&mut self) {
        *self = Self::new(self.suite, &expand(&self.secret, "traffic upd", self.secret.len()));
    }

    fn seal(&mut self, content_type: u8, content: &[u8], padding: usize) -> Vec<u8> {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.number.to_be_bytes());
        nonce.iter_mut().zip(&self.iv).for_each(|(byte, iv)| *byte ^= iv);
        self.number += 1;
        let mut inner = content.to_vec();
        inner.push(content_type);
        inner.resize(inner.len() + padding, 0);
        let mut record = vec![23, 3, 3];
        record.extend(((inner.len() + 16) as u16).to_be_bytes());
        let (nonce, header) = (Nonce::assume_unique_for_key(nonce), Aad::from(record.clone()));
        self.key.seal_in_place_append_tag(nonce, header, &mut inner).expect("short");
        record.extend(inner);
        record
    }
}

/// `HKDF-Expand-Label(secret, label, "", length)` (RFC 8446 §7.1).
fn expand(secret: &[u8], label: &str, length: usize) -> Vec<u8> {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let hkdf = if secret.len() == 48 { HKDF_SHA384 } else { HKDF_SHA256 };
    let label = format!("tls13 {label}");
    let mut info = vec![0, length as u8, label.len() as u8];
    info.extend(label.bytes());
    info.push(0);
    let mut out = vec![0; length];
    let secret = Prk::new_less_safe(hkdf, secret);
    secret.expand(&[&info], Length(length)).and_then(|okm| okm.fill(&mut out)).expect("short");
    out
}
