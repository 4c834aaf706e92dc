//! Delivery as it is deployed: `delivery serve` behind a real Kafka. The server's process is the one
//! that is measured; this one only publishes to Kafka and answers the conductor.
//!
//! A plan without a rate: the events are written beforehand within a transaction, which the consumer
//! does not see before its commit (`isolation.level=read_committed` is librdkafka's default). So
//! neither writing them nor the broker's disk is measured.
//!
//! A plan of events that are due one by one: records when each was sent, appended and acknowledged,
//! and when a plain consumer received it ([`crate::journey`]).
//!
//! With two nodes, each conversation has its members on both: the same number of each. The nodes share the
//! partitions and hand over through the log. Plain round trips of the broker run at the same time.

pub(crate) mod node;
pub(crate) mod paced;
mod plain;
mod round_trip;
mod trace;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use delivery_testkit::publisher::create_topics;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

use crate::clock::now_ns;
use crate::control::{Pushed, Ready};
use crate::generator::{Generator, PushPlan, conversation};
use crate::journey::Passage;
use crate::names;
use crate::payload::{conversation_id, creation};
use crate::program::beside;
use crate::usage;
use node::{READY_MAX, RunTopics, ServedNode};
use paced::write;
use plain::PlainConsumer;
use round_trip::RoundTrip;
use trace::{TracedProducer, UNTRACED};

/// As in a small deployment; records are spread over them by conversation.
const PARTITIONS: i32 = 4;
/// Limit for one operation of Kafka.
pub(crate) const KAFKA_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// Configuration of [`ServedDelivery`].
#[derive(Clone, Debug, clap::Parser)]
pub struct ServedConfig {
    /// `host:port` of a broker.
    #[arg(long, env = "KAFKA_BROKERS")]
    pub brokers: String,
    /// The `delivery` program; by default the one in the folder of this one.
    #[arg(long, default_value_os_t = beside("delivery"))]
    pub program: PathBuf,
    /// Nodes: one that reads every partition, or two that share them and hand over through the log.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub nodes: u8,
    /// Core of the server.
    #[arg(long = "core")]
    pub server_core: usize,
    /// Core of this process.
    #[arg(long)]
    pub own_core: usize,
}

/// Running `delivery serve` and the producers of their events.
pub struct ServedDelivery {
    nodes: Vec<ServedNode>,
    config: ServedConfig,
    topics: RunTopics,
    /// Producer of events that become visible all at once.
    at_once: BaseProducer,
    /// Producer of events that are sent when they are due. It lingers for a millisecond, which is
    /// part of the latency: without it the broker, which shares its core with the client, would
    /// answer every event by itself.
    paced: TracedProducer,
    /// Reads the same records, while events are due one by one.
    plain: Option<PlainConsumer>,
    /// Runs at the same time, with two nodes.
    round_trip: Option<RoundTrip>,
    /// Observations of the last push.
    passages: Vec<Passage>,
    /// Sizes of the conversations that have been created.
    prepared: Vec<usize>,
    /// Conversations that have been created.
    created: u64,
    /// The plan whose events are written but not committed.
    uncommitted: Option<PushPlan>,
}

pub(crate) fn failed(error: &KafkaError) -> io::Error {
    io::Error::other(format!("Kafka: {error}"))
}

impl ServedDelivery {
    /// Creates the topics and starts the nodes that read them.
    ///
    /// # Errors
    /// The broker is unreachable, or a node does not get ready.
    pub fn start(config: &ServedConfig) -> io::Result<Self> {
        let topics = RunTopics::new();
        let settings = [("message.timestamp.type", "LogAppendTime")];
        let read = [&*topics.messages, &*topics.conversations];
        create_topics(&config.brokers, &read, PARTITIONS, &settings)?;
        if config.nodes > 1 {
            let (name, partitions) = (&*topics.round_trips, round_trip::PARTITIONS);
            create_topics(&config.brokers, &[name], partitions, &settings)?;
        }
        // The children inherit the core; this process then moves to its own.
        usage::pin(config.server_core)?;
        let started = (1..=config.nodes).map(|number| {
            let (program, brokers) = (&config.program, &config.brokers);
            ServedNode::start(program, brokers, &topics, (number, config.nodes), &[])
        });
        let nodes: io::Result<Vec<_>> = started.collect();
        usage::pin(config.own_core)?;
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &config.brokers);
        let at_once = client
            .clone()
            .set("transactional.id", &topics.messages)
            .set("queue.buffering.max.messages", "1000000")
            .set("linger.ms", "5")
            .create::<BaseProducer>()
            .map_err(|error| failed(&error))?;
        at_once.init_transactions(KAFKA_MAX).map_err(|error| failed(&error))?;
        let paced = client
            .set("linger.ms", "1")
            // At most five requests in flight, as by default in Java's producer. Without a bound, a
            // broker that falls behind receives more requests instead of larger ones, and stays
            // behind.
            .set("enable.idempotence", "true")
            .create_with_context(trace::Trace::default())
            .map_err(|error| failed(&error))?;
        let mut served = Self {
            nodes: nodes?,
            config: config.clone(),
            topics,
            at_once,
            paced,
            plain: None,
            round_trip: None,
            passages: Vec::new(),
            prepared: Vec::new(),
            created: 0,
            uncommitted: None,
        };
        served.nodes.iter_mut().try_for_each(ServedNode::wait_until_ready)?;
        served.wait_until_shared()?;
        Ok(served)
    }

    /// Waits until every partition of the messages has one owner.
    fn wait_until_shared(&self) -> io::Result<()> {
        let from = Instant::now();
        while self.nodes.len() > 1 && self.owners().is_err() {
            if from.elapsed() > READY_MAX {
                self.owners()?;
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The node that owns each partition of the messages. A node alone owns them all. Of two, one may own them
    /// all, and the other those of the conversations.
    fn owners(&self) -> io::Result<HashMap<i32, u8>> {
        if self.nodes.len() == 1 {
            return Ok((0..PARTITIONS).map(|partition| (partition, 0)).collect());
        }
        let mut owners = HashMap::new();
        let mut owned = Vec::new();
        for (number, node) in (0..).zip(&self.nodes) {
            let partitions = node.owned(&self.topics.messages)?;
            owned.push(partitions.len());
            owners.extend(partitions.into_iter().map(|partition| (partition, number)));
        }
        let complete =
            owners.len() == PARTITIONS as usize && owned.iter().sum::<usize>() == owners.len();
        match complete {
            true => Ok(owners),
            false => Err(io::Error::other(format!("not one owner for each partition: {owned:?}"))),
        }
    }

    /// What the conductor has to know.
    pub fn ready(&self) -> Ready {
        let ready = |node: &ServedNode, other| Ready {
            ready: node.address.to_string(),
            pid: node.pid(),
            other,
        };
        ready(&self.nodes[0], self.nodes.get(1).map(|node| Box::new(ready(node, None))))
    }

    /// Records that the nodes have read.
    fn records(&self) -> io::Result<u64> {
        self.nodes.iter().map(ServedNode::records).sum()
    }

    /// Open sessions of all nodes.
    ///
    /// # Errors
    /// A node does not answer.
    pub fn sessions(&self) -> io::Result<usize> {
        self.nodes.iter().map(ServedNode::sessions).sum()
    }

    /// The sessions that a plan is for: those of one node. Each of the other nodes has as many.
    fn sessions_per_node(&self) -> io::Result<usize> {
        Ok(self.sessions()? / self.nodes.len())
    }

    /// Creates the conversations of a plan. Also writes its events if it has no rate, and starts the
    /// plain clients if they are due one by one.
    ///
    /// # Errors
    /// Kafka failed.
    pub fn prepare(&mut self, plan: PushPlan) -> io::Result<()> {
        let sessions = self.sessions_per_node()?;
        if !self.prepared.contains(&plan.group) {
            self.prepared.push(plan.group);
            self.create_conversations(plan.group, sessions)?;
        }
        let RunTopics { messages, conversations, round_trips, .. } = &self.topics;
        let ServedConfig { brokers, server_core, .. } = &self.config;
        if plan.rate == 0 {
            self.at_once.begin_transaction().map_err(|error| failed(&error))?;
            let mut generator = Generator::new(plan, sessions);
            while let Some(item) = generator.next_due() {
                let key = conversation_id(item.conversation);
                let record = BaseRecord::to(messages).key(&*key).payload(&*item.value);
                write(&self.at_once, record)?;
            }
            self.at_once.flush(KAFKA_MAX).map_err(|error| failed(&error))?;
            self.uncommitted = Some(plan);
        } else if plan.is_one_by_one() {
            let topics = [(&**messages, PARTITIONS), (&**conversations, PARTITIONS)];
            self.plain = Some(PlainConsumer::start(brokers, &topics, *server_core)?);
            if self.nodes.len() > 1 {
                self.round_trip = Some(RoundTrip::start(brokers, round_trips, *server_core)?);
            }
        }
        Ok(())
    }

    fn create_conversations(&mut self, group: usize, sessions: usize) -> io::Result<()> {
        let count = (sessions / group).max(1);
        let until = self.records()? + count as u64;
        for at in 0..count {
            let first = at * group;
            let on_node = first..(first + group).min(sessions);
            let members = (0..self.nodes.len())
                .flat_map(|node| on_node.clone().map(move |session| node * sessions + session));
            let number = conversation(group, at);
            let value = creation(number, members.map(names::user));
            let key = conversation_id(number);
            let record = BaseRecord::with_opaque_to(&self.topics.conversations, UNTRACED);
            write(&self.paced, record.key(&*key).payload(&*value))?;
        }
        self.paced.flush(KAFKA_MAX).map_err(|error| failed(&error))?;
        self.created += count as u64;
        while self.records()? < until {
            std::thread::sleep(POLL);
        }
        self.nodes.iter().try_for_each(|node| node.wait_until_followed(self.created))
    }

    /// Makes the events of a plan visible to the nodes.
    ///
    /// # Errors
    /// Kafka failed, the plan has not been prepared, or partitions changed their owner.
    pub fn push(&mut self, plan: PushPlan) -> io::Result<Pushed> {
        let sessions = self.sessions_per_node()?;
        let owners = self.owners()?;
        let round_trip = self.round_trip.take();
        let started_ns = now_ns();
        let round_trip = round_trip.map(|trip| trip.push(plan, sessions)).transpose()?;
        if plan.rate == 0 {
            if self.uncommitted.take() != Some(plan) {
                return Err(io::Error::other("the plan is not prepared"));
            }
            self.at_once.commit_transaction(KAFKA_MAX).map_err(|error| failed(&error))?;
        } else {
            paced::push(&self.paced, &self.topics.messages, None, plan, sessions)?;
        }
        let elapsed_ns = now_ns() - started_ns;
        if let Some(plain) = self.plain.take() {
            self.passages = joined(self.paced.context().take(), plain.finish(plan.events));
        }
        for passage in &mut self.passages {
            passage.owner = owners.get(&passage.partition).copied().unwrap_or(0);
        }
        if let Some(round_trip) = round_trip {
            for (passage, trip) in self.passages.iter_mut().zip(round_trip.finish()?) {
                passage.round_trip_ns = trip.consumed_ns.saturating_sub(trip.sent_ns);
            }
        }
        if self.owners()? != owners {
            return Err(io::Error::other("partitions changed their owner"));
        }
        Ok(Pushed {
            messages: (self.nodes.len() * plan.group.min(sessions)) as u64 * plan.events,
            elapsed_ns,
            ..Pushed::default()
        })
    }

    /// Observations of the last push, if its events were due one by one.
    pub fn passages(&mut self) -> Vec<Passage> {
        std::mem::take(&mut self.passages)
    }
}

/// Adds the times of the plain consumer to the passages.
fn joined(mut passages: Vec<Passage>, read: Vec<plain::Read>) -> Vec<Passage> {
    let read: HashMap<_, _> =
        read.into_iter().map(|(key, sequence, at_ns)| ((key, sequence), at_ns)).collect();
    for passage in &mut passages {
        let key = conversation_id(conversation(1, passage.session as usize)).into_bytes();
        let at_ns = read.get(&(key, u64::from(passage.sequence)));
        passage.consumed_ns = at_ns.copied().unwrap_or(0);
    }
    passages
}
