//! Embedded Kafka: the mock cluster of librdkafka.

use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

use crate::app::config::Name;

/// Partitions per topic. More than one, as in a real cluster.
const PARTITIONS: i32 = 3;

/// The running mock cluster. Dropping it stops it.
pub(super) struct EmbeddedKafka(MockCluster<'static, DefaultProducerContext>);

impl EmbeddedKafka {
    /// Starts one broker with these topics on a free loopback port.
    ///
    /// # Errors
    /// librdkafka could not start it.
    pub(super) fn start(topics: &[Name]) -> Result<Self, String> {
        let failed = |error| format!("the embedded Kafka did not start: {error}");
        let cluster = MockCluster::new(1).map_err(failed)?;
        for topic in topics {
            cluster.create_topic(topic.as_str(), PARTITIONS, 1).map_err(failed)?;
        }
        Ok(Self(cluster))
    }

    /// The address of the broker.
    pub(super) fn brokers(&self) -> String {
        self.0.bootstrap_servers()
    }
}
