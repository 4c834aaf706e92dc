//! Nodes of the same group that take no hand-offs through the log: nodes of other versions, such as Go
//! nodes, and nodes with `HANDOFF=redis`. They know only the registry and the channel
//! `delivery:{instance}`. This node (`HANDOFF=log`) exchanges events with them through Redis while they may
//! exist, as during a migration.
//!
//! ```text
//!  PUBSUB CHANNELS delivery:* ──► without a lease in the session table? ──► active, and 60 s longer
//!        every 500 ms                                                        │
//!                           RouterCore ──► LegacyNodes ──► Nodes (registry, PUBLISH)
//! ```
//!
//! - An instance with a lease gets nothing through Redis, because the log hands over to it: [`Nodes`]
//!   leaves it out when it looks users up.
//! - A node of the other kind is found before other nodes can find its sessions: it subscribes before its first
//!   session is registered, and registrations are looked up again after one second
//!   ([`super::LocationsConfig::lifetime`]), as with `HANDOFF=redis`.
//! - A node subscribes to its own channel only when its lease is stored, and gives the subscription up
//!   before the lease. So a node with a lease is not taken for one without.
//! - The owner of a partition may take the lease of this node to have expired, because this node cannot
//!   reach Kafka. It may then hand over through Redis, after a gap. So what arrives while the lease has not
//!   been renewed for long closes all sessions first ([`LegacyWatch::is_lease_overdue`]).

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redis::{FromRedisValue, cmd};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::counters::{LegacyCounters, NodesCounters};
use super::link::RedisLink;
use super::locations::Locations;
use super::nodes::{Nodes, NodesConfig};
use crate::service::backends::ports::{ForwardDone, Forwarding, LogNodes, RemoteNodes};

/// Time between two questions to Redis. With [`LEASE_LAG`] and an answer it is shorter than the lifetime of
/// a location.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long after its subscription the lease of a node may be read. An instance counts as one without
/// a lease only after that.
const LEASE_LAG: Duration = Duration::from_millis(200);
/// How long such nodes are expected back after the last one is gone.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Instances named in a line of the log.
const NAMED_MAX: usize = 8;

/// When to expect such nodes.
#[derive(Clone, Debug)]
pub struct LegacyConfig {
    /// This node's own instance id.
    pub instance: Arc<str>,
    /// Always, also if none is subscribed (`LEGACY_NODES=on`).
    pub always: bool,
    /// Whether such nodes find the sessions of this node in the registry.
    pub is_registered: bool,
    /// After this time without a renewal, the lease of this node counts as overdue: half of `NODE_TIMEOUT`.
    pub lease_overdue_after: Duration,
}

/// Whether other nodes use the registry to find the sessions of this node.
#[derive(Clone, Debug)]
pub struct RegistryUse(Arc<AtomicBool>);

impl RegistryUse {
    /// They do (`HANDOFF=redis`).
    pub fn always() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    /// Whether they do now.
    pub fn is_active(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is known of such nodes, and of the lease of this node.
#[derive(Debug)]
struct Observed {
    always: bool,
    /// Whether Redis has answered once.
    has_answer: bool,
    /// Instances in the last answer.
    instances: HashSet<String>,
    /// When the last answer with an instance came.
    seen: Option<Instant>,
    /// Leases of this node that were read, and when the last one was.
    renewed: Option<(u64, Instant)>,
}

impl Observed {
    fn new(always: bool) -> Self {
        Self { always, has_answer: false, instances: HashSet::new(), seen: None, renewed: None }
    }

    /// The instances without a lease that are subscribed now.
    fn answered(&mut self, instances: HashSet<String>, now: Instant) {
        self.has_answer = true;
        if !instances.is_empty() {
            self.seen = Some(now);
        }
        self.instances = instances;
    }

    /// Whether such nodes may exist. Without any answer they have to be assumed.
    fn may_exist(&self, now: Instant) -> bool {
        let lately = self.seen.is_some_and(|seen| now.duration_since(seen) < KEPT_FOR);
        self.always || !self.has_answer || lately
    }

    /// Notes how many leases of this node were read. Returns whether the next one is overdue.
    fn note_renewals(&mut self, renewals: Option<u64>, after: Duration, now: Instant) -> bool {
        // Without a lease this node has no session, except those that it is closing.
        let Some(renewals) = renewals else { return true };
        match self.renewed {
            Some((known, since)) if known == renewals => now.duration_since(since) >= after,
            _ => {
                self.renewed = Some((renewals, now));
                false
            }
        }
    }
}

/// Watches for such nodes.
pub struct LegacyWatch {
    config: LegacyConfig,
    link: RedisLink,
    log_nodes: Arc<dyn LogNodes>,
    counters: Arc<LegacyCounters>,
    active: RegistryUse,
    overdue: AtomicBool,
    /// Locked by one question at a time.
    observed: Mutex<Observed>,
}

impl fmt::Debug for LegacyWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LegacyWatch").field("config", &self.config).finish_non_exhaustive()
    }
}

impl LegacyWatch {
    fn new(
        config: LegacyConfig,
        link: RedisLink,
        log_nodes: Arc<dyn LogNodes>,
        counters: Arc<LegacyCounters>,
    ) -> Self {
        counters.legacy_exchange.set(1);
        let observed = Mutex::new(Observed::new(config.always));
        let active = RegistryUse::always();
        let overdue = AtomicBool::new(true);
        Self { config, link, log_nodes, counters, active, overdue, observed }
    }

    /// Whether such nodes may exist. One relaxed load.
    pub fn may_exist(&self) -> bool {
        self.active.is_active()
    }

    /// The same, for those that need nothing else.
    pub fn registry_use(&self) -> RegistryUse {
        self.active.clone()
    }

    /// Whether owners of partitions may take the lease of this node to have expired.
    pub fn is_lease_overdue(&self) -> bool {
        self.overdue.load(Ordering::Relaxed)
    }

    pub(super) fn count_overdue(&self) {
        self.counters.legacy_lease_overdue.add(1);
    }

    /// Whether the instance takes hand-offs through the log.
    pub(super) fn has_lease(&self, instance: &str) -> bool {
        self.log_nodes.has_lease(instance)
    }

    /// Waits until the lease of this node is stored.
    pub(super) async fn lease_stored(&self) {
        while self.log_nodes.own_renewals().is_none() {
            sleep(INTERVAL / 5).await;
        }
    }

    /// Asks Redis now. Returns whether such nodes may exist.
    pub(super) async fn ask(&self) -> bool {
        let mut observed = self.observed.lock().await;
        let renewals = self.log_nodes.own_renewals();
        let after = self.config.lease_overdue_after;
        let overdue = observed.note_renewals(renewals, after, Instant::now());
        self.overdue.store(overdue, Ordering::Relaxed);
        // Before this node has a lease, it has not read the leases of the others.
        if renewals.is_some()
            && let Some(instances) = self.subscribed(&observed.instances).await
        {
            self.log_changes(&observed.instances, &instances);
            self.counters.legacy_nodes.set(instances.len() as u64);
            observed.answered(instances, Instant::now());
        }
        let active = observed.may_exist(Instant::now());
        if self.active.0.swap(active, Ordering::Relaxed) != active {
            self.counters.legacy_exchange.set(u64::from(active));
            self.counters.legacy_exchange_changes.add(1);
        }
        active
    }

    /// The instances without a lease that are subscribed to their channels. `None`: no answer.
    async fn subscribed(&self, known: &HashSet<String>) -> Option<HashSet<String>> {
        let mut channels = cmd("PUBSUB");
        channels.arg("CHANNELS").arg(super::channel_of("*"));
        let answer = self.link.ask(vec![channels]).await.ok().and_then(|mut it| it.pop()?.ok());
        let channels = answer.and_then(|answer| Vec::<String>::from_redis_value(answer).ok());
        let Some(channels) = channels else {
            self.counters.legacy_checks_failed.add(1);
            return None;
        };
        let prefix = super::channel_of("");
        let instances = channels.iter().filter_map(|channel| channel.strip_prefix(&prefix));
        let mut found: HashSet<String> = instances
            .filter(|instance| **instance != *self.config.instance && !self.has_lease(instance))
            .map(str::to_owned)
            .collect();
        if !found.is_subset(known) {
            sleep(LEASE_LAG).await;
            found.retain(|instance| !self.has_lease(instance));
        }
        Some(found)
    }

    fn log_changes(&self, before: &HashSet<String>, now: &HashSet<String>) {
        let new: Vec<_> = now.difference(before).take(NAMED_MAX).map(String::as_str).collect();
        if !new.is_empty() {
            tracing::info!(
                nodes = now.len(),
                new = new.join(", "),
                "nodes without hand-off through the log: exchanging events with them through Redis"
            );
        }
        if !new.is_empty() && !self.config.is_registered {
            tracing::error!(
                "PRESENCE_MODE is off: such nodes do not find the users of this node, and hand nothing over \
                 to it"
            );
        }
        if now.is_empty() && !before.is_empty() {
            tracing::info!("no node without hand-off through the log any more");
        }
    }
}

/// The other nodes that are reached through Redis. Dropping it stops its tasks.
pub struct LegacyNodes {
    nodes: Nodes,
    watch: Arc<LegacyWatch>,
    _watcher: JoinSet<()>,
}

impl LegacyNodes {
    /// Starts watching, and the task that hands over. Needs a tokio runtime.
    pub fn start(
        config: LegacyConfig,
        link: RedisLink,
        log_nodes: Arc<dyn LogNodes>,
        counters: Arc<LegacyCounters>,
        nodes_counters: Arc<NodesCounters>,
    ) -> Self {
        let nodes = Nodes::except(
            NodesConfig::new(Arc::clone(&config.instance)),
            link.clone(),
            nodes_counters,
            Some(Arc::clone(&log_nodes)),
        );
        let watch = Arc::new(LegacyWatch::new(config, link, log_nodes, counters));
        let mut watcher = JoinSet::new();
        let watching = Arc::clone(&watch);
        watcher.spawn(async move {
            loop {
                watching.ask().await;
                sleep(INTERVAL).await;
            }
        });
        Self { nodes, watch, _watcher: watcher }
    }

    /// What is known of these nodes.
    pub fn watch(&self) -> &Arc<LegacyWatch> {
        &self.watch
    }

    /// The location cache, which must be informed of changes.
    pub fn locations(&self) -> &Arc<Locations> {
        self.nodes.locations()
    }
}

impl RemoteNodes for LegacyNodes {
    fn may_exist(&self) -> bool {
        self.watch.may_exist()
    }

    fn forward(&self, value: &[u8], users: &[&str], done: ForwardDone) -> Forwarding {
        self.nodes.forward(value, users, done)
    }

    fn lost(&self, users: &[&str]) {
        self.nodes.lost(users);
    }

    fn lost_by_all(&self) {
        if self.may_exist() {
            self.nodes.lost_by_all();
        }
    }

    fn has_room(&self) -> bool {
        !self.may_exist() || self.nodes.has_room()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instances(names: &[&str]) -> HashSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn nodes_without_a_lease_are_assumed_until_redis_answers() {
        let start = Instant::now();
        let mut observed = Observed::new(false);
        assert!(observed.may_exist(start + 2 * KEPT_FOR));
        observed.answered(instances(&[]), start);
        assert!(!observed.may_exist(start));
    }

    #[test]
    fn nodes_without_a_lease_are_expected_back_for_a_minute() {
        let start = Instant::now();
        let mut observed = Observed::new(false);
        observed.answered(instances(&["go-1"]), start);
        assert!(observed.may_exist(start));
        observed.answered(instances(&[]), start + Duration::from_secs(1));
        assert!(observed.may_exist(start + Duration::from_secs(59)));
        assert!(!observed.may_exist(start + Duration::from_secs(60)));
        observed.answered(instances(&["go-1"]), start + Duration::from_secs(100));
        assert!(observed.may_exist(start + Duration::from_secs(159)), "seen again");
    }

    #[test]
    fn nodes_without_a_lease_are_always_expected_if_the_setting_says_so() {
        let start = Instant::now();
        let mut observed = Observed::new(true);
        observed.answered(instances(&[]), start);
        assert!(observed.may_exist(start + 2 * KEPT_FOR));
    }

    #[test]
    fn lease_is_overdue_without_a_renewal_in_time() {
        let (start, after) = (Instant::now(), Duration::from_secs(30));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut observed = Observed::new(false);
        assert!(observed.note_renewals(None, after, at(0)), "no lease");
        assert!(!observed.note_renewals(Some(1), after, at(0)));
        assert!(!observed.note_renewals(Some(1), after, at(29)));
        assert!(observed.note_renewals(Some(1), after, at(30)));
        assert!(!observed.note_renewals(Some(2), after, at(31)), "renewed");
        // A new epoch counts from the start.
        assert!(!observed.note_renewals(Some(1), after, at(90)));
    }
}
