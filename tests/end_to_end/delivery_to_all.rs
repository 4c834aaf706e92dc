//! Issue “The whole way”, show 2 and 3: every session receives exactly the messages of its user.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use delivery_testkit::admin::Metrics;
use delivery_testkit::publisher::{Publisher, new_topic};

use super::support::fleet::{Connect, Fleet, Received};
use super::support::node::{Node, NodeBuilder};
use super::support::services::kafka_brokers;
use super::support::tally::{Tally, Totals};
use super::support::world::{Chance, World};

/// Messages of a run.
const EVENTS: usize = 100_000;
/// Limit of deliveries published but not yet received, on average per session. Far below the 128 that
/// close a session, because this test is not about overflow.
const AHEAD_PER_SESSION: u64 = 16;
/// The run has failed after this long without progress.
const PROGRESS_WITHIN: Duration = Duration::from_secs(120);

struct Run {
    node: Node,
    world: World,
    fleet: Fleet,
    tallies: Vec<Tally>,
    ended: Vec<String>,
}

impl Run {
    /// Connects every session of the world and waits until all are open.
    fn connect(node: Node, world: World, receive_buffer: Option<usize>) -> Self {
        let mut fleet = Fleet::new();
        for (user, device) in &world.sessions {
            let connect = Connect { receive_buffer, ..Connect::session(node.public, user, device) };
            fleet.connect(&connect).expect("the server accepts");
        }
        let tallies = vec![Tally::default(); world.sessions.len()];
        let mut run = Self { node, world, fleet, tallies, ended: Vec::new() };
        let deadline = Instant::now() + PROGRESS_WITHIN;
        while run.fleet.open_count() < run.tallies.len() {
            assert!(Instant::now() < deadline, "{} sessions open", run.fleet.open_count());
            run.turn();
        }
        run
    }

    fn turn(&mut self) {
        let Self { fleet, tallies, ended, .. } = self;
        fleet.turn(Duration::from_millis(5), &mut |client, seen| match seen {
            Received::Binary(payload) => {
                tallies[client].saw(&payload);
            }
            Received::Open(_) | Received::Ping => {}
            other => ended.push(format!("client {client}: {other:?}")),
        });
        let why = || self.node.metrics().nonzero("delivery_shard_");
        assert!(self.ended.is_empty(), "{:?}\n{:#?}", self.ended, why());
    }

    fn received(&self) -> u64 {
        self.tallies.iter().map(|tally| tally.messages).sum()
    }

    fn others(&self) -> u64 {
        self.tallies.iter().flat_map(|tally| tally.others.values()).sum()
    }

    /// Runs the clients until `wanted` returns true.
    fn turn_until(&mut self, mut wanted: impl FnMut(&Self) -> bool) {
        let mut progress = (0, Instant::now());
        while !wanted(self) {
            self.turn();
            let seen = self.received() + self.others();
            if seen > progress.0 {
                progress = (seen, Instant::now());
            }
            assert!(
                progress.1.elapsed() < PROGRESS_WITHIN,
                "stalled: {} messages and {} other events received",
                self.received(),
                self.others()
            );
        }
    }

    /// Publishes every conversation, then `EVENTS` messages to random conversations.
    fn publish(&mut self, publisher: &mut Publisher) -> BTreeMap<String, i64> {
        let devices = self
            .world
            .devices()
            .into_iter()
            .map(|(u, n)| (u.to_owned(), n))
            .collect::<BTreeMap<_, _>>();
        let conversations: Vec<_> = self.world.conversations.clone().into_iter().collect();
        let recipients: Vec<u64> = conversations
            .iter()
            .map(|(_, members)| members.iter().map(|user| devices[user] as u64).sum())
            .collect();

        for (conversation, members) in &conversations {
            publisher.created(conversation, members);
        }
        let announced: u64 = recipients.iter().sum();
        self.turn_until(|run| run.others() == announced);

        let ahead_max = AHEAD_PER_SESSION * self.tallies.len() as u64;
        let mut chance = Chance::new(7);
        let mut last = vec![0; conversations.len()];
        let mut expected = 0;
        for _ in 0..EVENTS {
            let number = chance.below(conversations.len());
            let (conversation, members) = &conversations[number];
            let sender = &members[chance.below(members.len())];
            last[number] += 1;
            publisher.message(
                conversation,
                last[number],
                sender,
                "the quick brown fox jumps over the lazy dog",
            );
            expected += recipients[number];
            if expected > self.received() + ahead_max {
                self.turn_until(|run| expected <= run.received() + ahead_max / 2);
            }
        }
        self.turn_until(|run| run.received() >= expected);
        publisher.flush(PROGRESS_WITHIN);
        conversations.into_iter().map(|(id, _)| id).zip(last).collect()
    }

    /// Asserts that each user received exactly their messages, in order.
    fn check(&self, published: &BTreeMap<String, i64>) {
        let by_user = self.world.by_user();
        let mut totals = Totals::default();
        for ((user, _), tally) in self.world.sessions.iter().zip(&self.tallies) {
            let mine = by_user.get(user.as_str()).into_iter().flatten();
            let mine = mine.map(|id| ((*id).to_owned(), published[*id])).collect();
            tally.add_to(&mut totals, &mine);
        }
        let received = self.received();
        assert_eq!(totals, Totals { received, ..Totals::default() });
        assert!(received > 0);
    }
}

/// One whole run: 200 conversations, 2,000 sessions, three partitions.
fn every_session_receives_its_own(
    name: &str,
    node: NodeBuilder,
    receive_buffer: Option<usize>,
) -> Metrics {
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, name, 3);
    let node = node.kafka(&brokers, &topic).start();
    let mut run = Run::connect(node, World::new(1, 200, 100, 2_000), receive_buffer);
    let began = Instant::now();
    let mut publisher = Publisher::new(&brokers, &topic);
    let published = run.publish(&mut publisher);
    println!(
        "{name}: {EVENTS} events, {} deliveries in {:.1} s",
        run.received(),
        began.elapsed().as_secs_f32()
    );
    run.check(&published);
    run.node.metrics()
}

/// Promise: “In order per conversation.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn hundred_thousand_events_reach_every_device_of_every_member() {
    every_session_receives_its_own("one-shard", NodeBuilder::serve(), None);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn two_shards_deliver_the_same() {
    every_session_receives_its_own("two-shards", NodeBuilder::serve().set("SHARDS", 2), None);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn seven_shards_deliver_the_same() {
    every_session_receives_its_own("seven-shards", NodeBuilder::serve().set("SHARDS", 7), None);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn short_sends_tear_no_frame() {
    // Queues must not overflow here: these sockets are full most of the time.
    let node = NodeBuilder::serve()
        .set("SHARDS", 2)
        .set("SO_SNDBUF", 4_608)
        .set("QUEUE_MESSAGES_MAX", 4_096);
    let metrics = every_session_receives_its_own("short-sends", node, Some(2_304));
    let short = metrics.sum("delivery_shard_sends_short_total", &[]);
    println!("{short} of {} sends were short", metrics.sum("delivery_shard_sends_total", &[]));
    assert!(short > 0.0);
}
