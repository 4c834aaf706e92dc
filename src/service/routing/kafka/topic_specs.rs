//! What the two topics of the cluster have to be, and what is wrong with those that exist.

use crate::service::routing::kafka::outbox::MESSAGE_BYTES_MAX;

/// Partitions of the sessions topic: one, so that its offsets are a total order.
const SESSIONS_PARTITIONS: i32 = 1;

/// Partitions of a new hand-off topic. Each node reads one of them. More nodes share them.
const HAND_OFF_PARTITIONS: i32 = 32;

/// Names of the topics of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterTopicNames {
    /// Which node holds which session.
    pub sessions: String,
    /// What owners of partitions hand over to the holders of sessions.
    pub hand_off: String,
}

impl Default for ClusterTopicNames {
    fn default() -> Self {
        Self { sessions: "delivery.sessions.v1".into(), hand_off: "delivery.handoff.v1".into() }
    }
}

/// Which values of a topic's property are good.
#[derive(Clone, Copy, Debug)]
pub(super) enum Need {
    Exactly,
    AtLeast(i64),
    AtMost(i64),
}

/// A property of a topic.
#[derive(Clone, Copy, Debug)]
pub(super) struct TopicProperty {
    pub(super) name: &'static str,
    /// The value of a topic that this node creates.
    pub(super) value: &'static str,
    pub(super) need: Need,
    /// Whether another value makes the topic unusable.
    pub(super) required: bool,
    /// What another value causes.
    pub(super) otherwise: &'static str,
}

impl TopicProperty {
    const fn required(
        name: &'static str,
        value: &'static str,
        need: Need,
        otherwise: &'static str,
    ) -> Self {
        Self { name, value, need, required: true, otherwise }
    }

    const fn advised(
        name: &'static str,
        value: &'static str,
        need: Need,
        otherwise: &'static str,
    ) -> Self {
        Self { name, value, need, required: false, otherwise }
    }

    fn accepts(&self, found: &str) -> bool {
        // Kafka writes "no limit" as -1.
        let number = || found.parse().map(|number: i64| if number < 0 { i64::MAX } else { number });
        match self.need {
            Need::Exactly => found == self.value,
            Need::AtLeast(least) => number().is_ok_and(|number| number >= least),
            Need::AtMost(most) => number().is_ok_and(|number| number <= most),
        }
    }
}

/// A beginning must not vanish before each lane has applied it: above `TAIL_AGE`, ms.
const COMPACTION_LAG_MS: i64 = 900_000;

/// A node that is stopped for less than this misses nothing, ms.
const RETENTION_MS_MIN: i64 = 60_000;

const SESSIONS_PROPERTIES: [TopicProperty; 7] = [
    TopicProperty::required(
        "cleanup.policy",
        "compact",
        Need::Exactly,
        "retention deletes the records of sessions that have not ended",
    ),
    TopicProperty::required(
        "message.timestamp.type",
        "LogAppendTime",
        Need::Exactly,
        "leases expire by the clocks of the nodes",
    ),
    TopicProperty::required(
        "min.compaction.lag.ms",
        "900000",
        Need::AtLeast(COMPACTION_LAG_MS),
        "compaction removes records that not every node has read",
    ),
    TopicProperty::advised(
        "delete.retention.ms",
        "3600000",
        Need::AtLeast(3_600_000),
        "a node that starts slowly may miss the ends of sessions",
    ),
    TopicProperty::advised(
        "segment.bytes",
        "33554432",
        Need::AtMost(256 << 20),
        "compaction begins late, and nodes start slowly",
    ),
    TopicProperty::advised(
        "segment.ms",
        "600000",
        Need::AtMost(3_600_000),
        "compaction begins late, and nodes start slowly",
    ),
    TopicProperty::advised(
        "max.compaction.lag.ms",
        "3600000",
        Need::AtMost(86_400_000),
        "compaction begins late, and nodes start slowly",
    ),
];

const HAND_OFF_PROPERTIES: [TopicProperty; 8] = [
    TopicProperty::required(
        "cleanup.policy",
        "delete",
        Need::Exactly,
        "compaction removes records that not every node has read",
    ),
    TopicProperty::required(
        "message.timestamp.type",
        "LogAppendTime",
        Need::Exactly,
        "a wrong clock of a node lets its records expire early",
    ),
    TopicProperty::required(
        "retention.ms",
        "600000",
        Need::AtLeast(RETENTION_MS_MIN),
        "records expire before a slow node has read them",
    ),
    TopicProperty::required(
        "max.message.bytes",
        "8388608",
        Need::AtLeast(MESSAGE_BYTES_MAX as i64),
        "large records cannot be handed over",
    ),
    TopicProperty::advised(
        "retention.bytes",
        "-1",
        Need::AtLeast(1 << 30),
        "records may expire before a slow node has read them",
    ),
    TopicProperty::advised(
        "segment.bytes",
        "67108864",
        Need::AtMost(256 << 20),
        "the topic occupies much more than its retention",
    ),
    TopicProperty::advised(
        "segment.ms",
        "60000",
        Need::AtMost(3_600_000),
        "the topic occupies much more than its retention",
    ),
    TopicProperty::advised(
        "compression.type",
        "producer",
        Need::Exactly,
        "the brokers compress each record again",
    ),
];

/// The value of a property of a new sessions topic.
pub fn sessions_property(name: &str) -> Option<&'static str> {
    SESSIONS_PROPERTIES.iter().find(|it| it.name == name).map(|it| it.value)
}

/// What a topic should be.
#[derive(Clone, Copy)]
pub(super) struct TopicSpec<'a> {
    pub(super) name: &'a str,
    /// The setting with the name.
    pub(super) setting: &'static str,
    /// Partitions of a new topic.
    pub(super) partitions: i32,
    /// Whether another number of partitions makes the topic unusable.
    pub(super) partitions_fixed: bool,
    pub(super) properties: &'static [TopicProperty],
    pub(super) brokers: &'a str,
}

impl TopicSpec<'_> {
    pub(super) fn create_command(&self) -> String {
        let Self { name, partitions, brokers, .. } = self;
        let mut command = format!(
            "kafka-topics.sh --bootstrap-server {brokers} --create --topic {name} --partitions {partitions}"
        );
        for property in self.properties {
            command += &format!(" --config {}={}", property.name, property.value);
        }
        command
    }

    pub(super) fn access_command(&self) -> String {
        let Self { name, brokers, .. } = self;
        format!(
            "kafka-acls.sh --bootstrap-server {brokers} --add --allow-principal User:NAME --operation Describe --operation DescribeConfigs --operation Read --operation Write --topic {name}"
        )
    }

    fn alter_command(&self, properties: &[&TopicProperty]) -> String {
        let Self { name, brokers, .. } = self;
        let values: Vec<_> =
            properties.iter().map(|it| format!("{}={}", it.name, it.value)).collect();
        format!(
            "kafka-configs.sh --bootstrap-server {brokers} --alter --entity-type topics --entity-name {name} --add-config {}",
            values.join(",")
        )
    }

    /// Checks the number of partitions.
    pub(super) fn check_partitions(&self, found: i32, findings: &mut Findings) {
        let Self { name, partitions, brokers, .. } = self;
        if self.partitions_fixed && found != *partitions {
            findings.problems.push(format!(
                "it has {found} partitions, not {partitions}: offsets of several partitions have no order"
            ));
            let delete = "kafka-topics.sh --bootstrap-server";
            findings.commands.push(format!("{delete} {brokers} --delete --topic {name}"));
            findings.commands.push(self.create_command());
        } else if found < *partitions {
            findings.warnings.push(format!(
                "the topic {name} has {found} partitions, not {partitions}: nodes read the records of each other. Mend it with\n  kafka-topics.sh --bootstrap-server {brokers} --alter --topic {name} --partitions {partitions}"
            ));
        }
    }

    /// Checks the properties that the broker reports. `found` returns the value of one.
    pub(super) fn check_properties<'v>(
        &self,
        found: impl Fn(&str) -> Option<&'v str>,
        findings: &mut Findings,
    ) {
        let mut wrong = Vec::new();
        for property in self.properties {
            let TopicProperty { name, value, otherwise, .. } = property;
            let Some(found) = found(name) else {
                if property.required {
                    findings.warnings.push(format!(
                        "the broker does not report {name} of the topic {}, which must be {value}",
                        self.name
                    ));
                }
                continue;
            };
            if property.accepts(found) {
                continue;
            }
            let problem = format!("{name} is {found}, not {value}: {otherwise}");
            if property.required {
                findings.problems.push(problem);
                wrong.push(property);
            } else {
                let command = self.alter_command(&[property]);
                findings
                    .warnings
                    .push(format!("the topic {}: {problem}. Mend it with\n  {command}", self.name));
            }
        }
        if !wrong.is_empty() {
            findings.commands.push(self.alter_command(&wrong));
        }
    }
}

/// What was found in one topic.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) problems: Vec<String>,
    pub(super) commands: Vec<String>,
    pub(super) warnings: Vec<String>,
}

pub(super) fn specs<'a>(names: &'a ClusterTopicNames, brokers: &'a str) -> [TopicSpec<'a>; 2] {
    [
        TopicSpec {
            name: &names.sessions,
            setting: "SESSIONS_TOPIC",
            partitions: SESSIONS_PARTITIONS,
            partitions_fixed: true,
            properties: &SESSIONS_PROPERTIES,
            brokers,
        },
        TopicSpec {
            name: &names.hand_off,
            setting: "HANDOFF_TOPIC",
            partitions: HAND_OFF_PARTITIONS,
            partitions_fixed: false,
            properties: &HAND_OFF_PROPERTIES,
            brokers,
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_page_has_the_commands_that_create_the_topics() {
        let page = include_str!("../../../../docs/operations.md");
        for topic in specs(&ClusterTopicNames::default(), "kafka:9092") {
            let command = topic.create_command();
            assert!(page.lines().any(|line| line == command), "{command}");
        }
    }
}
