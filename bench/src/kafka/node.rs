//! One `delivery serve`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use delivery_testkit::ports::free_port;

use super::POLL;
use crate::admin::AdminPort;
use crate::program::Program;

/// For the start of a node, and for its partitions.
pub(crate) const READY_MAX: Duration = Duration::from_secs(60);
/// Metric: records that the routers have read.
const RECORDS: &str = "delivery_router_records_total";
/// Metric: records that the membership cache has read. Every node reads them all.
const MEMBERSHIP_RECORDS: &str = "delivery_kafka_membership_records_total";
/// Metric: open sessions.
const SESSIONS: &str = "delivery_shard_sessions";
/// Metric with a sample for each partition that the node owns.
const LAG: &str = "kafka_consumer_lag";

/// Names of the topics; no other run uses them.
pub(crate) struct RunTopics {
    pub(crate) messages: String,
    pub(crate) conversations: String,
    pub(crate) sessions: String,
    pub(crate) hand_offs: String,
    pub(crate) round_trips: String,
}

impl RunTopics {
    pub(crate) fn new() -> Self {
        Self::of(&std::process::id().to_string())
    }

    /// The topics of a node that reads nothing of the others'.
    pub(crate) fn of_another() -> Self {
        Self::of(&format!("{}-another", std::process::id()))
    }

    fn of(run: &str) -> Self {
        Self {
            messages: format!("messaging.bench-{run}"),
            // A topic of its own, as in a deployment: the membership cache reads it as well.
            conversations: format!("conversation.bench-{run}"),
            sessions: format!("sessions.bench-{run}"),
            hand_offs: format!("handoff.bench-{run}"),
            round_trips: format!("round-trip.bench-{run}"),
        }
    }
}

/// A running `delivery serve`.
pub(crate) struct ServedNode {
    server: Program,
    /// Address of its public listener.
    pub(crate) address: SocketAddr,
    /// Address of its gRPC port.
    pub(crate) grpc: SocketAddr,
    admin: AdminPort,
}

impl ServedNode {
    /// Starts node `number` of the `nodes` of a run, with `more` settings. It is not ready yet.
    pub(crate) fn start(
        program: &Path,
        brokers: &str,
        topics: &RunTopics,
        (number, nodes): (u8, u8),
        more: &[(&'static str, String)],
    ) -> io::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let grpc = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let admin = AdminPort(free_port());
        let mode = if nodes == 1 { "broadcast" } else { "group" };
        let mut environment = vec![
            ("INSTANCE_ID", format!("bench-{number}")),
            ("HTTP_PORT", address.to_string()),
            ("HTTP_ADDR", format!("127.0.0.1:{}", admin.0)),
            ("GRPC_ADDR", grpc.to_string()),
            ("SHARDS", "1".to_owned()),
            ("CONNECTIONS_MAX", "14000".to_owned()),
            ("AUTH_MODE", "trust".to_owned()),
            ("ECHO", "true".to_owned()),
            ("CONNECTIONS_PER_ADDRESS", "0".to_owned()),
            ("HANDSHAKES_PER_SECOND", "0".to_owned()),
            ("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0".to_owned()),
            ("SO_SNDBUF", "128KiB".to_owned()),
            ("ROUTING_MODE", mode.to_owned()),
            ("KAFKA_BROKERS", brokers.to_owned()),
            ("KAFKA_TOPICS", format!("{},{}", topics.messages, topics.conversations)),
            ("KAFKA_GROUP", topics.messages.clone()),
            ("SESSIONS_TOPIC", topics.sessions.clone()),
            ("HANDOFF_TOPIC", topics.hand_offs.clone()),
            ("LOG_LEVEL", "warn".to_owned()),
        ];
        environment.extend_from_slice(more);
        let command = [program.display().to_string(), "serve".to_owned()];
        let server = Program::start("delivery", None, &command, &environment)?;
        Ok(Self { server, address, grpc, admin })
    }

    /// Waits until it is ready.
    pub(crate) fn wait_until_ready(&mut self) -> io::Result<()> {
        let admin = self.admin;
        self.server.wait_until(READY_MAX, || admin.is_ready())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Memory that it uses, and the bound that it computes, bytes.
    pub(crate) fn memory(&self) -> io::Result<(f64, f64)> {
        let bound = self.admin.metrics("delivery_memory_bound_bytes")?;
        let bound = bound.iter().map(|(_, bytes)| bytes).sum();
        Ok((self.admin.metric("process_resident_memory_bytes", "")?, bound))
    }

    /// Records that its routers have read.
    pub(crate) fn records(&self) -> io::Result<u64> {
        Ok(self.admin.metric(RECORDS, "")? as u64)
    }

    /// Open sessions.
    pub(crate) fn sessions(&self) -> io::Result<usize> {
        Ok(self.admin.metric(SESSIONS, "")? as usize)
    }

    /// Waits until its membership cache has read this many records.
    pub(crate) fn wait_until_followed(&self, records: u64) -> io::Result<()> {
        while (self.admin.metric(MEMBERSHIP_RECORDS, "")? as u64) < records {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The partitions of a topic that it owns.
    pub(crate) fn owned(&self, topic: &str) -> io::Result<Vec<i32>> {
        let of_topic = format!(r#"topic="{topic}""#);
        let samples = self.admin.metrics(LAG)?;
        let of_topic = samples.iter().filter(|(labels, _)| labels.contains(&of_topic));
        Ok(of_topic.filter_map(|(labels, _)| partition_of(labels)).collect())
    }
}

/// The partition in the labels of a sample.
fn partition_of(labels: &str) -> Option<i32> {
    labels.split_once(r#"partition=""#)?.1.split_once('"')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_found_among_the_labels() {
        let labels = r#"{service="delivery-service",topic="messages",partition="12"}"#;
        assert_eq!(partition_of(labels), Some(12));
        assert_eq!(partition_of(r#"{topic="messages"}"#), None);
    }
}
