//! Clients that come back, in virtual time: a real session manager, real catch-up, a real shard on the
//! simulated kernel and a real hub of gRPC streams, between a model of the message service and models of
//! clients. One seed drives everything.
//!
//! ```text
//!  message service (model) ── pages ──► catch-up ──► session manager ──┬─► shard ──► WebSocket client
//!     │ commits in any order                                           └─► hub ────► gRPC client
//!     └─ records ──► log ──► router (model): every session in the directory ─┘
//! ```
//!
//! The promise under test: for any interleaving of late commits, live events, pages, cursors and reconnects, a
//! client receives every message at least once. Within a session it receives the messages of its catch-up
//! ascending by sequence, or what was replayed in the order of the log, then live events in the order of the
//! log; a message that catch-up or a replay has delivered does not come live too.
//!
//! Cursors: when a client receives one, it has received every message below it. Some clients return with their
//! last cursor, others with sequences. The tails drop their oldest records at any time, so that cursors expire,
//! also during a replay. Now and then all sessions leave the directory because they have missed something.

mod client;
mod service;
mod session;
mod tails;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::sleep;

use self::client::ReturningClient;
use self::service::{CONVERSATIONS, MessageStore, StoreService, USER, conversation};
use self::tails::{ModelReplays, ModelTails};
use crate::domain::capacity::Capacity;
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::domain::event::Event;
use crate::domain::ids::SessionAddress;
use crate::domain::limiter::{ConnectionLimiter, ConnectionLimits};
use crate::handoff::{Doorbell, PeerEnd, Pushed, connect};
use crate::reactor::config::ShardConfig;
use crate::reactor::counters::ShardCounters;
use crate::reactor::shard::{Shard, ShardLinks};
use crate::reactor::simulation::kernel::SimulatedKernel;
use crate::reactor::simulation::random::Random;
use crate::service::backends::ports::MissedEvents as _;
use crate::service::cluster::missed::MissedSessions;
use crate::service::events::encode::{CompressionConfig, Encoder};
use crate::service::events::envelope;
use crate::service::members::directory::Directory;
use crate::service::sessions::auth::Authenticator;
use crate::service::sessions::catch_up::{
    CatchUpConfig, CatchUpCounters, CatchUpService, ReadAccess,
};
use crate::service::sessions::manager::{
    SessionConfig, SessionCounters, SessionHandle, SessionManager, SessionPorts,
};
use crate::service::sessions::presence::Presence;
use crate::service::streams::hub::{Hub, HubConfig, HubHandle, HubMetrics};

/// Slots of each ring.
const RING_SLOTS: usize = 1024;
/// Actions of one run.
const ACTIONS: usize = 160;
/// Turns until everything has to be at rest, each of [`REST`].
const REST_TURNS_MAX: usize = 2_000;
const REST: Duration = Duration::from_millis(25);

/// What happened in some runs. It shows that they did something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReturningSummary {
    /// Sessions that clients began.
    pub sessions: u64,
    /// Messages that came with catch-up.
    pub caught_up: u64,
    /// Messages that came live.
    pub live: u64,
    /// Live messages with a sequence below one that the session had: committed late.
    pub late: u64,
    /// Live records that were not sent because catch-up had delivered their message.
    pub duplicates_dropped: u64,
    /// Messages that a client got in more than one session.
    pub repeated: u64,
    /// Cursors that clients received.
    pub cursors: u64,
    /// Sessions that began with a cursor.
    pub resumed: u64,
    /// Cursors that had expired.
    pub expired: u64,
    /// Messages that were replayed.
    pub replayed: u64,
}

impl ReturningSummary {
    /// Adds another run.
    pub fn add(&mut self, other: &Self) {
        self.sessions += other.sessions;
        self.caught_up += other.caught_up;
        self.live += other.live;
        self.late += other.late;
        self.duplicates_dropped += other.duplicates_dropped;
        self.repeated += other.repeated;
        self.cursors += other.cursors;
        self.resumed += other.resumed;
        self.expired += other.expired;
        self.replayed += other.replayed;
    }
}

thread_local! {
    /// The seed and the action that run; seeds begin at 1.
    static AT: Cell<(u64, usize)> = const { Cell::new((0, 0)) };
}

/// Makes a panic of this program print the seed and the action.
pub fn print_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        let (seed, step) = AT.get();
        if seed == 0 {
            return; // Another thread.
        }
        eprintln!("seed {seed} failed at step {step}");
        eprintln!(
            "replay: cargo run --release --features simulation --bin simulate -- --world returning \
             --seed {seed}"
        );
    }));
}

/// Runs one seed.
///
/// # Panics
/// A promise is broken.
pub fn run(seed: u64) -> ReturningSummary {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut world = ReturningWorld::new(seed);
        for action in 0..ACTIONS {
            AT.set((seed, action));
            world.act().await;
        }
        world.rest().await;
        world.client.summary
    })
}

/// Everything of one run.
struct ReturningWorld {
    random: Random,
    store: Arc<MessageStore>,
    shard: Shard<SimulatedKernel>,
    hub: HubHandle,
    /// The router's ends of the rings to the shard and to the hub.
    routers: [PeerEnd; 2],
    directory: Arc<Directory>,
    missed: Arc<MissedSessions>,
    tails: Arc<ModelTails>,
    encoder: Encoder,
    client: ReturningClient,
    /// The manager ends with its last handle.
    _manager: SessionHandle,
}

impl ReturningWorld {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let store = Arc::new(MessageStore::new(&mut random));
        let bell = |_| Arc::new(Doorbell::new().expect("a descriptor"));
        let [shard_bell, hub_bell, manager_bell, router_bell] = [(); 4].map(bell);
        let ring = |to: &Arc<Doorbell>, from: &Arc<Doorbell>| connect([RING_SLOTS; 2], to, from);
        let (manager_shard, shard_manager) = ring(&shard_bell, &manager_bell);
        let (manager_hub, hub_manager) = ring(&hub_bell, &manager_bell);
        let (router_shard, shard_router) = ring(&shard_bell, &router_bell);
        let (router_hub, hub_router) = ring(&hub_bell, &router_bell);
        let links = ShardLinks {
            peers: vec![shard_manager, shard_router],
            bell: shard_bell,
            limiter: Arc::new(ConnectionLimiter::new(ConnectionLimits::default())),
            capacity: Arc::new(Capacity::new(16)),
            counters: Arc::new(ShardCounters::default()),
            handshaker: None,
        };
        let cursor_ms = random.pick(&[50, 400, 15_000]);
        let config = ShardConfig {
            connections_max: 16,
            cursor_interval_ms: cursor_ms,
            ..ShardConfig::default()
        };
        let mut shard = Shard::new(SimulatedKernel::new(random.draw(), 16), config, links);
        shard.turn().expect("a simulated kernel");
        let peers = vec![hub_manager, hub_router];
        let metrics = Arc::new(HubMetrics::default());
        let cursor_interval = Duration::from_millis(cursor_ms);
        let hub_config = HubConfig { cursor_interval, ..HubConfig::default() };
        let (hub, task) =
            Hub::new(hub_config, peers, hub_bell, metrics).expect("the runtime polls");
        tokio::spawn(task.run());

        let service = Arc::new(StoreService::new(Arc::clone(&store), random.draw()));
        let access = ReadAccess::Checked { listing: service.clone(), source: service.clone() };
        let config = CatchUpConfig {
            chunk_messages_max: 1 + random.below(64),
            steps_at_once: 1 + random.below(4),
            calls_max: 1 + random.below(3),
            ..CatchUpConfig::default()
        };
        let counters = Arc::<CatchUpCounters>::default();
        let directory = Arc::new(Directory::new());
        let missed = MissedSessions::new(Arc::clone(&directory), None, Arc::clone(&manager_bell));
        let missed = Arc::new(missed);
        let tails = Arc::new(ModelTails::new(random.draw()));
        let catch_up = CatchUpService::new(config, service, access, counters);
        catch_up.set_replays(Arc::new(ModelReplays(Arc::clone(&tails))));
        let ports = SessionPorts {
            bell: manager_bell,
            shards: vec![manager_shard, manager_hub],
            directory: Arc::clone(&directory),
            missed: Arc::clone(&missed),
            announcer: None,
            auth: Authenticator::trust(),
            presence: Presence::off(),
            catch_up,
        };
        let counters = Arc::<SessionCounters>::default();
        let manager = SessionManager::spawn(SessionConfig::default(), ports, counters);
        Self {
            client: ReturningClient::new(),
            random,
            store,
            shard,
            hub,
            routers: [router_shard, router_hub],
            directory,
            missed,
            tails,
            encoder: Encoder::new(CompressionConfig::default()),
            _manager: manager.expect("the runtime polls"),
        }
    }

    /// One random action, and a little time for everybody.
    async fn act(&mut self) {
        match self.random.below(28) {
            0..=3 => self.store.takes_sequence(&mut self.random),
            4..=7 => self.store.commits(&mut self.random),
            8..=11 => self.store.publishes(&mut self.random),
            12..=15 => self.route(),
            16..=17 if !self.client.is_connected() => self.connect(),
            16..=20 => {
                let bytes = 1 + self.random.below(4_000);
                self.client.reads(&mut self.shard, bytes);
            }
            24..=25 => self.push_positions(),
            26 if self.random.chance(40) => self.tails.trims(&mut self.random),
            26 if self.random.chance(10) => self.missed.missed_by_user(USER),
            27 if self.client.has_cursor() && self.random.chance(160) => {
                self.client.leaves(&mut self.shard);
            }
            21 if self.random.chance(100) => self.client.leaves(&mut self.shard),
            22 if self.random.chance(20) => self.pass(Duration::from_millis(400)).await,
            _ => {
                let time = Duration::from_millis(self.random.between(1, 12));
                self.pass(time).await;
            }
        }
        for _ in 0..self.random.below(4) {
            self.turn().await;
        }
    }

    /// Everybody does what can be done without time passing.
    async fn turn(&mut self) {
        self.shard.kernel_mut().progress();
        self.shard.turn().expect("a simulated kernel");
        for _ in 0..1 + self.random.below(3) {
            yield_now().await;
        }
        self.client.takes(&mut self.shard).await;
    }

    async fn pass(&mut self, time: Duration) {
        self.shard.kernel_mut().pass(time.as_millis() as u64);
        sleep(time).await;
    }

    fn connect(&mut self) {
        let named = self.client.named(&self.store, &mut self.random);
        self.client.chooses_cursor(&mut self.random);
        let capacity = 200 + self.random.below(20_000);
        match self.random.chance(128) {
            true => self.client.opens_socket(&mut self.shard, capacity, named),
            false => self.client.opens_stream(&self.hub, named),
        }
    }

    /// Routes the next record to every session that the directory knows.
    fn route(&mut self) {
        let Some((index, record)) = self.store.routes() else { return };
        self.tails.routes(&record);
        self.client.is_routed(&record);
        let mut sessions: Vec<SessionAddress> = Vec::new();
        self.directory.sessions_of(USER, |address| sessions.push(address));
        let event = self.encode(&record.value);
        let newest = self.directory.find(&self.client.ids());
        for address in sessions {
            if Some(address) == newest {
                self.client.is_sent(index, &record);
            }
            let command = ShardCommand::Deliver {
                event: Arc::clone(&event),
                recipients: Recipients::One((address.connection, address.encoding)),
                class: DeliveryClass::Live,
                ticket: None,
            };
            let commands = &mut self.routers[address.shard.index()].commands;
            assert!(matches!(commands.push(command), Pushed::Accepted), "the ring is large");
            commands.publish();
        }
    }

    /// The router gives its positions to the shard and to the hub, behind everything that it has routed.
    fn push_positions(&mut self) {
        for router in &mut self.routers {
            let positions = self.tails.positions();
            let pushed = router.commands.push(ShardCommand::Routed { positions });
            assert!(matches!(pushed, Pushed::Accepted), "the ring is large");
            router.commands.publish();
        }
    }

    fn encode(&mut self, value: &[u8]) -> Arc<Event> {
        let record = envelope::decode(value).expect("a record of the model");
        let mut wanted = EncodingSet::default();
        wanted.insert(Encoding::Binary);
        wanted.insert(Encoding::Stream);
        Arc::new(self.encoder.encode(&record, wanted, 0))
    }

    /// Everything is committed, published and routed, and the client stays until it has everything.
    async fn rest(&mut self) {
        self.store.finish(&mut self.random);
        while self.store.has_records() {
            self.route();
            self.push_positions();
            self.turn().await;
        }
        for _ in 0..REST_TURNS_MAX {
            if !self.client.is_connected() {
                self.connect();
            }
            self.client.reads(&mut self.shard, usize::MAX);
            for _ in 0..4 {
                self.turn().await;
            }
            self.pass(REST).await;
            let missing = (0..CONVERSATIONS).any(|of| !self.client.has_all(&self.store, of));
            if !missing {
                return;
            }
        }
        for of in 0..CONVERSATIONS {
            let missing = self.client.missing(&self.store, of);
            let name = conversation(of);
            assert!(missing.is_empty(), "{name} lacks {missing:?}");
        }
    }
}
