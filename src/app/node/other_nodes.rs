//! Exchange with the other nodes through Redis: events for users on other nodes go out, events for users
//! on this node come in.

use std::sync::Arc;

use super::metrics::register;
use super::routing::Routing;
use crate::app::admin::{Collector, ReadinessCheck};
use crate::app::config::{HandOffMode, LegacyNodesMode, PresenceMode, Settings};
use crate::service::backends::ports::{
    LogNodes, MembershipChanges, MissedEvents, RemoteNodes, RouterInbox,
};
use crate::service::backends::redis::{
    Announcer, LegacyConfig, LegacyNodes, LegacyWatch, Locations, Nodes, NodesConfig,
    PresenceUpdates, RedisLink, RegistryUse, Sinks, SubscriptionCounters, Subscriptions,
    SubscriptionsConfig,
};
use crate::service::members::current::CurrentConversations;
use crate::service::members::directory::Directory;
use crate::service::routing::router::RouterHandle;
use crate::service::sessions::manager::SessionHandle;
use crate::service::sessions::presence_fanout::{
    PresenceFanout, PresenceFanoutConfig, PresenceFanoutParts,
};

/// The sending side. It is created before the routers, which use it.
pub(super) struct OtherNodes {
    link: RedisLink,
    /// `None`: every node reads every partition (`broadcast`), or the log hands over to all of them.
    through_redis: Option<ThroughRedis>,
}

/// The nodes that are reached through Redis.
struct ThroughRedis {
    nodes: Arc<dyn RemoteNodes>,
    locations: Arc<Locations>,
    announcer: Announcer,
    /// `None`: all of them (`HANDOFF=redis`).
    legacy: Option<Arc<LegacyWatch>>,
}

/// The receiving side. Dropping it ends the subscriptions.
pub(super) struct OtherNodesListener {
    _subscriptions: Subscriptions,
    counters: Arc<SubscriptionCounters>,
}

/// The sessions of this node.
pub(super) struct OwnSessions<'a> {
    /// Their manager.
    pub handle: &'a SessionHandle,
    /// Takes those that have missed events.
    pub missed: Arc<dyn MissedEvents>,
    /// By user.
    pub directory: &'a Arc<Directory>,
}

impl ThroughRedis {
    /// All other nodes (`HANDOFF=redis`).
    fn all(instance: &Arc<str>, link: &RedisLink, collectors: &mut Vec<Collector>) -> Self {
        let counters = register("", collectors);
        let config = NodesConfig::new(Arc::clone(instance));
        let nodes = Nodes::new(config, link.clone(), Arc::clone(&counters));
        Self {
            locations: Arc::clone(nodes.locations()),
            nodes: Arc::new(nodes),
            announcer: Announcer::start(link.clone(), counters, RegistryUse::always()),
            legacy: None,
        }
    }

    /// The other nodes that take no hand-offs through the log.
    fn some(
        settings: &Settings,
        instance: &Arc<str>,
        link: &RedisLink,
        log_nodes: Arc<dyn LogNodes>,
        collectors: &mut Vec<Collector>,
    ) -> Self {
        let counters = register("", collectors);
        let config = LegacyConfig {
            instance: Arc::clone(instance),
            always: settings.legacy_nodes == LegacyNodesMode::On,
            is_registered: settings.presence() != PresenceMode::Off,
            lease_overdue_after: settings.node_timeout / 2,
        };
        let nodes = LegacyNodes::start(
            config,
            link.clone(),
            log_nodes,
            register("", collectors),
            Arc::clone(&counters),
        );
        let legacy = Arc::clone(nodes.watch());
        Self {
            locations: Arc::clone(nodes.locations()),
            nodes: Arc::new(nodes),
            announcer: Announcer::start(link.clone(), counters, legacy.registry_use()),
            legacy: Some(legacy),
        }
    }
}

impl OtherNodes {
    /// Creates the sending side on this Redis connection. `log_nodes`: the nodes to which the log hands
    /// over.
    pub(super) fn new(
        settings: &Settings,
        instance: &Arc<str>,
        link: RedisLink,
        log_nodes: Option<Arc<dyn LogNodes>>,
        collectors: &mut Vec<Collector>,
    ) -> Self {
        let through_redis = match log_nodes {
            Some(log_nodes) if settings.expects_legacy_nodes() => {
                Some(ThroughRedis::some(settings, instance, &link, log_nodes, collectors))
            }
            _ if settings.hand_off() == Some(HandOffMode::Redis) => {
                Some(ThroughRedis::all(instance, &link, collectors))
            }
            _ => None,
        };
        Self { link, through_redis }
    }

    /// Announces registrations to the other nodes; used by presence.
    pub(super) fn announcer(&self) -> Option<Announcer> {
        self.through_redis.as_ref().map(|them| them.announcer.clone())
    }

    /// Hands events over to the other nodes; used by the routers.
    pub(super) fn remote(&self) -> Option<Arc<dyn RemoteNodes>> {
        self.through_redis.as_ref().map(|them| Arc::clone(&them.nodes))
    }

    /// Subscribes to what the other nodes and the presence service publish. Sends a presence change
    /// to all users on this node who share a conversation with the changed user. `conversations`
    /// lists the conversations; without it nobody receives the change. Closes a session of this
    /// node that has moved to another node, and those that have missed events.
    pub(super) fn listen(
        &self,
        instance: &Arc<str>,
        sessions: OwnSessions<'_>,
        routing: &Routing,
        conversations: Option<&CurrentConversations>,
        collectors: &mut Vec<Collector>,
    ) -> OtherNodesListener {
        let router: Arc<dyn RouterInbox> = Arc::new(RouterHandle::new(routing.controls().to_vec()));
        let mut presence: Vec<Arc<dyn PresenceUpdates>> = Vec::new();
        if let Some(them) = &self.through_redis {
            presence.push(Arc::clone(&them.locations) as Arc<dyn PresenceUpdates>);
            presence.push(Arc::new(sessions.handle.clone()));
        }
        if let Some(service) = conversations {
            let parts = PresenceFanoutParts {
                directory: Arc::clone(sessions.directory),
                listing: Arc::new(service.clone()),
                source: Arc::new(service.clone()),
                router: Arc::clone(&router),
            };
            let counters = register("", collectors);
            let config = PresenceFanoutConfig::default();
            let fan_out = Arc::new(PresenceFanout::new(config, parts, counters));
            routing.membership().watch(Arc::clone(&fan_out) as Arc<dyn MembershipChanges>);
            presence.push(fan_out);
        }
        let sinks = Sinks { router, missed: sessions.missed, presence };
        let config = SubscriptionsConfig {
            hand_offs: self.through_redis.is_some(),
            legacy: self.through_redis.as_ref().and_then(|them| them.legacy.clone()),
            ..SubscriptionsConfig::new(Arc::clone(instance))
        };
        let counters = register("", collectors);
        let subscriptions =
            Subscriptions::start(config, self.link.clone(), sinks, Arc::clone(&counters));
        OtherNodesListener { _subscriptions: subscriptions, counters }
    }
}

impl OtherNodesListener {
    /// A node that has never reached Redis is not ready. A node that loses Redis later stays ready,
    /// because serving its own users needs no Redis.
    pub(super) fn check(&self) -> ReadinessCheck {
        let counters = Arc::clone(&self.counters);
        Box::new(move || {
            let never = counters.redis_subscriptions.get() == 0;
            never.then(|| "redis: not reached yet".to_owned())
        })
    }
}
