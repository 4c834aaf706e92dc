//! Many sessions in one server: cost per session, rate of connects, completeness of delivery, and the
//! effects of storms and stalled readers.

pub(super) mod fleet;
mod heartbeat;
mod hold;
mod memory;
mod node;
mod returning;
mod services;
mod stall;
mod storm;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
pub use services::Presence;

use self::fleet::{Fleet, FleetConfig};
use self::node::Node;
use self::services::Services;
use super::child::Worker;
use crate::program::beside;

/// Average sessions per shard. The kernel spreads connections unevenly over the listeners, and a shard's
/// file table cannot be larger than `RLIMIT_NOFILE`.
const PER_SHARD: usize = 17_900;
/// Size of a shard's connection table, limited by `RLIMIT_NOFILE`.
const CONNECTIONS_PER_SHARD: usize = 19_600;
/// Pause until temporary memory has been freed.
const SETTLE: Duration = Duration::from_secs(5);

/// A run of `bench-scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScaleWork {
    /// Cost, speed and completeness of many sessions, while some reconnect.
    Hold,
    /// All sessions are dropped and come back within five seconds, with many conversations each.
    Return,
    /// What a storm of connects and disconnects leaves behind.
    Storm,
    /// Memory that clients which do not read take.
    Stall,
    /// Latency with heartbeats and without.
    Heartbeat,
}

/// Many sessions in one server.
#[derive(Clone, Debug, clap::Parser)]
pub struct ScalePlan {
    /// What to measure.
    #[arg(value_enum, default_value = "hold")]
    pub work: ScaleWork,
    /// Number of sessions.
    #[arg(long, default_value_t = 200_000)]
    pub sessions: usize,
    /// Sessions from which memory growth is counted; the idle sessions of a storm.
    #[arg(long, default_value_t = 20_000)]
    pub base: usize,
    /// Where sessions are registered.
    #[arg(long, value_enum, default_value = "redis")]
    pub presence: Presence,
    /// Reconnecting sessions catch up, from a message and a conversation service.
    #[arg(long)]
    pub catch_up: bool,
    /// Connects and disconnects of a storm.
    #[arg(long, default_value_t = 1_000_000)]
    pub storm: usize,
    /// Seconds of pushing while 1 % reconnect every ten seconds; 0: one event to each only.
    #[arg(long, default_value_t = 0)]
    pub push_s: u64,
    /// Events per second.
    #[arg(long, default_value_t = 5_000)]
    pub rate: u64,
    /// Recipients of each event.
    #[arg(long, default_value_t = 1)]
    pub group: usize,
    /// Conversations of each session (`return`).
    #[arg(long, default_value_t = 100)]
    pub conversations: usize,
    /// Sessions come back with a cursor (`return`).
    #[arg(long)]
    pub cursors: bool,
    /// Nodes in group mode; with two, sessions of the first come back to the second (`return`).
    #[arg(long, default_value_t = 1)]
    pub nodes: usize,
    /// The node is killed when its sessions are dropped, and started again (`return`).
    #[arg(long)]
    pub kill: bool,
    /// Kafka brokers; by default starts the Kafka that `tests/run setup` has fetched.
    #[arg(long)]
    pub brokers: Option<String>,
    /// More settings of the node, NAME=VALUE.
    #[arg(long = "set")]
    pub settings: Vec<String>,
    /// The node's program; by default the one in the folder of this program.
    #[arg(long, default_value_os_t = beside("delivery"))]
    pub node: PathBuf,
    /// Folder for the report and the logs.
    #[arg(long, default_value = "results")]
    pub output: PathBuf,
}

/// Runs a plan and writes its report.
///
/// # Errors
/// A program does not start or answer, or sessions do not open.
pub fn run(plan: &ScalePlan) -> io::Result<()> {
    fs::create_dir_all(&plan.output)?;
    let mut report = ScaleReport::default();
    let outcome = match plan.work {
        ScaleWork::Hold => hold::run(plan, &mut report),
        ScaleWork::Return => returning::run(plan, &mut report),
        ScaleWork::Storm => storm::run(plan, &mut report),
        ScaleWork::Stall => stall::run(plan, &mut report),
        ScaleWork::Heartbeat => heartbeat::run(plan, &mut report),
    };
    // The report is kept even after a failure.
    let name = format!("{:?}{}-{}.md", plan.work, plan.variant(), plan.sessions).to_lowercase();
    fs::write(plan.output.join(name), &report.text)?;
    println!("{}", report.text);
    outcome
}

/// The findings, printed as they are added.
#[derive(Debug, Default)]
struct ScaleReport {
    text: String,
}

impl ScaleReport {
    fn note(&mut self, line: &str) {
        eprintln!("{line}");
        let _ = writeln!(self.text, "- {line}");
    }

    fn table(&mut self, columns: &[&str]) {
        let line = format!("\n| {} |\n|{}", columns.join(" | "), " ---: |".repeat(columns.len()));
        eprintln!("{line}");
        let _ = writeln!(self.text, "{line}");
    }

    fn row(&mut self, values: &[f64]) {
        let values: Vec<_> = values.iter().map(|value| format!("{value:.0}")).collect();
        let line = format!("| {} |", values.join(" | "));
        eprintln!("{line}");
        let _ = writeln!(self.text, "{line}");
    }
}

impl ScalePlan {
    /// Tells the reports of `return` apart.
    fn variant(&self) -> String {
        let cursors = if self.cursors { "-cursors" } else { "" };
        let killed = if self.kill { "-killed" } else { "" };
        let nodes = if self.nodes > 1 { format!("-{}-nodes", self.nodes) } else { String::new() };
        format!("{cursors}{killed}{nodes}")
    }

    fn shards(&self) -> usize {
        self.sessions.div_ceil(PER_SHARD)
    }

    /// Starts a real node and the services around it.
    fn node(&self) -> io::Result<(Services, Node)> {
        let services = Services::start(
            &self.output,
            &beside("bench-backend"),
            self.brokers.as_deref(),
            self.presence,
            self.sessions,
        )?;
        let settings = self.settings_of(&services, self.catch_up);
        let node = Node::start(
            &self.output.join("delivery.log"),
            &self.node,
            self.shards(),
            &services,
            &settings,
            &self.more_settings(),
        )?;
        Ok((services, node))
    }

    /// The same with all neighbours, as the first of several nodes.
    fn node_with_neighbours(&self) -> io::Result<(Services, Node)> {
        let services = Services::start(
            &self.output,
            &beside("bench-backend"),
            self.brokers.as_deref(),
            Presence::Service,
            self.sessions,
        )?;
        let node = self.another_node(&services, 0)?;
        Ok((services, node))
    }

    /// Another node beside these services.
    fn another_node(&self, services: &Services, number: usize) -> io::Result<Node> {
        let plan = Self { presence: Presence::Service, ..self.clone() };
        let mut settings = plan.settings_of(services, true);
        settings.push(("INSTANCE_ID", format!("bench-{number}")));
        if self.nodes > 1 {
            settings.push(("ROUTING_MODE", "group".to_owned()));
        }
        let log = self.output.join(format!("delivery-{number}.log"));
        Node::start(&log, &self.node, self.shards(), services, &settings, &self.more_settings())
    }

    fn settings_of(&self, services: &Services, neighbours: bool) -> Vec<(&'static str, String)> {
        let mut settings = vec![
            // One conversation per session exceeds the default.
            ("MEMBERSHIP_CACHE_MAX", (2 * self.sessions).max(200_000).to_string()),
        ];
        let mode = match self.presence {
            Presence::Redis => "redis",
            Presence::Service => "service",
            Presence::Off => "off",
        };
        settings.push(("PRESENCE_MODE", mode.to_owned()));
        if self.presence == Presence::Service {
            settings.push(("PRESENCE_SVC_ADDR", services.neighbours.clone()));
        }
        if neighbours {
            settings.push(("MSG_SVC_ADDR", services.neighbours.clone()));
            settings.push(("CONV_SVC_ADDR", services.neighbours.clone()));
        }
        settings
    }

    fn more_settings(&self) -> Vec<(String, String)> {
        let pairs = self.settings.iter().filter_map(|setting| setting.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Clients of a node, not connected yet.
    fn clients_of(&self, node: &Node, arguments: Vec<String>) -> Fleet {
        Fleet::new(FleetConfig {
            program: beside("bench-client"),
            server: node.address.clone(),
            tokens: true,
            arguments,
        })
    }

    /// Starts Delivery without Kafka, tokens and presence on core 0, and creates its clients on core
    /// 1.
    fn parts(&self, shards: usize, arguments: &[String]) -> io::Result<(Worker, Fleet)> {
        let mut command = vec![
            beside("bench-delivery").display().to_string(),
            format!("--shards={shards}"),
            format!("--connections={CONNECTIONS_PER_SHARD}"),
            "--core=0".to_owned(),
        ];
        command.extend(arguments.iter().cloned());
        let server = Worker::start(&command)?;
        let address = server.expect("ready")?["ready"].as_str().unwrap_or_default().to_owned();
        let fleet = Fleet::new(FleetConfig {
            program: beside("bench-client"),
            server: address,
            tokens: false,
            arguments: vec!["--core=1".to_owned()],
        });
        Ok((server, fleet))
    }
}
