//! A small RealChat under steady load: Kafka, Redis, neighbours, some Delivery nodes, and clients that
//! reconnect and resume as `docs/guarantees.md` says.

mod drain;
mod injected;
mod returning;
mod timeline;
mod totals;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use delivery_testkit::admin::Metrics;
use delivery_testkit::neighbours::{FakeNeighbours, Method};
use delivery_testkit::ports::free_port;
use delivery_testkit::publisher::{Publisher, message, new_topic};

use crate::support::back_end::with_neighbours;
use crate::support::fleet::{ClientId, Connect, Fleet, Received};
use crate::support::node::{Node, NodeBuilder};
use crate::support::own_services::OwnService;
use crate::support::proxy::Proxy;
use crate::support::tally::{Tally, Totals, resume_request};
use crate::support::wait::SOON;
use crate::support::world::{Chance, World};

use timeline::Timeline;

use drain::{Drained, waiting_time};
use returning::CursorUser;

/// The size of a scene.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) sessions: usize,
    pub(super) conversations: usize,
    /// The clients return with cursors.
    pub(super) cursors: bool,
}

/// The size that most rows of the table use.
pub(super) const USUAL: Size = Size { sessions: 300, conversations: 60, cursors: false };
/// The same with cursors.
pub(super) const CURSORS: Size = Size { cursors: true, ..USUAL };

/// Messages published per second.
const RATE: u32 = 200;
const MEMBERS_MAX: usize = 30;
/// Partitions of the topic.
const PARTITIONS: i32 = 6;
/// Backoff from the end of a session to the next attempt: random between these.
const BACK_OFF_MS: (usize, usize) = (100, 600);
/// Limit for an answer to the handshake; then the client tries another node.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(3);
/// Nothing arrives for this long: what is missing does not arrive any more.
const QUIET: Duration = Duration::from_secs(10);

/// One device of one user.
struct Session {
    user: String,
    device: String,
    tally: Tally,
    /// `None`: the client names sequences.
    cursors: Option<CursorUser>,
    /// The connection, open or opening, with the time of its start.
    client: Option<(ClientId, Instant)>,
    /// When it was to connect. The test itself may be late.
    due_at: Instant,
    /// The time of the 101 of that connection.
    opened_at: Option<Instant>,
    /// Conversations whose catch-up has ended: it got a message that was published after the 101. Until
    /// then live messages wait, which is no stall.
    live: BTreeSet<usize>,
    /// Its connection is that of the start: it has never resumed, and what it missed, it missed.
    stayed: bool,
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
    /// Of the sessions whose first connection lasted to the end.
    pub(super) stayed: Totals,
    /// Longest time from publishing a message to its arrival at a session that had caught up before, by
    /// the node of the session.
    pub(super) stalls: BTreeMap<usize, Duration>,
    /// Messages that were late, and what was done to nodes when.
    pub(super) timeline: Timeline,
    /// Ends of sessions by node and close code (0: without one).
    pub(super) endings: BTreeMap<(usize, u16), u64>,
    pub(super) reconnects: u64,
    /// Of clients with cursors: messages that came twice within one session, or behind a later one.
    pub(super) within_sessions: Totals,
    /// Calls for messages since the beginning of the load.
    pub(super) sync_calls: usize,
    /// Counters that grew, summed over all nodes.
    pub(super) grown: BTreeMap<String, f64>,
    /// They show their logs when a test fails that still has them.
    _nodes: Vec<Option<Node>>,
    /// Effect of each drain on the other nodes.
    pub(super) drains: Vec<Drained>,
}

impl Outcome {
    /// The longest stall on any node.
    pub(super) fn longest_stall(&self) -> Duration {
        self.stalls.values().copied().max().unwrap_or_default()
    }

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
    topic: String,
    /// Of everybody but node 0.
    kafka_proxy: Proxy,
    kafka_proxy_of_node_0: Proxy,
    pub(super) redis: OwnService,
    pub(super) redis_proxy: Proxy,
    pub(super) neighbours: FakeNeighbours,
    builders: Vec<NodeBuilder>,
    pub(super) nodes: Vec<Option<Node>>,
    world: World,
    fleet: Fleet,
    sessions: Vec<Session>,
    owners: Vec<usize>,
    /// Node of each answer 101, and when the client was to connect.
    handshakes: Vec<(Instant, usize)>,
    drains: Vec<Drained>,
    publisher: Publisher,
    conversations: Vec<String>,
    last: Vec<i64>,
    chance: Chance,
    began: Instant,
    next_message_at: Instant,
    stalls: BTreeMap<usize, Duration>,
    timeline: Timeline,
    reconnects: u64,
    endings: BTreeMap<(usize, u16), u64>,
    before: Vec<Metrics>,
    sync_calls_before: usize,
}

impl Scene {
    /// Starts everything and waits until all sessions are open. `adapt` changes a node's settings.
    pub(super) fn start(
        nodes: usize,
        size: Size,
        adapt: impl Fn(usize, NodeBuilder) -> NodeBuilder,
    ) -> Self {
        let listeners = [(); 2].map(|()| {
            let port = free_port();
            (port, Proxy::start(([127, 0, 0, 1], port).into()))
        });
        let advertised = listeners.each_ref().map(|(port, proxy)| (*port, proxy.address));
        let kafka = OwnService::kafka(advertised);
        let [(_, kafka_proxy), (_, kafka_proxy_of_node_0)] = listeners;
        let redis = OwnService::redis();
        let redis_proxy = Proxy::start(redis.address);
        let neighbours = FakeNeighbours::start();
        let brokers = kafka_proxy.address.to_string();
        let topic = new_topic(&brokers, "faults", PARTITIONS);
        let world = World::new(3, size.conversations, MEMBERS_MAX, size.sessions);
        neighbours.state().members = world
            .conversations
            .iter()
            .map(|(id, members)| (id.clone(), members.iter().cloned().collect()))
            .collect();
        let builders: Vec<_> = (0..nodes)
            .map(|number| {
                let brokers = match number {
                    0 => kafka_proxy_of_node_0.address.to_string(),
                    _ => brokers.clone(),
                };
                let node = with_neighbours(NodeBuilder::serve(), &neighbours)
                    .set("INSTANCE_ID", format!("node-{number}"))
                    .kafka(&brokers, &topic)
                    .set("REDIS_ADDR", redis_proxy.address)
                    .set("PRESENCE_MODE", "redis")
                    .set("ROUTING_MODE", "group")
                    .set("HANDOFF", "log")
                    .set("KAFKA_PROPERTIES", "session.timeout.ms=6000")
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
            cursors: size.cursors.then(CursorUser::default),
            client: None,
            due_at: Instant::now(),
            opened_at: None,
            live: BTreeSet::new(),
            stayed: true,
            reconnect_at: Some(Instant::now()),
            node: number,
            through: None,
        });
        let mut scene = Self {
            // It finds new partitions soon.
            publisher: Publisher::with_settings(
                &brokers,
                &topic,
                &[("topic.metadata.refresh.interval.ms", "1000")],
            ),
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
            stalls: BTreeMap::new(),
            timeline: Timeline::default(),
            reconnects: 0,
            endings: BTreeMap::new(),
            before: Vec::new(),
            sync_calls_before: 0,
            nodes: running.into_iter().map(Some).collect(),
            builders,
            kafka,
            topic,
            kafka_proxy,
            kafka_proxy_of_node_0,
            redis,
            redis_proxy,
            neighbours,
        };
        scene.settle("all sessions are open", SOON, |scene| scene.all_open());
        scene.settle("all sessions have caught up", SOON, |scene| scene.all_caught_up());
        // A handshake that was refused before is none of the fault.
        scene.reconnects = 0;
        scene.endings.clear();
        scene.sessions.iter_mut().for_each(|session| session.stayed = true);
        scene.before = scene.metrics();
        scene.sync_calls_before = scene.neighbours.state().count(Method::Sync);
        scene
    }

    fn all_open(&self) -> bool {
        let open = |session: &Session| session.client.is_some_and(|(id, _)| self.fleet.is_open(id));
        self.sessions.iter().all(open)
    }

    /// Events of sessions in catch-up wait, so they are no measure of a stall.
    fn all_caught_up(&self) -> bool {
        self.metrics().iter().all(|node| {
            let count = |name: &str| node.sum(&format!("delivery_resume_{name}"), &[]);
            count("waiting") + count("running") == 0.0
                && count("requested_total") == node.sum("delivery_session_sessions", &[])
        })
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
        let sent = self.began.elapsed().as_millis();
        let content = format!("{sent} {number} and the rest of a message");
        // As in a real back end, the message service has it before it is published.
        let stored = message(conversation, self.last[number], sender, &content);
        self.neighbours.state().messages.entry(conversation.clone()).or_default().push(stored);
        self.publisher.message(conversation, self.last[number], sender, &content);
    }

    /// Reads what arrived, and reconnects the sessions that are due.
    fn turn(&mut self) {
        let Self { fleet, sessions, owners, began, stalls, endings, .. } = self;
        let Self { chance, handshakes, timeline, .. } = self;
        fleet.turn(Duration::from_millis(2), &mut |client, seen| {
            let session = &mut sessions[owners[client]];
            let (code, reason) = match seen {
                Received::Binary(payload) => {
                    if let Some(client) = &mut session.cursors {
                        client.received(&payload);
                    }
                    if let Some(content) = session.tally.saw(&payload) {
                        let mut words = content.split(' ').map(str::parse);
                        let mut number = || words.next().and_then(Result::ok).expect("a number");
                        let sent = *began + Duration::from_millis(number());
                        let conversation = number() as usize;
                        if session.opened_at.is_some_and(|opened_at| opened_at < sent)
                            && !session.live.insert(conversation)
                        {
                            let stall = stalls.entry(session.node).or_default();
                            *stall = sent.elapsed().max(*stall);
                            timeline.arrived(sent - *began, sent.elapsed(), session.node);
                        }
                    }
                    return;
                }
                Received::Closed(code, reason) => (code, reason),
                Received::Refused(status, _) => (status, String::new()),
                Received::Ended => (0, String::new()),
                Received::Open(_) => {
                    handshakes.push((session.due_at, session.node));
                    if session.client.is_some_and(|(id, _)| id == client) {
                        session.opened_at = Some(Instant::now());
                    }
                    return;
                }
                Received::Text(text) => {
                    if let Some(client) = &mut session.cursors {
                        client.text(&text);
                    }
                    return;
                }
                Received::Ping | Received::Pong(_) => return,
            };
            // The end of an abandoned connection is ignored.
            if session.client.is_some_and(|(id, _)| id == client) {
                *endings.entry((session.node, code)).or_default() += 1;
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
            if let Some(due_at) = session.reconnect_at.filter(|at| *at <= now) {
                session.due_at = due_at;
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
            let first_message = Some(match &mut session.cursors {
                None => resume_request(&session.tally),
                Some(client) => client.first_message(),
            });
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
            if let Some((id, _)) = session.client {
                self.fleet.abort(id);
            }
            session.through = Some(through);
            session.retry_after(Duration::ZERO);
        }
        self.settle("sessions are open through the proxy", SOON, |scene| scene.all_open());
    }

    /// Terminates the connections of every `nth` session without a close frame.
    pub(super) fn drop_sessions(&mut self, nth: usize) {
        for session in self.sessions.iter_mut().step_by(nth) {
            if let Some((id, _)) = session.client {
                self.fleet.abort(id);
            }
            session.retry_after(Duration::ZERO);
        }
    }

    /// Runs the clients without publishing until the condition holds.
    fn settle(&mut self, what: &str, within: Duration, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + within;
        while !done(self) {
            assert!(Instant::now() < deadline, "not within {within:?}: {what}; {:?}", self.endings);
            self.turn();
        }
    }

    /// Stops the load, waits for messages in flight, makes every session with gaps reconnect and catch
    /// up, and returns the result.
    pub(super) fn finish(mut self, name: &str) -> Outcome {
        self.settle("everything is published", SOON, |scene| {
            scene.publisher.acknowledged() == scene.publisher.sent()
        });
        self.settle("all sessions are open again", SOON, |scene| scene.all_open());
        let deadline = Instant::now() + SOON;
        let (mut lost, mut quiet_since) = (u64::MAX, Instant::now());
        // Until everything has arrived, or nothing more arrives.
        while lost > 0 && quiet_since.elapsed() < QUIET && Instant::now() < deadline {
            self.turn();
            let now_lost = self.totals().lost;
            if now_lost < lost {
                (lost, quiet_since) = (now_lost, Instant::now());
            }
        }
        let missed_live = lost;
        // Catch-up fills gaps out of order and with duplicates; these are not counted as disorder.
        let live = self.totals();
        let stayed = self.totals_of(|session| session.stayed);
        let (stalls, endings) = (self.stalls.clone(), self.endings.clone());
        if lost > 0 {
            self.drop_sessions(1);
            self.settle("all sessions have caught up", SOON, |scene| scene.totals().lost == 0);
        }
        let sync_calls = self.neighbours.state().count(Method::Sync) - self.sync_calls_before;
        let mut within_sessions = Totals::default();
        for client in self.sessions.iter_mut().filter_map(|session| session.cursors.take()) {
            let of_client = client.within_sessions();
            within_sessions.duplicates += of_client.duplicates;
            within_sessions.out_of_order += of_client.out_of_order;
        }
        let outcome = Outcome {
            within_sessions,
            sync_calls,
            published: self.publisher.sent(),
            totals: Totals { lost: self.totals().lost, ..live },
            missed_live,
            stayed,
            stalls,
            timeline: std::mem::take(&mut self.timeline),
            endings,
            reconnects: self.reconnects,
            grown: self.changed_counters(),
            drains: std::mem::take(&mut self.drains),
            _nodes: std::mem::take(&mut self.nodes),
        };
        super::table::write(name, &outcome);
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
        self.opened_at = None;
        self.live.clear();
        self.stayed = false;
        self.reconnect_at = Some(Instant::now() + wait);
    }
}
