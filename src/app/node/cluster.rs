//! The node's part in a cluster whose nodes hand events over through topics in Kafka (`HANDOFF=log`).
//!
//! ```text
//! prepare ─► session manager, routers ─► start: topics, readers ─► table read ─► lease stored ─► group joined
//! ```
//!
//! The group is joined last: before its lease is stored, no other node could hand anything over to this one.

use super::sizing::millis;
use crate::service::members::beginnings::Beginnings;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::metrics::{component, register};
use crate::app::admin::{Collector, ReadinessCheck};
use crate::app::config::{HandOffMode, Settings};
use crate::handoff::{Doorbell, Pushed};
use crate::service::backends::ports::{LogNodes, MissedEvents};
use crate::service::cluster::announcer::{CHANGES_WAITING_MAX, SessionAnnouncer};
use crate::service::cluster::holder::Holder;
use crate::service::cluster::lease::{LeaseParts, LeaseState, LeaseThread};
use crate::service::cluster::missed::MissedSessions;
use crate::service::cluster::own_epoch::OwnEpoch;
use crate::service::cluster::ports::{
    ArrivedHandOffs, HandOffReceiver, IncomingHandOff, NodeEpoch, SessionsLog, SessionsRecord,
};
use crate::service::cluster::table::{SessionTable, TableConfig, TableListener};
use crate::service::members::directory::Directory;
use crate::service::routing::kafka::{
    ClaimParts, ClusterLogCounters, ClusterLogMetrics, ClusterLogParts, ClusterLogs,
    ClusterTopicNames, KafkaConfig, OwnedPartitions, SessionsJanitor,
};
use crate::service::routing::router::holding::HandOffInboxes;
use crate::service::routing::router::owner::ClusterParts;
use crate::service::routing::router::{ReplayAnswers, RouterControl};

/// What the session manager and the routers need before anything is read.
pub(super) struct Cluster {
    instance: Arc<str>,
    topics: Arc<[Arc<str>]>,
    sessions_topic: String,
    holder: Arc<Mutex<Holder>>,
    missed: Arc<MissedSessions>,
    own: Arc<OwnEpoch>,
    table: Arc<SessionTable>,
    logs: Arc<ClusterLogs>,
    owned: Arc<OwnedPartitions>,
    announcer: Arc<SessionAnnouncer>,
    failed: Arc<Failure>,
    answers: Arc<ReplayAnswers>,
    kafka: KafkaConfig,
    sessions_topic_counters: Arc<ClusterLogCounters>,
}

/// Why the node cannot take part in the cluster; `None`: it can.
type Failure = watch::Sender<Option<String>>;

/// The topics of the cluster, until one of them is deleted and created again: offsets in the old one mean nothing then.
struct TopicWatch {
    table: Arc<SessionTable>,
    inboxes: HandOffInboxes,
    /// Hand-offs below this offset were received.
    handed_to: AtomicI64,
    failed: Arc<Failure>,
}

impl TopicWatch {
    fn has_lost(&self, setting: &str) {
        self.failed.send_replace(Some(format!(
            "{setting}: the topic was deleted or has lost its last records: all nodes have to start again"
        )));
    }
}

impl SessionsLog for TopicWatch {
    fn record(&self, record: SessionsRecord) {
        self.table.record(record);
    }

    fn read_to(&self, next: i64) {
        SessionsLog::read_to(&*self.table, next);
    }

    fn restarted(&self) {
        self.has_lost("SESSIONS_TOPIC");
        self.table.restarted();
    }

    fn fell_behind(&self) {
        tracing::warn!("read the sessions topic too late: reading it again, with a new epoch");
        self.table.fell_behind();
    }
}

impl HandOffReceiver for TopicWatch {
    fn opened(&self, log: Arc<dyn ArrivedHandOffs>) -> Option<Arc<Doorbell>> {
        self.inboxes.opened(log)
    }

    fn receive(&self, hand_off: IncomingHandOff) -> Pushed<IncomingHandOff> {
        self.inboxes.receive(hand_off)
    }

    fn read_to(&self, next: i64) {
        if self.handed_to.swap(next, Ordering::Relaxed) > next {
            self.has_lost("HANDOFF_TOPIC");
        }
        self.inboxes.read_to(next);
    }

    fn missed(&self) {
        self.inboxes.missed();
    }

    fn gone(&self) {
        self.has_lost("HANDOFF_TOPIC");
        self.inboxes.gone();
    }
}

/// The running threads.
pub(super) struct RunningCluster {
    logs: Arc<ClusterLogs>,
    lease: LeaseThread,
    janitor: SessionsJanitor,
    failure: watch::Receiver<Option<String>>,
}

impl Cluster {
    /// Starts the writers. Needs no broker. `None`: this node takes no part in such a cluster.
    ///
    /// # Errors
    /// A Kafka property is invalid, or a thread cannot be started.
    pub(super) fn prepare(
        settings: &Settings,
        kafka: KafkaConfig,
        directory: &Arc<Directory>,
        bell: Arc<Doorbell>,
        collectors: &mut Vec<Collector>,
    ) -> Result<Option<Self>, String> {
        if settings.hand_off() != Some(HandOffMode::Log) {
            return Ok(None);
        }
        let instance: Arc<str> = kafka.client_id.as_str().into();
        let topics: Arc<[Arc<str>]> = kafka.topics_by_index().into();
        let holder = Arc::<Mutex<Holder>>::default();
        let missed =
            Arc::new(MissedSessions::new(Arc::clone(directory), Some(Arc::clone(&holder)), bell));
        let reports = Arc::clone(&missed) as Arc<dyn MissedEvents>;
        let own = Arc::new(OwnEpoch::new(Arc::clone(&holder), reports));
        let age_ms = millis(settings.tail_age);
        let config = TableConfig {
            topics: topics.to_vec(),
            node_timeout_ms: i64::try_from(millis(settings.node_timeout)).unwrap_or(i64::MAX),
            newcomers_age_ms: i64::try_from(age_ms).unwrap_or(i64::MAX),
            beginnings_max: Beginnings::KEPT_MAX,
        };
        let listener = Arc::clone(&own) as Arc<dyn TableListener>;
        let table = Arc::new(SessionTable::new(config, listener, register("cluster_", collectors)));
        let metrics = ClusterLogMetrics::default();
        collectors.extend([
            component("sessions_topic_", Arc::clone(&metrics.sessions)),
            component("handoff_topic_", Arc::clone(&metrics.hand_off)),
        ]);
        let names = ClusterTopicNames {
            sessions: settings.sessions_topic.to_string(),
            hand_off: settings.handoff_topic.to_string(),
        };
        let sessions_topic_counters = Arc::clone(&metrics.sessions);
        let logs =
            ClusterLogs::open(kafka.clone(), names, metrics).map_err(|error| error.to_string())?;
        let announcer = SessionAnnouncer::new(
            Arc::clone(&own),
            Arc::clone(&table),
            logs.sessions(),
            CHANGES_WAITING_MAX,
            register("announced_", collectors),
        );
        Ok(Some(Self {
            instance,
            topics,
            sessions_topic: settings.sessions_topic.to_string(),
            holder,
            missed,
            own,
            table,
            logs: Arc::new(logs),
            owned: Arc::default(),
            announcer: Arc::new(announcer),
            failed: Arc::new(watch::channel(None).0),
            answers: Arc::default(),
            kafka,
            sessions_topic_counters,
        }))
    }

    /// The nodes to which the log hands over.
    pub(super) fn log_nodes(&self) -> Arc<dyn LogNodes> {
        Arc::clone(&self.table) as _
    }

    /// Where gaps are reported.
    pub(super) fn missed(&self) -> &Arc<MissedSessions> {
        &self.missed
    }

    /// Announces the sessions of this node.
    pub(super) fn announcer(&self) -> &Arc<SessionAnnouncer> {
        &self.announcer
    }

    /// What the routers need.
    pub(super) fn for_routers(&self) -> ClusterParts {
        ClusterParts {
            table: Arc::clone(&self.table),
            holder: Arc::clone(&self.holder),
            sink: self.logs.hand_offs(),
            missed: Arc::clone(&self.missed) as Arc<dyn MissedEvents>,
            topics: Arc::clone(&self.topics),
            answers: Arc::clone(&self.answers),
        }
    }

    /// What the consumer group needs.
    pub(super) fn for_claims(&self) -> ClaimParts {
        ClaimParts {
            barrier: self.logs.barrier(),
            owned: Arc::clone(&self.owned),
            table: Arc::clone(&self.table),
            sessions_topic: self.sessions_topic.clone(),
            failed: {
                let failed = Arc::clone(&self.failed);
                Arc::new(move |reason| {
                    failed.send_replace(Some(reason));
                })
            },
        }
    }

    /// Creates and checks the topics, reads them, stores the lease, and then joins the group. All in the
    /// background.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(super) fn start(self, routers: &[RouterControl]) -> Result<RunningCluster, String> {
        let Self { instance, topics, missed, own, table, logs, owned, announcer, failed, .. } =
            self;
        let janitor = SessionsJanitor::start(
            self.kafka,
            self.sessions_topic,
            Arc::clone(&table),
            logs.sessions(),
            self.sessions_topic_counters,
        )
        .map_err(|error| error.to_string())?;
        let inboxes = HandOffInboxes {
            routers: routers.to_vec(),
            topics,
            missed: Box::new(move || missed.missed_by_all()),
        };
        let failure = failed.subscribe();
        let topics_failed = Arc::clone(&failed);
        let topics = Arc::new(TopicWatch {
            table: Arc::clone(&table),
            inboxes,
            handed_to: AtomicI64::new(0),
            failed: Arc::clone(&failed),
        });
        let parts = ClusterLogParts {
            epoch: new_epoch(),
            log: Arc::clone(&topics) as _,
            receiver: topics,
            failed: Box::new(move |error| {
                topics_failed.send_replace(Some(error.to_string()));
            }),
        };
        logs.follow(parts).map_err(|error| error.to_string())?;
        let (read, partition, epochs) = (Arc::clone(&logs), Arc::clone(&logs), Arc::clone(&logs));
        let positions = Arc::clone(&owned);
        let lease = LeaseThread::spawn(LeaseParts {
            instance: instance.to_string(),
            host: host(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hand_off_partition: Box::new(move || partition.hand_off_partition()),
            table,
            own,
            announcer,
            writer: logs.sessions(),
            is_read: Box::new(move || read.missing().is_none()),
            routed: Box::new(move || positions.positions()),
            set_epoch: Box::new(move |epoch| epochs.set_epoch(epoch)),
            new_epoch: Box::new(new_epoch),
        });
        let lease = lease.map_err(|error| format!("the thread of the lease: {error}"))?;
        tokio::spawn(follow_lease(lease.state(), owned, failed));
        Ok(RunningCluster { logs, lease, janitor, failure })
    }
}

/// Joins the group when the lease is stored, and reports an instance that is in use.
async fn follow_lease(
    mut state: watch::Receiver<LeaseState>,
    owned: Arc<OwnedPartitions>,
    failed: Arc<Failure>,
) {
    loop {
        let seen = state.borrow_and_update().clone();
        match seen {
            LeaseState::Living => owned.join(),
            LeaseState::InUse(other) => {
                failed.send_replace(Some(other.to_string()));
            }
            _ => {}
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

impl RunningCluster {
    /// Ready when the topics are read and the lease is stored. A node that waits for a new lease is not.
    pub(super) fn check(&self) -> ReadinessCheck {
        let (logs, state) = (Arc::clone(&self.logs), self.lease.state());
        Box::new(move || {
            let waiting = || {
                let what = match &*state.borrow() {
                    LeaseState::Living => return None,
                    LeaseState::Reading | LeaseState::Announcing => {
                        "the lease of this node is not stored yet".to_owned()
                    }
                    LeaseState::Watching => {
                        "waiting whether another node with this INSTANCE_ID lives".to_owned()
                    }
                    LeaseState::InUse(other) => other.to_string(),
                    LeaseState::Stopping | LeaseState::Stopped => "stopping".to_owned(),
                };
                Some(what)
            };
            logs.missing().or_else(waiting).map(|what| format!("cluster: {what}"))
        })
    }

    /// Waits until the node cannot take part in the cluster. Returns why.
    pub(super) async fn failure(&self) -> String {
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // The node stops.
            Err(_) => std::future::pending().await,
        }
    }

    /// Stores the ends of the sessions, the end of the lease, and what was handed over, for at most
    /// `grace`. To be called when all sessions and routers have ended. Blocks.
    pub(super) fn stop(self, grace: Duration) {
        let Self { logs, lease, janitor, .. } = self;
        janitor.end();
        if !lease.stop(grace / 2) {
            tracing::warn!("the end of this node is not stored: the others wait for NODE_TIMEOUT");
        }
        let unstored = logs.stop(grace / 2);
        if unstored > 0 {
            tracing::warn!(
                "{unstored} records for the topics of the cluster are not stored: the next owners repeat what \
                 was handed over, and the other nodes wait for NODE_TIMEOUT if the end of this node is among them"
            );
        }
        janitor.stop();
    }
}

/// A number that no node had before.
fn new_epoch() -> NodeEpoch {
    NodeEpoch(rand::random_range(1..=u64::MAX))
}

fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
