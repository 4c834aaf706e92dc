//! Delivery as it is deployed, `delivery serve` behind a real Kafka: what is pushed is first in a
//! topic. Its process is the one that is measured; this one only tells Kafka and the conductor.
//!
//! As fast as it can: the events are written beforehand within a transaction, which the consumer
//! does not see before its commit (`isolation.level=read_committed` is librdkafka's default), so
//! that neither writing them nor the broker's reading them in is what is measured.
//!
//! One by one: it is kept when each record was sent, appended and acknowledged, and when a plain
//! consumer got it ([`crate::journey`]).

mod plain;
mod trace;

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext};

use crate::clock::now_ns;
use crate::control::Pushed;
use crate::generator::{Generator, Item, Plan, conversation};
use crate::journey::Passage;
use crate::names;
use crate::payload::{Stamp, creation};
use crate::usage;
use plain::PlainConsumer;
use trace::{TracedProducer, UNTRACED};

/// As a small deployment has; records are spread over them by conversation.
const PARTITIONS: i32 = 4;
const KAFKA_PATIENCE: Duration = Duration::from_secs(60);
const READY_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// What the consumer has to have read before it counts as idle again.
const RECORDS: &str = "delivery_router_records_total";
const SESSIONS: &str = "delivery_shard_sessions";

/// What it needs.
#[derive(Clone, Debug)]
pub struct Setting {
    /// `host:port` of a broker.
    pub brokers: String,
    /// The `delivery` program.
    pub program: PathBuf,
    /// Core of the server.
    pub server_core: usize,
    /// Core of this process.
    pub own_core: usize,
}

/// See the module.
pub struct Served {
    server: Child,
    brokers: String,
    server_core: usize,
    /// Where it listens.
    pub address: SocketAddr,
    admin: SocketAddr,
    /// Topics.
    messages: String,
    conversations: String,
    /// Writes what is to appear at once.
    at_once: BaseProducer,
    /// Writes each event when it is due. A millisecond of lingering keeps the broker, which shares
    /// its core with the client, from an answer per event; it is part of the latency.
    paced: TracedProducer,
    /// Reads what is due one by one as well.
    plain: Option<PlainConsumer>,
    /// What was seen of the events of the last push.
    passages: Vec<Passage>,
    /// Sizes of conversations that have been made.
    made: Vec<usize>,
    /// Events that are written and wait for their commit.
    filled: Option<Plan>,
}

fn failed(error: &KafkaError) -> io::Error {
    io::Error::other(format!("Kafka: {error}"))
}

fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind(("127.0.0.1", 0))?.local_addr()
}

impl Served {
    /// Makes a topic and starts a server that reads it.
    ///
    /// # Errors
    /// No broker, or the server does not get ready.
    pub fn start(setting: &Setting) -> io::Result<Self> {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &setting.brokers);
        // Two, as in a deployment: the second is read by the membership cache as well.
        let run = std::process::id();
        let messages = format!("messaging.bench-{run}");
        let conversations = format!("conversation.bench-{run}");
        make_topics(&client, &[&messages, &conversations])?;
        let (address, admin) = (free_address()?, free_address()?);
        // The child inherits the core; this process then leaves it.
        usage::pin(setting.server_core)?;
        // It ends with this process, however that ends.
        let server = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&setting.program)
            .arg("serve")
            .env("HTTP_PORT", address.to_string())
            .env("HTTP_ADDR", admin.to_string())
            .env("GRPC_ADDR", "")
            .env("SHARDS", "1")
            .env("CONNECTIONS_MAX", "14000")
            .env("AUTH_MODE", "trust")
            .env("ECHO", "true")
            .env("CONNECTIONS_PER_ADDRESS", "0")
            .env("HANDSHAKES_PER_SECOND", "0")
            .env("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0")
            .env("SO_SNDBUF", "128KiB")
            .env("ROUTING_MODE", "group")
            .env("KAFKA_BROKERS", &setting.brokers)
            .env("KAFKA_TOPICS", format!("{messages},{conversations}"))
            .env("KAFKA_GROUP", &messages)
            .env("LOG_LEVEL", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        usage::pin(setting.own_core)?;
        let at_once = client
            .clone()
            .set("transactional.id", &messages)
            .set("queue.buffering.max.messages", "1000000")
            .set("linger.ms", "5")
            .create::<BaseProducer>()
            .map_err(|error| failed(&error))?;
        at_once.init_transactions(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
        let paced = client
            .set("linger.ms", "1")
            // At most five requests under way, as Java's producer has it by default. Without that
            // bound a broker that is behind for a moment gets more requests instead of larger ones,
            // and stays behind.
            .set("enable.idempotence", "true")
            .create_with_context(trace::Trace::default())
            .map_err(|error| failed(&error))?;
        let mut served = Self {
            server,
            brokers: setting.brokers.clone(),
            server_core: setting.server_core,
            address,
            admin,
            messages,
            conversations,
            at_once,
            paced,
            plain: None,
            passages: Vec::new(),
            made: Vec::new(),
            filled: None,
        };
        served.wait_ready()?;
        Ok(served)
    }

    /// The server's process.
    pub fn pid(&self) -> u32 {
        self.server.id()
    }

    fn wait_ready(&mut self) -> io::Result<()> {
        let from = Instant::now();
        while !matches!(self.get("/health/ready"), Ok((200, _))) {
            if let Some(status) = self.server.try_wait()? {
                return Err(io::Error::other(format!("delivery ended: {status}")));
            }
            if from.elapsed() > READY_PATIENCE {
                return Err(io::Error::other("delivery does not get ready"));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Status and body of an answer of the admin port.
    fn get(&self, path: &str) -> io::Result<(u16, String)> {
        let mut stream = TcpStream::connect(self.admin)?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let status = text.split_whitespace().nth(1).and_then(|status| status.parse().ok());
        Ok((status.unwrap_or(0), text))
    }

    /// The sum of the samples of one name.
    fn metric(&self, name: &str) -> io::Result<u64> {
        let (_, page) = self.get("/metrics")?;
        let samples = page.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let values = samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        Ok(values.sum::<f64>() as u64)
    }

    /// Sessions that are open.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn sessions(&self) -> io::Result<usize> {
        Ok(self.metric(SESSIONS)? as usize)
    }

    /// Makes the conversations of a plan, and writes its events if it has no rate, or readies the
    /// plain consumer if they are due one by one. Always does something: what is pushed has been read
    /// by the broker before.
    ///
    /// # Errors
    /// Kafka's.
    pub fn prepare(&mut self, plan: Plan) -> io::Result<()> {
        let sessions = self.sessions()?;
        if !self.made.contains(&plan.group) {
            self.made.push(plan.group);
            self.make_conversations(plan.group, sessions)?;
        }
        if plan.rate == 0 {
            self.at_once.begin_transaction().map_err(|error| failed(&error))?;
            let mut generator = Generator::new(plan, sessions);
            while let Some(item) = generator.next_due() {
                let key = key(item.conversation);
                let record = BaseRecord::to(&self.messages).key(&*key).payload(&*item.value);
                write(&self.at_once, record)?;
            }
            self.at_once.flush(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
            self.filled = Some(plan);
        } else if plan.is_one_by_one() {
            let topics = [&*self.messages, &*self.conversations];
            self.plain = Some(PlainConsumer::start(&self.brokers, &topics, self.server_core)?);
        }
        Ok(())
    }

    fn make_conversations(&self, group: usize, sessions: usize) -> io::Result<()> {
        let count = (sessions / group).max(1);
        let until = self.metric(RECORDS)? + count as u64;
        for at in 0..count {
            let first = at * group;
            let members = first..(first + group).min(sessions);
            let number = conversation(group, at);
            let value = creation(number, members.map(names::user));
            let key = key(number);
            let record = BaseRecord::with_opaque_to(&self.conversations, UNTRACED);
            write(&self.paced, record.key(&*key).payload(&*value))?;
        }
        self.paced.flush(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
        while self.metric(RECORDS)? < until {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Lets the server see the events.
    ///
    /// # Errors
    /// Kafka's, or the plan has not been prepared.
    pub fn push(&mut self, plan: Plan) -> io::Result<Pushed> {
        let sessions = self.sessions()?;
        let started_ns = now_ns();
        if plan.rate == 0 {
            if self.filled.take() != Some(plan) {
                return Err(io::Error::other("prepare it first"));
            }
            self.at_once.commit_transaction(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
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
            generator_ns: 0,
            retries: 0,
            sends: None,
        })
    }

    fn push_paced(&self, plan: Plan, sessions: usize) -> io::Result<()> {
        let mut generator = Generator::new(plan, sessions);
        while !generator.is_finished() {
            let Some(item) = generator.next_due() else {
                let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
                self.paced.poll(Duration::ZERO);
                std::thread::sleep(Duration::from_nanos(wait));
                continue;
            };
            let number = if plan.is_one_by_one() { self.trace(&item) } else { UNTRACED };
            let key = key(item.conversation);
            let record = BaseRecord::with_opaque_to(&self.messages, number);
            write(&self.paced, record.key(&*key).payload(&*item.value))?;
        }
        self.paced.flush(KAFKA_PATIENCE).map_err(|error| failed(&error))
    }

    fn trace(&self, item: &Item) -> usize {
        let stamp = Stamp::find(&item.value).expect("every value has one");
        self.paced.context().begin(item.sessions.start, stamp.sequence, stamp.intended_ns)
    }

    /// What was seen of the events of the last push, if they were due one by one.
    pub fn passages(&mut self) -> Vec<Passage> {
        std::mem::take(&mut self.passages)
    }
}

fn key(conversation: usize) -> String {
    format!("c{conversation:07}")
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

/// The passages with the moments at which the plain consumer read.
fn joined(mut passages: Vec<Passage>, read: Vec<plain::Read>) -> Vec<Passage> {
    let read: HashMap<_, _> =
        read.into_iter().map(|(key, sequence, at_ns)| ((key, sequence), at_ns)).collect();
    for passage in &mut passages {
        let key = key(conversation(1, passage.session as usize)).into_bytes();
        let at_ns = read.get(&(key, u64::from(passage.sequence)));
        passage.consumed_ns = at_ns.copied().unwrap_or(0);
    }
    passages
}

fn make_topics(client: &ClientConfig, topics: &[&str]) -> io::Result<()> {
    let admin: AdminClient<DefaultClientContext> =
        client.create().map_err(|error| failed(&error))?;
    let new: Vec<_> = topics
        .iter()
        .map(|topic| {
            NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1))
                .set("message.timestamp.type", "LogAppendTime")
        })
        .collect();
    let options = AdminOptions::new().operation_timeout(Some(KAFKA_PATIENCE));
    let made = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(admin.create_topics(&new, &options))
        .map_err(|error| failed(&error))?;
    match made.into_iter().find_map(Result::err) {
        None => Ok(()),
        Some((topic, error)) => Err(io::Error::other(format!("topic {topic}: {error}"))),
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Nothing of it is kept.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
