//! The topics of the cluster in a real Kafka: how long a starting node reads, and what a hand-off costs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use delivery::handoff::Pushed;
use delivery::service::cluster::ports::{
    HandOffReceiver, HandOffSink as _, IncomingHandOff, OutgoingHandOff, Queued,
    SessionsWriter as _,
};
use delivery::service::cluster::wire::hand_off_header::Content;
use delivery::service::cluster::wire::{HandOffHeader, Users};
use delivery::service::routing::kafka::{
    ClusterLogCounters, ClusterTopicNames, HandOffOutbox, HandOffReader, KafkaConfig,
    SessionsOutbox, SessionsReader, ensure_topics,
};

use super::names::{TOPIC, begun, epoch, lease, table};
use crate::names::user;
use crate::payload::{Stamp, Template};
use crate::usage::process_ns;

/// Pause while a queue is full, or until somebody has read.
const PAUSE: Duration = Duration::from_millis(1);
/// The same for a reader, whose own time is measured.
const READING_PAUSE: Duration = Duration::from_millis(20);
const GRACE: Duration = Duration::from_secs(60);

fn own_ns() -> io::Result<u64> {
    process_ns(std::process::id())
}

/// The settings of a node. `uncompressed`: except for the compression.
fn config(brokers: &str, uncompressed: bool) -> KafkaConfig {
    let mut config = KafkaConfig::new(brokers);
    if uncompressed {
        config.properties.push(("compression.type".to_owned(), "none".to_owned()));
    }
    config
}

/// Topics that no other run uses.
fn topics(config: &KafkaConfig) -> io::Result<(ClusterTopicNames, i32)> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(io::Error::other)?;
    let name = |what| format!("bench-{what}-{}", now.as_nanos());
    let names = ClusterTopicNames { sessions: name("sessions"), hand_off: name("handoff") };
    let topics = ensure_topics(config, &names, &Arc::default(), |reason| eprintln!("{reason}"));
    let partitions = topics.map_err(io::Error::other)?.hand_off_partitions;
    Ok((names, partitions))
}

/// Bytes of the log of all partitions of a topic in the broker's data.
fn stored_bytes(data: &Path, topic: &str) -> io::Result<u64> {
    let mut bytes = 0;
    for folder in fs::read_dir(data)? {
        let folder = folder?;
        if !folder.file_name().to_string_lossy().starts_with(&format!("{topic}-")) {
            continue;
        }
        for file in fs::read_dir(folder.path())? {
            let file = file?;
            if file.path().extension().is_some_and(|it| it == "log") {
                bytes += file.metadata()?.len();
            }
        }
    }
    Ok(bytes)
}

/// Where the topics are.
#[derive(clap::Args, Debug)]
struct KafkaArguments {
    /// Kafka.
    #[arg(long, env = "KAFKA_BROKERS")]
    brokers: String,
    /// The broker's data, to see how many bytes it stored.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Do not compress: the ids and texts here repeat more than real ones.
    #[arg(long)]
    uncompressed: bool,
}

/// Lets a new node read a sessions topic.
#[derive(clap::Args, Debug)]
pub struct ReadyPlan {
    #[command(flatten)]
    kafka: KafkaArguments,
    /// Sessions in the topic.
    #[arg(long, default_value_t = 1_000_000)]
    sessions: usize,
    /// Nodes.
    #[arg(long, default_value_t = 50)]
    nodes: usize,
    /// How often it is read.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

impl ReadyPlan {
    /// Prints what it found.
    ///
    /// # Errors
    /// Kafka is not there, or `/proc` is not mounted.
    pub fn run(&self) -> io::Result<()> {
        let config = config(&self.kafka.brokers, self.kafka.uncompressed);
        let (names, _) = topics(&config)?;
        let writer = SessionsOutbox::start(&config, &names.sessions, Arc::default());
        let writer = writer.map_err(io::Error::other)?;
        let (started, before) = (Instant::now(), own_ns()?);
        let leases = (0..self.nodes).map(lease);
        let mut records = 0_u64;
        for (key, value) in leases.chain((0..self.sessions).map(|it| begun(it, self.nodes))) {
            while !writer.write(&key, Some(&value)) {
                sleep(PAUSE);
            }
            records += 1;
        }
        let left = writer.stop(GRACE);
        let took = started.elapsed().as_secs_f64();
        println!(
            "{records} records written in {took:.1} s: {:.0} a second, {:.2} µs of CPU each; {left} not stored",
            records as f64 / took,
            (own_ns()? - before) as f64 / records as f64 / 1e3,
        );
        if let Some(data) = &self.kafka.data {
            let bytes = stored_bytes(data, &names.sessions)?;
            println!("stored: {bytes} B, {:.1} B a record", bytes as f64 / records as f64);
        }
        for _ in 0..self.rounds {
            let table = table();
            let (started, before) = (Instant::now(), own_ns()?);
            let log = Arc::clone(&table) as _;
            let reader = SessionsReader::start(&config, &names.sessions, log, Arc::default());
            let reader = reader.map_err(io::Error::other)?;
            while reader.status().missing().is_some() {
                sleep(PAUSE);
            }
            let took = started.elapsed().as_secs_f64();
            println!(
                "{} records read and applied in {took:.2} s: {:.0} a second, {:.2} µs of CPU each",
                table.next_offset(),
                table.next_offset() as f64 / took,
                (own_ns()? - before) as f64 / records as f64 / 1e3,
            );
            reader.stop();
        }
        Ok(())
    }
}

#[derive(Default)]
struct CountingReceiver {
    received: AtomicU64,
    next: AtomicU64,
}

impl HandOffReceiver for CountingReceiver {
    fn receive(&self, _: IncomingHandOff) -> Pushed<IncomingHandOff> {
        self.received.fetch_add(1, Ordering::Relaxed);
        Pushed::Accepted
    }

    fn read_to(&self, next: i64) {
        self.next.store(next as u64, Ordering::Release);
    }

    fn missed(&self) {}

    fn gone(&self) {}
}

/// Writes hand-offs, and reads them.
#[derive(clap::Args, Debug)]
pub struct HandOffPlan {
    #[command(flatten)]
    kafka: KafkaArguments,
    /// Hand-offs per second. 0: as many as the queue takes.
    #[arg(long, default_value_t = 4_000)]
    rate: u64,
    /// How long, s.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Hand-offs without a rate.
    #[arg(long, default_value_t = 1_000_000)]
    records: u64,
    /// Bytes of the value.
    #[arg(long, default_value_t = 400)]
    value_bytes: usize,
    /// Users that each names.
    #[arg(long, default_value_t = 1)]
    users: usize,
    /// Only write, to partition 0 of this topic.
    #[arg(long)]
    topic: Option<String>,
}

/// What a run took.
struct Took {
    records: u64,
    seconds: f64,
    cpu_ns: u64,
}

impl HandOffPlan {
    fn records(&self) -> u64 {
        if self.rate == 0 { self.records } else { self.rate * self.seconds }
    }

    /// Writes to these partitions until everything is stored.
    fn write(&self, config: &KafkaConfig, topic: &str, partitions: u64) -> io::Result<Took> {
        let counters = Arc::<ClusterLogCounters>::default();
        let writer = HandOffOutbox::start(config, topic, Arc::clone(&counters));
        let writer = writer.map_err(io::Error::other)?;
        let stamp = Stamp { sequence: 1, intended_ns: 1 };
        let value = Template::new(self.value_bytes).envelope(1, stamp);
        let key = user(1);
        let records = self.records();
        let (started, before) = (Instant::now(), own_ns()?);
        let mut sent = 0_u64;
        while sent < records {
            let due = match self.rate {
                0 => records,
                rate => (started.elapsed().as_nanos() as u64 * rate / 1_000_000_000).min(records),
            };
            while sent < due {
                let ids = (0..self.users).map(|it| user(sent as usize + it)).collect();
                let header = HandOffHeader {
                    parked: Vec::new(),
                    topic: TOPIC.into(),
                    partition: 200,
                    offset: 50_000_000_000 + sent as i64,
                    generation: 1_796_000_000_000,
                    table: 50_000_000_000,
                    appended_at_ms: 1_796_000_000_000,
                    content: Some(Content::Live(Users { ids })),
                };
                let hand_off = OutgoingHandOff {
                    target: epoch(1),
                    partition: (sent % partitions) as i32,
                    header: &header,
                    key: Some(key.as_bytes()),
                    value: &value,
                };
                match writer.send(hand_off, Box::new(|| {})) {
                    Queued::Accepted => sent += 1,
                    Queued::Full => break,
                    Queued::TooLarge => return Err(io::Error::other("too large")),
                }
            }
            sleep(PAUSE);
        }
        while counters.stored.get() < records {
            sleep(PAUSE);
        }
        let seconds = started.elapsed().as_secs_f64();
        let cpu_ns = own_ns()? - before;
        writer.stop(GRACE);
        Ok(Took { records, seconds, cpu_ns })
    }

    /// Another process that writes the same to partition 0 of a topic.
    fn writer(&self, topic: &str) -> io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["hand-off", "--brokers", &self.kafka.brokers, "--topic", topic]);
        for (name, value) in [
            ("--rate", self.rate),
            ("--seconds", self.seconds),
            ("--records", self.records),
            ("--value-bytes", self.value_bytes as u64),
            ("--users", self.users as u64),
        ] {
            command.args([name, &value.to_string()]);
        }
        command.stdout(Stdio::null()).spawn()
    }

    /// Reads as the node `reads` what another process writes.
    fn read(&self, config: &KafkaConfig, reads: usize) -> io::Result<(Took, u64)> {
        let (names, _) = topics(config)?;
        let receiver = Arc::<CountingReceiver>::default();
        let receives = Arc::clone(&receiver) as _;
        let counters = Arc::default();
        let reader =
            HandOffReader::start(config, &names.hand_off, 0, epoch(reads), receives, counters);
        let reader = reader.map_err(io::Error::other)?;
        while reader.status().missing().is_some() {
            sleep(PAUSE);
        }
        let (started, before) = (Instant::now(), own_ns()?);
        let mut writer = self.writer(&names.hand_off)?;
        let records = self.records();
        while receiver.next.load(Ordering::Acquire) < records {
            if writer.try_wait()?.is_some_and(|status| !status.success()) {
                return Err(io::Error::other("the writer failed"));
            }
            sleep(READING_PAUSE);
        }
        let (seconds, cpu_ns) = (started.elapsed().as_secs_f64(), own_ns()? - before);
        writer.wait()?;
        reader.stop();
        Ok((Took { records, seconds, cpu_ns }, receiver.received.load(Ordering::Relaxed)))
    }

    /// Prints what it found.
    ///
    /// # Errors
    /// Kafka is not there, or `/proc` is not mounted.
    pub fn run(&self) -> io::Result<()> {
        let config = config(&self.kafka.brokers, self.kafka.uncompressed);
        if let Some(topic) = &self.topic {
            self.write(&config, topic, 1)?;
            return Ok(());
        }
        let print = |what: &str, took: &Took| {
            println!(
                "{what}: {} in {:.1} s, {:.0} a second, {:.2} µs of CPU each",
                took.records,
                took.seconds,
                took.records as f64 / took.seconds,
                took.cpu_ns as f64 / took.records as f64 / 1e3,
            );
        };
        // To as many partitions as a new topic has.
        let (names, partitions) = topics(&config)?;
        let spread = self.write(&config, &names.hand_off, partitions.unsigned_abs().into())?;
        print("written to all partitions", &spread);
        if let Some(data) = &self.kafka.data {
            let bytes = stored_bytes(data, &names.hand_off)?;
            let each = bytes as f64 / spread.records as f64;
            println!("stored: {bytes} B, {each:.1} B each");
        }
        for (what, reads) in [("read", 1), ("read and skipped", 2)] {
            let (took, received) = self.read(&config, reads)?;
            print(what, &took);
            println!("  ({received} of them for this node)");
        }
        Ok(())
    }
}
