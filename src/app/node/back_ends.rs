//! Clients of the other services and of Redis, as far as they are configured. All connect in the
//! background and reconnect by themselves.

use std::sync::Arc;

use super::metrics::{self, register};
use super::other_nodes::OtherNodes;
use super::routing::{RoutingPeers, compression};
use super::sizing::{Sizing, millis};
use super::tls::Tls;
use super::tokens::Tokens;
use crate::app::admin::Collector;
use crate::app::config::{AuthMode, GrpcAddress, PresenceMode, Settings};
use crate::service::backends::neighbours::{
    ConversationService, MessageService, NeighbourConfig, NeighbourCounters, PresenceService,
};
use crate::service::backends::ports::{ConversationSource, LogNodes, MissedEvents};
use crate::service::backends::redis::{self, Announcer, LocationsConfig, RedisConfig, RedisLink};
use crate::service::members::current::CurrentConversations;
use crate::service::members::membership::{Membership, MembershipConfig};
use crate::service::members::user_lists::{UserLists, UserListsConfig};
use crate::service::sessions::catch_up::{CatchUpConfig, CatchUpService, ReadAccess};
use crate::service::sessions::presence::{
    Presence, PresenceConfig, PresenceTarget, VisibilityConfig,
};

/// The clients of all configured back ends.
pub(super) struct BackEnds {
    pub tokens: Tokens,
    /// `None`: the ports of clients speak plaintext.
    pub tls: Option<Tls>,
    /// For those who ask who may read what.
    pub conversations: Option<CurrentConversations>,
    /// For the routers.
    membership: Arc<Membership>,
    user_lists: Option<Arc<UserLists>>,
    /// `None`: no Redis.
    pub other_nodes: Option<OtherNodes>,
    pub presence: Presence,
    pub catch_up: CatchUpService,
    /// The metrics of all back ends.
    pub collectors: Vec<Collector>,
}

impl BackEnds {
    /// Creates the clients for a node of this name. `log_nodes`: the nodes to which the log hands over. Must be
    /// called within the runtime.
    ///
    /// # Errors
    /// A key or an address cannot be used.
    pub(super) fn start(
        settings: &Settings,
        sizing: &Sizing,
        instance: &Arc<str>,
        log_nodes: Option<Arc<dyn LogNodes>>,
        mut collectors: Vec<Collector>,
    ) -> Result<Self, String> {
        let conversations = neighbour(
            settings,
            ("CONV_SVC_ADDR", "conversation_service_"),
            settings.conv_svc_addr.as_ref(),
            ConversationService::new,
            &mut collectors,
        )?;
        let messages = neighbour(
            settings,
            ("MSG_SVC_ADDR", "message_service_"),
            settings.msg_svc_addr.as_ref(),
            MessageService::new,
            &mut collectors,
        )?;
        let redis = redis_link(settings, &mut collectors)?;
        let other_nodes = redis
            .clone()
            .map(|link| OtherNodes::new(settings, instance, link, log_nodes, &mut collectors));
        let announcer = other_nodes.as_ref().and_then(OtherNodes::announcer);
        let presence =
            presence(settings, sizing, instance, redis.as_ref(), announcer, &mut collectors)?;
        let service = conversations.map(Arc::new);
        let source = service.clone().map(|service| -> Arc<dyn ConversationSource> { service });
        let membership = membership(settings, source, &mut collectors);
        let conversations =
            service.map(|service| CurrentConversations::new(service, Arc::clone(&membership)));
        let user_lists = conversations.as_ref().map(|conversations| {
            let (listing, membership) = (conversations.clone(), Arc::clone(&membership));
            UserLists::new(
                UserListsConfig {
                    deadline_ms: membership_deadline_ms(settings),
                    ..UserListsConfig::default()
                },
                Arc::new(listing),
                membership,
                tokio::runtime::Handle::current(),
            )
        });
        let catch_up = catch_up(settings, messages, conversations.as_ref(), &mut collectors);
        collectors.push(metrics::cursors_expired(catch_up.clone()));
        let tokens = Tokens::new(settings, &mut collectors)?;
        let tls = Tls::new(settings, &mut collectors)?;
        Ok(Self {
            tokens,
            tls,
            conversations,
            membership,
            user_lists,
            other_nodes,
            presence,
            catch_up,
            collectors,
        })
    }

    /// The back ends that the routers need.
    pub(super) fn for_routing(&self, missed: Arc<dyn MissedEvents>) -> RoutingPeers {
        let membership = Arc::clone(&self.membership);
        let remote = self.other_nodes.as_ref().and_then(OtherNodes::remote);
        let user_lists = self.user_lists.clone();
        RoutingPeers { membership, user_lists, remote, cluster: None, missed }
    }
}

/// Creates the client of a gRPC service, if its address is set.
fn neighbour<T, E: std::fmt::Display>(
    settings: &Settings,
    (setting, prefix): (&'static str, &'static str),
    address: Option<&GrpcAddress>,
    make: impl FnOnce(&NeighbourConfig, Arc<NeighbourCounters>) -> Result<T, E>,
    collectors: &mut Vec<Collector>,
) -> Result<Option<T>, String> {
    let Some(address) = address else { return Ok(None) };
    let config = NeighbourConfig {
        setting,
        answer_bytes_max: settings.neighbour_answer_max.bytes(),
        call_timeout: settings.call_timeout,
        ..NeighbourConfig::new(address.url())
    };
    make(&config, register(prefix, collectors))
        .map(Some)
        .map_err(|error| format!("{setting}: {} cannot be used: {error}", config.url))
}

fn redis_link(
    settings: &Settings,
    collectors: &mut Vec<Collector>,
) -> Result<Option<RedisLink>, String> {
    let Some(address) = settings.redis() else { return Ok(None) };
    let address = address.map_err(|error| error.to_string())?;
    Ok(Some(redis::connect(RedisConfig::new(address), register("", collectors))))
}

fn presence(
    settings: &Settings,
    sizing: &Sizing,
    instance: &Arc<str>,
    redis: Option<&RedisLink>,
    announcer: Option<Announcer>,
    collectors: &mut Vec<Collector>,
) -> Result<Presence, String> {
    let target = match settings.presence() {
        PresenceMode::Off => return Ok(Presence::off()),
        PresenceMode::Redis => {
            PresenceTarget::Redis(redis.expect("validated with the settings").clone())
        }
        PresenceMode::Service => {
            let address = settings.presence_svc_addr.as_ref();
            let names = ("PRESENCE_SVC_ADDR", "presence_service_");
            let service = neighbour(settings, names, address, PresenceService::new, collectors)?;
            PresenceTarget::Service(service.expect("validated with the settings"))
        }
    };
    let visibility = announcer.is_some().then(|| VisibilityConfig {
        lookup_lifetime: LocationsConfig::default().lifetime(),
        registration_wait: settings.registration_wait,
    });
    let config = PresenceConfig {
        visibility,
        refresh_interval: settings.presence_refresh,
        announcer,
        ..presence_config(Arc::clone(instance), sizing)
    };
    Ok(Presence::spawn(config, target, register("presence_", collectors)))
}

/// The bounds of presence. There is room for the unregistration of all sessions at once.
pub(super) fn presence_config(instance: Arc<str>, sizing: &Sizing) -> PresenceConfig {
    let config = PresenceConfig::new(instance);
    let ends_waiting_max = config.ends_waiting_max.max(sizing.sessions_max());
    PresenceConfig { ends_waiting_max, ..config }
}

fn catch_up(
    settings: &Settings,
    messages: Option<MessageService>,
    conversations: Option<&CurrentConversations>,
    collectors: &mut Vec<Collector>,
) -> CatchUpService {
    let config = catch_up_config(settings);
    let counters = register("resume_", collectors);
    let Some(messages) = messages else {
        tracing::warn!(
            "MSG_SVC_ADDR is not set: no catch-up after a reconnect, except with a cursor"
        );
        return CatchUpService::without_messages(config, counters);
    };
    let access = match (conversations, settings.auth_mode) {
        (Some(service), _) => ReadAccess::Checked {
            listing: Arc::new(service.clone()),
            source: Arc::new(service.clone()),
        },
        (None, AuthMode::Trust) => ReadAccess::Unchecked,
        (None, AuthMode::Jwt) => {
            tracing::warn!(
                "CONV_SVC_ADDR is not set, so access cannot be checked: no catch-up after a reconnect, \
                 except with a cursor"
            );
            return CatchUpService::without_messages(config, counters);
        }
    };
    CatchUpService::new(config, Arc::new(messages), access, counters)
}

fn catch_up_config(settings: &Settings) -> CatchUpConfig {
    let defaults = CatchUpConfig::default();
    CatchUpConfig {
        calls_max: settings.resume_calls_max.size(),
        // A chunk must fit into the queue of the session.
        chunk_messages_max: defaults
            .chunk_messages_max
            .min(settings.queue_messages_max.size().div_ceil(2)),
        chunk_bytes_max: defaults.chunk_bytes_max.min(settings.queue_bytes_max.bytes() / 2),
        compression: compression(settings),
        ..defaults
    }
}

/// The deadline of a request for members or conversations, ms. A large answer takes two calls, and waits for others.
fn membership_deadline_ms(settings: &Settings) -> u64 {
    let least_ms = MembershipConfig::default().fetch_deadline_ms;
    least_ms.max(3 * millis(settings.call_timeout))
}

/// The cache of member lists. `source`: `None`: they come from events only.
fn membership(
    settings: &Settings,
    source: Option<Arc<dyn ConversationSource>>,
    collectors: &mut Vec<Collector>,
) -> Arc<Membership> {
    let defaults = MembershipConfig::default();
    let config = MembershipConfig {
        conversations_max: settings.membership_cache_max.size(),
        members_max: settings.membership_members_max.size(),
        lifetime_ms: millis(settings.membership_lifetime),
        fetch_deadline_ms: membership_deadline_ms(settings),
        ..defaults
    };
    let runtime = tokio::runtime::Handle::current();
    Membership::new(config, source, runtime, register("membership_", collectors))
}
