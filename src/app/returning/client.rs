//! The model of a client with one device that comes back again and again, over WebSocket or gRPC.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::task::{Context, Poll, Waker};

use prost::Message as _;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::ReturningSummary;
use super::service::{CONVERSATIONS, MessageStore, ModelRecord, USER, conversation, number_of};
use super::session::SessionOracle;
use super::tails::offsets;
use crate::domain::command::Hello;
use crate::domain::cursor::Cursor;
use crate::domain::encoding::Encoding;
use crate::reactor::shard::Shard;
use crate::reactor::simulation::kernel::{SimulatedKernel, SocketId};
use crate::reactor::simulation::random::Random;
use crate::service::events::proto::delivery::v1::DeliveryEvent;
use crate::service::events::proto::message::v1::{Message, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventEnvelope;
use crate::service::members::directory::SessionIds;
use crate::service::streams::hub::{HubHandle, StreamSession};

/// What a client names when it comes back, by conversation.
pub(super) type Named = [i64; CONVERSATIONS];

/// What a client says about cursors when it comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CursorUse {
    /// It wants none.
    Unwanted,
    /// It has none yet.
    First,
    Since(Cursor),
}

/// The first message of a WebSocket client.
fn first_message(named: &Named, cursor: &CursorUse) -> String {
    let entry = |(of, sequence): (usize, &i64)| format!("\"{}\":{sequence}", conversation(of));
    let entries: Vec<_> = named.iter().enumerate().map(entry).collect();
    let cursor = match cursor {
        CursorUse::Unwanted => String::new(),
        CursorUse::First => "\"cursor\":null,".into(),
        CursorUse::Since(cursor) => format!("\"cursor\":\"{}\",", cursor.to_text()),
    };
    format!("{{{cursor}\"last_sequences\":{{{}}}}}", entries.join(","))
}

/// A connection, and what the client has not read of it.
enum ClientLink {
    Socket {
        socket: SocketId,
        named: Named,
        /// Whether the 101 has come.
        is_open: bool,
        /// Whether the client has sent its first message.
        has_asked: bool,
        /// Bytes on their way. They are lost when the client leaves.
        unread: Vec<u8>,
        /// Bytes that do not make a frame yet.
        input: Vec<u8>,
    },
    Opening(JoinHandle<Result<StreamSession, Status>>),
    Stream(StreamSession),
}

/// A client. Each of its sessions is another device, so that the directory tells them apart.
pub(super) struct ReturningClient {
    pub(super) summary: ReturningSummary,
    received: [BTreeSet<i64>; CONVERSATIONS],
    connection: Option<ClientLink>,
    ids: SessionIds,
    oracle: SessionOracle,
    /// Every record that was routed, by partition: its sequence.
    routed: [Vec<i64>; CONVERSATIONS],
    /// The last cursor.
    cursor: Option<Cursor>,
    /// What its next session says about cursors.
    cursor_use: CursorUse,
}

impl ReturningClient {
    pub(super) fn new() -> Self {
        Self {
            summary: ReturningSummary::default(),
            received: Default::default(),
            connection: None,
            ids: SessionIds::new(USER, "none"),
            oracle: SessionOracle::default(),
            routed: Default::default(),
            cursor: None,
            cursor_use: CursorUse::Unwanted,
        }
    }

    /// It returns with its last cursor or without one, or wants none.
    pub(super) fn chooses_cursor(&mut self, random: &mut Random) {
        self.cursor_use = match (&self.cursor, random.below(4)) {
            (_, 0) => CursorUse::Unwanted,
            (None, _) | (_, 1) => CursorUse::First,
            (Some(cursor), _) => CursorUse::Since(cursor.clone()),
        };
    }

    /// A record of the log: known to this model, whether or not a session gets it.
    pub(super) fn is_routed(&mut self, record: &ModelRecord) {
        self.routed[record.conversation].push(record.sequence);
    }

    /// It receives a cursor: it has everything below.
    fn receives_cursor(&mut self, cursor: Cursor) {
        assert_ne!(self.cursor_use, CursorUse::Unwanted, "a cursor that nobody asked for");
        let offsets = offsets(&cursor);
        for (of, next) in offsets.into_iter().enumerate() {
            let below = &self.routed[of][..next as usize];
            let lacks: Vec<_> = below.iter().filter(|it| !self.received[of].contains(it)).collect();
            assert!(lacks.is_empty(), "a cursor at {next} of {of}, and the client lacks {lacks:?}");
        }
        self.summary.cursors += 1;
        self.cursor = Some(cursor);
    }

    fn cursor_expires(&mut self) {
        self.oracle.cursor_expires();
        self.summary.expired += 1;
        // A client without a cursor that can be used has none.
        self.cursor = None;
    }

    pub(super) fn has_cursor(&self) -> bool {
        self.cursor.is_some()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// What it names (`docs/websocket.md`): the sequence up to which it has everything. If it has
    /// everything that there is, now and then a sequence above the end, which must silence nothing.
    pub(super) fn named(&self, store: &MessageStore, random: &mut Random) -> Named {
        let mut named = [0; CONVERSATIONS];
        for (of, sequence) in named.iter_mut().enumerate() {
            let received = &self.received[of];
            *sequence = (1..).take_while(|it| received.contains(it)).last().unwrap_or(0);
            if store.is_quiet(of) && self.has_all(store, of) && random.chance(64) {
                *sequence += random.between(1, 9) as i64;
            }
        }
        named
    }

    pub(super) fn opens_socket(
        &mut self,
        shard: &mut Shard<SimulatedKernel>,
        capacity: usize,
        named: Named,
    ) {
        let device = self.next_device();
        let socket = shard.kernel_mut().connect(Ipv4Addr::LOCALHOST, capacity);
        let socket = socket.expect("the shard listens");
        let request = format!(
            "GET /ws?user_id={USER}&device_id={device} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Version: 13\r\n\r\n"
        );
        shard.kernel_mut().client_sends(socket, request.as_bytes());
        self.connection = Some(ClientLink::Socket {
            socket,
            named,
            is_open: false,
            has_asked: false,
            unread: Vec::new(),
            input: Vec::new(),
        });
    }

    pub(super) fn opens_stream(&mut self, hub: &HubHandle, named: Named) {
        let hello = Box::new(Hello {
            user_id: USER.into(),
            device_id: self.next_device(),
            token: None,
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            encoding: Encoding::Stream,
        });
        let hub = hub.clone();
        let cursor = self.cursor_use.clone();
        let opening = tokio::spawn(async move {
            let session = hub.open(hello).await?;
            match &cursor {
                CursorUse::Unwanted => {}
                CursorUse::First => session.resume_since(Box::default()).await,
                CursorUse::Since(cursor) => session.resume_since(cursor.encode().into()).await,
            }
            if !matches!(cursor, CursorUse::Since(_)) {
                name_all(&session, named).await;
            }
            session.outbox.opening_done(Instant::now());
            Ok(session)
        });
        self.connection = Some(ClientLink::Opening(opening));
    }

    fn next_device(&mut self) -> String {
        self.summary.sessions += 1;
        let device = format!("device-{}", self.summary.sessions);
        self.ids = SessionIds::new(USER, &device);
        self.oracle = SessionOracle::default();
        if matches!(self.cursor_use, CursorUse::Since(_)) {
            self.summary.resumed += 1;
            self.oracle.returns_with_cursor();
        }
        device
    }

    /// It disconnects without a word.
    pub(super) fn leaves(&mut self, shard: &mut Shard<SimulatedKernel>) {
        match self.connection.take() {
            Some(ClientLink::Socket { socket, .. }) => {
                shard.kernel_mut().client_resets(socket);
            }
            Some(ClientLink::Opening(opening)) => opening.abort(),
            Some(ClientLink::Stream(_)) | None => {}
        }
    }

    /// The router sends a record to its newest session.
    pub(super) fn is_sent(&mut self, index: u64, record: &ModelRecord) {
        self.oracle.is_sent(index, record);
    }

    /// The ids of its newest session.
    pub(super) fn ids(&self) -> SessionIds {
        self.ids.clone()
    }

    /// What the server has sent is on its way.
    pub(super) async fn takes(&mut self, shard: &mut Shard<SimulatedKernel>) {
        match &mut self.connection {
            Some(ClientLink::Socket { socket, unread, .. }) => {
                unread.extend(shard.kernel_mut().take_sent(*socket));
            }
            Some(ClientLink::Opening(opening)) if opening.is_finished() => {
                let session = opening.await.expect("opening a stream does not panic");
                self.connection = session.ok().map(ClientLink::Stream);
            }
            Some(ClientLink::Opening(_) | ClientLink::Stream(_)) | None => {}
        }
    }

    /// It reads up to so many bytes.
    pub(super) fn reads(&mut self, shard: &mut Shard<SimulatedKernel>, bytes: usize) {
        match self.connection.take() {
            Some(mut connection @ ClientLink::Socket { .. }) => {
                if self.reads_socket(shard, &mut connection, bytes) {
                    self.connection = Some(connection);
                }
            }
            Some(ClientLink::Stream(session)) => {
                // An event has about 50 bytes.
                if self.reads_stream(&session, bytes / 50 + 1) {
                    self.connection = Some(ClientLink::Stream(session));
                }
            }
            other => self.connection = other,
        }
    }

    /// Returns whether the connection is still open.
    fn reads_stream(&mut self, session: &StreamSession, events: usize) -> bool {
        for _ in 0..events {
            let mut context = Context::from_waker(Waker::noop());
            match session.outbox.poll_next(&mut context, Instant::now()) {
                Poll::Ready(Ok(delivery)) => {
                    session.sent(&delivery);
                    let event = DeliveryEvent::decode(delivery.bytes()).expect("an event");
                    if !event.cursor.is_empty() {
                        self.receives_cursor(Cursor::decode(&event.cursor).expect("a cursor"));
                    } else {
                        self.receives(event.message.expect("a message"));
                    }
                }
                Poll::Ready(Err(status)) => {
                    if status.code() == Code::FailedPrecondition {
                        self.cursor_expires();
                    }
                    return false;
                }
                Poll::Pending => break,
            }
        }
        true
    }

    /// Returns whether the connection is still open.
    fn reads_socket(
        &mut self,
        shard: &mut Shard<SimulatedKernel>,
        connection: &mut ClientLink,
        bytes: usize,
    ) -> bool {
        let ClientLink::Socket { socket, named, is_open, has_asked, unread, input } = connection
        else {
            return true;
        };
        if *is_open && !std::mem::replace(has_asked, true) {
            shard
                .kernel_mut()
                .client_sends(*socket, &text_frame(&first_message(named, &self.cursor_use)));
        }
        let bytes = bytes.min(unread.len());
        shard.kernel_mut().client_reads(*socket, bytes);
        input.extend(unread.drain(..bytes));
        if !*is_open {
            let Some(end) = input.windows(4).position(|it| it == b"\r\n\r\n") else {
                return !shard.kernel_mut().server_ended(*socket);
            };
            if !input.starts_with(b"HTTP/1.1 101") {
                return false;
            }
            input.drain(..end + 4);
            *is_open = true;
        }
        while let Some((opcode, payload, length)) = frame(input) {
            if opcode == BINARY {
                let envelope = EventEnvelope::decode(payload).expect("an envelope");
                let sent = MessageSentEvent::decode(&*envelope.payload).expect("an event");
                self.receives(sent.message.expect("a message"));
            }
            if opcode == TEXT {
                let text: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
                match text["cursor"].as_str() {
                    Some(cursor) => {
                        self.receives_cursor(Cursor::from_text(cursor).expect("a cursor"));
                    }
                    None if text["cursor_expired"].is_string() => self.cursor_expires(),
                    None => panic!("an unexpected text: {text}"),
                }
            }
            if opcode == CLOSE {
                return false;
            }
            input.drain(..length);
        }
        !(unread.is_empty() && shard.kernel_mut().server_ended(*socket))
    }

    fn receives(&mut self, message: Message) {
        let (of, sequence) = (number_of(&message.conversation_id), message.sequence);
        let arrival = self.oracle.receives(of, sequence, &message.content);
        self.summary.caught_up += u64::from(arrival.is_caught_up);
        self.summary.replayed += u64::from(arrival.is_replayed);
        self.summary.live += u64::from(!arrival.is_caught_up && !arrival.is_replayed);
        self.summary.late += u64::from(arrival.is_late);
        self.summary.duplicates_dropped += arrival.dropped;
        self.summary.repeated += u64::from(!self.received[of].insert(sequence));
    }

    pub(super) fn has_all(&self, store: &MessageStore, of: usize) -> bool {
        self.missing(store, of).is_empty()
    }

    /// Committed messages that it has not received.
    pub(super) fn missing(&self, store: &MessageStore, of: usize) -> Vec<i64> {
        store.committed(of).difference(&self.received[of]).copied().collect()
    }
}

/// Names all conversations.
async fn name_all(session: &StreamSession, named: Named) {
    for (of, sequence) in named.into_iter().enumerate() {
        session.report_position(conversation(of), sequence).await;
        yield_now().await;
    }
}

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;

/// A masked text frame of a short message (RFC 6455 §5.2). The key is zero.
fn text_frame(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).expect("two conversations");
    let [high, low] = length.to_be_bytes();
    match length {
        0..126 => [&[0x81, 0x80 | low, 0, 0, 0, 0], text.as_bytes()].concat(),
        _ => [&[0x81, 0xFE, high, low, 0, 0, 0, 0], text.as_bytes()].concat(),
    }
}

/// The first frame of the server: opcode, payload and length of the frame.
fn frame(input: &[u8]) -> Option<(u8, &[u8], usize)> {
    let (opcode, length) = (input.first()? & 0x0f, *input.get(1)?);
    let (length, header) = match length {
        126 => (usize::from(u16::from_be_bytes(input.get(2..4)?.try_into().ok()?)), 4),
        127 => panic!("the messages of the model are short"),
        short => (usize::from(short), 2),
    };
    Some((opcode, input.get(header..header + length)?, header + length))
}
