//! The two topics of the cluster: creates what is missing, and checks what exists.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use tokio::time::Instant;

use crate::service::backends::outage::Outage;
use crate::service::routing::kafka::client::{self, with_user_properties};
use crate::service::routing::kafka::topic_specs::{ClusterTopicNames, Findings, TopicSpec, specs};
use crate::service::routing::kafka::{KafkaConfig, KafkaStartError};

/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The topics as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterTopics {
    /// Partitions of the hand-off topic, at least one.
    pub hand_off_partitions: i32,
    /// What could be better, or could not be checked. Each with the command that mends it.
    pub warnings: Vec<String>,
}

/// Why the topics cannot be used. The text names the commands that mend it.
#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    /// This node may not create a topic.
    #[error("{setting}: cannot create the topic {topic}: {reason}. Create it with\n  {command}")]
    NotCreated {
        /// The setting that names it.
        setting: &'static str,
        /// The topic.
        topic: String,
        /// The broker's answer.
        reason: String,
        /// Creates the topic.
        command: String,
    },
    /// This node may not use a topic.
    #[error("{setting}: the topic {topic} is not visible to this node: {reason}. It must exist, and this node must have access to it:\n  {}", .commands.join("\n  "))]
    NotVisible {
        /// The setting that names it.
        setting: &'static str,
        /// The topic.
        topic: String,
        /// The broker's answer.
        reason: String,
        /// Create the topic, and give access. `NAME` stands for the user of this node.
        commands: [String; 2],
    },
    /// A topic would lose or misorder records as it is configured.
    #[error("{setting}: the topic {topic} is not usable: {}. If anything else uses it, set {setting} to another name. Only if it is a topic of Delivery, mend it with\n  {}", .problems.join("; "), .commands.join("\n  "))]
    Wrong {
        /// The setting that names it.
        setting: &'static str,
        /// The topic.
        topic: String,
        /// What is wrong, and why it matters.
        problems: Vec<String>,
        /// Mend the topic.
        commands: Vec<String>,
    },
    /// The client could not be created.
    #[error(transparent)]
    Client(#[from] KafkaStartError),
    /// The node stops.
    #[error("stopped")]
    Stopped,
}

/// Why an attempt has not succeeded.
enum Attempt {
    /// The brokers do not answer, or are not ready.
    Again(String),
    Failed(TopicsError),
}

fn again(error: impl fmt::Display) -> Attempt {
    Attempt::Again(error.to_string())
}

struct TopicsContext;

impl ClientContext for TopicsContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "topics of the cluster");
    }
}

struct TopicsClient {
    admin: AdminClient<TopicsContext>,
    runtime: tokio::runtime::Runtime,
}

impl TopicsClient {
    fn new(config: &KafkaConfig) -> Result<Self, KafkaStartError> {
        let mut properties = with_user_properties(client::common_properties(config), config);
        // A request for a missing topic must not create it with the broker's defaults.
        properties.set("allow.auto.create.topics", "false");
        let admin = AdminClient::from_config_and_context(&properties, TopicsContext)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        Ok(Self { admin, runtime })
    }

    /// Partitions of a topic. `None`: it does not exist.
    fn partitions(&self, topic: &TopicSpec<'_>) -> Result<Option<i32>, Attempt> {
        let name = topic.name;
        let metadata = self.admin.inner().fetch_metadata(Some(name), REQUEST_TIMEOUT);
        let metadata = metadata.map_err(again)?;
        let found = metadata.topics().iter().find(|found| found.name() == name);
        let Some(found) = found else { return Ok(None) };
        match found.error() {
            None => Ok(Some(i32::try_from(found.partitions().len()).unwrap_or(i32::MAX))),
            Some(
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART
                | RDKafkaRespErr::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC,
            ) => Ok(None),
            Some(error) => {
                let error = KafkaError::MetadataFetch(error.into());
                if !is_refusal(&error) {
                    return Err(again(format!("topic {name}: {error}")));
                }
                Err(Attempt::Failed(TopicsError::NotVisible {
                    setting: topic.setting,
                    topic: name.to_owned(),
                    reason: error.to_string(),
                    commands: [topic.create_command(), topic.access_command()],
                }))
            }
        }
    }

    fn create(&self, topic: &TopicSpec<'_>) -> Result<(), Attempt> {
        let broker_default = TopicReplication::Fixed(-1);
        let mut new = NewTopic::new(topic.name, topic.partitions, broker_default);
        for property in topic.properties {
            new = new.set(property.name, property.value);
        }
        let options = AdminOptions::new()
            .request_timeout(Some(REQUEST_TIMEOUT))
            .operation_timeout(Some(REQUEST_TIMEOUT));
        let created = self.runtime.block_on(self.admin.create_topics([&new], &options));
        for result in created.map_err(|error| creation_failed(topic, &error))? {
            match result {
                Ok(name) => tracing::info!(topic = name, "topic created"),
                // Another node was faster.
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => {
                    return Err(creation_failed(topic, &KafkaError::AdminOp(code)));
                }
            }
        }
        Ok(())
    }

    /// The properties of a topic. `None`: this node may not read them.
    fn properties(&self, topic: &str) -> Result<Option<ConfigResource>, Attempt> {
        let options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
        let wanted = [ResourceSpecifier::Topic(topic)];
        match self.runtime.block_on(self.admin.describe_configs(&wanted, &options)) {
            // The client library drops the error of a topic, and reports no properties then.
            Ok(found) => {
                let found = found.into_iter().filter_map(Result::ok).next();
                Ok(found.filter(|found| !found.entries.is_empty()))
            }
            Err(error) if is_refusal(&error) => Ok(None),
            Err(error) => Err(again(error)),
        }
    }

    /// Creates and checks one topic. Returns its partitions.
    fn ensure(&self, topic: &TopicSpec<'_>, warnings: &mut Vec<String>) -> Result<i32, Attempt> {
        let partitions = match self.partitions(topic)? {
            Some(partitions) => partitions,
            None => {
                self.create(topic)?;
                let created = self.partitions(topic)?;
                created.ok_or_else(|| again(format!("topic {} is not known yet", topic.name)))?
            }
        };
        let mut findings = Findings::default();
        topic.check_partitions(partitions, &mut findings);
        match self.properties(topic.name)? {
            Some(found) => {
                let value = |name: &str| found.get(name).and_then(|entry| entry.value.as_deref());
                topic.check_properties(value, &mut findings);
            }
            None => findings.warnings.push(format!(
                "the properties of the topic {} cannot be read (DescribeConfigs). They must be those of\n  {}",
                topic.name,
                topic.create_command()
            )),
        }
        let Findings { problems, commands, warnings: found } = findings;
        if !problems.is_empty() {
            let (setting, topic) = (topic.setting, topic.name.to_owned());
            return Err(Attempt::Failed(TopicsError::Wrong { setting, topic, problems, commands }));
        }
        warnings.extend(found);
        Ok(partitions)
    }
}

/// Whether a broker refuses a request for good.
fn is_refusal(error: &KafkaError) -> bool {
    // `rdkafka_error_code` does not know the errors of the admin client.
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    };
    matches!(
        code,
        Some(
            RDKafkaErrorCode::ClusterAuthorizationFailed
                | RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::PolicyViolation
                | RDKafkaErrorCode::InvalidConfig
                | RDKafkaErrorCode::InvalidPartitions
                | RDKafkaErrorCode::InvalidReplicationFactor
                | RDKafkaErrorCode::InvalidTopic
                | RDKafkaErrorCode::UnsupportedVersion
                | RDKafkaErrorCode::UnsupportedFeature
        )
    )
}

fn creation_failed(topic: &TopicSpec<'_>, error: &KafkaError) -> Attempt {
    if !is_refusal(error) {
        return again(error);
    }
    Attempt::Failed(TopicsError::NotCreated {
        setting: topic.setting,
        topic: topic.name.to_owned(),
        reason: error.to_string(),
        command: topic.create_command(),
    })
}

/// Creates the topics that are missing, and checks those that exist. Blocks, and retries while the brokers
/// are unreachable, until `stopping`; `waiting` gets the reason of each failed attempt. To be called
/// before any other client uses the topics.
///
/// # Errors
/// See [`TopicsError`].
///
/// # Panics
/// On a thread of an asynchronous runtime.
pub fn ensure_topics(
    config: &KafkaConfig,
    names: &ClusterTopicNames,
    stopping: &Arc<AtomicBool>,
    waiting: impl Fn(&str),
) -> Result<ClusterTopics, TopicsError> {
    let client = TopicsClient::new(config)?;
    let outage = Outage::default();
    while !stopping.load(Ordering::Acquire) {
        match client.ensure_both(config, names) {
            Ok(topics) => {
                if let Some(back) = outage.succeeded(Instant::now()) {
                    tracing::info!("topics of the cluster found {back}");
                }
                return Ok(topics);
            }
            Err(Attempt::Failed(error)) => return Err(error),
            Err(Attempt::Again(reason)) => {
                waiting(&reason);
                if let Some(again) = outage.failed(Instant::now()) {
                    tracing::warn!(
                        reason,
                        "cannot check the topics of the cluster; retrying{again}"
                    );
                }
                std::thread::sleep(RETRY_PAUSE);
            }
        }
    }
    Err(TopicsError::Stopped)
}

impl TopicsClient {
    fn ensure_both(
        &self,
        config: &KafkaConfig,
        names: &ClusterTopicNames,
    ) -> Result<ClusterTopics, Attempt> {
        let mut warnings = Vec::new();
        let [sessions, hand_off] = specs(names, &config.brokers);
        self.ensure(&sessions, &mut warnings)?;
        let hand_off_partitions = self.ensure(&hand_off, &mut warnings)?;
        Ok(ClusterTopics { hand_off_partitions, warnings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> ClusterTopicNames {
        ClusterTopicNames::default()
    }

    fn as_created(topic: &TopicSpec<'_>) -> impl Fn(&str) -> Option<&'static str> {
        let properties = topic.properties;
        move |name| properties.iter().find(|it| it.name == name).map(|it| it.value)
    }

    #[test]
    fn topic_as_this_node_creates_it_has_no_findings() {
        let names = names();
        for topic in specs(&names, "kafka:9092") {
            let mut findings = Findings::default();
            topic.check_partitions(topic.partitions, &mut findings);
            topic.check_properties(as_created(&topic), &mut findings);
            assert!(findings.problems.is_empty() && findings.warnings.is_empty(), "{findings:?}");
        }
    }

    #[test]
    fn forbidden_creation_names_the_exact_command() {
        let names = names();
        let [sessions, hand_off] = specs(&names, "kafka:9092");
        let refused = KafkaError::AdminOp(RDKafkaErrorCode::TopicAuthorizationFailed);
        let Attempt::Failed(error) = creation_failed(&sessions, &refused) else { panic!() };
        let text = error.to_string();
        let command = "kafka-topics.sh --bootstrap-server kafka:9092 --create --topic delivery.sessions.v1 --partitions 1 \
            --config cleanup.policy=compact --config message.timestamp.type=LogAppendTime \
            --config min.compaction.lag.ms=900000 --config delete.retention.ms=3600000 \
            --config segment.bytes=33554432 --config segment.ms=600000 --config max.compaction.lag.ms=3600000";
        assert!(text.ends_with(&format!("Create it with\n  {command}")), "{text}");
        assert!(text.contains("uthorization failed"), "{text}");
        assert!(text.starts_with("SESSIONS_TOPIC: cannot create the topic"), "{text}");
        assert_eq!(
            hand_off.create_command(),
            "kafka-topics.sh --bootstrap-server kafka:9092 --create --topic delivery.handoff.v1 --partitions 32 \
            --config cleanup.policy=delete --config message.timestamp.type=LogAppendTime \
            --config retention.ms=600000 --config max.message.bytes=8388608 --config retention.bytes=-1 \
            --config segment.bytes=67108864 --config segment.ms=60000 --config compression.type=producer"
        );
        let timeout = KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut);
        assert!(matches!(creation_failed(&sessions, &timeout), Attempt::Again(_)));
    }

    /// What the check of a topic says about one other value.
    fn check(topic: &TopicSpec<'_>, other: (&str, &'static str)) -> Findings {
        let mut findings = Findings::default();
        let created = as_created(topic);
        let value = |name: &str| if name == other.0 { Some(other.1) } else { created(name) };
        topic.check_properties(value, &mut findings);
        findings
    }

    #[test]
    fn values_that_lose_records_are_errors_with_the_command_that_mends_them() {
        let names = names();
        let [sessions, hand_off] = specs(&names, "kafka:9092");
        for (topic, name, value, mended) in [
            (&sessions, "cleanup.policy", "delete", "compact"),
            (&sessions, "cleanup.policy", "compact,delete", "compact"),
            (&sessions, "message.timestamp.type", "CreateTime", "LogAppendTime"),
            (&sessions, "min.compaction.lag.ms", "0", "900000"),
            (&hand_off, "cleanup.policy", "compact", "delete"),
            (&hand_off, "retention.ms", "59999", "600000"),
            (&hand_off, "max.message.bytes", "1048588", "8388608"),
        ] {
            let findings = check(topic, (name, value));
            assert_eq!(findings.problems.len(), 1, "{name}={value}: {findings:?}");
            assert!(
                findings.problems[0].starts_with(&format!("{name} is {value}, not {mended}: "))
            );
            assert_eq!(
                findings.commands,
                [format!(
                    "kafka-configs.sh --bootstrap-server kafka:9092 --alter --entity-type topics --entity-name {} --add-config {name}={mended}",
                    topic.name
                )]
            );
        }
    }

    #[test]
    fn other_values_are_at_most_warnings() {
        let names = names();
        let [sessions, hand_off] = specs(&names, "kafka:9092");
        for (topic, name, value, warnings) in [
            (&sessions, "segment.ms", "604800000", 1),
            (&sessions, "min.compaction.lag.ms", "1000000", 0),
            (&sessions, "max.compaction.lag.ms", "9223372036854775807", 1),
            (&hand_off, "retention.ms", "-1", 0),
            (&hand_off, "retention.bytes", "1000", 1),
            (&hand_off, "compression.type", "gzip", 1),
        ] {
            let findings = check(topic, (name, value));
            assert!(findings.problems.is_empty(), "{findings:?}");
            assert_eq!(findings.warnings.len(), warnings, "{name}={value}: {findings:?}");
            assert!(findings.warnings.iter().all(|text| text.contains("kafka-configs.sh")));
        }
    }

    #[test]
    fn sessions_topic_has_one_partition_and_the_hand_off_topic_any_number() {
        let names = names();
        let [sessions, hand_off] = specs(&names, "kafka:9092");
        let mut findings = Findings::default();
        sessions.check_partitions(3, &mut findings);
        assert_eq!(findings.problems.len(), 1);
        assert!(findings.commands[0].contains("--delete --topic delivery.sessions.v1"));
        let error = TopicsError::Wrong {
            setting: sessions.setting,
            topic: sessions.name.to_owned(),
            problems: findings.problems.clone(),
            commands: findings.commands.clone(),
        };
        let text = error.to_string();
        let advice = text.find("If anything else uses it, set SESSIONS_TOPIC to another name");
        assert!(advice < text.find("--delete"), "before the command that deletes it: {text}");
        assert_eq!(findings.commands[1], sessions.create_command());
        let mut findings = Findings::default();
        hand_off.check_partitions(64, &mut findings);
        assert!(findings.warnings.is_empty());
        hand_off.check_partitions(1, &mut findings);
        assert!(findings.problems.is_empty());
        assert!(
            findings.warnings[0].contains("--alter --topic delivery.handoff.v1 --partitions 32")
        );
    }
}
