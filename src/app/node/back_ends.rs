//! The services that this node asks and tells, as far as they are configured. All connect in the
//! background and again when they were away.

use std::sync::Arc;

use super::metrics::component;
use super::other_nodes::OtherNodes;
use super::routing::{RoutingPeers, compression};
use super::sizing::Sizing;
use crate::app::admin::Samples;
use crate::app::config::{AuthMode, GrpcAddress, PresenceMode, Settings};
use crate::service::backends::neighbours::{
    ConversationService, MessageService, NeighbourConfig, NeighbourCounters, PresenceService,
};
use crate::service::backends::ports::ConversationSource;
use crate::service::backends::redis::{self, Announcer, LocationsConfig, RedisConfig, RedisLink};
use crate::service::sessions::auth::{Authenticator, ClaimRules, JwksConfig, KeySource};
use crate::service::sessions::catch_up::{CatchUpConfig, CatchUpService, ReadAccess};
use crate::service::sessions::presence::{
    Presence, PresenceConfig, PresenceTarget, VisibilityConfig,
};

/// See the module.
pub(super) struct BackEnds {
    pub auth: Arc<Authenticator>,
    pub conversations: Option<ConversationService>,
    /// `None`: no Redis.
    pub other_nodes: Option<OtherNodes>,
    pub presence: Presence,
    pub catch_up: CatchUpService,
    /// The metrics of all of them.
    pub samples: Vec<Samples>,
}

impl BackEnds {
    /// Makes them, for a node of this name. Needs the runtime.
    ///
    /// # Errors
    /// A key or an address cannot be used.
    pub(super) fn start(
        settings: &Settings,
        sizing: &Sizing,
        instance: &Arc<str>,
    ) -> Result<Self, String> {
        let mut samples = Vec::new();
        let conversations = neighbour(
            settings,
            ("CONV_SVC_ADDR", "conversation_service_"),
            settings.conv_svc_addr.as_ref(),
            ConversationService::new,
            &mut samples,
        )?;
        let messages = neighbour(
            settings,
            ("MSG_SVC_ADDR", "message_service_"),
            settings.msg_svc_addr.as_ref(),
            MessageService::new,
            &mut samples,
        )?;
        let redis = redis_link(settings, &mut samples)?;
        let other_nodes =
            redis.clone().map(|link| OtherNodes::new(settings, instance, link, &mut samples));
        let announcer = other_nodes.as_ref().and_then(OtherNodes::announcer);
        let presence =
            presence(settings, sizing, instance, redis.as_ref(), announcer, &mut samples)?;
        let catch_up = catch_up(settings, messages, conversations.as_ref(), &mut samples);
        let auth = authenticator(settings, &mut samples)?;
        Ok(Self { auth, conversations, other_nodes, presence, catch_up, samples })
    }

    /// What the routers need of them.
    pub(super) fn for_routing(&self) -> RoutingPeers {
        let service = self.conversations.clone();
        let source = service.map(|service| -> Arc<dyn ConversationSource> { Arc::new(service) });
        RoutingPeers { source, remote: self.other_nodes.as_ref().and_then(OtherNodes::remote) }
    }
}

/// One of the gRPC services, if it has an address.
fn neighbour<T, E: std::fmt::Display>(
    settings: &Settings,
    (setting, prefix): (&str, &'static str),
    address: Option<&GrpcAddress>,
    make: impl FnOnce(&NeighbourConfig, Arc<NeighbourCounters>) -> Result<T, E>,
    samples: &mut Vec<Samples>,
) -> Result<Option<T>, String> {
    let Some(address) = address else { return Ok(None) };
    let config = NeighbourConfig {
        call_timeout: settings.call_timeout,
        ..NeighbourConfig::new(address.url())
    };
    let counters = Arc::new(NeighbourCounters::default());
    let made = make(&config, Arc::clone(&counters))
        .map_err(|error| format!("{setting}: {} cannot be used: {error}", config.url))?;
    samples.push(component(prefix, move |visit| counters.visit(visit)));
    Ok(Some(made))
}

fn redis_link(
    settings: &Settings,
    samples: &mut Vec<Samples>,
) -> Result<Option<RedisLink>, String> {
    let Some(address) = settings.redis() else { return Ok(None) };
    let address = address.map_err(|error| error.to_string())?;
    let counters = Arc::default();
    let link = redis::connect(RedisConfig::new(address), Arc::clone(&counters));
    samples.push(component("", move |visit| counters.visit(visit)));
    Ok(Some(link))
}

fn presence(
    settings: &Settings,
    sizing: &Sizing,
    instance: &Arc<str>,
    redis: Option<&RedisLink>,
    announcer: Option<Announcer>,
    samples: &mut Vec<Samples>,
) -> Result<Presence, String> {
    let target = match settings.presence() {
        PresenceMode::Off => return Ok(Presence::off()),
        PresenceMode::Redis => {
            PresenceTarget::Redis(redis.expect("checked with the settings").clone())
        }
        PresenceMode::Service => {
            let address = settings.presence_svc_addr.as_ref();
            let names = ("PRESENCE_SVC_ADDR", "presence_service_");
            let service = neighbour(settings, names, address, PresenceService::new, samples)?;
            PresenceTarget::Service(service.expect("checked with the settings"))
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
    let counters = Arc::default();
    let presence = Presence::spawn(config, target, Arc::clone(&counters));
    samples.push(component("presence_", move |visit| counters.visit(visit)));
    Ok(presence)
}

/// The bounds of presence: all sessions may leave at once.
pub(super) fn presence_config(instance: Arc<str>, sizing: &Sizing) -> PresenceConfig {
    let config = PresenceConfig::new(instance);
    let ends_waiting_max = config.ends_waiting_max.max(sizing.sessions_max());
    PresenceConfig { ends_waiting_max, ..config }
}

fn catch_up(
    settings: &Settings,
    messages: Option<MessageService>,
    conversations: Option<&ConversationService>,
    samples: &mut Vec<Samples>,
) -> CatchUpService {
    let Some(messages) = messages else {
        tracing::warn!("MSG_SVC_ADDR is not set: what a client missed is not caught up");
        return CatchUpService::off();
    };
    let access = match (conversations, settings.auth_mode) {
        (Some(service), _) => ReadAccess::Checked {
            listing: Arc::new(service.clone()),
            source: Arc::new(service.clone()),
        },
        (None, AuthMode::Trust) => ReadAccess::Unchecked,
        (None, AuthMode::Jwt) => {
            tracing::warn!(
                "CONV_SVC_ADDR is not set, so nobody can say who may read what: what a client \
                 missed is not caught up"
            );
            return CatchUpService::off();
        }
    };
    let defaults = CatchUpConfig::default();
    let config = CatchUpConfig {
        calls_max: settings.resume_calls_max.size(),
        // A chunk must not overflow the queue that it is put into.
        chunk_messages_max: defaults
            .chunk_messages_max
            .min(settings.queue_messages_max.size().div_ceil(2)),
        chunk_bytes_max: defaults.chunk_bytes_max.min(settings.queue_bytes_max.bytes() / 2),
        compression: compression(settings),
        ..defaults
    };
    let counters = Arc::default();
    let catch_up = CatchUpService::new(config, Arc::new(messages), access, Arc::clone(&counters));
    samples.push(component("resume_", move |visit| counters.visit(visit)));
    catch_up
}

fn authenticator(
    settings: &Settings,
    samples: &mut Vec<Samples>,
) -> Result<Arc<Authenticator>, String> {
    if settings.auth_mode == AuthMode::Trust {
        tracing::warn!("AUTH_MODE=trust: anybody can connect as anybody");
        return Ok(Authenticator::trust());
    }
    let (setting, source) = match (&settings.jwt_secret, &settings.jwt_key_file, &settings.jwks_url)
    {
        (Some(secret), ..) => ("JWT_SECRET", KeySource::Secret(secret.clone())),
        (_, Some(path), _) => {
            let pem = std::fs::read(path)
                .map_err(|error| format!("JWT_KEY_FILE: {}: {error}", path.display()))?;
            ("JWT_KEY_FILE", KeySource::Pem(pem))
        }
        (_, _, Some(url)) => ("JWKS_URL", KeySource::Jwks(JwksConfig::new(url.secret().clone()))),
        (None, None, None) => unreachable!("checked with the settings"),
    };
    let rules = ClaimRules {
        issuer: settings.jwt_issuer.as_ref().map(ToString::to_string),
        audience: settings.jwt_audience.as_ref().map(ToString::to_string),
        leeway: settings.jwt_leeway,
    };
    let counters = Arc::default();
    let auth = Authenticator::jwt(source, rules, Arc::clone(&counters))
        .map_err(|error| format!("{setting}: {error}"))?;
    samples.push(component("auth_", move |visit| counters.visit(visit)));
    Ok(auth)
}
