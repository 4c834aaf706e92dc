//! One `delivery serve`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use delivery_testkit::ports::free_port;

use super::{POLL, RunTopics, ServedConfig};
use crate::admin::AdminPort;
use crate::program::Program;

/// For the start of a node, and for its partitions.
pub(super) const READY_MAX: Duration = Duration::from_secs(60);
/// Metric: records that the routers have read.
const RECORDS: &str = "delivery_router_records_total";
/// Metric: records that the membership cache has read. Every node reads them all.
const MEMBERSHIP_RECORDS: &str = "delivery_kafka_membership_records_total";
/// Metric: open sessions.
const SESSIONS: &str = "delivery_shard_sessions";
/// Metric with a sample for each partition that the node owns.
const LAG: &str = "kafka_consumer_lag";

/// A running `delivery serve`.
pub(super) struct ServedNode {
    server: Program,
    /// Address of its public listener.
    pub(super) address: SocketAddr,
    admin: AdminPort,
}

impl ServedNode {
    /// Starts node `number` of a run. It is not ready yet.
    pub(super) fn start(config: &ServedConfig, topics: &RunTopics, number: u8) -> io::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let admin = AdminPort(free_port());
        let mode = if config.nodes == 1 { "broadcast" } else { "group" };
        let server = Program::start(
            "delivery",
            None,
            &[config.program.display().to_string(), "serve".to_owned()],
            &[
                ("INSTANCE_ID", format!("bench-{number}")),
                ("HTTP_PORT", address.to_string()),
                ("HTTP_ADDR", format!("127.0.0.1:{}", admin.0)),
                ("GRPC_ADDR", "127.0.0.1:0".to_owned()),
                ("SHARDS", "1".to_owned()),
                ("CONNECTIONS_MAX", "14000".to_owned()),
                ("AUTH_MODE", "trust".to_owned()),
                ("ECHO", "true".to_owned()),
                ("CONNECTIONS_PER_ADDRESS", "0".to_owned()),
                ("HANDSHAKES_PER_SECOND", "0".to_owned()),
                ("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0".to_owned()),
                ("SO_SNDBUF", "128KiB".to_owned()),
                ("ROUTING_MODE", mode.to_owned()),
                ("KAFKA_BROKERS", config.brokers.clone()),
                ("KAFKA_TOPICS", format!("{},{}", topics.messages, topics.conversations)),
                ("KAFKA_GROUP", topics.messages.clone()),
                ("SESSIONS_TOPIC", topics.sessions.clone()),
                ("HANDOFF_TOPIC", topics.hand_offs.clone()),
                ("LOG_LEVEL", "warn".to_owned()),
            ],
        )?;
        Ok(Self { server, address, admin })
    }

    /// Waits until it is ready.
    pub(super) fn wait_until_ready(&mut self) -> io::Result<()> {
        let admin = self.admin;
        self.server.wait_until(READY_MAX, || admin.is_ready())
    }

    pub(super) fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Records that its routers have read.
    pub(super) fn records(&self) -> io::Result<u64> {
        Ok(self.admin.metric(RECORDS, "")? as u64)
    }

    /// Open sessions.
    pub(super) fn sessions(&self) -> io::Result<usize> {
        Ok(self.admin.metric(SESSIONS, "")? as usize)
    }

    /// Waits until its membership cache has read this many records.
    pub(super) fn wait_until_followed(&self, records: u64) -> io::Result<()> {
        while (self.admin.metric(MEMBERSHIP_RECORDS, "")? as u64) < records {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The partitions of a topic that it owns.
    pub(super) fn owned(&self, topic: &str) -> io::Result<Vec<i32>> {
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
