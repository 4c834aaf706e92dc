//! What one kind of conversation costs the events of all others: nodes behind a real Kafka, small events at a steady
//! rate, and the same beside the other kind, in turn. Each round also has a *control*: as many events as those of the
//! other kind, of ordinary conversations, so that what they cost as events, and what the machine adds, is known in the
//! same run. The control of hostile clients are the same clients at another node on the same core, which nobody else
//! uses.
//!
//! Members come from a conversation service in this process. Nodes run on one core; broker, clients and this process on
//! the other.

mod load;
mod service;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use delivery_testkit::publisher::create_topics;
use serde_json::Value;

use crate::conductor::{Worker, number};
use crate::generator::{PushPlan, conversation};
use crate::hostile::Hostility;
use crate::kafka::node::{READY_MAX, RunTopics, ServedNode};
use crate::latency::{Latencies, Percentiles};
use crate::program::beside;
use crate::usage;

use load::{Extra, SmallEvents};
use service::{BesideServices, Known};

/// For all events of a phase to arrive.
const ARRIVAL_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// Pause between phases.
const SETTLE: Duration = Duration::from_secs(1);
/// Number of the first user without a session.
const ABSENT: usize = 1_000_000;
/// The large conversation.
const LARGE: usize = 9_000_000;
/// The first of the ordinary conversations of the control, with one member on each node.
const ORDINARY: usize = 9_050_000;
/// The first of the unknown conversations.
const UNKNOWN: usize = 9_100_000;

/// What the small events run beside.
#[derive(Clone, Copy, Debug, clap::Subcommand)]
pub enum Neighbour {
    /// A conversation with many members, few of them connected.
    Large {
        /// Its members.
        #[arg(long, default_value_t = 60_000)]
        members: usize,
        /// Those who are connected: the same number to each node.
        #[arg(long, default_value_t = 100)]
        connected: usize,
        /// Its events per second.
        #[arg(long, default_value_t = 150)]
        rate: u64,
    },
    /// Conversations whose members cannot be fetched: the conversation service does not answer.
    Unknown {
        /// Such conversations in each partition.
        #[arg(long, default_value_t = 10)]
        of_partition: usize,
        /// Events per second of each of them.
        #[arg(long, default_value_t = 1)]
        rate: u64,
    },
    /// Clients of the first node that behave badly.
    Hostile {
        /// What they do.
        #[arg(long)]
        kind: Hostility,
        /// How many.
        #[arg(long, default_value_t = 1800)]
        clients: usize,
        /// Bytes that each of them may send in a second, if that is what they do.
        #[arg(long, default_value_t = 65_536)]
        bytes_per_s: usize,
    },
}

/// Measures small events with and without a neighbour.
#[derive(Clone, Debug, clap::Parser)]
pub struct BesidePlan {
    #[command(subcommand)]
    neighbour: Neighbour,
    /// `host:port` of a broker.
    #[arg(long, env = "KAFKA_BROKERS", global = true, default_value = "127.0.0.1:9092")]
    brokers: String,
    /// The `delivery` program; by default the one in the folder of this one.
    #[arg(long, global = true, default_value_os_t = beside("delivery"))]
    program: PathBuf,
    /// Nodes: one that reads every partition, or two that share them.
    #[arg(long, global = true, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
    nodes: u8,
    /// Partitions of the events.
    #[arg(long, global = true, default_value_t = 4)]
    partitions: i32,
    /// Small events per second, each for a session on each node.
    #[arg(long, global = true, default_value_t = 500)]
    small_rate: u64,
    /// Sessions of each node that get small events.
    #[arg(long, global = true, default_value_t = 500)]
    sessions: usize,
    /// Seconds of each phase.
    #[arg(long, global = true, default_value_t = 10)]
    seconds: u64,
    /// Seconds before a phase with the neighbour in which it sends events, and as long a pause before one without:
    /// until as many records wait as ever do. By default longer than `ROUTE_RETRY_MAX` if records wait.
    #[arg(long, global = true)]
    ramp: Option<u64>,
    /// Rounds, each of one phase without the neighbour, one beside the control, and one beside the neighbour.
    #[arg(long, global = true, default_value_t = 3)]
    rounds: usize,
    /// Seconds of warm-up: a broker is a JVM that compiles.
    #[arg(long, global = true, default_value_t = 20)]
    warm_up: u64,
    /// Core of the nodes.
    #[arg(long, global = true, default_value_t = 0)]
    server_core: usize,
    /// Core of everything else.
    #[arg(long, global = true, default_value_t = 1)]
    client_core: usize,
}

/// What the small events of a phase run beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// As many events as those of the neighbour, of ordinary conversations; or hostile clients at another node.
    Control,
    Neighbour,
}

impl Beside {
    const ALL: [Self; 3] = [Self::Nothing, Self::Control, Self::Neighbour];

    fn label(self) -> &'static str {
        match self {
            Self::Nothing => "without",
            Self::Control => "control",
            Self::Neighbour => "beside",
        }
    }
}

/// What a phase found.
struct Phase {
    latency: Latencies,
    /// Processor time of all routers, ns.
    routers_ns: u64,
    nodes_ns: u64,
    /// Events of the neighbour.
    extra: u64,
    wrong: f64,
    /// Memory of the first node, and its bound, bytes.
    memory: (f64, f64),
    /// What the hostile clients did.
    hostile: Option<Value>,
}

/// The process of the hostile clients.
struct Hostile(Worker);

impl Hostile {
    /// Ends it, and returns what it did.
    fn end(mut self) -> io::Result<Value> {
        self.0.tell("quit")?;
        self.0.expect("opened")
    }
}

struct World {
    plan: BesidePlan,
    nodes: Vec<ServedNode>,
    /// For the control of hostile clients.
    another: Option<ServedNode>,
    small_events: SmallEvents,
    extra: Extra,
    /// One for each node.
    small: Vec<Worker>,
    _connected: Vec<Worker>,
    _services: tokio::runtime::Runtime,
}

impl World {
    fn start(plan: &BesidePlan) -> io::Result<Self> {
        usage::pin(plan.client_core)?;
        let topics = RunTopics::new();
        let read = [&*topics.messages, &*topics.conversations];
        create_topics(&plan.brokers, &read, plan.partitions, &[])?;
        let (small, connected) = (plan.sessions, plan.connected_to_each());
        let first_connected = usize::from(plan.nodes) * small;
        let known = Known {
            small,
            nodes: usize::from(plan.nodes),
            large: match plan.neighbour {
                Neighbour::Large { members, .. } => members,
                Neighbour::Unknown { .. } | Neighbour::Hostile { .. } => 0,
            },
            connected: first_connected..first_connected + usize::from(plan.nodes) * connected,
        };
        let (services, address) = BesideServices::serve(known)?;
        let environment = [
            ("CONV_SVC_ADDR", address.clone()),
            ("MSG_SVC_ADDR", address),
            ("CONNECTIONS_MAX", "18000".to_owned()),
        ];
        usage::pin(plan.server_core)?;
        let started = (1..=plan.nodes).map(|number| {
            let (program, brokers) = (&plan.program, &plan.brokers);
            ServedNode::start(program, brokers, &topics, (number, plan.nodes), &environment)
        });
        let nodes: io::Result<Vec<_>> = started.collect();
        let another = match plan.neighbour {
            Neighbour::Hostile { .. } => {
                let topics = RunTopics::of_another();
                let read = [&*topics.messages, &*topics.conversations];
                create_topics(&plan.brokers, &read, plan.partitions, &[])?;
                let (program, brokers) = (&plan.program, &plan.brokers);
                Some(ServedNode::start(program, brokers, &topics, (1, 1), &environment)?)
            }
            Neighbour::Large { .. } | Neighbour::Unknown { .. } => None,
        };
        usage::pin(plan.client_core)?;
        let (mut nodes, mut another) = (nodes?, another);
        nodes.iter_mut().chain(&mut another).try_for_each(ServedNode::wait_until_ready)?;
        let from = Instant::now();
        while owned(&nodes, &topics)? != plan.partitions as usize * usize::from(plan.nodes == 2) {
            if from.elapsed() > READY_MAX {
                return Err(io::Error::other("not one owner for each partition"));
            }
            std::thread::sleep(POLL);
        }
        let connect = |first: usize, sessions: usize| -> io::Result<Vec<Worker>> {
            let nodes = nodes.iter().enumerate();
            let clients =
                nodes.map(|(at, node)| plan.connect(node, first + at * sessions, sessions));
            clients.collect()
        };
        let small_clients = connect(0, small)?;
        let connected = connect(first_connected, connected)?;
        // The beginnings of all sessions are read by both nodes.
        std::thread::sleep(SETTLE);
        let small_events = SmallEvents::new(&plan.brokers, &topics)?;
        let (plan, extra) = (plan.clone(), Extra::new(plan, &topics)?);
        let (small, _connected, _services) = (small_clients, connected, services);
        Ok(Self { plan, nodes, another, small_events, extra, small, _connected, _services })
    }

    fn used(&self) -> io::Result<(u64, u64)> {
        let (mut routers, mut nodes) = (0, 0);
        for node in &self.nodes {
            routers += usage::threads_ns(node.pid(), "router-")?;
            nodes += usage::process_ns(node.pid())?;
        }
        Ok((routers, nodes))
    }

    /// `ramp`: see [`BesidePlan::ramp`].
    fn phase(&mut self, seconds: u64, beside: Beside, ramp: Duration) -> io::Result<Phase> {
        let stopped = Arc::new(AtomicBool::new(false));
        let extra = (beside != Beside::Nothing).then(|| self.extra.start(beside, &stopped));
        let met = match beside {
            Beside::Nothing => None,
            Beside::Control => self.another.as_ref(),
            Beside::Neighbour => Some(&self.nodes[0]),
        };
        let hostile = met.map(|node| self.plan.hostile(node)).transpose()?.flatten();
        std::thread::sleep(SETTLE + ramp);
        ask(&mut self.small, "reset", "done")?;
        let (before, sent_before) = (self.used()?, self.extra.sent());
        let BesidePlan { small_rate, sessions, .. } = self.plan;
        let events = small_rate * seconds;
        let pushes = PushPlan {
            group: 1,
            each: 1,
            burst: 1,
            events,
            rate: small_rate,
            at_once: 1,
            bytes: 128,
        };
        let small = self.small_events.push(pushes, sessions);
        let extra_events = self.extra.sent() - sent_before;
        let memory = met.unwrap_or(&self.nodes[0]).memory()?;
        let hostile = hostile.map(Hostile::end).transpose()?;
        stopped.store(true, Ordering::Relaxed);
        if let Some(extra) = extra {
            extra.join().map_err(|_| io::Error::other("the load panicked"))??;
        }
        small?;
        let (from, wanted) = (Instant::now(), (events * u64::from(self.plan.nodes)) as f64);
        let reports = loop {
            let reports = ask(&mut self.small, "report", "messages")?;
            if sum(&reports, "messages") >= wanted || from.elapsed() > ARRIVAL_MAX {
                break reports;
            }
            std::thread::sleep(POLL);
        };
        let after = self.used()?;
        let wrong = ["gaps", "duplicates", "reordered", "unstamped", "closed"];
        let wrong = wrong.iter().map(|member| sum(&reports, member)).sum::<f64>()
            + (wanted - sum(&reports, "messages")).abs();
        let mut latency = Latencies::default();
        for mut answer in ask(&mut self.small, "latency", "latency")? {
            latency.add(&serde_json::from_value(answer["latency"].take())?);
        }
        let (routers_ns, nodes_ns) = (after.0 - before.0, after.1 - before.1);
        Ok(Phase { latency, routers_ns, nodes_ns, extra: extra_events, wrong, memory, hostile })
    }
}

/// Partitions of the messages that have an owner. Without a group, nobody owns them.
fn owned(nodes: &[ServedNode], topics: &RunTopics) -> io::Result<usize> {
    if nodes.len() == 1 {
        return Ok(0);
    }
    nodes.iter().map(|node| Ok(node.owned(&topics.messages)?.len())).sum()
}

fn ask(clients: &mut [Worker], word: &str, member: &str) -> io::Result<Vec<Value>> {
    clients.iter_mut().try_for_each(|client| client.tell(word))?;
    clients.iter().map(|client| client.expect(member)).collect()
}

fn sum(answers: &[Value], member: &str) -> f64 {
    answers.iter().map(|answer| number(answer, member)).sum()
}

impl BesidePlan {
    fn connected_to_each(&self) -> usize {
        match self.neighbour {
            Neighbour::Large { connected, .. } => (connected / usize::from(self.nodes)).max(1),
            // For the control.
            Neighbour::Unknown { .. } | Neighbour::Hostile { .. } => 1,
        }
    }

    /// Starts the hostile clients. They give way to all others on their core.
    fn hostile(&self, node: &ServedNode) -> io::Result<Option<Hostile>> {
        let Neighbour::Hostile { kind, clients, bytes_per_s } = self.neighbour else {
            return Ok(None);
        };
        let kind = clap::ValueEnum::to_possible_value(&kind).expect("no kind is hidden");
        let worker = Worker::start(&[
            "nice".to_owned(),
            beside("bench-hostile").display().to_string(),
            format!("--server={}", node.address),
            format!("--grpc={}", node.grpc),
            format!("--kind={}", kind.get_name()),
            format!("--clients={clients}"),
            format!("--bytes-per-s={bytes_per_s}"),
        ])?;
        Ok(Some(Hostile(worker)))
    }

    fn connect(&self, node: &ServedNode, first: usize, sessions: usize) -> io::Result<Worker> {
        let client = Worker::start(&[
            beside("bench-client").display().to_string(),
            format!("--server={}", node.address),
            format!("--first={first}"),
            format!("--sessions={sessions}"),
            format!("--core={}", self.client_core),
        ])?;
        let dialed = client.expect("dialed")?;
        if number(&dialed, "failed") > 0.0 {
            return Err(io::Error::other(format!("not all sessions opened: {dialed}")));
        }
        Ok(client)
    }

    /// Runs the phases and prints what they found.
    ///
    /// # Errors
    /// Kafka or a program failed.
    pub fn run(&self) -> io::Result<()> {
        let mut world = World::start(self)?;
        // Small conversations are fetched, and the broker compiles.
        world.phase(self.warm_up.max(1), Beside::Nothing, Duration::ZERO)?;
        world.phase(self.warm_up.max(1) / 2 + 1, Beside::Neighbour, Duration::ZERO)?;
        let ramp = Duration::from_secs(self.ramp.unwrap_or(match self.neighbour {
            Neighbour::Large { .. } => 0,
            Neighbour::Hostile { .. } => 5,
            Neighbour::Unknown { .. } => 32,
        }));
        println!(
            "{} nodes, {} small events/s, beside {:?}",
            self.nodes, self.small_rate, self.neighbour
        );
        println!(
            "round    p50, ms   p99, ms   p99.9, ms   routers, µs CPU/event of the neighbour   wrong"
        );
        let mut all = Beside::ALL.map(|_| Latencies::default());
        let mut ratios = Beside::ALL.map(|_| Vec::new());
        for round in 1..=self.rounds {
            let (mut idle_ns, mut p99s) = (0, [0.0; Beside::ALL.len()]);
            for (index, beside) in Beside::ALL.into_iter().enumerate() {
                // What waits of the neighbour of the round before is given up first. The control of events has nothing
                // to wait for.
                let is_hostile = matches!(self.neighbour, Neighbour::Hostile { .. });
                let ramp = match beside {
                    Beside::Control if !is_hostile => Duration::ZERO,
                    _ => ramp,
                };
                let phase = world.phase(self.seconds, beside, ramp)?;
                all[index].add(&phase.latency);
                let percentiles = phase.latency.percentiles();
                p99s[index] = percentiles.p99;
                if beside == Beside::Nothing {
                    idle_ns = phase.routers_ns;
                }
                let more = phase.routers_ns.saturating_sub(idle_ns) as f64 / 1e3;
                let cost = match phase.extra {
                    0 => "-".to_owned(),
                    extra => format!("{:.1}", more / extra as f64),
                };
                let busy = phase.nodes_ns as f64 / 1e7 / self.seconds as f64;
                println!(
                    "{round} {:<8} {}   {cost:>8}   {}   (nodes {busy:.0} % of a core)",
                    beside.label(),
                    shown(percentiles),
                    phase.wrong
                );
                if let Some(hostile) = phase.hostile {
                    let (used, bound) = phase.memory;
                    println!(
                        "           hostile clients: {hostile}; memory of their node: {:.0} MiB of {:.0}",
                        used / 1_048_576.0,
                        bound / 1_048_576.0
                    );
                }
            }
            ratios.iter_mut().zip(p99s).for_each(|(ratios, p99)| ratios.push(p99 / p99s[0]));
        }
        for (beside, latency) in Beside::ALL.iter().zip(all) {
            println!("all {:<8} {}", beside.label(), shown(latency.percentiles()));
        }
        let [_, control, beside] = ratios.map(median);
        println!(
            "p99, median of the rounds: beside / without {beside:.2}, control / without {control:.2}"
        );
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[upper],
        _ => f64::midpoint(values[upper - 1], values[upper]),
    }
}

fn shown(Percentiles { p50, p99, p999, .. }: Percentiles) -> String {
    format!("{:>8.2}  {:>8.2}  {:>8.2}", p50 / 1e3, p99 / 1e3, p999 / 1e3)
}

/// The number of the small conversation with this index.
fn small_number(index: usize) -> usize {
    conversation(1, index)
}
