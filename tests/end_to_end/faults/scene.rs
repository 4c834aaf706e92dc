//! A small RealChat under steady load: Kafka, Redis, neighbours, some Delivery nodes, and clients that
//! reconnect and resume as `docs/guarantees.md` says.

mod drain;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use delivery_testkit::admin::Metrics;
use delivery_testkit::neighbours::FakeNeighbours;
use delivery_testkit::ports::free_port;
use delivery_testkit::publisher::{Publisher, message, new_topic};

use crate::support::back_end::with_neighbours;
use crate::support::fleet::{ClientId, Connect, Fleet, Received};
use crate::support::node::{Node, NodeBuilder};
use crate::support::own_services::OwnService;
use crate::support::proxy::Proxy;
use crate::support::tally::{Tally, Totals, resume_request};
use crate::support::world::{Chance, World};

use drain::{Drained, waiting_time};

/// The size of a scene.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) sessions: usize,
    pub(super) conversations: usize,
}

/// The size that most rows of the table use.
pub(super) const USUAL: Size = Size { sessions: 300, conversations: 60 };

/// Messages published per second.
const RATE: u32 = 200;
const MEMBERS_MAX: usize = 30;
/// Backoff from the end of a session to the next attempt: random between these.
const BACK_OFF_MS: (usize, usize) = (100, 600);
/// Limit for an answer to the handshake; then the client tries another node.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(3);
/// Limit from the end of the last fault until everything published has arrived.
const SETTLED_WITHIN: Duration = Duration::from_secs(90);
/// Limit from the readiness of the nodes until all sessions are open.
const CONNECTED_WITHIN: Duration = Duration::from_secs(30);

/// One device of one user.
struct Session {
    user: String,
    device: String,
    tally: Tally,
    /// The connection, open or opening, with the time of its start.
    client: Option<(ClientId, Instant)>,
    reconnect_at: Option<Instant>,
    /// The node to try next, or the one that it is connected to.
    node: usize,
    /// Connects through this address instead of directly to its first node.
    through: Option<std::net::SocketAddr>,
}

/// The result of a run: a row of the fault table.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) published: u64,
    pub(super) totals: Totals,
    /// Missing from sessions that stayed connected, before they reconnected to catch up.
    pub(super) missed_live: u64,
    pub(super) longest_stall: Duration,
    pub(super) reconnects: u64,
    /// Counters that grew, summed over all nodes.
    pub(super) grown: BTreeMap<String, f64>,
    /// Effect of each drain on the other nodes.
    pub(super) drains: Vec<Drained>,
}

impl Outcome {
    /// Whether a counter grew. It is written as on the metrics page, with at most one label.
    pub(super) fn shows(&self, metric: &str) -> bool {
        let (name, label) = metric.split_once('{').unwrap_or((metric, "}"));
        let label = label.trim_end_matches('}');
        self.grown.keys().any(|series| {
            let (own, labels) = series.split_once('{').unwrap_or((series, ""));
            own == name && labels.contains(label)
        })
    }
}

/// A running scene.
pub(super) struct Scene {
    pub(super) kafka: OwnService,
    pub(super) kafka_proxy: Proxy,
    pub(super) redis: OwnService,
    pub(super) redis_proxy: Proxy,
    pub(super) neighbours: FakeNeighbours,
    builders: Vec<NodeBuilder>,
    pub(super) nodes: Vec<Option<Node>>,
    world: World,
    fleet: Fleet,
    sessions: Vec<Session>,
    owners: Vec<usize>,
    /// Time and node of each answer 101.
    handshakes: Vec<(Instant, usize)>,
    drains: Vec<Drained>,
    publisher: Publisher,
    conversations: Vec<String>,
    last: Vec<i64>,
    chance: Chance,
    began: Instant,
    next_message_at: Instant,
    longest_stall: Duration,
    reconnects: u64,
    /// Ends of sessions by close code (0: without one).
    pub(super) endings: BTreeMap<u16, u64>,
    before: Vec<Metrics>,
}

impl Scene {
    /// Starts everything and waits until all sessions are open. `adapt` changes a node's settings.
    pub(super) fn start(
        nodes: usize,
        size: Size,
        adapt: impl Fn(usize, NodeBuilder) -> NodeBuilder,
    ) -> Self {
        let port = free_port();
        let kafka_proxy = Proxy::start(([127, 0, 0, 1], port).into());
        let kafka = OwnService::kafka(port, kafka_proxy.address);
        let redis = OwnService::redis();
        let redis_proxy = Proxy::start(redis.address);
        let neighbours = FakeNeighbours::start();
        let brokers = kafka_proxy.address.to_string();
        let topic = new_topic(&brokers, "faults", 6);
        let world = World::new(3, size.conversations, MEMBERS_MAX, size.sessions);
        neighbours.state().members = world
            .conversations
            .iter()
            .map(|(id, members)| (id.clone(), members.iter().cloned().collect()))
            .collect();
        let builders: Vec<_> = (0..nodes)
            .map(|number| {
                let node = with_neighbours(NodeBuilder::serve(), &neighbours)
                    .set("INSTANCE_ID", format!("node-{number}"))
                    .kafka(&brokers, &topic)
                    .set("REDIS_ADDR", redis_proxy.address)
                    .set("PRESENCE_MODE", "redis")
                    .set("ROUTING_MODE", "group")
                    // Faults are tested with the time limits of a production node.
                    .set("CALL_TIMEOUT", "2s")
                    .set("HANDSHAKE_TIMEOUT", "10s")
                    .set("IDLE_TIMEOUT", "60s")
                    .set("PING_INTERVAL", "54s")
                    .set("WRITE_TIMEOUT", "10s");
                adapt(number, node)
            })
            .collect();
        let mut running: Vec<_> = builders.iter().map(NodeBuilder::spawn).collect();
        running.iter_mut().for_each(Node::wait_ready);
        let sessions = world.sessions.iter().enumerate().map(|(number, (user, device))| Session {
            user: user.clone(),
            device: device.clone(),
            tally: Tally::default(),
            client: None,
            reconnect_at: Some(Instant::now()),
            node: number,
            through: None,
        });
        let mut scene = Self {
            publisher: Publisher::new(&brokers, &topic),
            sessions: sessions.collect(),
            conversations: world.conversations.keys().cloned().collect(),
            last: vec![0; world.conversations.len()],
            world,
            fleet: Fleet::new(),
            owners: Vec::new(),
            handshakes: Vec::new(),
            drains: Vec::new(),
            chance: Chance::new(11),
            began: Instant::now(),
            next_message_at: Instant::now(),
            longest_stall: Duration::ZERO,
            reconnects: 0,
            endings: BTreeMap::new(),
            before: Vec::new(),
            nodes: running.into_iter().map(Some).collect(),
            builders,
            kafka,
            kafka_proxy,
            redis,
            redis_proxy,
            neighbours,
        };
        scene.settle("all sessions are open", CONNECTED_WITHIN, |scene| scene.all_open());
        scene.reconnects = 0;
        scene.before = scene.metrics();
        scene
    }

    fn all_open(&self) -> bool {
        let open = |session: &Session| session.client.is_some_and(|(id, _)| self.fleet.is_open(id));
        self.sessions.iter().all(open)
    }

    fn metrics(&self) -> Vec<Metrics> {
        let running = |node: &Option<Node>| node.as_ref().map(Node::metrics).unwrap_or_default();
        self.nodes.iter().map(running).collect()
    }

    /// Keeps up the load for this long.
    pub(super) fn run(&mut self, time: Duration) {
        let end = Instant::now() + time;
        // No burst after a pause between two phases.
        self.next_message_at =
            self.next_message_at.max(Instant::now() - Duration::from_millis(100));
        while Instant::now() < end {
            while self.next_message_at <= Instant::now() {
                self.publish_one();
                self.next_message_at += Duration::from_secs(1) / RATE;
            }
            self.turn();
        }
    }

    fn publish_one(&mut self) {
        let number = self.chance.below(self.conversations.len());
        let conversation = &self.conversations[number];
        let members = &self.world.conversations[conversation];
        let sender = &members[self.chance.below(members.len())];
        self.last[number] += 1;
        let content = format!("{} and the rest of a message", self.began.elapsed().as_millis());
        // As in a real back end, the message service has it before it is published.
        let stored = message(conversation, self.last[number], sender, &content);
        self.neighbours.state().messages.entry(conversation.clone()).or_default().push(stored);
        self.publisher.message(conversation, self.last[number], sender, &content);
    }

    /// Reads what arrived, and reconnects the sessions that are due.
    fn turn(&mut self) {
        let Self { fleet, sessions, owners, began, longest_stall, endings, .. } = self;
        let Self { chance, handshakes, .. } = self;
        fleet.turn(Duration::from_millis(2), &mut |client, seen| {
            let session = &mut sessions[owners[client]];
            let (code, reason) = match seen {
                Received::Binary(payload) => {
                    if let Some(content) = session.tally.saw(&payload) {
                        let sent = content.split(' ').next().and_then(|ms| ms.parse().ok());
                        let sent = Duration::from_millis(sent.expect("a time"));
                        *longest_stall = (*longest_stall).max(began.elapsed().saturating_sub(sent));
                    }
                    return;
                }
                Received::Closed(code, reason) => (code, reason),
                Received::Refused(status, _) => (status, String::new()),
                Received::Ended => (0, String::new()),
                Received::Open(_) => {
                    handshakes.push((Instant::now(), session.node));
                    return;
                }
                Received::Text(_) | Received::Ping | Received::Pong(_) => return,
            };
            // The end of an abandoned connection is ignored.
            if session.client.is_some_and(|(id, _)| id == client) {
                *endings.entry(code).or_default() += 1;
                match waiting_time(&reason) {
                    Some(wait) => session.retry_after(wait),
                    None => session.retry_later(chance),
                }
            }
        });
        let now = Instant::now();
        for number in 0..self.sessions.len() {
            let session = &mut self.sessions[number];
            if let Some((id, since)) = session.client
                && !self.fleet.is_open(id)
                && now - since > HANDSHAKE_WITHIN
            {
                self.fleet.abort(id);
                session.retry_later(&mut self.chance);
            }
            if session.reconnect_at.is_some_and(|at| at <= now) {
                self.reconnect(number);
            }
        }
    }

    /// Connects to the next node that accepts, as behind a load balancer.
    fn reconnect(&mut self, number: usize) {
        let session = &mut self.sessions[number];
        let (nodes, fleet) = (&self.nodes, &mut self.fleet);
        let connected = (0..nodes.len()).find_map(|_| {
            session.node = (session.node + 1) % nodes.len();
            let node = nodes[session.node].as_ref();
            let address = session.through.or(node.map(|node| node.public))?;
            let first_message = Some(resume_request(&session.tally));
            let connect = Connect::session(address, &session.user, &session.device);
            fleet.connect(&Connect { first_message, ..connect }).ok()
        });
        self.reconnects += 1;
        match connected {
            Some(client) => {
                session.client = Some((client, Instant::now()));
                session.reconnect_at = None;
                assert_eq!(client, self.owners.len());
                self.owners.push(number);
            }
            None => session.retry_later(&mut self.chance),
        }
    }

    /// Abandons the connections of the sessions of this node without a close frame, as a client does
    /// that receives nothing.
    pub(super) fn desert(&mut self, through: std::net::SocketAddr) {
        for session in &mut self.sessions {
            if session.through == Some(through) {
                session.through = None;
                session.retry_later(&mut self.chance);
            }
        }
    }

    /// Makes every `nth` session reconnect through this address, and waits until all have.
    pub(super) fn reconnect_through(&mut self, through: std::net::SocketAddr, nth: usize) {
        for session in self.sessions.iter_mut().step_by(nth) {
            if let Some((id, _)) = session.client.take() {
                self.fleet.abort(id);
            }
            session.through = Some(through);
            session.reconnect_at = Some(Instant::now());
        }
        self.settle("sessions are open through the proxy", CONNECTED_WITHIN, |scene| {
            scene.all_open()
        });
    }

    /// Terminates the connections of every `nth` session without a close frame.
    pub(super) fn drop_sessions(&mut self, nth: usize) {
        for session in self.sessions.iter_mut().step_by(nth) {
            if let Some((id, _)) = session.client.take() {
                self.fleet.abort(id);
            }
            session.reconnect_at = Some(Instant::now());
        }
    }

    /// Restarts a node with the same settings.
    pub(super) fn start_node(&mut self, number: usize) {
        assert!(self.nodes[number].is_none(), "it is running");
        self.nodes[number] = Some(self.builders[number].spawn());
    }

    /// Adds a node with the settings of node 0 and some more.
    pub(super) fn add_node(&mut self, adapt: impl FnOnce(NodeBuilder) -> NodeBuilder) {
        self.builders.push(adapt(self.builders[0].clone().on_ports_of_its_own()));
        self.nodes.push(None);
        self.start_node(self.nodes.len() - 1);
    }

    /// Sends SIGKILL.
    pub(super) fn kill_node(&mut self, number: usize) {
        self.nodes[number].take().expect("it is running").kill();
    }

    /// Sends SIGTERM and keeps up the load until the node has exited.
    pub(super) fn stop_node(&mut self, number: usize, within: Duration) {
        let mut node = self.nodes[number].take().expect("it is running");
        node.signal(rustix::process::Signal::TERM);
        let deadline = Instant::now() + within;
        let status = loop {
            self.run(Duration::from_millis(100));
            if let Some(status) = node.ended() {
                break status;
            }
            assert!(Instant::now() < deadline, "it did not stop");
        };
        assert!(status.success(), "{status}: {}", node.log());
    }

    /// Keeps up the load until the node is ready.
    pub(super) fn run_until_ready(&mut self, number: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.readiness(number).0 != 200 {
            assert!(Instant::now() < deadline, "node {number} is not ready");
            self.run(Duration::from_millis(200));
        }
    }

    /// Status and body of `/health/ready`; 0: no answer.
    pub(super) fn readiness(&self, number: usize) -> (u16, String) {
        let answer = self.nodes[number].as_ref().and_then(|node| node.get("/health/ready"));
        answer.map_or((0, "no answer".into()), |answer| (answer.status, answer.body.trim().into()))
    }

    /// Runs the clients without publishing until the condition holds.
    fn settle(&mut self, what: &str, within: Duration, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + within;
        while !done(self) {
            assert!(Instant::now() < deadline, "not within {within:?}: {what}; {:?}", self.endings);
            self.turn();
        }
    }

    fn published(&self) -> BTreeMap<String, i64> {
        self.conversations.iter().cloned().zip(self.last.iter().copied()).collect()
    }

    fn totals(&self) -> Totals {
        let published = self.published();
        let by_user = self.world.by_user();
        let mut totals = Totals::default();
        for session in &self.sessions {
            let mine = by_user.get(session.user.as_str()).into_iter().flatten();
            let mine = mine.map(|id| ((*id).to_owned(), published[*id])).collect();
            session.tally.add_to(&mut totals, &mine);
        }
        totals
    }

    /// Stops the load, waits for messages in flight, makes every session with gaps reconnect and catch
    /// up, and returns the result.
    pub(super) fn finish(mut self, name: &str) -> Outcome {
        self.publisher.flush(SETTLED_WITHIN);
        self.settle("all sessions are open again", SETTLED_WITHIN, |scene| scene.all_open());
        let deadline = Instant::now() + SETTLED_WITHIN;
        let (mut lost, mut quiet_since) = (u64::MAX, Instant::now());
        // Until everything has arrived, or nothing more arrives.
        while lost > 0
            && quiet_since.elapsed() < Duration::from_secs(10)
            && Instant::now() < deadline
        {
            self.turn();
            let now_lost = self.totals().lost;
            if now_lost < lost {
                (lost, quiet_since) = (now_lost, Instant::now());
            }
        }
        let missed_live = lost;
        // Catch-up fills gaps out of order and with duplicates; these are not counted as disorder.
        let live = self.totals();
        let longest_stall = self.longest_stall;
        if lost > 0 {
            self.drop_sessions(1);
            self.settle("all sessions have caught up", SETTLED_WITHIN, |scene| {
                scene.totals().lost == 0
            });
        }
        let outcome = Outcome {
            published: self.publisher.sent(),
            totals: Totals { lost: self.totals().lost, ..live },
            missed_live,
            longest_stall,
            reconnects: self.reconnects,
            grown: self.changed_counters(),
            drains: std::mem::take(&mut self.drains),
        };
        super::table::write(name, &outcome, &self.endings);
        outcome
    }

    /// Error counters that grew, summed over all nodes.
    fn changed_counters(&self) -> BTreeMap<String, f64> {
        let mut changed = BTreeMap::new();
        for (before, after) in self.before.iter().zip(&self.metrics()) {
            for (series, value) in after.grown_since(before) {
                *changed.entry(series).or_default() += value;
            }
        }
        changed
    }
}

impl Session {
    fn retry_later(&mut self, chance: &mut Chance) {
        let wait = BACK_OFF_MS.0 + chance.below(BACK_OFF_MS.1 - BACK_OFF_MS.0);
        self.retry_after(Duration::from_millis(wait as u64));
    }

    fn retry_after(&mut self, wait: Duration) {
        self.client = None;
        self.reconnect_at = Some(Instant::now() + wait);
    }
}
