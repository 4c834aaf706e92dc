//! Kafka inside the process: librdkafka's mock cluster.

use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

use crate::app::config::Name;

/// Partitions of each topic: more than one, so that it behaves as the real one.
const PARTITIONS: i32 = 3;

/// Ends with this value.
pub(super) struct EmbeddedKafka(MockCluster<'static, DefaultProducerContext>);

impl EmbeddedKafka {
    /// One broker on a free port of the loopback address, with these topics.
    ///
    /// # Errors
    /// The library could not start it.
    pub(super) fn start(topics: &[Name]) -> Result<Self, String> {
        let failed = |error| format!("the embedded Kafka did not start: {error}");
        let cluster = MockCluster::new(1).map_err(failed)?;
        for topic in topics {
            cluster.create_topic(topic.as_str(), PARTITIONS, 1).map_err(failed)?;
        }
        Ok(Self(cluster))
    }

    /// Where it listens.
    pub(super) fn brokers(&self) -> String {
        self.0.bootstrap_servers()
    }
}
