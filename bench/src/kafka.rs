//! Delivery as it is deployed: `delivery serve` behind a real Kafka. The server's process is the one
//! that is measured; this one only publishes to Kafka and answers the conductor.
//!
//! A plan without a rate: the events are written beforehand within a transaction, which the consumer
//! does not see before its commit (`isolation.level=read_committed` is librdkafka's default). So
//! neither writing them nor the broker's disk is measured.
//!
//! A plan of events that are due one by one: records when each was sent, appended and acknowledged,
//! and when a plain consumer received it ([`crate::journey`]).

mod plain;
mod trace;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use delivery_testkit::ports::free_port;
use delivery_testkit::publisher::create_topics;
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext};

use crate::admin::AdminPort;
use crate::clock::now_ns;
use crate::control::Pushed;
use crate::generator::{Generator, Item, PushPlan, conversation};
use crate::journey::Passage;
use crate::names;
use crate::payload::{Stamp, conversation_id, creation};
use crate::program::{Program, beside};
use crate::usage;
use plain::PlainConsumer;
use trace::{TracedProducer, UNTRACED};

/// As in a small deployment; records are spread over them by conversation.
const PARTITIONS: i32 = 4;
/// Limit for one operation of Kafka.
const KAFKA_MAX: Duration = Duration::from_secs(60);
const READY_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// Metric: records that the routers have read.
const RECORDS: &str = "delivery_router_records_total";
/// Metric: open sessions.
const SESSIONS: &str = "delivery_shard_sessions";

/// Configuration of [`ServedDelivery`].
#[derive(Clone, Debug, clap::Parser)]
pub struct ServedConfig {
    /// `host:port` of a broker.
    #[arg(long, env = "KAFKA_BROKERS")]
    pub brokers: String,
    /// The `delivery` program; by default the one in the folder of this one.
    #[arg(long, default_value_os_t = beside("delivery"))]
    pub program: PathBuf,
    /// Core of the server.
    #[arg(long = "core")]
    pub server_core: usize,
    /// Core of this process.
    #[arg(long)]
    pub own_core: usize,
}

/// A running `delivery serve` and the producers of its events.
pub struct ServedDelivery {
    server: Program,
    brokers: String,
    server_core: usize,
    /// Address of the server.
    pub address: SocketAddr,
    admin: AdminPort,
    /// Topic of the messages.
    messages: String,
    /// Topic of the conversations.
    conversations: String,
    /// Producer of events that become visible all at once.
    at_once: BaseProducer,
    /// Producer of events that are sent when they are due. It lingers for a millisecond, which is
    /// part of the latency: without it the broker, which shares its core with the client, would
    /// answer every event by itself.
    paced: TracedProducer,
    /// Reads the same records, while events are due one by one.
    plain: Option<PlainConsumer>,
    /// Observations of the last push.
    passages: Vec<Passage>,
    /// Sizes of the conversations that have been created.
    prepared: Vec<usize>,
    /// The plan whose events are written but not committed.
    uncommitted: Option<PushPlan>,
}

fn failed(error: &KafkaError) -> io::Error {
    io::Error::other(format!("Kafka: {error}"))
}

impl ServedDelivery {
    /// Creates the topics and starts a server that reads them.
    ///
    /// # Errors
    /// The broker is unreachable, or the server does not get ready.
    pub fn start(config: &ServedConfig) -> io::Result<Self> {
        // Two topics, as in a deployment: the membership cache reads the second as well.
        let run = std::process::id();
        let messages = format!("messaging.bench-{run}");
        let conversations = format!("conversation.bench-{run}");
        let settings = [("message.timestamp.type", "LogAppendTime")];
        create_topics(&config.brokers, &[&messages, &conversations], PARTITIONS, &settings)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let admin = AdminPort(free_port());
        // The child inherits the core; this process then moves to its own.
        usage::pin(config.server_core)?;
        let mut server = Program::start(
            "delivery",
            None,
            &[config.program.display().to_string(), "serve".to_owned()],
            &[
                ("HTTP_PORT", address.to_string()),
                ("HTTP_ADDR", format!("127.0.0.1:{}", admin.0)),
                ("GRPC_ADDR", String::new()),
                ("SHARDS", "1".to_owned()),
                ("CONNECTIONS_MAX", "14000".to_owned()),
                ("AUTH_MODE", "trust".to_owned()),
                ("ECHO", "true".to_owned()),
                ("CONNECTIONS_PER_ADDRESS", "0".to_owned()),
                ("HANDSHAKES_PER_SECOND", "0".to_owned()),
                ("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0".to_owned()),
                ("SO_SNDBUF", "128KiB".to_owned()),
                ("ROUTING_MODE", "broadcast".to_owned()),
                ("KAFKA_BROKERS", config.brokers.clone()),
                ("KAFKA_TOPICS", format!("{messages},{conversations}")),
                ("KAFKA_GROUP", messages.clone()),
                ("LOG_LEVEL", "warn".to_owned()),
            ],
        )?;
        usage::pin(config.own_core)?;
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &config.brokers);
        let at_once = client
            .clone()
            .set("transactional.id", &messages)
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
        server.wait_until(READY_MAX, || admin.is_ready())?;
        Ok(Self {
            server,
            brokers: config.brokers.clone(),
            server_core: config.server_core,
            address,
            admin,
            messages,
            conversations,
            at_once,
            paced,
            plain: None,
            passages: Vec::new(),
            prepared: Vec::new(),
            uncommitted: None,
        })
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Records that the server has read.
    fn records(&self) -> io::Result<u64> {
        Ok(self.admin.metric(RECORDS, "")? as u64)
    }

    /// Open sessions.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn sessions(&self) -> io::Result<usize> {
        Ok(self.admin.metric(SESSIONS, "")? as usize)
    }

    /// Creates the conversations of a plan. Also writes its events if it has no rate, and starts the
    /// plain consumer if they are due one by one.
    ///
    /// # Errors
    /// Kafka failed.
    pub fn prepare(&mut self, plan: PushPlan) -> io::Result<()> {
        let sessions = self.sessions()?;
        if !self.prepared.contains(&plan.group) {
            self.prepared.push(plan.group);
            self.create_conversations(plan.group, sessions)?;
        }
        if plan.rate == 0 {
            self.at_once.begin_transaction().map_err(|error| failed(&error))?;
            let mut generator = Generator::new(plan, sessions);
            while let Some(item) = generator.next_due() {
                let key = conversation_id(item.conversation);
                let record = BaseRecord::to(&self.messages).key(&*key).payload(&*item.value);
                write(&self.at_once, record)?;
            }
            self.at_once.flush(KAFKA_MAX).map_err(|error| failed(&error))?;
            self.uncommitted = Some(plan);
        } else if plan.is_one_by_one() {
            let topics = [&*self.messages, &*self.conversations];
            self.plain = Some(PlainConsumer::start(&self.brokers, &topics, self.server_core)?);
        }
        Ok(())
    }

    fn create_conversations(&self, group: usize, sessions: usize) -> io::Result<()> {
        let count = (sessions / group).max(1);
        let until = self.records()? + count as u64;
        for at in 0..count {
            let first = at * group;
            let members = first..(first + group).min(sessions);
            let number = conversation(group, at);
            let value = creation(number, members.map(names::user));
            let key = conversation_id(number);
            let record = BaseRecord::with_opaque_to(&self.conversations, UNTRACED);
            write(&self.paced, record.key(&*key).payload(&*value))?;
        }
        self.paced.flush(KAFKA_MAX).map_err(|error| failed(&error))?;
        while self.records()? < until {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Makes the events of a plan visible to the server.
    ///
    /// # Errors
    /// Kafka failed, or the plan has not been prepared.
    pub fn push(&mut self, plan: PushPlan) -> io::Result<Pushed> {
        let sessions = self.sessions()?;
        let started_ns = now_ns();
        if plan.rate == 0 {
            if self.uncommitted.take() != Some(plan) {
                return Err(io::Error::other("the plan is not prepared"));
            }
            self.at_once.commit_transaction(KAFKA_MAX).map_err(|error| failed(&error))?;
        } else {
            self.push_paced(plan, sessions)?;
        }
        let elapsed_ns = now_ns() - started_ns;
        if let Some(plain) = self.plain.take() {
            self.passages = joined(self.paced.context().take(), plain.finish(plan.events));
        }
        Ok(Pushed {
            messages: plan.events * plan.group.min(sessions) as u64,
            elapsed_ns,
            ..Pushed::default()
        })
    }

    fn push_paced(&self, plan: PushPlan, sessions: usize) -> io::Result<()> {
        let mut generator = Generator::new(plan, sessions);
        while !generator.is_finished() {
            let Some(item) = generator.next_due() else {
                let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
                self.paced.poll(Duration::ZERO);
                std::thread::sleep(Duration::from_nanos(wait));
                continue;
            };
            let number = if plan.is_one_by_one() { self.trace(&item) } else { UNTRACED };
            let key = conversation_id(item.conversation);
            let record = BaseRecord::with_opaque_to(&self.messages, number);
            write(&self.paced, record.key(&*key).payload(&*item.value))?;
        }
        self.paced.flush(KAFKA_MAX).map_err(|error| failed(&error))
    }

    fn trace(&self, item: &Item) -> usize {
        let stamp = Stamp::find(&item.value).expect("every value has one");
        self.paced.context().begin(item.sessions.start, stamp.sequence, stamp.intended_ns)
    }

    /// Observations of the last push, if its events were due one by one.
    pub fn passages(&mut self) -> Vec<Passage> {
        std::mem::take(&mut self.passages)
    }
}

fn write<C: ProducerContext>(
    producer: &BaseProducer<C>,
    mut record: BaseRecord<'_, str, [u8], C::DeliveryOpaque>,
) -> io::Result<()> {
    loop {
        match producer.send(record) {
            Ok(()) => break,
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                producer.poll(POLL);
                record = back;
            }
            Err((error, _)) => return Err(failed(&error)),
        }
    }
    producer.poll(Duration::ZERO);
    Ok(())
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
