//! Redis between the nodes: what concerns users elsewhere goes out, what concerns users here comes
//! in.

use std::sync::Arc;

use super::metrics::component;
use super::routing::Routing;
use crate::app::admin::{Check, Samples};
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

/// The way out; it is there before the routers, which use it.
pub(super) struct OtherNodes {
    link: RedisLink,
    /// `None`: every node reads everything itself (`broadcast`).
    nodes: Option<Arc<Nodes>>,
    announcer: Option<Announcer>,
}

/// The way in; it ends with this value.
pub(super) struct FromOtherNodes {
    _subscriptions: Subscriptions,
    counters: Arc<SubscriptionCounters>,
}

impl OtherNodes {
    /// Over this connection.
    pub(super) fn new(
        settings: &Settings,
        instance: &Arc<str>,
        link: RedisLink,
        samples: &mut Vec<Samples>,
    ) -> Self {
        if settings.routing() != RoutingMode::Group {
            return Self { link, nodes: None, announcer: None };
        }
        let counters = Arc::default();
        let config = NodesConfig::new(Arc::clone(instance));
        let nodes = Nodes::new(config, link.clone(), Arc::clone(&counters));
        let announcer = Announcer::start(link.clone(), Arc::clone(&counters));
        samples.push(component("", move |visit| counters.visit(visit)));
        Self { link, nodes: Some(Arc::new(nodes)), announcer: Some(announcer) }
    }

    /// For presence: tells the other nodes of registrations.
    pub(super) fn announcer(&self) -> Option<Announcer> {
        self.announcer.clone()
    }

    /// For the routers.
    pub(super) fn remote(&self) -> Option<Arc<dyn RemoteNodes>> {
        self.nodes.clone().map(|nodes| -> Arc<dyn RemoteNodes> { nodes })
    }

    /// Subscribes to what other nodes and the presence service publish. A change of presence goes
    /// to those here whom `conversations` says it concerns; without that service to nobody. Sessions
    /// that have moved to another node end here.
    pub(super) fn listen(
        &self,
        instance: &Arc<str>,
        sessions: &SessionHandle,
        routing: &Routing,
        directory: &Arc<Directory>,
        conversations: Option<&ConversationService>,
        samples: &mut Vec<Samples>,
    ) -> FromOtherNodes {
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
            let counters = Arc::default();
            let config = PresenceFanoutConfig::default();
            let fan_out = Arc::new(PresenceFanout::new(config, parts, Arc::clone(&counters)));
            samples.push(component("", move |visit| counters.visit(visit)));
            routing.membership().watch(Arc::clone(&fan_out) as Arc<dyn MembershipChanges>);
            presence.push(fan_out);
        }
        let sinks = Sinks { router, presence };
        let config = SubscriptionsConfig {
            hand_offs: self.nodes.is_some(),
            ..SubscriptionsConfig::new(Arc::clone(instance))
        };
        let counters = Arc::new(SubscriptionCounters::default());
        let subscriptions =
            Subscriptions::start(config, self.link.clone(), sinks, Arc::clone(&counters));
        let counted = Arc::clone(&counters);
        samples.push(component("", move |visit| counted.visit(visit)));
        FromOtherNodes { _subscriptions: subscriptions, counters }
    }
}

impl FromOtherNodes {
    /// A node that never reached its Redis is not taken into service. One that loses it stays: what
    /// it does for its own users needs no Redis.
    pub(super) fn check(&self) -> Check {
        let counters = Arc::clone(&self.counters);
        Box::new(move || {
            let never = counters.redis_subscriptions.get() == 0;
            never.then(|| "redis: not reached yet".to_owned())
        })
    }
}
