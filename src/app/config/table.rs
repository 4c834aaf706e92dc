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
    AuthMode, Auto, Count, FileMode, GrpcAddress, HandOffMode, LegacyNodesMode, ListenAddress,
    LogFormat, Name, PeerAddress, PresenceMode, RoutingMode, SecretUrl, SettingValue, Size,
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
        /// Public port for WebSocket (`/ws`). A port alone listens on all addresses, IPv6 and IPv4 (`dev`: on
        /// 127.0.0.1);
        /// `0.0.0.0:8083` on IPv4 only.
        http_port: ListenAddress = "8083", example "0.0.0.0:8083";
        /// Start although another process of this user listens on the public port. The kernel then
        /// distributes the clients among both, for example while a new version takes over.
        http_port_shared: bool = "false", example "true";
        /// Admin port for health, metrics and what operators do (`delivery admin`). Do not expose it to clients.
        http_addr: ListenAddress = "8093", example ":8093";
        /// Unix socket that serves the same as the admin port. Whoever may open it needs no token. Empty: none.
        admin_socket: Option<PathBuf> = "", example "/run/delivery/admin.sock";
        /// Permissions of the file of this socket: who may write may connect.
        admin_socket_mode: FileMode = "0600", example "0660";
        /// Port of the gRPC API `DeliveryApi.Connect`. Empty: gRPC is off.
        grpc_addr: Option<ListenAddress> = "50054", example "50054";
    }
    "Node" {
        /// Name of this node in the registry, unique among all nodes. Empty: a new name at each start.
        instance_id: Option<Name> = "", example "delivery-7f9c";
        /// The `service` label of every metric.
        service_name: Name = "delivery-service", example "delivery-service";
        /// Number of shards. A shard is a thread with an io_uring that holds client sockets. `auto`: one
        /// per core that this process may use, except one core in eight (at least one) for routing
        /// and Kafka.
        shards: Auto<Count> = "auto", from "1" to "1024", example "6";
        /// Number of router threads, which find the recipients of events. Each owns some of the partitions.
        routers: Count = "1", from "1" to "64", example "1";
        /// Number of threads for authentication, back ends, gRPC and admin. `auto`: one per eight
        /// cores, at least two.
        service_threads: Auto<Count> = "auto", from "1" to "256", example "2";
    }
    "Limits" {
        /// Maximum number of WebSocket connections, and of gRPC streams beside them; further ones are refused with 503 or, over
        /// gRPC, `RESOURCE_EXHAUSTED`. Each shard has room for an equal part, and
        /// one without room leaves new connections to the others. `auto`: what the descriptor limit allows, at most
        /// 65536 per shard.
        connections_max: Auto<Count> = "auto", from "1" to "16777216", example "200000";
        /// Maximum number of sessions per user on all devices; further ones are refused with 429.
        connections_per_user: Count = "32", from "1" to "65536", example "32";
        /// Maximum number of connections from one address (`ipv6_client_prefix`), WebSocket and gRPC together;
        /// further ones are refused with 429 or, over gRPC, closed. 0: no limit, for nodes behind a proxy.
        connections_per_address: Count = "20000", from "0" to "16777216", example "200";
        /// Leading bits of an IPv6 address that count as one address in limits: what one customer has.
        ipv6_client_prefix: Count = "64", from "32" to "128", example "56";
        /// Maximum number of new connections in each second of the clock; further ones are refused with 503 or, over gRPC,
        /// closed. A further call on a gRPC connection counts like a connection. 0: no limit.
        handshakes_per_second: Count = "20000", from "0" to "10000000", example "5000";
        /// Maximum number of new connections in each second from one address, counted in the same way; further
        /// ones are refused with 429 or, over gRPC, closed. 0: no limit.
        handshakes_per_second_per_address: Count = "2000", from "0" to "10000000", example "20";
        /// Maximum number of frames per second from one client; more close its session with 1008.
        inbound_messages_per_second: Count = "100", from "1" to "65535", example "20";
        /// Maximum number of bytes per second from one client; more close its session with 1008.
        inbound_bytes_per_second: Size = "256KiB", from "4KiB" to "1GiB", example "256KiB";
        /// Maximum size of one message from a client, as it arrives and after decompression; a larger one closes its
        /// session with 1009.
        message_bytes_max: Size = "64KiB", from "1KiB" to "1GiB", example "64KiB";
        /// Maximum number of events queued for one client; more close its session with 1011 (slow
        /// reader).
        queue_messages_max: Count = "128", from "2" to "32766", example "128";
        /// Maximum number of bytes queued for one client; more close its session with 1011 (slow
        /// reader).
        queue_bytes_max: Size = "1MiB", from "16KiB" to "1GiB", example "1MiB";
        /// Maximum number of live events held for one client during catch-up; more close its session
        /// with 1013.
        hold_messages_max: Count = "1024", from "1" to "32766", example "1024";
        /// Maximum number of bytes held for one client during catch-up; more close its session with
        /// 1013.
        hold_bytes_max: Size = "1MiB", from "16KiB" to "1GiB", example "1MiB";
        /// Maximum number of live events in one shard that are not sent to all recipients yet. A
        /// quarter of them may be held for sessions that catch up: beyond it those that hold most are
        /// closed with 1013. At the other three quarters the shard accepts no further events for a
        /// moment, and the Kafka partitions concerned pause; then it closes the sessions whose sockets
        /// are full with 1011.
        shard_events_max: Count = "262144", from "1" to "16777216", example "262144";
        /// Maximum number of bytes of these events, each counted with 512 more, divided in the same
        /// way. Multiplied by the number of shards, this is the largest part of the memory bound.
        shard_event_bytes_max: Size = "256MiB", from "1MiB" to "1024GiB", example "256MiB";
        /// Kernel send buffer per WebSocket client, and per gRPC connection (`SO_SNDBUF`; the kernel doubles it).
        /// 0: the kernel sizes it dynamically, up to several megabytes per slow reader.
        so_sndbuf: Size = "64KiB", from "0" to "64MiB", example "64KiB";
    }
    "Times" {
        /// Maximum time from accepting a connection to its complete upgrade request; a later one is
        /// answered with 408. Over gRPC: to the HTTP/2 preface, and from a call to its first request.
        handshake_timeout: Duration = "10s", from "100ms" to "5m", example "10s";
        /// Idle time after which a client is pinged. The ping goes out up to a ninth earlier, so that
        /// clients that connected together are not pinged together.
        ping_interval: Duration = "54s", from "1s" to "1h", example "54s";
        /// Idle time after which a connection is terminated. Must be longer than the ping interval. Over gRPC
        /// also the time without a call.
        idle_timeout: Duration = "60s", from "2s" to "2h", example "60s";
        /// Maximum time from the first byte of a message from a client to its last; a slower one closes its session
        /// with 1008.
        message_timeout: Duration = "1m", from "100ms" to "1h", example "30s";
        /// Time without progress of a send after which a connection is terminated. Progress is a byte that the kernel
        /// takes for the socket. It takes the next ones when a third of its send buffer is free (`SO_SNDBUF`), so a
        /// client that reads less than that in this time is terminated too. Over gRPC: time in which the client's
        /// window lets out no byte, which ends the stream, or the socket takes none, which ends the connection.
        write_timeout: Duration = "10s", from "100ms" to "10m", example "30s";
        /// Maximum time for a client to answer a close frame. Over gRPC: maximum time until the status of a stream is
        /// sent, after which the stream is reset.
        close_timeout: Duration = "5s", from "100ms" to "1m", example "5s";
        /// Time for which the live events of a new session are held while the node waits for its first
        /// message, the resume request.
        resume_grace: Duration = "10s", dev "500ms", from "0s" to "5m", example "10s";
        /// Maximum time for a session to catch up; after that it is closed with 1013.
        catch_up_timeout: Duration = "5m", from "1s" to "1h", example "5m";
        /// How often a session that asked for cursors gets one while something is routed. What came after the last
        /// cursor is repeated if the connection breaks.
        cursor_interval: Duration = "15s", from "100ms" to "1h", example "15s";
    }
    "WebSocket" {
        /// Origins that browsers may connect from, as they send them (`Origin`). `https://*.example.com` means all
        /// hosts below that domain, `http://localhost:*` all ports, `null` pages without an origin of their own (files,
        /// sandboxed frames), `*` alone all. Other schemes are possible: `file://`, `chrome-extension://…`. Empty: all.
        /// `dev` allows only pages of this machine, because it checks no tokens.
        origins: Vec<Name> = "", dev "http://localhost:*,https://localhost:*,http://127.0.0.1:*,http://[::1]:*", example "https://chat.example.com,https://*.example.org";
        /// Compress events (permessage-deflate) for clients that support it.
        deflate: bool = "true", example "true";
        /// Size below which events are not compressed.
        deflate_threshold: Size = "256B", from "0" to "1MiB", example "256B";
        /// Serve `/echo`, for conformance suites and load tools.
        echo: bool = "false", dev "true", example "true";
    }
    "Kafka" {
        /// Bootstrap brokers. `dev` starts an embedded broker if there are none.
        kafka_brokers: Vec<PeerAddress> = "", example "kafka-1:9092,kafka-2:9092";
        /// Topics to consume.
        kafka_topics: Vec<Name> = "messaging.events.v1,conversation.events.v1", example "messaging.events.v1,conversation.events.v1";
        /// Those of these topics that carry membership events, which every node reads for its member lists.
        /// Empty: the topics with a part that starts with `conversation` (`prod.conversation.events.v1`;
        /// parts are separated by `.`, `-` and `_`), or all topics if there are none.
        membership_topics: Vec<Name> = "", example "conversation.events.v1";
        /// Consumer group (`ROUTING_MODE=group`).
        kafka_group: Name = "delivery-service-group", example "delivery-service-group";
        /// Further librdkafka properties, for example for TLS and SASL (`PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512`), or
        /// `group.protocol=consumer` for the group protocol of Kafka 4 (KIP-848).
        kafka_properties: Vec<Name> = "", example "security.protocol=SASL_SSL,sasl.mechanism=SCRAM-SHA-512,sasl.username=delivery,sasl.password=secret";
        /// How the nodes share the work: `group` (they share the partitions) or `broadcast` (each
        /// node reads every partition). Empty: `group` if Redis is configured, else `broadcast`.
        routing_mode: Option<RoutingMode> = "", example "group";
        /// How an event reaches users on other nodes (`ROUTING_MODE=group`): `log` (through two topics in
        /// Kafka: nothing is lost) or `redis` (through the registry and Redis: a user who may have missed
        /// an event is disconnected and resumes). Nodes of both kinds can share a group during a migration:
        /// see `legacy_nodes`. The embedded broker of `dev` cannot have such topics.
        handoff: HandOffMode = "log", dev "redis", example "log";
        /// Whether nodes with `HANDOFF=log` also exchange events through Redis with nodes of the group that
        /// take no hand-offs through the log, such as Go nodes: `auto` (while such nodes are subscribed in
        /// Redis, and one minute longer), `on` or `off`. It needs Redis, and presence in it.
        legacy_nodes: LegacyNodesMode = "auto", example "off";
        /// Topic in which the nodes say who is where (`HANDOFF=log`). Created if it is missing.
        sessions_topic: Name = "delivery.sessions.v1", example "delivery.sessions.v1";
        /// Topic through which the nodes hand events over (`HANDOFF=log`). Created if it is missing.
        handoff_topic: Name = "delivery.handoff.v1", example "delivery.handoff.v1";
        /// Maximum memory of the last events that this node routed. From them it sends a session that returns with a
        /// cursor what it has missed, and a new session what other nodes could not hand over yet. None with
        /// `HANDOFF=redis`.
        tail_bytes: Size = "64MiB", from "1MiB" to "64GiB", example "256MiB";
        /// Maximum age of these events, counted from when the node read them. Older ones are dropped, also if no others
        /// arrive.
        tail_age: Duration = "5m", from "10s" to "10m", example "5m";
        /// How long a node may be silent before the others give it up (`HANDOFF=log`). Its sessions are
        /// closed with 4409 if it comes back.
        node_timeout: Duration = "1m", from "10s" to "10m", example "1m";
        /// Topic for records that cannot be routed. Empty: they are counted and skipped.
        dead_letter_topic: Option<Name> = "", example "delivery.dead-letter.v1";
        /// Maximum time for which a record that cannot be routed is retried. The rest of its partition
        /// waits.
        route_retry_max: Duration = "30s", from "0s" to "1h", example "30s";
        /// Maximum number of conversations in the membership cache.
        membership_cache_max: Count = "200000", from "1" to "100000000", example "1000000";
        /// Maximum number of members in the membership cache, over all conversations. A member takes
        /// about 40 bytes.
        membership_members_max: Count = "4000000", from "1" to "1000000000", example "20000000";
        /// Lifetime of a cached member list. After that it is fetched again from the conversation
        /// service; without that service it does not expire.
        membership_lifetime: Duration = "10m", from "1s" to "24h", example "10m";
        /// Maximum amount of data fetched ahead from Kafka, per partition.
        kafka_prefetch: Size = "4MiB", from "64KiB" to "1GiB", example "4MiB";
    }
    "Redis" {
        /// Address of Redis; several are the nodes of a cluster. `redis_url` overrides it.
        redis_addr: Vec<PeerAddress> = "", example "redis:6379";
        /// URL of Redis: `redis://`, `rediss://` (TLS), `redis+cluster://` or `rediss+cluster://`, with
        /// user, password and database; or `redis+sentinel://user:password@host:26379,host:26379/NAME`
        /// for the primary that Sentinels monitor as NAME (`rediss+sentinel://`: TLS). If `redis_addr` is
        /// empty as well, Redis is not used.
        redis_url: Option<SecretUrl> = "", example "rediss://delivery:password@redis:6379/0";
    }
    "Other services" {
        /// Address of the message service, which returns the messages a client missed. Empty: no
        /// catch-up.
        msg_svc_addr: Option<GrpcAddress> = "", example "message-service:50052";
        /// Address of the conversation service, which returns the members of conversations. Empty:
        /// only conversations whose creation event this node has read can be routed.
        conv_svc_addr: Option<GrpcAddress> = "", example "conversation-service:50051";
        /// Address of the presence service.
        presence_svc_addr: Option<GrpcAddress> = "", example "https://presence-service:50053";
        /// Where presence is reported: `service` (to the presence service), `redis` (directly to its
        /// keys in Redis) or `off`. Empty: `service` if `presence_svc_addr` is set, else `off`.
        presence_mode: Option<PresenceMode> = "", example "service";
        /// Interval of presence refreshes. A presence entry expires after 60 s.
        presence_refresh: Duration = "20s", from "1s" to "55s", example "20s";
        /// Deadline of one call to another service.
        call_timeout: Duration = "2s", from "50ms" to "1m", example "2s";
        /// Maximum size of an answer of another service, such as the members of a conversation. Few answers
        /// beyond 8 MiB arrive at a time.
        neighbour_answer_max: Size = "64MiB", from "64KiB" to "1GiB", example "64MiB";
        /// Maximum time for which catch-up waits until the session is registered, so that other nodes
        /// hand over its events (`HANDOFF=redis`). After that it continues without, and is
        /// counted.
        registration_wait: Duration = "2s", from "0s" to "5m", example "2s";
        /// Maximum number of concurrent calls for catch-up, for all clients together.
        resume_calls_max: Count = "64", from "1" to "4096", example "64";
    }
    "Tokens" {
        /// `jwt`: clients need a valid token. `trust`: anybody can connect as any user.
        auth_mode: AuthMode = "jwt", dev "trust", example "jwt";
        /// Key of HS256 tokens, at least 32 bytes.
        jwt_secret: Option<Secret> = "", example "at-least-32-random-bytes-of-secret";
        /// File with keys of HS256 tokens, one in each line, at least 32 bytes each. A token may be signed with any of
        /// them, or with that of `jwt_secret`. The file is read again on SIGHUP, and when it has changed.
        jwt_secret_file: Option<PathBuf> = "", example "/etc/delivery/jwt-secrets";
        /// PEM file with the public keys of RS256, ES256 or EdDSA tokens. It is read again on SIGHUP, and when it has
        /// changed.
        jwt_key_file: Option<PathBuf> = "", example "/etc/delivery/jwt.pem";
        /// URLs of public keys (JWKS). Fetched every five minutes, and when no key verifies a token, at most every 10
        /// s.
        jwks_url: Vec<SecretUrl> = "", example "https://auth.example.com/.well-known/jwks.json";
        /// Required `iss` of a token. Empty: any.
        jwt_issuer: Option<Name> = "", example "realchat-auth";
        /// Required `aud` of a token. Empty: any.
        jwt_audience: Option<Name> = "", example "realchat";
        /// Tolerated clock difference when the times of a token are checked.
        jwt_leeway: Duration = "30s", from "0s" to "10m", example "30s";
    }
    "TLS" {
        /// PEM files with certificate chains, each in the order of issue, the certificate of the server first. With them the
        /// WebSocket and gRPC ports speak TLS 1.3, and nothing else. A client gets the certificate with the name it asks
        /// for, otherwise that of the first file. The files are read again on SIGHUP, and when they have changed. Empty: no TLS.
        tls_cert: Vec<PathBuf> = "", example "/etc/delivery/tls/tls.crt";
        /// PEM files with the private keys (PKCS #8, PKCS #1 or SEC 1, not encrypted), one for each file of `tls_cert`, in the
        /// same order.
        tls_key: Vec<PathBuf> = "", example "/etc/delivery/tls/tls.key";
        /// Secret of session tickets, at least 32 bytes, the same on all nodes: with a ticket a client that returns, to
        /// whichever node, needs no new signature. Empty, as `tls_ticket_secret_file`: a random one for each node.
        tls_ticket_secret: Option<Secret> = "", example "at-least-32-random-bytes-of-secret";
        /// File with secrets of session tickets, one in each line, at least 32 bytes each, at most 8. The first one is used for
        /// new tickets (`tls_ticket_secret`, if it is set), tickets of all are accepted. The file is read again on
        /// SIGHUP, and when it has changed.
        tls_ticket_secret_file: Option<PathBuf> = "", example "/etc/delivery/tls-ticket-secrets";
    }
    "Admin" {
        /// Token of operators, at least 32 bytes: with it, `delivery admin` may act from anywhere, and over TCP nobody may
        /// without it. Without a token only this machine may act. `/health` and `/metrics` need none.
        admin_token: Option<Secret> = "", example "at-least-32-random-bytes-of-token";
        /// File with such tokens, one in each line. Each of them may be used, and that of `admin_token`. The file is read
        /// again on SIGHUP, and when it has changed.
        admin_token_file: Option<PathBuf> = "", example "/etc/delivery/admin-tokens";
        /// File with revocations of tokens, one in each line: a time and a user, or `*` for everybody. Tokens that were
        /// issued earlier are refused from the start of the node on. The file is read again on SIGHUP, and when it has
        /// changed.
        revocations_file: Option<PathBuf> = "", example "/etc/delivery/revocations";
        /// How long a node refuses tokens from when it was told (`delivery admin revoke`, `revocations_file`). Set it to
        /// the longest time for which tokens of clients are valid, or longer.
        revocations_kept: Duration = "24h", from "1m" to "8760h", example "24h";
    }
    "Demo" {
        /// Run the demo conversation of `delivery dev`: `demo` with alice, bob and carol, a message about
        /// once a second. `--no-demo` (`dev` only) is short for `--dev-demo false`.
        dev_demo: bool = "true", example "true";
    }
    "Stopping" {
        /// Time for which a node that drains or stops (on SIGTERM, SIGINT or `POST /admin/drain`) still
        /// accepts and serves connections after its readiness has turned off, because load balancers
        /// notice that only when they poll. Set it to the longest time that yours take. 0: the public
        /// port closes at once.
        drain_delay: Duration = "5s", dev "0s", from "0s" to "10m", example "15s";
        /// Time over which sessions are closed one after the other with 1012, after the drain delay.
        /// 0: all are closed at once with 1001.
        drain_period: Duration = "0s", from "0s" to "1h", example "20s";
        /// Maximum time from the end of the drain period to the exit of the process.
        stop_timeout: Duration = "10s", from "100ms" to "10m", example "10s";
    }
    "Telemetry" {
        /// Log levels (`off`, `error`, `warn`, `info`, `debug` or `trace`): one for everything, and
        /// others for single targets, as in `info,delivery::service=debug`. The variable `RUST_LOG`
        /// overrides it.
        log_level: Targets = "info", example "info";
        /// `text`, or `json` for one JSON object per line.
        log_format: LogFormat = "text", example "json";
        /// Serve `/metrics`.
        metrics_enabled: bool = "true", example "true";
        /// Log each record that has a `traceparent` header, with its trace id, when it is routed (at
        /// level debug).
        tracing_enabled: bool = "false", example "true";
    }
}
