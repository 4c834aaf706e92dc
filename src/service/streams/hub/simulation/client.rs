//! What a client of the hub must get.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use rand::RngExt as _;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::Code;

use super::{CONVERSATIONS, World, conversation};
use crate::domain::command::{DeliveryClass, Hello};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationKey};
use crate::service::events::conversation_key::conversation_key;
use crate::service::streams::hub::{
    HubRequest, NotAdmitted, Outbox, PositionReport, StreamSession,
};

/// Streams at a time.
const CLIENTS_MAX: usize = 16;

/// How a client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamReading {
    /// Everything at once.
    Prompt,
    /// An event now and then.
    Slow,
    /// Nothing.
    Stalled,
}

/// A conversation that a client has named.
#[derive(Debug, Default)]
pub(super) struct NamedByClient {
    /// Live events above this number must not come before the catch-up is complete.
    pub(super) at_number: u64,
    /// Messages that were missed and not sent yet; known when the session manager was asked.
    pub(super) missed: Option<VecDeque<i64>>,
    /// Those that were sent and have not arrived.
    pub(super) sent: VecDeque<i64>,
    pub(super) delivered: Option<RangeInclusive<i64>>,
    /// The session manager has completed the catch-up.
    pub(super) is_live: bool,
}

impl NamedByClient {
    pub(super) fn covers(&self, sequence: i64) -> bool {
        self.is_live && self.delivered.as_ref().is_some_and(|all| all.contains(&sequence))
    }
}

/// A live event on its way to a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addressed {
    pub(super) number: u64,
    pub(super) sequence: i64,
    pub(super) since_ms: u64,
}

pub(super) struct StreamClient {
    pub(super) reading: StreamReading,
    /// It does nothing but read: its events must come in time, whatever others do.
    pub(super) stands_by: bool,
    pub(super) outbox: Arc<Outbox>,
    /// Its writer has an event that the client's window does not let out.
    pub(super) window_is_closed: bool,
    pub(super) answer: Option<oneshot::Receiver<Result<ConnectionKey, NotAdmitted>>>,
    pub(super) session: Option<StreamSession>,
    pub(super) connection: Option<ConnectionKey>,
    pub(super) is_admitted: bool,
    pub(super) closed_by_service: bool,
    pub(super) status: Option<Code>,
    pub(super) ended: bool,
    pub(super) named: HashMap<ConversationKey, NamedByClient>,
    /// By conversation, in order.
    pub(super) expected: HashMap<ConversationKey, VecDeque<Addressed>>,
    /// An event was reported done that it has not received: its session must have ended.
    pub(super) must_end: bool,
}

impl StreamClient {
    /// Whether something is routed to it. A bystander gets nothing before its opening is done: what is held until then
    /// may be too much for the room of the hub.
    pub(super) fn is_addressed(&self) -> bool {
        self.is_listed() && (self.session.is_some() || !self.stands_by)
    }

    /// Whether the session manager lists it.
    pub(super) fn is_listed(&self) -> bool {
        self.is_admitted && !self.closed_by_service && !self.ended
    }

    /// Handles what its stream has brought.
    pub(super) fn received(
        &mut self,
        event: &Event,
        class: u8,
        number: u64,
        now_ms: u64,
    ) -> Option<u64> {
        assert!(!self.must_end, "an event came that was reported done before others");
        let position = event.position.expect("every event has one");
        let named = self.named.get_mut(&position.conversation);
        if class == DeliveryClass::CatchUp as u8 {
            let sent = named.and_then(|named| named.sent.pop_front());
            assert_eq!(sent, Some(position.sequence), "catch-up out of order");
            return None;
        }
        let may_come = named.as_ref().is_none_or(|it| it.is_live || number <= it.at_number);
        assert!(may_come, "a live event came before the catch-up was complete");
        let expected = self.expected.entry(position.conversation).or_default();
        loop {
            let next = expected.pop_front().expect("an event that was not sent to it, or twice");
            if next.number == number {
                return Some(now_ms - next.since_ms);
            }
            let is_covered = named.as_ref().is_some_and(|named| named.covers(next.sequence));
            assert!(is_covered, "an event was lost, or came late");
        }
    }

    /// Whether it lacks an event that it should have received.
    pub(super) fn lacks(&self, conversation: ConversationKey, number: u64) -> bool {
        let named = self.named.get(&conversation);
        let expected = self.expected.get(&conversation).into_iter().flatten();
        let is_lacked = |it: &Addressed| !named.is_some_and(|named| named.covers(it.sequence));
        expected.filter(|it| it.number == number).any(is_lacked)
    }
}

impl World {
    pub(super) fn connect(&mut self) {
        let open = self.clients.iter().filter(|client| !client.ended).count();
        if open >= CLIENTS_MAX {
            return;
        }
        let reading = [
            StreamReading::Prompt,
            StreamReading::Prompt,
            StreamReading::Slow,
            StreamReading::Stalled,
        ][self.random.random_range(0..4)];
        let hello = Hello {
            user_id: self.clients.len().to_string(),
            device_id: "phone".into(),
            token: None,
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            encoding: Encoding::Stream,
        };
        let outbox = Arc::new(Outbox::new(&self.limits));
        let (reply, answer) = oneshot::channel();
        let request =
            HubRequest::Open { hello: Box::new(hello), outbox: Arc::clone(&outbox), reply };
        if self.handle.requests.try_send(request).is_err() {
            return;
        }
        self.count("connected");
        self.clients.push(StreamClient {
            reading,
            stands_by: reading == StreamReading::Prompt && self.random.random_bool(0.5),
            outbox,
            window_is_closed: false,
            answer: Some(answer),
            session: None,
            connection: None,
            is_admitted: false,
            closed_by_service: false,
            status: None,
            ended: false,
            named: HashMap::new(),
            expected: HashMap::new(),
            must_end: false,
        });
    }

    pub(super) fn client_acts(&mut self) {
        if self.clients.is_empty() {
            return;
        }
        let number = self.random.random_range(0..self.clients.len());
        let client = &mut self.clients[number];
        let Some(session) = client.session.as_ref().filter(|_| !client.stands_by) else { return };
        match self.random.random_range(0..16) {
            0..=1 => {
                let name = conversation(self.random.random_range(0..CONVERSATIONS));
                let key = conversation_key(&name);
                let report = client.outbox.report_position(key, Instant::now());
                if report != PositionReport::CatchUp {
                    return;
                }
                let named = NamedByClient { at_number: self.number, ..NamedByClient::default() };
                client.named.insert(key, named);
                let request = HubRequest::CatchUp {
                    connection: session.connection,
                    conversation: name.into_boxed_str(),
                    after: 0,
                };
                assert!(self.handle.requests.try_send(request).is_ok(), "the hub takes them");
                self.count("named");
            }
            2 if self.random.random_bool(0.1) => {
                client.session = None;
                client.closed_by_service = true;
                self.count("left");
            }
            _ if client.reading == StreamReading::Slow => {
                let events = self.random.random_range(1..4);
                self.read(number, events);
            }
            _ => {}
        }
    }

    /// The writer of a client that does not read at once takes an event, which the window does not let out.
    pub(super) fn write(&mut self, number: usize) {
        if !self.clients[number].window_is_closed {
            self.read(number, 1);
        }
    }

    /// Reads what its writer has, and lets the writer take at most so many events. If the client is not one that reads
    /// at once, its window does not let out the last one.
    pub(super) fn read(&mut self, number: usize, events: usize) {
        let client = &mut self.clients[number];
        if std::mem::take(&mut client.window_is_closed) {
            client.outbox.let_out(0, Instant::now());
        }
        for left in (0..events).rev() {
            let Some(session) = &client.session else { return };
            let mut context = Context::from_waker(Waker::noop());
            match client.outbox.poll_next(&mut context, Instant::now()) {
                Poll::Pending => return,
                Poll::Ready(Ok(delivery)) => {
                    session.sent(&delivery);
                    client.window_is_closed = left == 0 && client.reading != StreamReading::Prompt;
                    let bytes = [0, delivery.bytes().len()][usize::from(client.window_is_closed)];
                    client.outbox.let_out(bytes, Instant::now());
                    let (class, number) = delivery.bytes().split_at(1);
                    let number = u64::from_le_bytes(number.try_into().expect("8 bytes"));
                    let late = client.received(delivery.event(), class[0], number, self.awake_ms);
                    *self.summary.counts.entry("received").or_default() += 1;
                    if let Some(late_ms) = late.filter(|_| client.stands_by) {
                        *self.summary.counts.entry("received by bystanders").or_default() += 1;
                        self.summary.latest_ms = self.summary.latest_ms.max(late_ms);
                    }
                }
                Poll::Ready(Err(status)) => {
                    let by_service = client.closed_by_service;
                    assert!(!client.stands_by || by_service, "a bystander was closed: {status}");
                    client.status = Some(status.code());
                    client.session = None;
                    client.closed_by_service = true;
                    self.count(match by_service {
                        true => "told of the close",
                        false => "closed by the hub",
                    });
                    return;
                }
            }
        }
    }

    pub(super) fn admitted(&mut self, number: usize) {
        let client = &mut self.clients[number];
        let Some(answer) = &mut client.answer else { return };
        match answer.try_recv() {
            Ok(Ok(connection)) => {
                assert_eq!(client.connection, Some(connection));
                let (outbox, hub) = (Arc::clone(&client.outbox), self.handle.clone());
                let why = OnceLock::new();
                outbox.opening_done(Instant::now());
                client.session = Some(StreamSession { connection, outbox, hub, why });
                client.answer = None;
            }
            Ok(Err(_)) => (client.answer, client.closed_by_service) = (None, true),
            Err(oneshot::error::TryRecvError::Empty) => {}
            Err(error) => panic!("no answer: {error}"),
        }
    }
}
