//! The hub in a simulated world: the real hub with its rings and queues, between models of the session manager, two
//! routers and the clients, driven by one seed over virtual time. `docs/simulation.md` describes what is checked.

mod client;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::advance;

use self::client::{Addressed, StreamClient, StreamReading};
use super::{Hub, HubConfig, HubHandle, HubMetrics, OutboxLimits};
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{
    DeliveryClass, Recipients, Refusal, ShardCommand, ShardReport, Ticket,
};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationKey, ConversationPosition};
use crate::domain::wait_allowance::WAIT_MS_MAX;
use crate::handoff::{Consumer, Doorbell, PeerEnd, Producer, Pushed, SpillingProducer, connect};
use crate::service::events::conversation_key::conversation_key;

const CONVERSATIONS: usize = 6;
const ROUTERS: usize = 2;
/// How long the hub sleeps at most while its room or a writer makes the rings wait.
const RETRY: Duration = Duration::from_millis(16);

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubSummary {
    /// How often each thing happened.
    pub counts: BTreeMap<&'static str, u64>,
    /// The longest that an event for a bystander took, ms in which the hub could run.
    pub latest_ms: u64,
}

impl HubSummary {
    /// Adds another run.
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
        self.latest_ms = self.latest_ms.max(other.latest_ms);
    }
}

thread_local! {
    /// The seed and the step that run; seeds begin at 1.
    static AT: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// Makes a panic of this program print the seed and the step.
pub fn print_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        let (seed, step) = AT.get();
        if seed > 0 {
            eprintln!("seed {seed} failed at step {step}");
            eprintln!(
                "replay: cargo run --release --features simulation --bin simulate -- --world hub \
                 --seed {seed}"
            );
        }
    }));
}

/// Runs one seed.
///
/// # Panics
/// A promise is broken.
pub fn run(seed: u64, steps: u64) -> HubSummary {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let mut world = World::new(seed);
        for step in 1..=steps {
            AT.set((seed, step));
            world.act().await;
            world.turn();
        }
        world.rest().await;
        world.stop().await;
        world.summary
    })
}

/// A delivery whose ticket has not come back.
struct Outstanding {
    peer: usize,
    conversation: ConversationKey,
    number: u64,
    recipients: Vec<usize>,
}

struct World {
    random: StdRng,
    hub: Hub,
    handle: HubHandle,
    deliveries_max: u64,
    manager: SpillingProducer<ShardCommand>,
    routers: Vec<Producer<ShardCommand>>,
    reports: Vec<Consumer<ShardReport>>,
    clients: Vec<StreamClient>,
    by_key: HashMap<ConnectionKey, usize>,
    limits: OutboxLimits,
    /// The last sequence of each conversation.
    sequences: [i64; CONVERSATIONS],
    number: u64,
    outstanding: HashMap<u64, Outstanding>,
    /// Time in which the hub could run, ms.
    awake_ms: u64,
    summary: HubSummary,
}

fn conversation(index: usize) -> String {
    format!("conversation-{index}")
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        // Rings hold less than the hub in production, and more if its room was set to little. Then the queues of streams are
        // longer than the room, so that the rings wait for room only.
        let (deliveries_max, slots, live_messages_max) =
            [(40, 1, 0), (40, 4, 0), (40, 512, 128), (200, 16, 0), (4_000, 32, 0)]
                [random.random_range(0..5)];
        let limits = OutboxLimits {
            live_messages_max: live_messages_max.max([4, 16, 128][random.random_range(0..3)]),
            hold_messages_max: [4, 64][random.random_range(0..2)],
            ..OutboxLimits::default()
        };
        let config = HubConfig { outbox: limits.clone(), deliveries_max, ..HubConfig::default() };
        let bell = Arc::new(Doorbell::new().expect("a descriptor"));
        let (mut commands, mut reports, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..=ROUTERS {
            let peer_bell = Arc::new(Doorbell::new().expect("a descriptor"));
            let (PeerEnd { commands: to, reports: from }, end) =
                connect([slots; 2], &bell, &peer_bell);
            commands.push(to);
            reports.push(from);
            ends.push(end);
        }
        let (handle, hub) =
            Hub::new(config, ends, bell, Arc::new(HubMetrics::default())).expect("a runtime");
        let manager = commands.remove(0).into();
        Self {
            random,
            hub,
            handle,
            deliveries_max: deliveries_max as u64,
            manager,
            routers: commands,
            reports,
            clients: Vec::new(),
            by_key: HashMap::new(),
            limits,
            sequences: [0; CONVERSATIONS],
            number: 0,
            outstanding: HashMap::new(),
            awake_ms: 0,
            summary: HubSummary::default(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.summary.counts.entry(what).or_default() += 1;
    }

    async fn act(&mut self) {
        match self.random.random_range(0..32) {
            0 => self.connect(),
            1..=3 => self.catch_up(),
            4..=14 => self.route(),
            15 => self.service_acts(),
            16..=25 => self.client_acts(),
            _ => self.pass().await,
        }
    }

    /// Routes events of one conversation, often many at once: to all sessions, or each to one of them.
    fn route(&mut self) {
        let index = self.random.random_range(0..CONVERSATIONS);
        let key = conversation_key(&conversation(index));
        let burst = [1, 1, 5, 200][self.random.random_range(0..4)];
        let is_for_all = self.random.random_bool(0.5);
        for _ in 0..burst {
            if self.routers[index % ROUTERS].free() == 0 {
                return;
            }
            self.sequences[index] += 1;
            self.number += 1;
            let (number, sequence) = (self.number, self.sequences[index]);
            let addressed = self.clients.iter().filter(|client| client.is_addressed()).count();
            let only =
                (!is_for_all && addressed > 0).then(|| self.random.random_range(0..addressed));
            let mut recipients = Vec::new();
            let clients = self.clients.iter_mut().enumerate();
            let clients = clients.filter(|(_, client)| client.is_addressed()).enumerate();
            for (place, (to, client)) in clients {
                if only.is_none_or(|only| only == place) {
                    let since_ms = self.awake_ms;
                    let addressed = Addressed { number, sequence, since_ms };
                    client.expected.entry(key).or_default().push_back(addressed);
                    recipients.push(to);
                }
            }
            let peer = 1 + index % ROUTERS;
            let command = self.deliver(peer, key, sequence, DeliveryClass::Live, recipients);
            let pushed = self.routers[index % ROUTERS].push(command);
            assert!(matches!(pushed, Pushed::Accepted), "it had room");
            self.count("routed");
        }
    }

    fn deliver(
        &mut self,
        peer: usize,
        conversation: ConversationKey,
        sequence: i64,
        class: DeliveryClass,
        recipients: Vec<usize>,
    ) -> ShardCommand {
        let number = self.number;
        let key = |to: &usize| self.clients[*to].connection.expect("it was admitted");
        let keys: Vec<_> = recipients.iter().map(|to| (key(to), Encoding::Stream)).collect();
        let mut bytes = vec![class as u8];
        bytes.extend(number.to_le_bytes());
        let event = Event::new(Some(ConversationPosition { conversation, sequence }), 0)
            .with_frame(Encoding::Stream, bytes.into_boxed_slice());
        let ticket = self.summary.counts.get("routed").copied().unwrap_or(0) % 3 > 0;
        let ticket = (ticket || class == DeliveryClass::CatchUp)
            .then(|| Ticket(NonZeroU64::new(number).expect("counted from 1")));
        if ticket.is_some() {
            let outstanding = Outstanding { peer, conversation, number, recipients };
            self.outstanding.insert(number, outstanding);
        }
        let recipients = Recipients::new(&keys, None);
        ShardCommand::Deliver { event: Arc::new(event), recipients, class, ticket }
    }

    /// The session manager sends what a client missed, and completes its catch-up.
    fn catch_up(&mut self) {
        for to in 0..self.clients.len() {
            let client = &mut self.clients[to];
            if !client.is_listed() {
                continue;
            }
            let due = client.named.iter_mut().find(|(_, named)| {
                named.missed.is_some() && !named.is_live && named.sent.len() < 4
            });
            let Some((&key, named)) = due else { continue };
            match named.missed.as_mut().and_then(VecDeque::pop_front) {
                Some(sequence) => {
                    named.sent.push_back(sequence);
                    self.number += 1;
                    let command = self.deliver(0, key, sequence, DeliveryClass::CatchUp, vec![to]);
                    self.manager.push(command);
                    self.count("caught up");
                }
                None => {
                    named.is_live = true;
                    let runs = named.delivered.iter().map(|all| SequenceRun {
                        conversation: key,
                        first: *all.start(),
                        last: *all.end(),
                    });
                    let delivered = CaughtUp::new(Some(key), runs.collect());
                    let connection = client.connection.expect("it was admitted");
                    let delivered = Box::new(delivered);
                    self.manager.push(ShardCommand::GoLive { connection, delivered });
                    self.count("gone live");
                }
            }
        }
    }

    fn service_acts(&mut self) {
        if self.clients.is_empty() || !self.random.random_bool(0.2) {
            return;
        }
        let client = self.random.random_range(0..self.clients.len());
        let client = &mut self.clients[client];
        if let Some(connection) = client.connection.filter(|_| client.is_listed()) {
            client.closed_by_service = true;
            let close = Close::new(CloseCode::SESSION_REPLACED, "session_replaced");
            let why = EndReason::ClosedByService;
            self.manager.push(ShardCommand::Close { connection, close, why });
            self.count("closed by the service");
        }
    }

    async fn pass(&mut self) {
        let ms = match self.random.random_range(0..64) {
            0 => self.random.random_range(1_000..60_000),
            _ => self.random.random_range(1..20),
        };
        let passes = Duration::from_millis(ms);
        advance(passes).await;
        self.awake_ms += passes.min(RETRY).as_millis() as u64;
    }

    /// Turns of the hub, until it takes nothing more from the routers' rings.
    fn turn(&mut self) {
        let free = |world: &Self| world.routers.iter().map(Producer::free).sum::<usize>();
        let mut before = None;
        while before != Some(free(self)) {
            before = Some(free(self));
            self.turn_once();
        }
    }

    /// A turn of the hub, and what everybody else does at once.
    fn turn_once(&mut self) {
        let waited = self.hub.makes_routers_wait();
        self.hub.step();
        let (queued, held) = (self.hub.notices.queued.events(), self.hub.notices.held.events());
        assert!(queued + held <= self.deliveries_max + 1, "{queued} queued, {held} held");
        let waits = waited || self.hub.makes_routers_wait();
        let has_room = self.routers.iter().all(|router| router.free() > 0);
        assert!(has_room || waits, "the hub leaves commands and does not wait");
        self.take_reports();
        self.manager.flush();
        for number in 0..self.clients.len() {
            self.admitted(number);
            match self.clients[number].reading {
                StreamReading::Prompt => self.read(number, usize::MAX),
                StreamReading::Slow | StreamReading::Stalled => self.write(number),
            }
        }
        self.check_bystanders();
    }

    fn take_reports(&mut self) {
        for peer in 0..self.reports.len() {
            while let Some(report) = self.reports[peer].pop() {
                self.report(peer, report);
            }
        }
    }

    fn report(&mut self, peer: usize, report: ShardReport) {
        match report {
            ShardReport::Done { ticket } => self.done(peer, ticket),
            ShardReport::Opened { connection, hello } => {
                let number = hello.user_id.parse().expect("a number");
                let refuses = self.random.random_bool(0.05);
                let client: &mut StreamClient = &mut self.clients[number];
                assert!(client.connection.replace(connection).is_none(), "opened twice");
                self.by_key.insert(connection, number);
                client.is_admitted = !refuses;
                self.manager.push(match refuses {
                    true => {
                        let body = "try again".into();
                        let refusal = Refusal { status: 503, body, retry_after_s: None };
                        ShardCommand::Refuse { connection, refusal }
                    }
                    false => ShardCommand::Admit { connection },
                });
            }
            ShardReport::Resume { connection, conversation, .. } => {
                let number = self.by_key[&connection];
                let key = conversation_key(&conversation);
                let index = (0..CONVERSATIONS).find(|it| self::conversation(*it) == *conversation);
                let last = self.sequences[index.expect("one of them")];
                let named = self.clients[number].named.get_mut(&key).expect("it was named");
                // The last of what has been routed.
                let all = (last - 5).max(1)..=last;
                assert!(named.missed.replace(all.clone().collect()).is_none(), "asked twice");
                named.delivered = Some(all);
            }
            ShardReport::Ended { connection, .. } => {
                let number = self.by_key.remove(&connection).expect("it was opened");
                self.clients[number].ended = true;
                self.count("ended");
            }
            ShardReport::Stopped
            | ShardReport::Message { .. }
            | ShardReport::GraceExpired { .. }
            | ShardReport::ResumeSince { .. }
            | ShardReport::Fence => panic!("not asked for: {report:?}"),
        }
    }

    fn done(&mut self, peer: usize, ticket: Ticket) {
        let done = self.outstanding.remove(&ticket.0.get()).expect("done once, with a ticket");
        assert_eq!(done.peer, peer, "another peer's ticket");
        for to in done.recipients {
            let client = &mut self.clients[to];
            let is_open = client.is_listed() && client.status.is_none();
            client.must_end |= is_open && client.lacks(done.conversation, done.number);
        }
    }

    fn check_bystanders(&mut self) {
        // For writers, then for room, and the precision of both.
        let latest_max = 2 * WAIT_MS_MAX + 4 * RETRY.as_millis() as u64;
        for (number, client) in self.clients.iter().enumerate() {
            if !client.stands_by || !client.is_listed() || client.session.is_none() {
                continue;
            }
            let oldest = client.expected.values().filter_map(VecDeque::front);
            let oldest_ms = oldest.map(|it| it.since_ms).min().unwrap_or(self.awake_ms);
            let late_ms = self.awake_ms - oldest_ms;
            assert!(late_ms <= latest_max, "an event of bystander {number} is {late_ms} ms late");
        }
    }

    /// Everybody reads, and nothing more is routed: each session that is open has everything.
    async fn rest(&mut self) {
        for _ in 0..400 {
            for client in &mut self.clients {
                client.reading = StreamReading::Prompt;
            }
            self.catch_up();
            self.pass().await;
            self.turn();
        }
        for (number, client) in self.clients.iter().enumerate() {
            if !client.is_listed() {
                continue;
            }
            assert!(!client.must_end, "client {number} lacks an event and was not told");
            for (conversation, expected) in &client.expected {
                let lacks = expected.iter().any(|it| client.lacks(*conversation, it.number));
                assert!(!lacks, "client {number} lacks events of {conversation:?}");
            }
            assert!(client.named.values().all(|named| named.sent.is_empty()));
        }
    }

    /// All streams end, and nothing is left.
    async fn stop(&mut self) {
        for client in &mut self.clients {
            client.closed_by_service = true;
        }
        let close = Close::new(CloseCode::GOING_AWAY, "server stopping");
        self.manager.push(ShardCommand::Stop { close });
        for _ in 0..400 {
            self.pass().await;
            self.turn();
        }
        assert!(self.by_key.is_empty(), "sessions that did not end: {:?}", self.by_key);
        assert!(self.outstanding.is_empty(), "deliveries that are not done");
        let (queued, held) = (&self.hub.notices.queued, &self.hub.notices.held);
        assert_eq!(
            [queued.sums(), held.sums()],
            [[0; 2]; 2],
            "queued and held, when all have ended"
        );
        assert!(self.clients.iter().all(|client| client.ended || client.connection.is_none()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_keeps_its_promises_over_many_seeds() {
        let mut total = HubSummary::default();
        (1..=60).for_each(|seed| total.add(&run(seed, 3_000)));
        for what in ["closed by the hub", "received by bystanders", "gone live", "left", "ended"] {
            assert!(total.counts[what] > 100, "{total:?}");
        }
    }
}
