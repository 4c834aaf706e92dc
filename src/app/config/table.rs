//! The table of all settings: each is declared once, with type, default, bounds and description.
//!
//! A setting `some_name` is `some_name = …` in the TOML file, `SOME_NAME` in the environment and
//! `--some-name` on the command line. Its doc comment is its description in `--help` and in
//! `docs/configuration.md`.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::filter::Targets;

use super::Setting;
use super::layers::Layers;
use super::value::{
    AuthMode, Auto, Count, GrpcAddress, ListenAddress, LogFormat, Name, PeerAddress, PresenceMode,
    RoutingMode, SecretUrl, SettingValue, Size,
};
use crate::domain::command::Secret;

/// Expands the table into [`TABLE`], [`Settings`] and the function that fills it.
macro_rules! settings {
    ($($group:literal { $(
        $(#[doc = $doc:literal])+
        $name:ident: $kind:ty = $default:literal
            $(, dev $dev:literal)? $(, from $min:literal to $max:literal)? , example $example:literal;
    )+ })+) => {
        /// Every setting, in the order of `--help` and of the reference.
        pub static TABLE: &[Setting] = &[$($(Setting {
            name: stringify!($name),
            group: $group,
            doc: &[$($doc),+],
            kind: <$kind as SettingValue>::KIND,
            toml: <$kind as SettingValue>::TOML,
            default: $default,
            dev_default: settings!(@optional $($dev)?),
            bounds: settings!(@optional $(($min, $max))?),
            example: $example,
        },)+)+];

        /// The values, typed.
        #[derive(Clone, Debug)]
        pub struct Settings { $($($(#[doc = $doc])+ pub $name: $kind,)+)+ }

        impl Settings {
            /// Reads each setting from the highest layer that has it. `None`: some are invalid,
            /// and the errors are in `layers`.
            pub(super) fn resolve(layers: &mut Layers) -> Option<Self> {
                let mut rows = TABLE.iter();
                $($(let $name = layers.resolve::<$kind>(rows.next()?);)+)+
                Some(Self { $($($name: $name?,)+)+ })
            }

            /// Each value as text, in the order of [`TABLE`]; secrets are masked.
            pub fn show(&self) -> Vec<String> {
                vec![$($(self.$name.show(),)+)+]
            }
        }
    };
    (@optional) => { None };
    (@optional $some:expr) => { Some($some) };
}

settings! {
    "Listening" {
        /// Public port: WebSocket (`/ws`). A bare port listens on every IPv4 address
        /// (`dev`: on loopback); `[::]:8083` listens on both families.
        http_port: ListenAddress = "8083", example "0.0.0.0:8083";
        /// Admin port: health, metrics, drain. Not for the public.
        http_addr: ListenAddress = "8093", example ":8093";
        /// Port of the gRPC API `DeliveryApi.Connect`. Empty: not served.
        grpc_addr: Option<ListenAddress> = "50054", example "50054";
    }
    "Node" {
        /// Name of this node in the registry, unique among the nodes. Empty: generated at each start.
        instance_id: Option<Name> = "", example "delivery-7f9c";
        /// The `service` label of every metric.
        service_name: Name = "delivery-service", example "delivery-service";
        /// Shards: threads with an io_uring each that hold the client sockets. `auto`: the cores
        /// this process may use, less one in eight (at least one) for routing and Kafka.
        shards: Auto<Count> = "auto", from "1" to "1024", example "6";
        /// Threads that find the recipients of events. Each owns some of the partitions.
        routers: Count = "1", from "1" to "64", example "1";
        /// Threads for everything else: sign-in, back ends, gRPC, admin. `auto`: one per eight cores,
        /// at least two.
        service_threads: Auto<Count> = "auto", from "1" to "256", example "2";
    }
    "Limits" {
        /// Connections this node holds at most; more are answered 503. Divided among the shards, each
        /// with an eighth to spare because the kernel does not spread them evenly. `auto`: what
        /// the descriptor limit allows each shard, at most 65536 for each.
        connections_max: Auto<Count> = "auto", from "1" to "16777216", example "200000";
        /// Sessions of one user, over all devices; one more is answered 429.
        connections_per_user: Count = "32", from "1" to "65536", example "32";
        /// Connections from one address (an IPv6 client is its /64); one more is answered 429.
        /// 0: no limit, as behind a proxy.
        connections_per_address: Count = "20000", from "0" to "16777216", example "200";
        /// New connections each second; more are answered 503. 0: no limit.
        handshakes_per_second: Count = "20000", from "0" to "10000000", example "5000";
        /// New connections each second from one address; more are answered 429. 0: no limit.
        handshakes_per_second_per_address: Count = "2000", from "0" to "10000000", example "20";
        /// Frames a client may send in any second; one more closes it with 1008.
        inbound_messages_per_second: Count = "100", from "1" to "65535", example "20";
        /// Bytes a client may send in any second; more close it with 1008.
        inbound_bytes_per_second: Size = "256KiB", from "4KiB" to "1GiB", example "256KiB";
        /// One message from a client, after decompression; a larger one closes it with 1009.
        message_bytes_max: Size = "64KiB", from "1KiB" to "1GiB", example "64KiB";
        /// Events waiting for a client that reads too slowly; one more closes it with 1011.
        queue_messages_max: Count = "128", from "2" to "32766", example "128";
        /// Bytes waiting for such a client; more close it with 1011.
        queue_bytes_max: Size = "1MiB", from "16KiB" to "1GiB", example "1MiB";
        /// Live events waiting for a client that is catching up; one more closes it with 1013.
        hold_messages_max: Count = "1024", from "1" to "32766", example "1024";
        /// Bytes waiting for such a client; more close it with 1013.
        hold_bytes_max: Size = "1MiB", from "16KiB" to "1GiB", example "1MiB";
        /// Events that may wait in one shard for anybody. At this number it takes no more, and the
        /// Kafka partitions concerned pause.
        shard_events_max: Count = "262144", from "1" to "16777216", example "262144";
        /// Bytes of those events. With the shards, the greatest part of the memory bound.
        shard_event_bytes_max: Size = "256MiB", from "1MiB" to "1024GiB", example "256MiB";
        /// Send buffer the kernel keeps for each client (`SO_SNDBUF`; the kernel doubles it).
        /// 0: the kernel grows it as it likes, up to megabytes for each stalled reader.
        so_sndbuf: Size = "64KiB", from "0" to "64MiB", example "64KiB";
    }
    "Times" {
        /// From accepting a connection to its complete upgrade request; later is answered 408.
        handshake_timeout: Duration = "10s", from "100ms" to "5m", example "10s";
        /// A client that was silent this long is pinged (up to a ninth earlier, so that clients
        /// that came together are not pinged together).
        ping_interval: Duration = "54s", from "1s" to "1h", example "54s";
        /// A client that was silent this long is dropped. More than the ping interval.
        idle_timeout: Duration = "60s", from "2s" to "2h", example "60s";
        /// A client that took nothing of what waits for it for this long is dropped.
        write_timeout: Duration = "10s", from "100ms" to "10m", example "30s";
        /// How long a client may take to answer a close frame.
        close_timeout: Duration = "5s", from "100ms" to "1m", example "5s";
        /// How long a session's live events wait for its first message (the resume request).
        resume_grace: Duration = "10s", dev "500ms", from "0s" to "5m", example "10s";
        /// How long a session may take to catch up; then it is closed with 1013.
        catch_up_timeout: Duration = "5m", from "1s" to "1h", example "5m";
    }
    "WebSocket" {
        /// Origins that browsers may connect from. Empty: any.
        origins: Vec<Name> = "", example "https://chat.example.com,https://*.example.org";
        /// Whether permessage-deflate is negotiated with clients that offer it.
        deflate: bool = "true", example "true";
        /// Events smaller than this are not compressed.
        deflate_threshold: Size = "256B", from "0" to "1MiB", example "256";
        /// Whether `/echo` answers (for conformance suites and load tools).
        echo: bool = "false", dev "true", example "true";
    }
    "Kafka" {
        /// Brokers to begin with. `dev` brings its own.
        kafka_brokers: Vec<PeerAddress> = "", example "kafka-1:9092,kafka-2:9092";
        /// Topics with the events.
        kafka_topics: Vec<Name> = "messaging.events.v1,conversation.events.v1", example "messaging.events.v1,conversation.events.v1";
        /// Consumer group (`group` routing).
        kafka_group: Name = "delivery-service-group", example "delivery-service-group";
        /// More properties for librdkafka, such as TLS and SASL (those need a build with
        /// `--features kafka-tls`).
        kafka_properties: Vec<Name> = "", example "security.protocol=SASL_SSL,sasl.mechanism=PLAIN";
        /// How several nodes share the work: `group` or `broadcast`. Empty: `group` if Redis is
        /// configured, `broadcast` if not.
        routing_mode: Option<RoutingMode> = "", example "group";
        /// Topic for records that could not be routed. Empty: they are counted and passed.
        dead_letter_topic: Option<Name> = "", example "delivery.dead-letter.v1";
        /// How long a record that cannot be routed is retried while the rest of its partition waits.
        route_retry_max: Duration = "30s", from "0s" to "1h", example "30s";
        /// Conversations whose members are remembered.
        membership_cache_max: Count = "200000", from "1" to "100000000", example "1000000";
        /// Members remembered, summed over those conversations; 16 bytes each.
        membership_members_max: Count = "4000000", from "1" to "1000000000", example "20000000";
        /// How long members are remembered before the conversation service is asked again. Without
        /// that service they are not forgotten.
        membership_lifetime: Duration = "10m", from "1s" to "24h", example "10m";
        /// Fetched from Kafka ahead of being routed, for each partition.
        kafka_prefetch: Size = "4MiB", from "64KiB" to "1GiB", example "4MiB";
    }
    "Redis" {
        /// Redis as host:port; several are nodes of a cluster. `redis_url` says more and wins.
        redis_addr: Vec<PeerAddress> = "", example "redis:6379";
        /// Redis as a URL: `redis://`, `rediss://` (TLS), `redis+cluster://` or
        /// `rediss+cluster://`, with user, password and database. Empty with `redis_addr` empty:
        /// no Redis.
        redis_url: Option<SecretUrl> = "", example "rediss://delivery:password@redis:6379/0";
    }
    "Neighbours" {
        /// The message service: what a client missed. Empty: nothing is caught up.
        msg_svc_addr: Option<GrpcAddress> = "", example "message-service:50052";
        /// The conversation service: members of conversations not seen yet. Empty: events of
        /// such conversations cannot be routed.
        conv_svc_addr: Option<GrpcAddress> = "", example "conversation-service:50051";
        /// The presence service.
        presence_svc_addr: Option<GrpcAddress> = "", example "https://presence-service:50053";
        /// Who is told about sessions: `service`, `redis` or `off`. Empty: `service` if
        /// `presence_svc_addr` is set, `off` if not.
        presence_mode: Option<PresenceMode> = "", example "service";
        /// How often presence is refreshed. Its entries live 60 s.
        presence_refresh: Duration = "20s", from "1s" to "55s", example "20s";
        /// Deadline of one call to a neighbour.
        call_timeout: Duration = "2s", from "50ms" to "1m", example "2s";
        /// How long a client's catch-up waits for its registration, so that other nodes hand over
        /// what comes next (`ROUTING_MODE=group`); then it goes on without, and is counted.
        registration_wait: Duration = "2s", from "0s" to "5m", example "2s";
        /// Calls for catch-up under way at once, all clients together.
        resume_calls_max: Count = "64", from "1" to "4096", example "64";
    }
    "Tokens" {
        /// `jwt`: a client needs a valid token. `trust`: anybody connects as anybody.
        auth_mode: AuthMode = "jwt", dev "trust", example "jwt";
        /// Key of HS256 tokens.
        jwt_secret: Option<Secret> = "", example "at-least-32-random-bytes-of-secret";
        /// PEM file with the public key of RS256, ES256 or EdDSA tokens.
        jwt_key_file: Option<PathBuf> = "", example "/etc/delivery/jwt.pem";
        /// Where the public keys are published (JWKS).
        jwks_url: Option<SecretUrl> = "", example "https://auth.example.com/.well-known/jwks.json";
        /// `iss` that a token must have. Empty: any.
        jwt_issuer: Option<Name> = "", example "realchat-auth";
        /// `aud` that a token must have. Empty: any.
        jwt_audience: Option<Name> = "", example "realchat";
        /// How wrong clocks may be.
        jwt_leeway: Duration = "30s", from "0s" to "10m", example "30s";
    }
    "Trying out" {
        /// Whether `delivery dev` feeds its demo conversation: `demo` with alice, bob and carol, one
        /// message a second. `--no-demo` is short for `--dev-demo false`.
        dev_demo: bool = "true", example "true";
    }
    "Stopping" {
        /// On SIGTERM sessions are told to go one after the other over this time, with 1012.
        /// 0: all at once, with 1001.
        drain_period: Duration = "0s", from "0s" to "1h", example "20s";
        /// From the end of the drain period to leaving whatever is still open.
        stop_timeout: Duration = "10s", from "100ms" to "10m", example "10s";
    }
    "Telemetry" {
        /// Which log lines are written: a level, or directives as in `info,delivery::service=debug`.
        /// The variable `RUST_LOG` is read too and wins.
        log_level: Targets = "info", example "info";
        /// `text` for people, `json` for machines.
        log_format: LogFormat = "text", example "json";
        /// Whether `/metrics` is served.
        metrics_enabled: bool = "true", example "true";
        /// Whether records with a `traceparent` header are logged with their trace id when they
        /// are routed (at level debug).
        tracing_enabled: bool = "false", example "true";
    }
}
