//! `delivery sizing`: what a cluster would cost, computed.

use std::fmt::Write as _;

use clap::Args;

use super::terminal;
use crate::service::routing::kafka::sessions_property;
use crate::service::routing::sizing::{
    ClusterLoad, ConversationSize, GroupCosts, MemberSessions, NODES_COMPARED_MAX, RecordFlow,
    SessionsTopic, Turning, UnitCosts,
};

/// The help text.
pub const ABOUT: &str = "\
Computes what a cluster would cost: what its nodes write and read, their memory, and the time until a new node is \
ready.

The formulas, and what is not included, are in docs/sizing.md. Bytes are those in Kafka before compression.";

/// The arguments. The defaults are the example of docs/sizing.md.
#[derive(Args, Debug)]
pub struct SizingArguments {
    /// Nodes
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    nodes: u32,
    /// Users who have a session
    #[arg(long, default_value_t = 10_000_000)]
    users: u64,
    /// Sessions of each of them
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    devices: f64,
    /// Share of the members of a conversation who have a session
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    members_online: f64,
    /// Records of the topics of events per second
    #[arg(long, default_value_t = 20_000.0, value_parser = positive)]
    records: f64,
    /// Bytes of the value of a record
    #[arg(long, default_value_t = 400)]
    value_bytes: usize,
    /// Members of conversations, and the share of the records that belong to conversations of this size
    #[arg(
        long,
        value_name = "MEMBERS:SHARE",
        value_delimiter = ',',
        default_value = "2:60,10:30,100:9,1000:0.9,10000:0.09,100000:0.01",
        value_parser = conversation_size
    )]
    conversations: Vec<ConversationSize>,
    /// Sessions that begin per second; as many end
    #[arg(long, default_value_t = 5_000.0, value_parser = positive)]
    connects: f64,
    /// Partitions of all topics of events
    #[arg(long, default_value_t = 200)]
    partitions: u32,
    /// Partitions of the hand-off topic [default: four per node]
    #[arg(long)]
    hand_off_partitions: Option<u32>,
    /// Routers of a node
    #[arg(long, default_value_t = 1)]
    routers: u32,
    /// Replication factor of the topics
    #[arg(long, default_value_t = 3)]
    replication: u32,
    /// Share of the records that are in membership topics
    #[arg(long, default_value_t = 0.01, value_parser = positive)]
    membership_share: f64,
    /// delete.retention.ms of the sessions topic, s [default: that of a new topic]
    #[arg(long)]
    ends_kept_s: Option<f64>,
    /// max.compaction.lag.ms of the sessions topic, s [default: that of a new topic]
    #[arg(long)]
    uncompacted_s: Option<f64>,
    /// TAIL_AGE, s
    #[arg(long, default_value_t = 300.0, value_parser = positive)]
    tail_age_s: f64,
    /// Time until all nodes have applied a record of the sessions topic, s
    #[arg(long, default_value_t = 0.02, value_parser = positive)]
    lag_s: f64,
    /// CPU time, relative to the machine of docs/sizing.md
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    cpu: f64,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "not a number".to_owned())?;
    if number > 0.0 && f64::is_finite(number) { Ok(number) } else { Err("not above 0".to_owned()) }
}

fn conversation_size(text: &str) -> Result<ConversationSize, String> {
    let (members, share) = text.split_once(':').ok_or("not MEMBERS:SHARE, such as 10:30")?;
    Ok(ConversationSize { members: positive(members)?, share: positive(share)? })
}

/// A duration of a new sessions topic, s.
fn topic_seconds(property: &str) -> f64 {
    let value = sessions_property(property).and_then(|value| value.parse::<f64>().ok());
    value.expect("a number of our own") / 1_000.0
}

impl SizingArguments {
    fn load(&self) -> ClusterLoad {
        let hand_off_partitions = self.hand_off_partitions.unwrap_or(4 * self.nodes).max(1);
        ClusterLoad {
            nodes: f64::from(self.nodes),
            users: self.users.max(1) as f64,
            sessions: MemberSessions {
                online: self.members_online.min(1.0),
                devices: self.devices,
            },
            records: self.records,
            value_bytes: self.value_bytes,
            membership_share: self.membership_share,
            conversations: self.conversations.clone(),
            connects: self.connects,
            partitions: f64::from(self.partitions.max(1)),
            hand_off_partitions: f64::from(hand_off_partitions),
            routers: f64::from(self.routers.max(1)),
            replication: f64::from(self.replication.max(1)),
            sessions_topic: SessionsTopic {
                uncompacted_s: self
                    .uncompacted_s
                    .unwrap_or_else(|| topic_seconds("max.compaction.lag.ms")),
                ends_kept_s: self
                    .ends_kept_s
                    .unwrap_or_else(|| topic_seconds("delete.retention.ms")),
            },
            tail_age_s: self.tail_age_s,
            lag_s: self.lag_s,
            unit_costs: UnitCosts::default().times(self.cpu),
        }
    }
}

/// Prints the costs.
///
/// # Errors
/// The standard output takes no more.
pub fn run(arguments: &SizingArguments) -> Result<(), String> {
    terminal::print(&report(&arguments.load()))
}

/// With commas: `20,000`; a fraction with three digits in all.
fn amount(number: f64) -> String {
    if number < 100.0 && number.fract() != 0.0 {
        let digits = if number < 10.0 { 2 } else { 1 };
        return format!("{number:.digits$}");
    }
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// In decimal units: `4.05 MB`.
fn bytes(number: f64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.into_iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => {
            let number = number / size;
            let digits = if number < 10.0 { 2 } else { usize::from(number < 100.0) };
            format!("{number:.digits$} {unit}")
        }
        None => format!("{number:.0} B"),
    }
}

/// Lines of a label and right-aligned columns.
fn line(text: &mut String, label: &str, columns: &[String]) {
    let _ = write!(text, "{label:<44}");
    columns.iter().for_each(|column| {
        let _ = write!(text, "{column:>15}");
    });
    text.push('\n');
}

fn heading(text: &mut String, label: &str, columns: &[&str]) {
    text.push('\n');
    line(text, label, &columns.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>());
}

fn flow(text: &mut String, label: &str, flow: RecordFlow) {
    line(text, &format!("  {label}"), &[amount(flow.records), bytes(flow.bytes)]);
}

/// The costs as text.
fn report(load: &ClusterLoad) -> String {
    let group = load.group();
    let mut text = format!(
        "{} nodes, {} sessions, {} records/s of {} B to {} members on average, {} connects/s\n",
        amount(load.nodes),
        amount(load.sessions_online()),
        amount(load.records),
        load.value_bytes,
        amount(load.members()),
        amount(load.connects),
    );
    sizes(&mut text, load, &group);
    written(&mut text, &group);
    read(&mut text, load, &group);
    machines(&mut text, load, &group);
    turning(&mut text, load);
    text
}

fn turning(text: &mut String, load: &ClusterLoad) {
    heading(
        text,
        "`group` costs less than `broadcast` from … nodes",
        &["records read", "bytes read", "CPU", "brokers' bytes"],
    );
    let mut row = |label: &str, load: &ClusterLoad| {
        let Turning { records, bytes, cpu, brokers } = load.turning();
        let from = |nodes: Option<u32>| match nodes {
            Some(nodes) => amount(f64::from(nodes)),
            None => format!("> {}", amount(f64::from(NODES_COMPARED_MAX))),
        };
        line(text, label, &[records, bytes, cpu, brokers].map(from));
    };
    row("  these conversations", load);
    for size in &load.conversations {
        let only = ClusterLoad { conversations: vec![*size], ..load.clone() };
        row(&format!("  only conversations of {}", amount(size.members)), &only);
    }
}

fn sizes(text: &mut String, load: &ClusterLoad, group: &GroupCosts) {
    heading(
        text,
        "Hand-offs of one record, by members",
        &["hand-offs", "users in each", "B in each", "B in all"],
    );
    for size in &group.sizes {
        let columns = [
            amount(size.hand_offs),
            amount(size.named),
            amount(size.bytes),
            bytes(size.hand_offs * size.bytes),
        ];
        line(text, &format!("  {}", amount(size.size.members)), &columns);
        if size.is_too_large {
            text.push_str("    too large: sessions are closed with 4409 instead\n");
        }
    }
    line(text, "  average", &[amount(group.live.records / load.records)]);
}

fn written(text: &mut String, group: &GroupCosts) {
    heading(text, "Written by the cluster, per second", &["records", "bytes"]);
    flow(text, "hand-offs: live", group.live);
    flow(text, "hand-offs: replays to sessions that began", group.replays);
    flow(text, "hand-offs: what has passed", group.passed);
    flow(text, "beginnings of sessions", group.begun);
    flow(text, "ends of sessions", group.ended);
    flow(text, "leases", group.leases);
}

fn read(text: &mut String, load: &ClusterLoad, group: &GroupCosts) {
    heading(text, "Read by one node, per second", &["records", "bytes"]);
    flow(text, "`group`: its partitions", group.read_source);
    flow(text, "`group`: hand-offs to it", group.read_own);
    flow(text, "`group`: hand-offs to others, skipped", group.read_foreign);
    flow(text, "`group`: the sessions topic", group.read_sessions);
    flow(text, "`group`: all", group.read());
    flow(text, "`broadcast`: all partitions", load.broadcast().read);
    flow(text, "both: membership topics besides", load.membership());
    heading(text, "Network of the brokers, per second", &["written", "replicated", "sent", "all"]);
    for (mode, brokers) in
        [("group", load.brokers_group(group)), ("broadcast", load.brokers_broadcast())]
    {
        let parts =
            [brokers.written.bytes, brokers.replicated, brokers.sent.bytes, brokers.bytes()];
        line(text, &format!("  `{mode}`"), &parts.map(bytes));
    }
}

fn machines(text: &mut String, load: &ClusterLoad, group: &GroupCosts) {
    heading(text, "One node", &["`group`", "`broadcast`"]);
    let cores = |cores: f64| format!("{cores:.2} cores");
    line(text, "  CPU for this", &[cores(group.cpu), cores(load.broadcast().cpu)]);
    let memory = load.memory();
    line(text, "  table of sessions", &[bytes(memory.table), "none".to_owned()]);
    line(text, "  tails (at most TAIL_BYTES)", &[bytes(memory.tails), "none".to_owned()]);
    let kept = format!("{} s", amount(memory.newcomers_s));
    line(text, "  beginnings are kept for", &[kept, "none".to_owned()]);
    let topic = load.sessions_topic();
    heading(text, "A new node reads the sessions topic", &["records"]);
    line(text, "  beginnings of sessions", &[amount(topic.begun)]);
    line(text, "  ends that are still kept", &[amount(topic.ended)]);
    line(text, "  not compacted yet, at most", &[amount(topic.uncompacted)]);
    line(text, "  and is ready after, at most", &[format!("{:.0} s", load.ready_s())]);
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;

    fn load(arguments: &[&str]) -> ClusterLoad {
        let command = SizingArguments::augment_args(clap::Command::new("sizing"));
        let matches = command.get_matches_from([&["sizing"], arguments].concat());
        SizingArguments::from_arg_matches(&matches).unwrap().load()
    }

    #[test]
    fn page_shows_what_the_program_prints() {
        let page = include_str!("../../docs/sizing.md");
        for arguments in [&[] as &[&str], &["--hand-off-partitions", "32"]] {
            let report = report(&load(arguments));
            let command = ["$ delivery sizing", &arguments.join(" ")].join(" ");
            assert!(page.contains(command.trim()), "{command}");
            assert!(page.contains(&report), "docs/sizing.md does not show {command}\n{report}");
        }
    }

    #[test]
    fn arguments_are_taken() {
        let load = load(&["--nodes", "3", "--conversations", "2:1,5:3", "--devices", "1.5"]);
        assert_eq!((load.nodes, load.hand_off_partitions), (3.0, 12.0));
        assert!((load.members() - 4.25).abs() < 1e-9);
        assert!((load.sessions_online() - 1.5e7).abs() < 1e-9);
        assert_eq!(positive("-1"), Err("not above 0".to_owned()));
        assert!(conversation_size("10").is_err());
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0.5, 7.0, 42.5, 1_234_567.4].map(amount), ["0.50", "7", "42.5", "1,234,567"]);
        assert_eq!(
            [40.0, 4_050_000.0, 28.5e6, 3e11].map(bytes),
            ["40 B", "4.05 MB", "28.5 MB", "300 GB"]
        );
    }
}
