//! The model of a client with one device that comes back again and again, over WebSocket or gRPC.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::task::{Context, Poll, Waker};

use prost::Message as _;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::Instant;
use tonic::Status;

use super::ReturningSummary;
use super::service::{CONVERSATIONS, MessageStore, ModelRecord, USER, conversation, number_of};
use super::session::SessionOracle;
use crate::domain::command::Hello;
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

/// The first message of a WebSocket client.
fn first_message(named: &Named) -> String {
    let entry = |(of, sequence): (usize, &i64)| format!("\"{}\":{sequence}", conversation(of));
    let entries: Vec<_> = named.iter().enumerate().map(entry).collect();
    format!("{{\"last_sequences\":{{{}}}}}", entries.join(","))
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
}

impl ReturningClient {
    pub(super) fn new() -> Self {
        Self {
            summary: ReturningSummary::default(),
            received: Default::default(),
            connection: None,
            ids: SessionIds::new(USER, "none"),
            oracle: SessionOracle::default(),
        }
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
        let opening = tokio::spawn(async move {
            let session = hub.open(hello).await?;
            for (of, sequence) in named.into_iter().enumerate() {
                session.report_position(conversation(of), sequence).await;
                yield_now().await;
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
                    let event = DeliveryEvent::decode(delivery.bytes()).expect("an event");
                    self.receives(event.message.expect("a message"));
                }
                Poll::Ready(Err(_)) => return false,
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
            shard.kernel_mut().client_sends(*socket, &text_frame(&first_message(named)));
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
        self.summary.live += u64::from(!arrival.is_caught_up);
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

const BINARY: u8 = 2;
const CLOSE: u8 = 8;

/// A masked text frame of a short message (RFC 6455 §5.2). The key is zero.
fn text_frame(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).ok().filter(|length| *length < 126);
    let length = length.expect("two conversations");
    [&[0x81, 0x80 | length, 0, 0, 0, 0], text.as_bytes()].concat()
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
