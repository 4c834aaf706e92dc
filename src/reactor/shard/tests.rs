//! Tests of single guarantees on the simulated kernel, without faults. The simulation tests all of
//! them together, with faults.

mod accepting;
mod bystanders;
mod closing;

use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::sync::Arc;

use super::*;
use crate::domain::budget::EventBudget;
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::close::{CloseCode, EndReason};
use crate::domain::command::{DeliveryClass, Recipients, Refusal, ShardReport, Ticket};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConversationKey, ConversationPosition};
use crate::domain::limiter::ConnectionLimits;
use crate::handoff::{PeerEnd, Pushed, connect};
use crate::protocol::frame::Opcode;
use crate::reactor::simulation::kernel::{SimulatedKernel, SocketId};
use crate::reactor::simulation::wire::{CLOSE, PING, PONG, TEXT, Wire, WireEvent, client_frame};

struct Rig {
    shard: Shard<SimulatedKernel>,
    manager: PeerEnd,
    router: PeerEnd,
    capacity: Arc<Capacity>,
    counters: Arc<ShardCounters>,
}

struct Client {
    socket: SocketId,
    wire: Wire,
}

impl Rig {
    fn new(config: ShardConfig) -> Self {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (manager, manager_end) = connect([64; 2], &bell, &bell);
        let (router, router_end) = connect([64; 2], &bell, &bell);
        let counters = Arc::new(ShardCounters::default());
        let capacity = Arc::new(Capacity::new(config.connections_max));
        let links = ShardLinks {
            peers: vec![manager_end, router_end],
            bell,
            limiter: Arc::new(ConnectionLimiter::new(ConnectionLimits::default())),
            capacity: Arc::clone(&capacity),
            counters: Arc::clone(&counters),
            handshaker: None,
        };
        let mut shard = Shard::new(SimulatedKernel::new(1, 8), config, links);
        shard.turn().unwrap();
        Self { shard, manager, router, capacity, counters }
    }

    fn turns(&mut self) {
        for _ in 0..8 {
            self.shard.kernel_mut().progress();
            self.shard.turn().unwrap();
            self.shard.audit();
        }
    }

    /// Advances time in steps of a tick, so that no deadline is noticed late.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(TICK_MS) {
            self.shard.kernel_mut().pass(TICK_MS);
            self.turns();
        }
    }

    fn connect(&mut self, capacity: usize) -> Client {
        let socket = self.shard.kernel_mut().connect(Ipv4Addr::LOCALHOST, capacity).unwrap();
        self.turns();
        Client { socket, wire: Wire::default() }
    }

    fn sends(&mut self, client: &Client, bytes: &[u8]) {
        self.shard.kernel_mut().client_sends(client.socket, bytes);
        self.turns();
    }

    fn command(&mut self, command: ShardCommand) {
        assert!(matches!(self.manager.commands.push(command), Pushed::Accepted));
        self.turns();
    }

    fn receives(&mut self, client: &mut Client) -> Option<WireEvent> {
        client.wire.push(&self.shard.kernel_mut().take_sent(client.socket));
        client.wire.next()
    }

    /// Connects a session up to the session manager's decision.
    fn request_session(&mut self, capacity: usize) -> (Client, ConnectionKey) {
        let client = self.connect(capacity);
        let request = "GET /ws?user_id=u&device_id=d HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\
                       Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                       Sec-WebSocket-Version: 13\r\n\r\n";
        self.sends(&client, request.as_bytes());
        loop {
            let report = self.manager.reports.pop().expect("a report of the request");
            if let ShardReport::Opened { connection, .. } = report {
                return (client, connection);
            }
        }
    }

    /// A session that holds live events.
    fn session(&mut self, capacity: usize) -> (Client, ConnectionKey) {
        let (mut client, connection) = self.request_session(capacity);
        self.command(ShardCommand::Admit { connection });
        assert_eq!(self.receives(&mut client), Some(WireEvent::Answer(101)));
        (client, connection)
    }

    fn live(&mut self, capacity: usize) -> (Client, ConnectionKey) {
        let (client, connection) = self.session(capacity);
        self.command(ShardCommand::GoLive { connection, delivered: Box::default() });
        (client, connection)
    }

    fn delivers(&mut self, to: ConnectionKey, sequence: i64, class: DeliveryClass) {
        self.command(delivery(to, sequence, class));
    }

    /// Pushes from a router; the shard takes its turn later.
    fn routes(&mut self, to: ConnectionKey, sequence: i64) {
        let command = delivery(to, sequence, DeliveryClass::Live);
        assert!(matches!(self.router.commands.push(command), Pushed::Accepted));
    }

    /// The sequences of the received events, up to a frame of another kind.
    fn events(&mut self, client: &mut Client) -> Vec<i64> {
        let mut sequences = Vec::new();
        while let Some(WireEvent::Frame(_, payload)) = self.receives(client) {
            sequences.push(i64::from_be_bytes(payload.try_into().unwrap()));
        }
        sequences
    }

    fn done(&mut self) -> Vec<u64> {
        let mut tickets = Vec::new();
        while let Some(ShardReport::Done { ticket }) = self.manager.reports.pop() {
            tickets.push(ticket.0.get());
        }
        tickets
    }

    fn ended(&mut self) -> EndReason {
        loop {
            if let ShardReport::Ended { why, .. } = self.manager.reports.pop().expect("an end") {
                return why;
            }
        }
    }
}

fn delivery(to: ConnectionKey, sequence: i64, class: DeliveryClass) -> ShardCommand {
    let position = ConversationPosition { conversation: ConversationKey(1), sequence };
    let frame = frame::encode(Opcode::Binary, false, &sequence.to_be_bytes());
    let event = Event::new(Some(position), 0).with_frame(Encoding::Binary, frame);
    ShardCommand::Deliver {
        event: Arc::new(event),
        recipients: Recipients::One((to, Encoding::Binary)),
        class,
        ticket: NonZeroU64::new(sequence as u64).map(Ticket),
    }
}

fn closed_with(said: Option<WireEvent>) -> u16 {
    let Some(WireEvent::Frame(CLOSE, payload)) = said else {
        panic!("{said:?} is not a close frame")
    };
    u16::from_be_bytes([payload[0], payload[1]])
}

/// What catch-up has delivered of the conversation of these tests.
fn caught_up(sequences: &[i64]) -> Box<CaughtUp> {
    let conversation = ConversationKey(1);
    let run = |sequence| SequenceRun::one(ConversationPosition { conversation, sequence });
    Box::new(CaughtUp::new(None, sequences.iter().copied().map(run).collect()))
}

#[test]
fn live_events_are_held_until_go_live_and_duplicates_are_dropped() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, key) = rig.session(100_000);
    for sequence in [3, 4] {
        rig.delivers(key, sequence, DeliveryClass::Live);
    }
    rig.delivers(key, 1, DeliveryClass::CatchUp);
    assert_eq!(rig.events(&mut client), [1]);
    let delivered = caught_up(&[1, 2, 3, 4]);
    rig.command(ShardCommand::GoLive { connection: key, delivered });
    rig.delivers(key, 2, DeliveryClass::Live);
    rig.delivers(key, 5, DeliveryClass::Live);
    rig.delivers(key, 6, DeliveryClass::Live);
    assert_eq!(rig.events(&mut client), [5, 6]);
    assert_eq!(rig.done(), [1, 3, 4, 2, 5, 6]);
    assert_eq!(rig.counters.counts.deliveries_duplicate.get(), 3);
}

/// Promise: “A live event is a duplicate only if catch-up has delivered exactly this message to the session.”
///
/// Issue “From the log to the members”: “the message service commits a lower sequence late; a device
/// that resumed in between received 3 by catch-up”, and the live event 2 is no duplicate of it, whether
/// it comes during the catch-up or afterwards. Neither does a later event end what is remembered.
#[test]
fn live_event_of_a_lower_sequence_is_sent_unless_catch_up_has_delivered_exactly_it() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, key) = rig.session(100_000);
    rig.delivers(key, 1, DeliveryClass::CatchUp);
    rig.delivers(key, 5, DeliveryClass::CatchUp);
    rig.delivers(key, 2, DeliveryClass::Live);
    rig.command(ShardCommand::GoLive { connection: key, delivered: caught_up(&[1, 5]) });
    for sequence in [7, 3, 5, 4, 1] {
        rig.delivers(key, sequence, DeliveryClass::Live);
    }
    assert_eq!(rig.events(&mut client), [1, 5, 2, 7, 3, 4]);
    assert_eq!(rig.counters.counts.deliveries_duplicate.get(), 2);
}

#[test]
fn what_catch_up_has_delivered_is_forgotten_in_time() {
    let mut rig = Rig::new(ShardConfig { dedupe_ms: 1_000, ..ShardConfig::default() });
    let (mut client, key) = rig.session(100_000);
    rig.delivers(key, 1, DeliveryClass::CatchUp);
    rig.command(ShardCommand::GoLive { connection: key, delivered: caught_up(&[1]) });
    rig.delivers(key, 1, DeliveryClass::Live);
    rig.pass(1_200);
    rig.delivers(key, 1, DeliveryClass::Live);
    assert_eq!(rig.events(&mut client), [1, 1], "repeated rather than lost");
    assert_eq!(rig.counters.counts.deliveries_duplicate.get(), 1);
}

#[test]
fn held_event_is_not_charged_to_the_budget_of_the_routers() {
    let budget = EventBudget::new(1 << 20);
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, connection) = rig.session(100_000);
    let frame = frame::encode(Opcode::Binary, false, &1_i64.to_be_bytes());
    let event = Event::new(None, 0).with_frame(Encoding::Binary, frame).charged_to(&budget);
    let (event, recipient) = (Arc::new(event), (connection, Encoding::Binary));
    let ended = ConnectionKey { generation: 9, ..connection };
    let recipients = [recipient, (ended, Encoding::Binary)];
    let recipients = Recipients::new(&recipients, Some(&budget));
    assert!(budget.charged() > event.cost(), "the list of recipients");
    let (class, ticket) = (DeliveryClass::Live, None);
    rig.command(ShardCommand::Deliver { event: Arc::clone(&event), recipients, class, ticket });
    assert_eq!(budget.charged(), 0, "held, and the list is gone");
    rig.command(ShardCommand::GoLive { connection, delivered: Box::default() });
    assert_eq!(rig.events(&mut client), [1]);
    assert_eq!(budget.charged(), event.cost(), "this test still has it");
    drop(event);
    assert_eq!(budget.charged(), 0);
}

#[test]
fn live_events_are_held_before_the_session_is_admitted() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, connection) = rig.request_session(100_000);
    rig.delivers(connection, 1, DeliveryClass::Live);
    rig.command(ShardCommand::Admit { connection });
    rig.command(ShardCommand::GoLive { connection, delivered: Box::default() });
    assert_eq!(rig.receives(&mut client), Some(WireEvent::Answer(101)));
    assert_eq!(rig.events(&mut client), [1]);
}

#[test]
fn session_without_a_first_message_goes_live_after_the_grace_period() {
    let mut rig = Rig::new(ShardConfig { resume_grace_ms: 1_000, ..ShardConfig::default() });
    let (mut client, key) = rig.session(100_000);
    rig.delivers(key, 1, DeliveryClass::Live);
    rig.pass(900);
    assert!(rig.events(&mut client).is_empty());
    rig.pass(200);
    assert_eq!(rig.events(&mut client), [1]);
    assert!(matches!(rig.manager.reports.pop(), Some(ShardReport::GraceExpired { .. })));
}

#[test]
fn delivery_is_done_when_the_socket_has_taken_all_of_it() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, key) = rig.live(400);
    rig.shard.kernel_mut().client_reads(client.socket, usize::MAX);
    for sequence in 1..=45 {
        rig.delivers(key, sequence, DeliveryClass::Live);
    }
    // Ten bytes each: forty fit into the socket.
    assert_eq!(rig.done().last(), Some(&40));
    rig.shard.kernel_mut().client_reads(client.socket, usize::MAX);
    rig.turns();
    assert_eq!(rig.done(), [41, 42, 43, 44, 45]);
    assert_eq!(rig.events(&mut client), (1..=45).collect::<Vec<_>>());
}

#[test]
fn long_event_behind_a_short_one_is_no_overflow() {
    let queue_bytes_max = 16 * 1024;
    let mut rig = Rig::new(ShardConfig { queue_bytes_max, ..ShardConfig::default() });
    let (mut client, key) = rig.live(1 << 20);
    let frame = frame::encode(Opcode::Binary, false, &[0; 20_000]);
    let event = Arc::new(Event::new(None, 0).with_frame(Encoding::Binary, frame));
    let recipients = Recipients::One((key, Encoding::Binary));
    rig.routes(key, 1);
    let long =
        ShardCommand::Deliver { event, recipients, class: DeliveryClass::Live, ticket: None };
    assert!(matches!(rig.router.commands.push(long), Pushed::Accepted));
    rig.turns();
    for length in [8, 20_000] {
        let Some(WireEvent::Frame(_, payload)) = rig.receives(&mut client) else { panic!() };
        assert_eq!(payload.len(), length);
    }
}

/// The bound is there against many events. A stream holds it as well.
#[test]
fn event_that_is_longer_than_all_that_may_be_held_is_held_alone() {
    let mut rig = Rig::new(ShardConfig { hold_bytes_max: 4096, ..ShardConfig::default() });
    let (mut client, connection) = rig.session(1 << 20);
    let frame = frame::encode(Opcode::Binary, false, &[0; 20_000]);
    let event = Arc::new(Event::new(None, 0).with_frame(Encoding::Binary, frame));
    let recipients = Recipients::One((connection, Encoding::Binary));
    let class = DeliveryClass::Live;
    rig.command(ShardCommand::Deliver { event, recipients, class, ticket: None });
    rig.command(ShardCommand::GoLive { connection, delivered: Box::default() });
    let Some(WireEvent::Frame(_, payload)) = rig.receives(&mut client) else { panic!() };
    assert_eq!(payload.len(), 20_000);
}

#[test]
fn stalled_reader_is_terminated_after_the_write_timeout() {
    let mut rig = Rig::new(ShardConfig { write_ms_max: 1_000, ..ShardConfig::default() });
    let (client, key) = rig.live(400);
    for sequence in 1..=50 {
        rig.delivers(key, sequence, DeliveryClass::Live);
    }
    rig.pass(900);
    assert!(!rig.shard.kernel().is_closed(client.socket));
    rig.pass(200);
    assert!(rig.shard.kernel().is_closed(client.socket));
    assert_eq!(rig.ended(), EndReason::WriteTimeout);
}

#[test]
fn silent_client_is_pinged_then_terminated_and_an_active_one_is_not() {
    let config = ShardConfig { ping_spread_ms: 0, ..ShardConfig::default() };
    let mut rig = Rig::new(config);
    let (mut silent, _) = rig.live(100_000);
    let (mut talking, _) = rig.live(100_000);
    rig.pass(53_000);
    rig.sends(&talking, &client_frame(true, 10, &[], [1; 4]));
    assert_eq!(rig.receives(&mut silent), None);
    rig.pass(1_100);
    assert_eq!(rig.receives(&mut silent), Some(WireEvent::Frame(PING, Vec::new())));
    rig.pass(5_800);
    assert!(!rig.shard.kernel().is_closed(silent.socket));
    rig.pass(200);
    assert!(rig.shard.kernel().is_closed(silent.socket));
    assert_eq!(rig.ended(), EndReason::PeerSilent);
    assert_eq!(rig.receives(&mut talking), None, "it has just sent something");
}

#[test]
fn deadlines_hold_when_the_low_half_of_the_ticks_wraps() {
    let mut rig = Rig::new(ShardConfig { ping_spread_ms: 0, ..ShardConfig::default() });
    let now_ms = rig.shard.kernel().now_ms();
    rig.shard.kernel_mut().pass((TICK_MS << 32) - 30_000 - now_ms);
    rig.turns();
    let (mut client, _) = rig.live(100_000);
    rig.pass(53_900);
    assert_eq!(rig.receives(&mut client), None);
    rig.pass(200);
    assert_eq!(rig.receives(&mut client), Some(WireEvent::Frame(PING, Vec::new())));
    rig.pass(5_700);
    assert!(!rig.shard.kernel().is_closed(client.socket));
    rig.pass(300);
    assert_eq!(rig.ended(), EndReason::PeerSilent);
}

#[test]
fn message_that_arrives_bit_by_bit_has_a_deadline_and_the_next_one_its_own() {
    let mut rig = Rig::new(ShardConfig { message_ms_max: 10_000, ..ShardConfig::default() });
    let (mut client, _) = rig.live(100_000);
    let message = client_frame(true, 1, b"{}", [1; 4]);
    // Three messages of seven seconds each, in turn and without a gap.
    for (at, byte) in message.repeat(3).iter().enumerate() {
        rig.sends(&client, &[*byte]);
        assert_eq!(rig.receives(&mut client), None, "{at}");
        rig.pass(1_000);
    }
    // A fragmented message. A ping between the fragments is none of it.
    rig.sends(&client, &client_frame(false, 1, b"{", [1; 4]));
    rig.pass(5_000);
    rig.sends(&client, &client_frame(true, 9, &[], [1; 4]));
    assert_eq!(rig.receives(&mut client), Some(WireEvent::Frame(PONG, Vec::new())));
    rig.pass(4_900);
    assert_eq!(rig.receives(&mut client), None);
    rig.pass(200);
    assert_eq!(closed_with(rig.receives(&mut client)), 1008);
    rig.pass(2_000);
    assert_eq!(rig.ended(), EndReason::PeerAtFault);
}

#[test]
fn shard_that_slept_long_pings_before_it_terminates() {
    let mut rig = Rig::new(ShardConfig::default());
    let (mut client, _) = rig.live(100_000);
    rig.shard.kernel_mut().pass(600_000);
    rig.turns();
    assert_eq!(rig.receives(&mut client), Some(WireEvent::Frame(PING, Vec::new())));
    rig.pass(5_000);
    rig.sends(&client, &client_frame(true, 10, &[], [1; 4]));
    rig.pass(5_000);
    assert!(!rig.shard.kernel().is_closed(client.socket));
}

#[test]
fn first_message_and_control_messages_are_reported_and_others_discarded() {
    let mut rig = Rig::new(ShardConfig::default());
    let (client, _) = rig.live(100_000);
    for text in [&b"hello"[..], b"hello again", b"{\"access_token\":\"x\"}"] {
        rig.sends(&client, &client_frame(true, TEXT, text, [7; 4]));
    }
    let mut texts = Vec::new();
    while let Some(ShardReport::Message { text, .. }) = rig.manager.reports.pop() {
        texts.push(String::from(text));
    }
    assert_eq!(texts, ["hello", "{\"access_token\":\"x\"}"]);
    assert_eq!(rig.counters.counts.messages_discarded.get(), 1);
}

#[test]
fn burst_is_not_a_slow_reader_and_a_slow_reader_delays_the_rings_for_a_bounded_time() {
    let mut rig = Rig::new(ShardConfig { queue_frames_max: 8, ..ShardConfig::default() });
    let (mut quick, key) = rig.live(100_000);
    for sequence in 1..=60 {
        rig.routes(key, sequence);
    }
    rig.turns();
    rig.pass(TICK_MS);
    assert_eq!(rig.events(&mut quick), (1..=60).collect::<Vec<_>>());
    let (trickling, slow) = rig.live(160);
    rig.shard.kernel_mut().client_reads(trickling.socket, usize::MAX);
    for sequence in 1..=30 {
        rig.routes(slow, sequence);
    }
    rig.routes(key, 61);
    for _ in 0..20 {
        rig.shard.kernel_mut().client_reads(trickling.socket, 1);
        rig.pass(TICK_MS);
    }
    assert_eq!(rig.events(&mut quick), [61], "delayed by the queue of another session");
    assert!(rig.counters.counts.intake_waits.get() > 0);
    assert_eq!(rig.counters.counts.queue_overflows.get(), 1);
}
