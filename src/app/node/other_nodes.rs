//! Exchange with the other nodes through Redis: events for users on other nodes go out, events for users
//! on this node come in.

use std::sync::Arc;

use super::metrics::register;
use super::routing::Routing;
use crate::app::admin::{Collector, ReadinessCheck};
use crate::app::config::{RoutingMode, Settings};
use crate::service::backends::neighbours::ConversationService;
use crate::service::backends::ports::{MembershipChanges, RemoteNodes, RouterInbox};
use crate::service::backends::redis::{
    Announcer, Nodes, NodesConfig, PresenceUpdates, RedisLink, Sinks, SubscriptionCounters,
    Subscriptions, SubscriptionsConfig,
};
use crate::service::members::directory::Directory;
use crate::service::routing::router::RouterHandle;
use crate::service::sessions::manager::SessionHandle;
use crate::service::sessions::presence_fanout::{
    PresenceFanout, PresenceFanoutConfig, PresenceFanoutParts,
};

/// The sending side. It is created before the routers, which use it.
pub(super) struct OtherNodes {
    link: RedisLink,
    /// `None`: every node reads every partition (`broadcast`).
    nodes: Option<Arc<Nodes>>,
    announcer: Option<Announcer>,
}

/// The receiving side. Dropping it ends the subscriptions.
pub(super) struct OtherNodesListener {
    _subscriptions: Subscriptions,
    counters: Arc<SubscriptionCounters>,
}

impl OtherNodes {
    /// Creates the sending side on this Redis connection.
    pub(super) fn new(
        settings: &Settings,
        instance: &Arc<str>,
        link: RedisLink,
        collectors: &mut Vec<Collector>,
    ) -> Self {
        if settings.routing() != RoutingMode::Group {
            return Self { link, nodes: None, announcer: None };
        }
        let counters = register("", collectors);
        let config = NodesConfig::new(Arc::clone(instance));
        let nodes = Nodes::new(config, link.clone(), Arc::clone(&counters));
        let announcer = Announcer::start(link.clone(), counters);
        Self { link, nodes: Some(Arc::new(nodes)), announcer: Some(announcer) }
    }

    /// Announces registrations to the other nodes; used by presence.
    pub(super) fn announcer(&self) -> Option<Announcer> {
        self.announcer.clone()
    }

    /// Hands events over to the other nodes; used by the routers.
    pub(super) fn remote(&self) -> Option<Arc<dyn RemoteNodes>> {
        self.nodes.clone().map(|nodes| -> Arc<dyn RemoteNodes> { nodes })
    }

    /// Subscribes to what the other nodes and the presence service publish. Sends a presence change
    /// to all users on this node who share a conversation with the changed user. `conversations`
    /// lists the conversations; without it nobody receives the change. Closes a session of this
    /// node that has moved to another node.
    pub(super) fn listen(
        &self,
        instance: &Arc<str>,
        sessions: &SessionHandle,
        routing: &Routing,
        directory: &Arc<Directory>,
        conversations: Option<&ConversationService>,
        collectors: &mut Vec<Collector>,
    ) -> OtherNodesListener {
        let router: Arc<dyn RouterInbox> = Arc::new(RouterHandle::new(routing.controls().to_vec()));
        let mut presence: Vec<Arc<dyn PresenceUpdates>> = Vec::new();
        if let Some(nodes) = &self.nodes {
            presence.push(Arc::clone(nodes.locations()) as Arc<dyn PresenceUpdates>);
            presence.push(Arc::new(sessions.clone()));
        }
        if let Some(service) = conversations {
            let parts = PresenceFanoutParts {
                directory: Arc::clone(directory),
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
        let sinks = Sinks { router, presence };
        let config = SubscriptionsConfig {
            hand_offs: self.nodes.is_some(),
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
