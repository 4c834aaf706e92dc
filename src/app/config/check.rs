//! Checks across settings: finds missing and contradictory ones.

use super::Profile;
use super::layers::Layers;
use super::table::Settings;
use super::value::{AuthMode, Name, PresenceMode, RoutingMode, SettingValue as _};
use crate::protocol::upgrade::origin::{BadOrigin, Origins};
use crate::service::backends::redis::{RedisAddress, RedisAddressError};

/// Minimum length of an HS256 key, bytes: the length of its hash (RFC 7518 §3.2).
const JWT_SECRET_BYTES_MIN: usize = 32;

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
    for property in &settings.kafka_properties {
        if !property.as_str().contains('=') {
            layers.reject("kafka_properties", format!("`{property}` is not name=value"));
        }
    }
    tokens(settings, layers);
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
    if settings.idle_timeout <= settings.ping_interval {
        let why = "is not longer than ping_interval: it would cut off healthy clients";
        layers.reject("idle_timeout", why);
    }
}

fn tokens(settings: &Settings, layers: &mut Layers) {
    let keys = [
        settings.jwt_secret.is_some(),
        settings.jwt_key_file.is_some(),
        settings.jwks_url.is_some(),
    ];
    let given = keys.iter().filter(|key| **key).count();
    if settings.auth_mode == AuthMode::Jwt && given == 0 {
        let why = "is missing: auth_mode `jwt` needs one of jwt_secret, jwt_key_file, jwks_url (or \
                   set auth_mode to `trust`, which lets anybody connect as any user)";
        layers.reject("jwt_secret", why);
    }
    if given > 1 {
        let why = "is one of several keys: set only one of jwt_secret, jwt_key_file, jwks_url";
        // At least one of the keys is not `jwt_secret`. The error names that one.
        let name = if settings.jwks_url.is_some() { "jwks_url" } else { "jwt_key_file" };
        layers.reject(name, why);
    }
    if let Some(secret) = &settings.jwt_secret
        && settings.auth_mode == AuthMode::Jwt
        && secret.expose().len() < JWT_SECRET_BYTES_MIN
    {
        let why =
            format!("is shorter than {JWT_SECRET_BYTES_MIN} bytes, which is too easy to guess");
        layers.reject("jwt_secret", why);
    }
    if let Some(path) = &settings.jwt_key_file
        && let Err(error) = std::fs::metadata(path)
    {
        layers.reject("jwt_key_file", format!("`{}` cannot be read: {error}", path.display()));
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
        assert_eq!(dev(&[("redis_url", "http://redis:1")]), ["--redis-url"]);
        assert_eq!(dev(&[("origins", "example.com")]), ["--origins"]);
        assert_eq!(dev(&[("idle_timeout", "54s")]), ["--idle-timeout"]);
        assert_eq!(dev(&[("kafka_topics", "")]), ["--kafka-topics"]);
        assert_eq!(dev(&[("kafka_properties", "x")]), ["--kafka-properties"]);
        assert_eq!(dev(&[("auth_mode", "jwt"), ("jwt_secret", "short")]), ["--jwt-secret"]);
        assert_eq!(dev(&[("jwt_key_file", "/nonexistent")]), ["--jwt-key-file"]);
        let secret = "0123456789abcdef0123456789abcdef";
        let two = [("jwt_secret", secret), ("jwks_url", "https://auth/keys"), ("auth_mode", "jwt")];
        assert_eq!(dev(&two), ["--jwks-url"]);
    }

    #[test]
    fn routing_mode_depends_on_redis() {
        assert_eq!(dev_settings(&[]).routing(), RoutingMode::Broadcast);
        assert_eq!(dev_settings(&[("redis_addr", "r:1")]).routing(), RoutingMode::Group);
        assert_eq!(dev_settings(&[("routing_mode", "group")]).routing(), RoutingMode::Group);
    }
}
