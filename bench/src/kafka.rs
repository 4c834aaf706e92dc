//! Delivery as it is deployed, `delivery serve` behind a real Kafka: what is pushed is first in a
//! topic. Its process is the one that is measured; this one only tells Kafka and the conductor.
//!
//! As fast as it can: the events are written beforehand within a transaction, which the consumer
//! does not see before its commit (`isolation.level=read_committed` is librdkafka's default), so
//! that neither writing them nor the broker's reading them in is what is measured.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

use crate::clock::now_ns;
use crate::control::Pushed;
use crate::generator::{Generator, Plan, conversation};
use crate::names;
use crate::payload::creation;
use crate::usage;

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
    paced: BaseProducer,
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
        let paced = client.set("linger.ms", "1").create().map_err(|error| failed(&error))?;
        let mut served = Self {
            server,
            address,
            admin,
            messages,
            conversations,
            at_once,
            paced,
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

    /// Makes the conversations of a plan and, if it has no rate, writes its events. Always does
    /// something: what is pushed has been read by the broker before.
    ///
    /// # Errors
    /// Kafka's.
    pub fn prepare(&mut self, plan: Plan) -> io::Result<()> {
        let sessions = self.sessions()?;
        if !self.made.contains(&plan.group) {
            self.made.push(plan.group);
            let count = (sessions / plan.group).max(1);
            let until = self.metric(RECORDS)? + count as u64;
            for at in 0..count {
                let first = at * plan.group;
                let members = first..(first + plan.group).min(sessions);
                let number = conversation(plan.group, at);
                let value = creation(number, members.map(names::user));
                self.write(&self.paced, &self.conversations, number, &value)?;
            }
            self.paced.flush(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
            while self.metric(RECORDS)? < until {
                std::thread::sleep(POLL);
            }
        }
        if plan.rate == 0 {
            self.at_once.begin_transaction().map_err(|error| failed(&error))?;
            let mut generator = Generator::new(plan, sessions);
            while let Some(item) = generator.next_due() {
                self.write(&self.at_once, &self.messages, item.conversation, &item.value)?;
            }
            self.at_once.flush(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
            self.filled = Some(plan);
        }
        Ok(())
    }

    fn write(
        &self,
        producer: &BaseProducer,
        topic: &str,
        conversation: usize,
        value: &[u8],
    ) -> io::Result<()> {
        let key = format!("c{conversation:07}");
        loop {
            match producer.send(BaseRecord::to(topic).key(&key).payload(value)) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                    producer.poll(POLL);
                }
                Err((error, _)) => return Err(failed(&error)),
            }
        }
        producer.poll(Duration::ZERO);
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
            let mut generator = Generator::new(plan, sessions);
            while !generator.is_finished() {
                let Some(item) = generator.next_due() else {
                    let wait = generator.due_ns().map_or(0, |due| due.saturating_sub(now_ns()));
                    self.paced.poll(Duration::ZERO);
                    std::thread::sleep(Duration::from_nanos(wait));
                    continue;
                };
                self.write(&self.paced, &self.messages, item.conversation, &item.value)?;
            }
            self.paced.flush(KAFKA_PATIENCE).map_err(|error| failed(&error))?;
        }
        Ok(Pushed {
            messages: plan.events * plan.group.min(sessions) as u64,
            elapsed_ns: now_ns() - started_ns,
            generator_ns: 0,
            retries: 0,
            sends: None,
        })
    }
}

fn make_topics(client: &ClientConfig, topics: &[&str]) -> io::Result<()> {
    let admin: AdminClient<DefaultClientContext> =
        client.create().map_err(|error| failed(&error))?;
    let new: Vec<_> = topics
        .iter()
        .map(|topic| NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1)))
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
