//! Delivery, wired as in `app` but without Kafka: a router reads a partition that the generator
//! writes.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use delivery::domain::budget::EventBudget;
use delivery::domain::capacity::Capacity;
use delivery::domain::ids::ShardId;
use delivery::domain::limiter::{ConnectionLimiter, ConnectionLimits};
use delivery::domain::limits::HANDOFF_RING_SLOTS;
use delivery::handoff::{Doorbell, PeerEnd, ShardEnd, connect};
use delivery::protocol::upgrade::UpgradeRules;
use delivery::reactor::config::ShardConfig;
use delivery::reactor::counters::ShardCounters;
use delivery::reactor::listener::{ListenerConfig, listen_on};
use delivery::reactor::shard::ShardLinks;
use delivery::reactor::thread::{ShardHandle, spawn};
use delivery::reactor::tls::ShardHandshakeEnd;
use delivery::service::cluster::missed::MissedSessions;
use delivery::service::members::directory::Directory;
use delivery::service::members::membership::{Membership, MembershipConfig};
use delivery::service::routing::router::{
    Assignment, CommittableOffset, RawRecord, RecordSource, Router, RouterConfig, RouterControl,
    RouterParts, TopicPartition,
};
use delivery::service::sessions::auth::Authenticator;
use delivery::service::sessions::catch_up::{CatchUpConfig, CatchUpService};
use delivery::service::sessions::manager::{
    SessionConfig, SessionHandle, SessionManager, SessionPorts,
};
use delivery::service::sessions::presence::Presence;
use delivery::service::tls::handshake::capture_secrets;
use delivery::service::tls::handshaker::Handshaker;
use delivery::service::tls::server_config;
use delivery::service::tls::tickets::Tickets;
use rcgen::generate_simple_self_signed;
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use crate::clock::now_ns;
use crate::control::Pushed;
use crate::generator::{Generator, PushPlan, conversation};
use crate::names;
use crate::payload::creation;
use crate::usage;

const POLL: Duration = Duration::from_micros(200);

/// Content of the partition.
#[derive(Default)]
struct Log {
    /// Creation events.
    creations: std::vec::IntoIter<Vec<u8>>,
    generator: Option<Generator>,
    offset: i64,
}

/// The router's source of records.
struct Source(Arc<Mutex<Log>>);

impl RecordSource for Source {
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool {
        let mut log = self.0.lock().expect("no holder panics");
        let value = match log.creations.next() {
            Some(value) => value,
            None => match log.generator.as_mut().and_then(Generator::next_due) {
                Some(item) => item.value,
                None => return false,
            },
        };
        let offset = log.offset;
        log.offset += 1;
        drop(log);
        take(RawRecord { offset, appended_at_ms: 0, key: None, value: &value, traceparent: None });
        true
    }
}

/// Configuration of [`Ours`].
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct OurConfig {
    /// Shards.
    #[arg(long, default_value_t = 1)]
    pub shards: u16,
    /// Connections per shard.
    #[arg(long, default_value_t = 16_000)]
    pub connections: u32,
    /// `SO_SNDBUF`, bytes; 0: the system's default.
    #[arg(long, default_value_t = 128 * 1024)]
    pub send_buffer_bytes: usize,
    /// Speak TLS, with a certificate of its own.
    #[arg(long)]
    pub tls: bool,
    /// Idle time after which a client is pinged, ms; it is dropped a ninth of that later.
    #[arg(long, default_value_t = 54_000)]
    pub ping_after_ms: u64,
}

/// A running Delivery.
pub struct Ours {
    /// Its address.
    pub address: SocketAddr,
    log: Arc<Mutex<Log>>,
    committable: Arc<CommittableOffset>,
    router: RouterControl,
    counters: Vec<Arc<ShardCounters>>,
    /// Sizes of the conversations that have been created.
    prepared: Vec<usize>,
    _sessions: SessionHandle,
    _shards: Vec<ShardHandle>,
    _runtime: tokio::runtime::Runtime,
}

fn peer(
    bell: &Arc<Doorbell>,
    bells: &[Arc<Doorbell>],
    shards: &mut [Vec<ShardEnd>],
) -> Vec<PeerEnd> {
    let mut ends = Vec::new();
    for (shard_bell, rings) in bells.iter().zip(shards) {
        let (peer_end, shard_end) = connect([HANDOFF_RING_SLOTS; 2], shard_bell, bell);
        rings.push(shard_end);
        ends.push(peer_end);
    }
    ends
}

/// TLS as in `app`.
fn tls_config() -> io::Result<Arc<ServerConfig>> {
    let mut config = own_server_config()?;
    capture_secrets(&mut config);
    Ok(Arc::new(config))
}

/// How handshakes are made, with an ECDSA certificate of its own.
pub(crate) fn own_server_config() -> io::Result<ServerConfig> {
    let own = generate_simple_self_signed(["bench".to_owned()]).map_err(io::Error::other)?;
    let key = PrivateKeyDer::Pkcs8(own.signing_key.serialize_der().into());
    let provider = Arc::new(default_provider());
    let pair = CertifiedKey::from_der(vec![own.cert.der().clone()], key, &provider);
    let resolver = Arc::new(SingleCertAndKey::from(pair.map_err(io::Error::other)?));
    let tickets = Arc::new(Tickets::new(&[], || UNIX_EPOCH.elapsed().map_or(0, |it| it.as_secs())));
    Ok(server_config(resolver, tickets, &[b"http/1.1"]))
}

fn handshaker(config: &Arc<ServerConfig>, bell: &Arc<Doorbell>) -> io::Result<ShardHandshakeEnd> {
    let (handshaker, end) = Handshaker::new(Arc::clone(config), Arc::default(), bell)?;
    handshaker.spawn("handshakes".to_owned())?;
    Ok(end)
}

impl Ours {
    /// Starts Delivery on a free port.
    ///
    /// # Errors
    /// A port, a thread or a ring is not available.
    pub fn start(config: OurConfig) -> io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let within = runtime.enter();
        let mut listen = ListenerConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
        listen.send_buffer_bytes =
            (config.send_buffer_bytes > 0).then_some(config.send_buffer_bytes);
        let count = usize::from(config.shards);
        let (listener, address) = listen_on(&listen).map_err(io::Error::other)?;
        let listener = Arc::new(listener);

        let bells: Vec<_> =
            (0..count).map(|_| Doorbell::new().map(Arc::new)).collect::<io::Result<_>>()?;
        let mut rings: Vec<Vec<ShardEnd>> = (0..count).map(|_| Vec::new()).collect();
        let manager_bell = Arc::new(Doorbell::new()?);
        let manager = peer(&manager_bell, &bells, &mut rings);
        let router_bell = Arc::new(Doorbell::new()?);
        let routes = peer(&router_bell, &bells, &mut rings);

        let limiter = Arc::new(ConnectionLimiter::new(ConnectionLimits {
            connections_per_address_max: u32::MAX,
            handshakes_per_address_per_s_max: u32::MAX,
            handshakes_per_s_max: u32::MAX,
            ..ConnectionLimits::default()
        }));
        let shard_config = ShardConfig {
            connections_max: config.connections,
            ping_after_ms: config.ping_after_ms,
            ping_spread_ms: config.ping_after_ms / 9,
            idle_ms_max: config.ping_after_ms + config.ping_after_ms / 9,
            upgrade: UpgradeRules { echo: true, ..UpgradeRules::default() },
            ..ShardConfig::default()
        };
        let mut counters = Vec::new();
        let mut shards = Vec::new();
        let tls = config.tls.then(tls_config).transpose()?;
        let capacity = Arc::new(Capacity::new(config.connections * u32::from(config.shards)));
        for (number, (peers, bell)) in (0..).zip(rings.into_iter().zip(&bells)) {
            let counts = Arc::new(ShardCounters::default());
            counters.push(Arc::clone(&counts));
            let links = ShardLinks {
                peers,
                bell: Arc::clone(bell),
                limiter: Arc::clone(&limiter),
                capacity: Arc::clone(&capacity),
                counters: counts,
                handshaker: tls.as_ref().map(|tls| handshaker(tls, bell)).transpose()?,
            };
            let shard = spawn(ShardId(number), shard_config.clone(), Arc::clone(&listener), links);
            shards.push(shard.map_err(io::Error::other)?);
        }

        let directory = Arc::new(Directory::new());
        let sessions = SessionManager::spawn(
            SessionConfig::default(),
            SessionPorts {
                missed: Arc::new(MissedSessions::new(
                    Arc::clone(&directory),
                    None,
                    Arc::clone(&manager_bell),
                )),
                announcer: None,
                bell: manager_bell,
                shards: manager,
                directory: Arc::clone(&directory),
                auth: Authenticator::trust(),
                presence: Presence::off(),
                catch_up: CatchUpService::without_messages(
                    CatchUpConfig::default(),
                    Arc::default(),
                ),
            },
            Arc::default(),
        )?;
        let membership = Membership::new(
            MembershipConfig { conversations_max: 4_000_000, ..MembershipConfig::default() },
            None,
            runtime.handle().clone(),
            Arc::default(),
        );
        let (thread, router) = Router::new(RouterParts {
            config: RouterConfig::default(),
            counters: Arc::default(),
            bell: router_bell,
            links: routes,
            directory,
            membership: Arc::clone(&membership),
            user_lists: None,
            remote: None,
            cluster: None,
            tails: None,
            dead_letters: None,
            budget: EventBudget::new(256 << 20),
        });
        thread.spawn("router".to_owned())?;
        membership.follow();

        let log = Arc::new(Mutex::new(Log::default()));
        let committable = Arc::new(CommittableOffset::new(Some(0)));
        router.assign(Assignment {
            log: TopicPartition { topic: "bench".into(), topic_index: 0, partition: 0 },
            source: Box::new(Source(Arc::clone(&log))),
            start: Some(0),
            fill: None,
            committable: Arc::clone(&committable),
            ownership: None,
        });
        drop(within);
        Ok(Self {
            address,
            log,
            committable,
            router,
            counters,
            prepared: Vec::new(),
            _sessions: sessions,
            _shards: shards,
            _runtime: runtime,
        })
    }

    /// Open sessions.
    pub fn sessions(&self) -> usize {
        self.counters.iter().map(|counters| counters.counts.sessions.get() as usize).sum()
    }

    fn sends(&self) -> u64 {
        self.counters.iter().map(|counters| counters.counts.sends.get()).sum()
    }

    /// Creates the conversations that a plan needs. Returns whether there was anything to do.
    pub fn prepare(&mut self, plan: PushPlan) -> bool {
        if self.prepared.contains(&plan.group) {
            return false;
        }
        self.prepared.push(plan.group);
        let sessions = self.sessions();
        let creations: Vec<Vec<u8>> = (0..(sessions / plan.group).max(1))
            .map(|at| {
                let first = at * plan.group;
                let members = first..(first + plan.group).min(sessions);
                creation(conversation(plan.group, at), members.map(names::user))
            })
            .collect();
        let until = {
            let mut log = self.log.lock().expect("no holder panics");
            let until = log.offset + creations.len() as i64;
            log.creations = creations.into_iter();
            until
        };
        self.router.bell().ring();
        self.wait_until(until);
        true
    }

    /// Waits until every record below this offset has been sent on each socket concerned.
    fn wait_until(&self, offset: i64) {
        while self.committable.get() < Some(offset) {
            std::thread::sleep(POLL);
        }
    }

    /// Pushes a plan.
    pub fn push(&self, plan: PushPlan) -> Pushed {
        let generator = Generator::new(plan, self.sessions());
        let generator_ns = generator.total_cost_ns();
        let sends = self.sends();
        let own_ns = usage::thread_ns();
        let started_ns = now_ns();
        let schedule = generator.schedule();
        let until = {
            let mut log = self.log.lock().expect("no holder panics");
            log.generator = Some(generator);
            log.offset + plan.events as i64
        };
        self.router.bell().ring();
        for due in schedule {
            std::thread::sleep(Duration::from_nanos(due.saturating_sub(now_ns())));
            self.router.bell().ring();
        }
        self.wait_until(until);
        Pushed {
            messages: plan.events * plan.group.min(self.sessions()) as u64,
            elapsed_ns: now_ns() - started_ns,
            // This thread only wakes the router when an event is due.
            generator_ns: generator_ns + usage::thread_ns() - own_ns,
            retries: 0,
            sends: Some(self.sends() - sends),
        }
    }
}
