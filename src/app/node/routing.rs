//! Starts the path from Kafka to the shards: membership cache, router threads, Kafka threads.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::mesh::PeerSide;
use super::metrics::{numbered, register};
use super::sizing::{Sizing, millis};
use crate::app::admin::{Collector, ReadinessCheck, number};
use crate::app::config::{HandOffMode, Name, SettingValue as _, Settings};
use crate::domain::budget::EventBudget;
use crate::domain::counters::MetricKind;
use crate::domain::limits::queued_share;
use crate::service::backends::ports::{MissedEvents, RemoteNodes};
use crate::service::cluster::tail::TailBudget;
use crate::service::events::encode::CompressionConfig;
use crate::service::members::directory::Directory;
use crate::service::members::membership::Membership;
use crate::service::members::user_lists::UserLists;
use crate::service::routing::kafka::{
    ClaimParts, DeadLetterTopic, Kafka, KafkaConfig, KafkaCounters, KafkaParts, KafkaStatus,
    TopicTrouble,
};
use crate::service::routing::replays::TailReplays;
use crate::service::routing::router::dead_letter::DeadLetterSink;
use crate::service::routing::router::owner::ClusterParts;
use crate::service::routing::router::{
    GroupReplays, ReplayChunkMax, Router, RouterConfig, RouterControl, RouterCounters, RouterParts,
    RouterReplays,
};
use crate::service::runtime::clock::steady_ms;

/// The back ends of the routers.
pub(super) struct RoutingPeers {
    /// The members of conversations.
    pub membership: Arc<Membership>,
    /// The conversations of users who return.
    pub user_lists: Option<Arc<UserLists>>,
    /// The other nodes, if Redis hands over to them.
    pub remote: Option<Arc<dyn RemoteNodes>>,
    /// If the log hands over to them.
    pub cluster: Option<(ClusterParts, ClaimParts)>,
    /// Where gaps are reported.
    pub missed: Arc<dyn MissedEvents>,
}

/// The running threads.
pub(super) struct Routing {
    kafka: Kafka,
    controls: Vec<RouterControl>,
    threads: Vec<JoinHandle<()>>,
    status: Arc<KafkaStatus>,
    membership: Arc<Membership>,
    /// Hand-off through the log.
    cluster: Option<ClusterParts>,
}

impl Routing {
    /// Starts everything. Kafka is connected in the background.
    ///
    /// # Errors
    /// A Kafka property is invalid, or a thread cannot be started.
    pub(super) fn start(
        settings: &Settings,
        sizing: &Sizing,
        kafka_config: KafkaConfig,
        sides: Vec<PeerSide>,
        directory: &Arc<Directory>,
        peers: RoutingPeers,
        collectors: &mut Vec<Collector>,
    ) -> Result<Self, String> {
        let RoutingPeers { membership, user_lists, remote, cluster, missed } = peers;
        let (cluster, claims) = cluster.unzip();
        let kafka_counters = register("kafka_", collectors);
        let dead_letters = dead_letters(settings, &kafka_config, &kafka_counters)?;
        let tails = tails(settings, collectors);
        let mut controls = Vec::new();
        let mut threads = Vec::new();
        let budget = event_budget(settings, sizing);
        collectors.push(event_bytes(Arc::clone(&budget)));
        for (number, side) in sides.into_iter().enumerate() {
            let counters = Arc::new(RouterCounters::default());
            let (router, control) = Router::new(RouterParts {
                config: router_config(settings),
                counters: Arc::clone(&counters),
                budget: Arc::clone(&budget),
                bell: side.bell,
                links: side.shards,
                directory: Arc::clone(directory),
                membership: Arc::clone(&membership),
                user_lists: user_lists.clone(),
                remote: remote.clone(),
                cluster: cluster.clone(),
                tails: tails.clone(),
                dead_letters: dead_letters.clone(),
            });
            let thread = router.spawn(format!("router-{number}"));
            threads.push(thread.map_err(|error| format!("cannot start router {number}: {error}"))?);
            controls.push(control);
            collectors.push(numbered("router_", "router", number, counters));
        }
        let status = Arc::new(KafkaStatus::default());
        let parts = KafkaParts {
            routers: controls.clone(),
            membership: Arc::clone(&membership),
            status: Arc::clone(&status),
            counters: kafka_counters,
            tails,
            claims,
            missed: Box::new(move || {
                missed.missed_by_all();
                if let Some(remote) = &remote {
                    remote.lost_by_all();
                }
            }),
        };
        let topics = kafka_config.topics_by_index();
        let kafka = Kafka::start(kafka_config, parts).map_err(|error| error.to_string())?;
        collectors.push(lag(Arc::clone(&status)));
        collectors.push(troubles(Arc::clone(&status), topics));
        Ok(Self { kafka, controls, threads, status, membership, cluster })
    }

    /// Ready when partitions are assigned, or when it is clear that this node gets none.
    pub(super) fn check(&self) -> ReadinessCheck {
        let status = Arc::clone(&self.status);
        Box::new(move || status.missing().map(|what| format!("kafka: {what}")))
    }

    /// The membership cache.
    pub(super) fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }

    /// A function that returns the number of partitions this node reads.
    pub(super) fn partitions(&self) -> impl Fn() -> usize + Send + Sync + 'static {
        let status = Arc::clone(&self.status);
        move || status.partitions()
    }

    /// The handles of the routers.
    pub(super) fn controls(&self) -> &[RouterControl] {
        &self.controls
    }

    /// What sessions have missed since their cursors, in chunks of at most so many records and bytes. `None`: the nodes
    /// keep no tails.
    pub(super) fn replays(
        &self,
        settings: &Settings,
        (records, bytes): (usize, usize),
    ) -> Option<Arc<dyn TailReplays>> {
        if settings.hand_off() == Some(HandOffMode::Redis) {
            return None;
        }
        let topics: Vec<Arc<str>> =
            settings.kafka_topics.iter().map(|topic| Arc::from(topic.as_str())).collect();
        let max = ReplayChunkMax { records, bytes };
        if let Some(cluster) = &self.cluster {
            let replays = GroupReplays::new(self.controls.clone(), cluster.clone(), max);
            tokio::spawn(replays.keep_told());
            return Some(Arc::new(replays));
        }
        Some(Arc::new(RouterReplays::new(self.controls.clone(), &topics, max)))
    }

    /// Waits at most `grace` for records in progress, commits, leaves the group and stops the threads.
    /// Blocks.
    pub(super) fn stop(self, grace: Duration) {
        self.kafka.stop(grace);
        self.controls.iter().for_each(RouterControl::stop);
        for thread in self.threads {
            thread.join().expect("a panic ends the process");
        }
    }
}

/// Which events are compressed.
pub(super) fn compression(settings: &Settings) -> CompressionConfig {
    CompressionConfig {
        threshold_bytes: settings.deflate_threshold.bytes(),
        ..CompressionConfig::default()
    }
}

/// Memory of the events in all shards and the gRPC hub together, bytes: those on their way, and those held for sessions
/// that catch up.
pub(super) fn event_bytes_max(settings: &Settings, sizing: &Sizing) -> u64 {
    let shards = u64::from(sizing.shards) + u64::from(settings.grpc_addr.is_some());
    shards * settings.shard_event_bytes_max.0
}

/// What the routers share: the shards and the hub bound the events that they hold.
fn event_budget(settings: &Settings, sizing: &Sizing) -> Arc<EventBudget> {
    let all = event_bytes_max(settings, sizing);
    EventBudget::new(queued_share(all))
}

/// The configuration of all routers.
pub(super) fn router_config(settings: &Settings) -> RouterConfig {
    RouterConfig {
        route_retry_max_ms: millis(settings.route_retry_max),
        compression: compression(settings),
        ..RouterConfig::default()
    }
}

/// `kafka_prefetch`, KiB.
pub(super) fn prefetch_kib(settings: &Settings) -> u32 {
    u32::try_from(settings.kafka_prefetch.0 >> 10).unwrap_or(u32::MAX)
}

/// The Kafka clients of a node of this name.
pub(super) fn kafka_config(settings: &Settings, instance: &Arc<str>) -> KafkaConfig {
    let properties = settings.kafka_properties.iter();
    KafkaConfig {
        topics: settings.kafka_topics.iter().map(Name::to_string).collect(),
        membership: settings.membership_topics.iter().map(Name::to_string).collect(),
        mode: settings.routing(),
        group: settings.kafka_group.to_string(),
        client_id: instance.to_string(),
        properties: properties
            .filter_map(|property| property.as_str().split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        prefetch_kib: prefetch_kib(settings),
        tracing: settings.tracing_enabled,
        ..KafkaConfig::new(settings.kafka_brokers.show())
    }
}

fn dead_letters(
    settings: &Settings,
    config: &KafkaConfig,
    counters: &Arc<KafkaCounters>,
) -> Result<Option<Arc<dyn DeadLetterSink>>, String> {
    let Some(topic) = &settings.dead_letter_topic else { return Ok(None) };
    let letters = DeadLetterTopic::new(topic.to_string(), config, Arc::clone(counters))
        .map_err(|error| format!("DEAD_LETTER_TOPIC: {error}"))?;
    Ok(Some(Arc::new(letters)))
}

/// The tails of the partitions. `None`: nothing is replayed, since the nodes that route events to a session by Redis do
/// not know what it has missed.
fn tails(settings: &Settings, collectors: &mut Vec<Collector>) -> Option<Arc<TailBudget>> {
    if settings.hand_off() == Some(HandOffMode::Redis) {
        return None;
    }
    let tails = TailBudget::new(settings.tail_bytes.0, millis(settings.tail_age));
    collectors.push(tail_metrics(Arc::clone(&tails)));
    Some(tails)
}

fn tail_metrics(tails: Arc<TailBudget>) -> Collector {
    Box::new(move |page| {
        let bytes = number(tails.bytes());
        let help = "Memory of the last events that this node routed.";
        page.sample(MetricKind::Gauge, "delivery_tail_bytes", help, &[], bytes);
        let age = number(tails.age_ms(steady_ms()));
        let help = "Age of the oldest of these events, ms.";
        page.sample(MetricKind::Gauge, "delivery_tail_age_ms", help, &[], age);
    })
}

/// Which topics of events cannot be read, and why.
fn troubles(status: Arc<KafkaStatus>, topics: Vec<Arc<str>>) -> Collector {
    Box::new(move |page| {
        let troubles = status.troubles();
        for topic in &topics {
            for trouble in [TopicTrouble::Missing, TopicTrouble::Forbidden] {
                let is_it = troubles.contains(&(Arc::clone(topic), trouble));
                let labels = [("topic", &**topic), ("reason", trouble.label())];
                let help = "1 if a topic of KAFKA_TOPICS cannot be read for this reason.";
                let value = number(u64::from(is_it));
                page.sample(
                    MetricKind::Gauge,
                    "delivery_kafka_topic_trouble",
                    help,
                    &labels,
                    value,
                );
            }
        }
    })
}

/// `kafka_consumer_lag` (contract §6).
fn event_bytes(budget: Arc<EventBudget>) -> Collector {
    Box::new(move |page| {
        let help = "Memory of the live events in rings, shards and the gRPC hub, without those held, bytes.";
        let bytes = number(budget.charged());
        page.sample(MetricKind::Gauge, "delivery_router_event_bytes", help, &[], bytes);
    })
}

fn lag(status: Arc<KafkaStatus>) -> Collector {
    Box::new(move |page| {
        for partition in status.lags() {
            let id = partition.partition.to_string();
            let labels = [("topic", &*partition.topic), ("partition", id.as_str())];
            let help = "Records of the partition that are not delivered yet.";
            let lag = number(partition.lag);
            page.sample(MetricKind::Gauge, "kafka_consumer_lag", help, &labels, lag);
        }
    })
}
