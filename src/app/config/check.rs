//! Checks across settings: finds missing and contradictory ones.

use super::Profile;
use super::layers::Layers;
use super::own_keys::{BadKey, admin_tokens, own_keys};
use super::revocations::revocations;
use super::table::Settings;
use super::tls_files::tls_files;
use super::value::{
    AuthMode, HandOffMode, LegacyNodesMode, Name, PresenceMode, RoutingMode, SettingValue as _,
};
use crate::protocol::upgrade::origin::{BadOrigin, Origins};
use crate::service::backends::redis::{RedisAddress, RedisAddressError};

impl Settings {
    /// The origins that browsers may connect from.
    ///
    /// # Errors
    /// An entry is not an origin.
    pub fn origin_rule(&self) -> Result<Origins, BadOrigin> {
        match self.origins.as_slice() {
            [] => Ok(Origins::Any),
            origins => Origins::parse(origins.iter().map(Name::as_str)),
        }
    }

    /// Whether Redis is configured.
    pub fn has_redis(&self) -> bool {
        self.redis_url.is_some() || !self.redis_addr.is_empty()
    }

    /// Whether the ports of clients have certificates.
    pub fn has_tls(&self) -> bool {
        !self.tls_cert.is_empty()
    }

    /// The address of Redis, if it is configured.
    pub fn redis(&self) -> Option<Result<RedisAddress, RedisAddressError>> {
        self.has_redis().then(|| match &self.redis_url {
            Some(url) => RedisAddress::parse(url.expose()),
            None => RedisAddress::parse(&self.redis_addr.show()),
        })
    }

    /// How several nodes share the work. Default: `group` if Redis is configured, else `broadcast`.
    pub fn routing(&self) -> RoutingMode {
        self.routing_mode.unwrap_or(if self.has_redis() {
            RoutingMode::Group
        } else {
            RoutingMode::Broadcast
        })
    }

    /// How events reach users on other nodes; `None`: every node reads every partition.
    pub fn hand_off(&self) -> Option<HandOffMode> {
        (self.routing() == RoutingMode::Group).then_some(self.handoff)
    }

    /// Whether the node may also exchange events with nodes that take no hand-offs through the log.
    pub fn expects_legacy_nodes(&self) -> bool {
        self.hand_off() == Some(HandOffMode::Log)
            && self.has_redis()
            && self.legacy_nodes != LegacyNodesMode::Off
    }

    /// Where presence is reported. Default: the presence service if it is configured, else nowhere.
    pub fn presence(&self) -> PresenceMode {
        self.presence_mode.unwrap_or(if self.presence_svc_addr.is_some() {
            PresenceMode::Service
        } else {
            PresenceMode::Off
        })
    }
}

/// Reports what is missing or contradictory.
pub(super) fn cross_check(settings: &Settings, layers: &mut Layers) {
    if layers.profile() == Profile::Serve && settings.kafka_brokers.is_empty() {
        layers.reject("kafka_brokers", "is missing: Delivery reads events from Kafka");
    }
    if settings.kafka_topics.is_empty() {
        layers.reject("kafka_topics", "is empty: at least one topic is needed");
    }
    topics(settings, layers);
    for property in &settings.kafka_properties {
        if !property.as_str().contains('=') {
            layers.reject("kafka_properties", format!("`{property}` is not name=value"));
        }
        if property.as_str().starts_with("transactional.id=") {
            let why = "sets `transactional.id`: Delivery uses no transactions, and would wait for one for ever";
            layers.reject("kafka_properties", why);
        }
    }
    tokens(settings, layers);
    if let Err(BadKey { setting, why }) = admin_tokens(settings) {
        layers.reject(setting, why);
    }
    if let Err(BadKey { setting, why }) = revocations(settings) {
        layers.reject(setting, why);
    }
    if settings.revocations_file.is_some() && settings.auth_mode == AuthMode::Trust {
        layers.reject("revocations_file", "is set, and auth_mode is `trust`: there are no tokens");
    }
    if let Err(BadKey { setting, why }) = tls_files(settings) {
        layers.reject(setting, why);
    }
    if let Err(error) = settings.origin_rule() {
        layers.reject("origins", error.to_string());
    }
    if let Some(Err(error)) = settings.redis() {
        layers.reject("redis_url", format!("is invalid: {error}"));
    }
    if settings.presence() == PresenceMode::Service && settings.presence_svc_addr.is_none() {
        layers.reject("presence_svc_addr", "is missing: presence_mode is `service`");
    }
    if settings.presence() == PresenceMode::Redis && !settings.has_redis() {
        layers.reject("redis_addr", "is missing: presence_mode is `redis`");
    }
    hand_off(settings, layers);
    legacy_nodes(settings, layers);
    if settings.idle_timeout <= settings.ping_interval {
        let why = "is not longer than ping_interval: it would cut off healthy clients";
        layers.reject("idle_timeout", why);
    }
}

/// Topics that are read, written and kept for different things are different topics. A node that reads what it writes
/// never ends.
fn topics(settings: &Settings, layers: &mut Layers) {
    let events = &settings.kafka_topics;
    for (index, topic) in events.iter().enumerate() {
        if topic.as_str().starts_with('^') {
            layers.reject("kafka_topics", format!("`{topic}` is a pattern: name each topic"));
        }
        if events[..index].contains(topic) {
            layers.reject("kafka_topics", format!("names `{topic}` twice"));
        }
    }
    for topic in &settings.membership_topics {
        if !events.contains(topic) {
            let why = format!("names `{topic}`, which kafka_topics does not");
            layers.reject("membership_topics", why);
        }
    }
    let mut written = Vec::new();
    if settings.hand_off() == Some(HandOffMode::Log) {
        written.push(("sessions_topic", settings.sessions_topic.as_str()));
        written.push(("handoff_topic", settings.handoff_topic.as_str()));
    }
    written
        .extend(settings.dead_letter_topic.as_ref().map(|it| ("dead_letter_topic", it.as_str())));
    for (index, (setting, topic)) in written.iter().enumerate() {
        if events.iter().any(|event| event.as_str() == *topic) {
            let why = format!(
                "is `{topic}`, which kafka_topics names: the node would read what it writes"
            );
            layers.reject(setting, why);
        }
        if let Some((other, _)) = written[..index].iter().find(|(_, other)| other == topic) {
            layers.reject(
                setting,
                format!("is `{topic}`, as {other} is: each needs a topic of its own"),
            );
        }
    }
}

/// What the hand-off through Redis needs (`HANDOFF=redis`). The nodes share the partitions, so each
/// event of a partition reaches the users on other nodes only through Redis, and only those that are in
/// the registry. Without either, a node delivers its own part of the events and nobody notices.
fn hand_off(settings: &Settings, layers: &mut Layers) {
    if settings.hand_off() != Some(HandOffMode::Redis) {
        return;
    }
    if !settings.has_redis() {
        let why = "is `redis`, and redis_addr is missing: without Redis no event reaches a user on \
                   another node (set redis_addr, or set handoff to `log`)";
        layers.reject("handoff", why);
    }
    if settings.presence() == PresenceMode::Off {
        let why = "is `off`, and handoff is `redis`: the nodes find a user on another node only in the \
                   registry of presence (set handoff to `log`, or set presence_svc_addr, or set \
                   presence_mode to `redis`, or set routing_mode to `broadcast`)";
        layers.reject("presence_mode", why);
    }
}

/// What the exchange with nodes that take no hand-offs through the log needs, if it is demanded
/// (`LEGACY_NODES=on`).
fn legacy_nodes(settings: &Settings, layers: &mut Layers) {
    let demanded = settings.hand_off() == Some(HandOffMode::Log)
        && settings.legacy_nodes == LegacyNodesMode::On;
    if !demanded {
        return;
    }
    if !settings.has_redis() {
        let why = "is `on`, and redis_addr is missing: such nodes are reached through Redis only (set \
                   redis_addr, or set legacy_nodes to `auto`)";
        layers.reject("legacy_nodes", why);
    }
    if settings.presence() == PresenceMode::Off {
        let why = "is `off`, and legacy_nodes is `on`: such nodes find a user of this node only in the \
                   registry of presence (set presence_svc_addr, or set presence_mode to `redis`, or set \
                   legacy_nodes to `auto`)";
        layers.reject("presence_mode", why);
    }
}

fn tokens(settings: &Settings, layers: &mut Layers) {
    let has_key = settings.jwt_secret.is_some()
        || settings.jwt_secret_file.is_some()
        || settings.jwt_key_file.is_some()
        || !settings.jwks_url.is_empty();
    if settings.auth_mode == AuthMode::Jwt && !has_key {
        let why = "is missing: auth_mode `jwt` needs at least one of jwt_secret, jwt_secret_file, jwt_key_file, \
                   jwks_url (or set auth_mode to `trust`, which lets anybody connect as any user)";
        layers.reject("jwt_secret", why);
    }
    if settings.auth_mode == AuthMode::Jwt
        && let Err(BadKey { setting, why }) = own_keys(settings)
    {
        layers.reject(setting, why);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{dev_settings, load};
    use super::*;

    fn subjects(profile: Profile, flags: &[(&'static str, &str)]) -> Vec<String> {
        let flags = flags.iter().map(|(name, value)| (*name, (*value).to_owned()));
        match load(Layers::new(profile).with_flags(flags)) {
            Ok(_) => Vec::new(),
            Err(errors) => errors.0.into_iter().map(|error| error.subject).collect(),
        }
    }

    const LONG: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn serve_needs_kafka_and_a_key_and_dev_nothing() {
        assert_eq!(subjects(Profile::Dev, &[]), [""; 0]);
        assert_eq!(subjects(Profile::Serve, &[]), ["KAFKA_BROKERS", "JWT_SECRET"]);
        let trust = [("kafka_brokers", "k:9092"), ("auth_mode", "trust")];
        assert_eq!(subjects(Profile::Serve, &trust), [""; 0]);
    }

    #[test]
    fn missing_and_contradictory_settings_are_reported() {
        let dev = |flags: &[_]| subjects(Profile::Dev, flags);
        assert_eq!(dev(&[("presence_mode", "service")]), ["PRESENCE_SVC_ADDR"]);
        assert_eq!(dev(&[("presence_mode", "redis")]), ["REDIS_ADDR"]);
        let broadcast = ("routing_mode", "broadcast");
        assert_eq!(dev(&[("redis_url", "http://redis:1"), broadcast]), ["--redis-url"]);
        assert_eq!(dev(&[("origins", "example.com")]), ["--origins"]);
        assert_eq!(dev(&[("idle_timeout", "54s")]), ["--idle-timeout"]);
        assert_eq!(dev(&[("kafka_topics", "")]), ["--kafka-topics"]);
        assert_eq!(dev(&[("kafka_topics", "a,b,a")]), ["--kafka-topics"]);
        assert_eq!(dev(&[("kafka_topics", "^a.*")]), ["--kafka-topics"]);
        assert_eq!(dev(&[("membership_topics", "a")]), ["--membership-topics"]);
        assert_eq!(dev(&[("kafka_topics", "a,b"), ("membership_topics", "a")]), [""; 0]);
        assert_eq!(dev(&[("kafka_properties", "transactional.id=x")]), ["--kafka-properties"]);
        assert_eq!(dev(&[("kafka_properties", "x")]), ["--kafka-properties"]);
        assert_eq!(dev(&[("auth_mode", "jwt"), ("jwt_secret", "short")]), ["--jwt-secret"]);
        assert_eq!(dev(&[("admin_token", "short")]), ["--admin-token"]);
        let revoked = ("revocations_file", "/dev/null");
        assert_eq!(dev(&[revoked]), ["--revocations-file"], "there are no tokens");
        assert_eq!(dev(&[revoked, ("auth_mode", "jwt"), ("jwt_secret", LONG)]), [""; 0]);
        for name in ["jwt_key_file", "jwt_secret_file"] {
            let flag = format!("--{}", name.replace('_', "-"));
            assert_eq!(dev(&[("auth_mode", "jwt"), (name, "/nonexistent")]), [flag]);
        }
        let several = ("jwks_url", "https://auth/keys,https://old-auth/keys");
        assert_eq!(dev(&[("jwt_secret", LONG), several, ("auth_mode", "jwt")]), [""; 0]);
    }

    #[test]
    fn topics_for_different_things_are_different() {
        let group = ("routing_mode", "group");
        let refused = |flags: &[_]| {
            let flags = [&[("handoff", "log"), group], flags].concat();
            subjects(Profile::Dev, &flags)
        };
        assert_eq!(refused(&[]), [""; 0]);
        assert_eq!(
            refused(&[("kafka_topics", "a,h"), ("handoff_topic", "h")]),
            ["--handoff-topic"]
        );
        assert_eq!(
            refused(&[("kafka_topics", "s"), ("sessions_topic", "s")]),
            ["--sessions-topic"]
        );
        let same = [("handoff_topic", "x"), ("sessions_topic", "x")];
        assert_eq!(refused(&same), ["--handoff-topic"]);
        let dead = [("kafka_topics", "a"), ("dead_letter_topic", "a")];
        assert_eq!(subjects(Profile::Dev, &dead), ["--dead-letter-topic"]);
        let unused =
            [("routing_mode", "broadcast"), ("handoff_topic", "x"), ("sessions_topic", "x")];
        assert_eq!(subjects(Profile::Dev, &unused), [""; 0]);
    }

    #[test]
    fn routing_mode_depends_on_redis() {
        assert_eq!(dev_settings(&[]).routing(), RoutingMode::Broadcast);
        let redis = ("redis_addr", "r:1");
        let mode = |flags: &[_]| dev_settings(flags).routing();
        assert_eq!(mode(&[redis, ("presence_mode", "redis")]), RoutingMode::Group);
        assert_eq!(mode(&[redis, ("presence_svc_addr", "p:1")]), RoutingMode::Group);
        assert_eq!(mode(&[redis, ("routing_mode", "broadcast")]), RoutingMode::Broadcast);
    }

    /// One value of each setting that the hand-off between nodes depends on; empty: not set.
    struct HandOffSettings {
        routing: &'static str,
        redis: &'static str,
        service: &'static str,
        presence: &'static str,
        handoff: &'static str,
    }

    /// All combinations.
    fn hand_off_settings() -> Vec<HandOffSettings> {
        let mut all = Vec::new();
        for routing in ["", "group", "broadcast"] {
            for redis in ["", "r:1"] {
                for service in ["", "p:1"] {
                    for presence in ["", "off", "service", "redis"] {
                        for handoff in ["", "log", "redis"] {
                            all.push(HandOffSettings {
                                routing,
                                redis,
                                service,
                                presence,
                                handoff,
                            });
                        }
                    }
                }
            }
        }
        all
    }

    /// Promise: “A node whose settings cannot deliver between nodes does not start.”
    #[test]
    fn settings_that_deliver_only_a_part_are_refused_with_what_to_do() {
        let no_redis = "redis_addr is missing";
        let no_registry = "the nodes find a user on another node only in the registry";
        for HandOffSettings { routing, redis, service, presence, handoff } in hand_off_settings() {
            let registry = match presence {
                "" => !service.is_empty(),
                "off" => false,
                _ => true,
            };
            let group = routing == "group" || (routing.is_empty() && !redis.is_empty());
            // `dev` has the default `redis`.
            let through_redis = group && handoff != "log";
            let mut expected = Vec::new();
            // Rules of presence itself.
            if presence == "service" && service.is_empty() {
                expected.push(("PRESENCE_SVC_ADDR", "presence_mode is `service`"));
            }
            if presence == "redis" && redis.is_empty() {
                expected.push(("REDIS_ADDR", "presence_mode is `redis`"));
            }
            if through_redis && redis.is_empty() {
                expected.push(("HANDOFF", no_redis));
            }
            if through_redis && !registry {
                expected.push(("PRESENCE_MODE", no_registry));
            }
            let flags = [
                ("routing_mode", routing),
                ("redis_addr", redis),
                ("presence_svc_addr", service),
                ("presence_mode", presence),
                ("handoff", handoff),
            ];
            let given = flags.iter().filter(|(_, value)| !value.is_empty());
            let environment: Vec<_> =
                given.map(|(name, value)| (name.to_ascii_uppercase(), *value)).collect();
            let layers = Layers::new(Profile::Dev).with_environment(|name| {
                let found = environment.iter().find(|(given, _)| given == name);
                found.map(|(_, value)| (*value).into())
            });
            let errors = load(layers).map_or_else(|errors| errors.0, |_| Vec::new());
            let found: Vec<_> = errors.iter().map(|error| error.subject.as_str()).collect();
            let subjects: Vec<_> = expected.iter().map(|(subject, _)| *subject).collect();
            assert_eq!(found, subjects, "{environment:?}");
            for (error, (_, problem)) in errors.iter().zip(&expected) {
                assert!(error.problem.contains(problem), "{environment:?}: {}", error.problem);
            }
        }
    }

    #[test]
    fn refusal_of_redis_without_presence_names_every_way_out() {
        let flags = [("redis_addr", "r:1".to_owned()), ("handoff", "redis".to_owned())];
        let errors = load(Layers::new(Profile::Dev).with_flags(flags)).unwrap_err();
        assert_eq!(
            errors.0[0].problem,
            "is `off`, and handoff is `redis`: the nodes find a user on another node only in the \
             registry of presence (set handoff to `log`, or set presence_svc_addr, or set \
             presence_mode to `redis`, or set routing_mode to `broadcast`)"
        );
        let flags = [
            ("routing_mode", "group".to_owned()),
            ("presence_svc_addr", "p:1".to_owned()),
            ("handoff", "redis".to_owned()),
        ];
        let errors = load(Layers::new(Profile::Dev).with_flags(flags)).unwrap_err();
        assert_eq!(
            errors.0[0].problem,
            "is `redis`, and redis_addr is missing: without Redis no event reaches a user on another \
             node (set redis_addr, or set handoff to `log`)"
        );
    }

    fn serve_settings(flags: &[(&'static str, &str)]) -> Settings {
        let needed = [("kafka_brokers", "k:9092"), ("auth_mode", "trust")];
        let flags = needed.iter().chain(flags).map(|(name, value)| (*name, (*value).to_owned()));
        let loaded = load(Layers::new(Profile::Serve).with_flags(flags));
        loaded.unwrap_or_else(|errors| panic!("{:?}", errors.0)).settings
    }

    #[test]
    fn nodes_share_work_through_the_log_unless_told_otherwise() {
        let hand_off = |flags: &[_]| serve_settings(flags).hand_off();
        let redis = ("redis_addr", "r:1");
        assert_eq!(hand_off(&[redis]), Some(HandOffMode::Log), "also without presence");
        assert_eq!(hand_off(&[redis, ("presence_mode", "redis")]), Some(HandOffMode::Log));
        assert_eq!(hand_off(&[("routing_mode", "group")]), Some(HandOffMode::Log));
        assert_eq!(hand_off(&[]), None, "broadcast");
    }

    #[test]
    fn legacy_nodes_are_expected_where_they_can_be_reached() {
        let expects = |flags: &[_]| serve_settings(flags).expects_legacy_nodes();
        let redis = ("redis_addr", "r:1");
        assert!(expects(&[redis]));
        assert!(expects(&[redis, ("presence_mode", "redis"), ("legacy_nodes", "on")]));
        assert!(!expects(&[redis, ("legacy_nodes", "off")]));
        assert!(!expects(&[("routing_mode", "group")]));
        assert!(!expects(&[redis, ("routing_mode", "broadcast")]));
        assert!(!expects(&[redis, ("presence_mode", "redis"), ("handoff", "redis")]));
    }

    #[test]
    fn legacy_nodes_that_cannot_be_reached_are_refused() {
        let dev = |flags: &[(&'static str, &'static str)]| {
            let log = ("handoff", "log");
            subjects(Profile::Dev, &[&[log], flags].concat())
        };
        let (group, on) = (("routing_mode", "group"), ("legacy_nodes", "on"));
        assert_eq!(dev(&[group, on]), ["--legacy-nodes", "PRESENCE_MODE"]);
        assert_eq!(dev(&[group, on, ("redis_addr", "r:1")]), ["PRESENCE_MODE"]);
        let registry = [group, on, ("redis_addr", "r:1"), ("presence_mode", "redis")];
        assert_eq!(dev(&registry), [""; 0]);
        assert_eq!(dev(&[("routing_mode", "broadcast"), on]), [""; 0], "nothing is handed over");
    }
}
