//! What no setting shows alone: pieces that are missing, and settings that contradict each other.

use super::value::{AuthMode, Name, PresenceMode, RoutingMode, Value as _};
use super::{Layers, Profile, Settings};
use crate::protocol::upgrade::origin::{BadOrigin, Origins};
use crate::service::backends::redis::{RedisAddress, RedisAddressError};

/// Bytes of an HS256 key: as long as its hash (RFC 7518 §3.2).
const JWT_SECRET_BYTES_MIN: usize = 32;

impl Settings {
    /// Which origins' pages may connect.
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

    /// Where Redis is, if anywhere.
    pub fn redis(&self) -> Option<Result<RedisAddress, RedisAddressError>> {
        self.has_redis().then(|| match &self.redis_url {
            Some(url) => RedisAddress::parse(url.expose()),
            None => RedisAddress::parse(&self.redis_addr.show()),
        })
    }

    /// How several nodes share the work: what was chosen, or what fits.
    pub fn routing(&self) -> RoutingMode {
        self.routing_mode.unwrap_or(if self.has_redis() {
            RoutingMode::Group
        } else {
            RoutingMode::Broadcast
        })
    }

    /// Who is told about sessions: what was chosen, or what fits.
    pub fn presence(&self) -> PresenceMode {
        self.presence_mode.unwrap_or(if self.presence_svc_addr.is_some() {
            PresenceMode::Service
        } else {
            PresenceMode::Off
        })
    }
}

/// Reports what is missing or contradictory.
pub(super) fn missing_pieces(settings: &Settings, layers: &mut Layers) {
    if layers.profile() == Profile::Serve && settings.kafka_brokers.is_empty() {
        layers.fault("kafka_brokers", "is missing: events come from Kafka".to_owned());
    }
    if settings.kafka_topics.is_empty() {
        layers.fault("kafka_topics", "is empty: there is nothing to read".to_owned());
    }
    for property in &settings.kafka_properties {
        if !property.as_str().contains('=') {
            layers.fault("kafka_properties", format!("`{property}` is not name=value"));
        }
    }
    tokens(settings, layers);
    if let Err(error) = settings.origin_rule() {
        layers.fault("origins", error.to_string());
    }
    if let Some(Err(error)) = settings.redis() {
        layers.fault("redis_url", format!("is not understood: {error}"));
    }
    if settings.presence() == PresenceMode::Service && settings.presence_svc_addr.is_none() {
        let why = "is missing, and presence_mode is `service`";
        layers.fault("presence_svc_addr", why.to_owned());
    }
    if settings.presence() == PresenceMode::Redis && !settings.has_redis() {
        layers.fault("redis_addr", "is missing, and presence_mode is `redis`".to_owned());
    }
    if settings.idle_timeout <= settings.ping_interval {
        let why = "is not more than ping_interval: healthy clients would be dropped";
        layers.fault("idle_timeout", why.to_owned());
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
        let why = "is missing, and auth_mode is `jwt`: give one of jwt_secret, jwt_key_file, \
                   jwks_url (or auth_mode `trust`, where anybody connects as anybody)";
        layers.fault("jwt_secret", why.to_owned());
    }
    if given > 1 {
        let why = "is one of several keys: give only one of jwt_secret, jwt_key_file, jwks_url";
        // Of several the last is a file or a URL: it can be named without telling a secret.
        let name = if settings.jwks_url.is_some() { "jwks_url" } else { "jwt_key_file" };
        layers.fault(name, why.to_owned());
    }
    if let Some(secret) = &settings.jwt_secret
        && settings.auth_mode == AuthMode::Jwt
        && secret.expose().len() < JWT_SECRET_BYTES_MIN
    {
        let why = format!("is shorter than {JWT_SECRET_BYTES_MIN} bytes, so it can be guessed");
        layers.fault("jwt_secret", why);
    }
    if let Some(path) = &settings.jwt_key_file
        && let Err(error) = std::fs::metadata(path)
    {
        layers.fault("jwt_key_file", format!("`{}` cannot be read: {error}", path.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::*;

    fn subjects(profile: Profile, flags: &[(&'static str, &str)]) -> Vec<String> {
        let flags = flags.iter().map(|(name, value)| (*name, (*value).to_owned()));
        match load(Layers::new(profile).with_flags(flags)) {
            Ok(_) => Vec::new(),
            Err(faults) => faults.0.into_iter().map(|fault| fault.subject).collect(),
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
    fn pieces_that_belong_together_are_asked_for() {
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
    fn routing_follows_redis() {
        let settings = |flags: &[(&'static str, &str)]| {
            let flags = flags.iter().map(|(name, value)| (*name, (*value).to_owned()));
            load(Layers::new(Profile::Dev).with_flags(flags)).unwrap().settings
        };
        assert_eq!(settings(&[]).routing(), RoutingMode::Broadcast);
        assert_eq!(settings(&[("redis_addr", "r:1")]).routing(), RoutingMode::Group);
        assert_eq!(settings(&[("routing_mode", "group")]).routing(), RoutingMode::Group);
    }
}
