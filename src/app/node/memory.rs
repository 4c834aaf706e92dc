//! Memory per session, and the upper bound of the whole process, computed from the settings. Both are
//! logged at start and exported as metrics, for sizing machines and detecting leaks.
//!
//! Each row of `docs/queues.md` names the part that covers it; a test compares the two.

use super::back_ends::presence_config;
use super::routing::{event_bytes_max, prefetch_kib, router_config};
use super::sizing::Sizing;
use super::streams::outbox_limits;
use crate::app::admin::{Collector, number};
use crate::app::config::{HandOffMode, PresenceMode, Settings};
use crate::app::telemetry::LINES_WAITING_MAX;
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::counters::MetricKind;
use crate::domain::cursor_schedule::CURSOR_SESSION_BYTES_MAX;
use crate::domain::encoding::Encoding;
use crate::domain::limits::{
    HANDOFF_RING_SLOTS, ID_BYTES_MAX, RECEIVE_BUFFER_BYTES, TOKEN_BYTES_MAX,
};
use crate::protocol::tls::Opening;
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::Connection;
use crate::reactor::queue::FramePool;
use crate::reactor::shard::PENDING_REPORTS_MAX;
use crate::reactor::slab::Slab;
use crate::reactor::tls::TlsTable;
use crate::service::backends::neighbours::{COMMON_ANSWER_BYTES_MAX, LARGE_ANSWERS_MAX};
use crate::service::backends::redis::{
    GAP_USERS_MAX, LocationsConfig, MOVES_MAX, NodesConfig, SubscriptionsConfig,
};
use crate::service::cluster::announcer::CHANGES_WAITING_MAX;
use crate::service::cluster::holder::Holder;
use crate::service::cluster::newcomers::NEWCOMERS_MAX;
use crate::service::cluster::table::SessionTable;
use crate::service::members::beginnings::Beginnings;
use crate::service::members::directory::Directory;
use crate::service::members::membership::{CHANGES_BYTES_MAX, MembershipConfig};
use crate::service::members::user_lists::USER_LISTS_BYTES_MAX;
use crate::service::routing::kafka;
use crate::service::routing::router::RECORD_UNDER_WAY_BYTES;
use crate::service::sessions::catch_up::CatchUpConfig;
use crate::service::sessions::manager;
use crate::service::sessions::presence::FENCE_BYTES;
use crate::service::sessions::presence_fanout::PresenceFanoutConfig;
use crate::service::streams::grpc;
use crate::service::streams::hub::{HUB_REQUESTS_MAX, OutboxLimits};

/// The two reference counts of an `Arc`, and the length of the first id.
const IDS_OVERHEAD: usize = 2 * size_of::<usize>() + 2;
/// Typical length of a user id (a UUID as text) and a device id, bytes.
const IDS_TYPICAL: usize = 36 + 16;
/// A user id in a map, bytes: the shared text of a UUID, its reference counts, a slot of the table.
const USER_BYTES: u64 = 100;
/// A member in a cached list, bytes: a UUID as text takes 36, an id in a list of mixed lengths four more.
const MEMBER_BYTES: u64 = 40;
/// A cached location of a user with one other instance, bytes: 125 measured beside its key.
const LOCATION_BYTES: u64 = 200;
/// A cached conversation without its members, bytes: id, state, the parts of its list.
const CONVERSATION_BYTES: u64 = 1024;
/// A presence entry in its map, its queue and its timer, bytes.
const PRESENCE_BYTES: u64 = 400;
/// Overhead of each record that is handed to or from another node, bytes.
const HAND_OFF_BYTES: usize = 128;
/// The program and the resident part of its threads' stacks, bytes.
const PROCESS_BYTES: u64 = 64 << 20;
/// Memory of an answer relative to its size on the wire: as it arrives, decoded (each id of a UUID takes 24
/// bytes more), and once more, because its caller may still use it when the next one arrives.
const ANSWER_COPIES: usize = 4;
/// Largest record that Kafka accepts by default, bytes.
const RECORD_BYTES: u64 = 1 << 20;
/// Typical log line, bytes.
const LOG_LINE_BYTES: u64 = 1024;

/// Kernel memory per idle session, bytes, from the slab growth on Linux 6.18: the socket with its inode,
/// file and name; the poll request; its entry in the shard's file table. Other versions differ by some
/// hundred bytes.
const KERNEL: [(&str, u64); 3] = [("socket", 3_840), ("watch", 256), ("place", 32)];

/// Number of partitions assumed at start, when the actual number is unknown. The metrics use the actual
/// number if it is larger.
const PARTITIONS: u64 = 64;

/// Sessions of all nodes assumed in the table (`HANDOFF=log`): it grows with the cluster.
const CLUSTER_SESSIONS: u64 = 10_000_000;
/// A session that began lately, bytes: its record, its shared user id, its place in two queues.
const NEWCOMER_BYTES: usize = 250;

/// Named parts with their sizes, bytes.
type PartSizes = Vec<(&'static str, u64)>;

/// Memory per session, and the bound of the process.
pub(super) struct MemoryBudget {
    /// One idle session.
    session: PartSizes,
    /// The process without the parts that grow with the number of partitions. Each part is at its
    /// maximum.
    fixed: PartSizes,
    /// What each partition adds to the bound.
    partition: PartSizes,
}

impl MemoryBudget {
    /// Computes the budget from the settings.
    pub(super) fn new(settings: &Settings, sizing: &Sizing, shard: &ShardConfig) -> Self {
        let mut session = vec![
            ("slot", Slab::<Connection>::SLOT_BYTES as u64),
            ("record", manager::RECORD_BYTES as u64),
            ("directory", Directory::ENTRY_BYTES as u64),
            ("ids", (IDS_OVERHEAD + IDS_TYPICAL) as u64),
        ];
        if settings.presence() == PresenceMode::Redis {
            session.push(("fence", FENCE_BYTES as u64));
        }
        if settings.has_tls() {
            session.push(("tls", TlsTable::SESSION_BYTES as u64));
        }
        let mut fixed = vec![("process", PROCESS_BYTES)];
        fixed.extend(shards(sizing, shard));
        if settings.has_tls() {
            fixed.extend(tls(sizing, shard));
        }
        fixed.extend(routing(settings, sizing));
        fixed.extend(other_services(settings, sizing));
        fixed.extend(streams(settings, sizing));
        fixed.extend(cluster(settings, sizing));
        let router = router_config(settings);
        let prefetch = kafka::partition_bytes_max(prefetch_kib(settings));
        let mut partition = vec![
            // The queues of the consumer and of the membership follower.
            ("kafka", 2 * prefetch),
            ("windows", (router.window_records_max * RECORD_UNDER_WAY_BYTES) as u64),
            ("parked_records", router.parked_bytes_max as u64 + RECORD_BYTES),
        ];
        if settings.hand_off() == Some(HandOffMode::Log) {
            let positions = sizing.sessions_max() * Holder::POSITION_BYTES;
            partition.push(("young_sessions", positions as u64));
        }
        Self { session, fixed, partition }
    }

    /// The bound with this number of partitions.
    fn bound(&self, partitions: u64) -> PartSizes {
        let partitions = partitions.max(PARTITIONS);
        let each = self.partition.iter().map(|(part, bytes)| (*part, bytes * partitions));
        self.fixed.iter().copied().chain(each).collect()
    }

    /// Logs the memory per session and the bound.
    pub(super) fn log(&self) {
        tracing::info!(
            "memory per idle session: {} B ({}), and about {} B in the kernel ({})",
            total(&self.session),
            parts(&self.session, |bytes| bytes.to_string()),
            total(&KERNEL),
            parts(&KERNEL, |bytes| bytes.to_string()),
        );
        let bound = self.bound(PARTITIONS);
        tracing::info!(
            "memory bound: {} if every limit is reached at once ({}), with {PARTITIONS} partitions; each \
             further one adds {}",
            human(total(&bound)),
            parts(&bound, human),
            human(total(&self.partition)),
        );
    }

    /// The metrics. `partitions` returns the number of partitions this node reads.
    pub(super) fn collector(
        self,
        partitions: impl Fn() -> usize + Send + Sync + 'static,
    ) -> Collector {
        Box::new(move |page| {
            let bound = self.bound(partitions() as u64);
            let families = [
                (
                    "delivery_memory_session_bytes",
                    "Memory per idle session, bytes.",
                    &*self.session,
                ),
                (
                    "delivery_memory_session_kernel_bytes",
                    "Kernel memory per idle session, bytes.",
                    &KERNEL,
                ),
                ("delivery_memory_bound_bytes", "Maximum memory of each part, bytes.", &*bound),
            ];
            for (name, help, amounts) in families {
                for (part, bytes) in amounts {
                    page.sample(MetricKind::Gauge, name, help, &[("part", part)], number(*bytes));
                }
            }
        })
    }
}

/// The shards, and the rings between them and their peers.
fn shards(sizing: &Sizing, shard: &ShardConfig) -> PartSizes {
    let shards = u64::from(sizing.shards);
    let slots = shards * u64::from(shard.slots_max());
    let connections = shards * u64::from(shard.connections_max);
    let ids = (IDS_OVERHEAD + 2 * ID_BYTES_MAX) as u64;
    // A client is either in its handshake or sending a message.
    let head = shard.upgrade.head_bytes_max as u64;
    let inbound = head.max(u64::from(shard.message_bytes_max));
    let queue = u64::from(shard.queue_frames_max + shard.hold_frames_max);
    // The hub counts as a shard.
    let peers = (shards + 1) * (u64::from(sizing.routers) + 1);
    let (command, report) = (size_of::<ShardCommand>() as u64, size_of::<ShardReport>() as u64);
    let ring = HANDOFF_RING_SLOTS as u64;
    vec![
        ("slots", slots * (Slab::<Connection>::SLOT_BYTES + CURSOR_SESSION_BYTES_MAX) as u64),
        ("records", slots * manager::RECORD_BYTES as u64),
        ("directory", connections * (Directory::ENTRY_BYTES as u64 * 2 + ids)),
        ("queues", connections * queue * FramePool::FRAME_BYTES as u64),
        ("partial_messages", connections * inbound),
        (
            "receive_buffers",
            shards * u64::from(shard.receive_buffers) * RECEIVE_BUFFER_BYTES as u64,
        ),
        ("rings", peers * ring * (command + report)),
        // Overflow of the rings: one command and one report per connection.
        ("commands", slots * (command + report)),
        // Messages of clients in the ring to the session manager, and waiting for it.
        ("client_messages", shards * (ring + PENDING_REPORTS_MAX as u64) * inbound),
    ]
}

/// TLS of the shards.
fn tls(sizing: &Sizing, shard: &ShardConfig) -> PartSizes {
    let shards = u64::from(sizing.shards);
    let connections = shards * u64::from(shard.connections_max);
    // A client is either in its handshake or sending a record.
    let inbound = TlsTable::HANDSHAKE_BYTES_MAX.max(Opening::BYTES_MAX) as u64;
    vec![
        ("tls_sessions", shards * u64::from(shard.slots_max()) * TlsTable::SESSION_BYTES as u64),
        ("tls_records", connections * inbound),
    ]
}

/// Routing, without the parts that grow with the number of partitions.
fn routing(settings: &Settings, sizing: &Sizing) -> PartSizes {
    let routers = u64::from(sizing.routers);
    let router = router_config(settings);
    let membership = MembershipConfig::default();
    let members = settings.membership_members_max.size() as u64;
    let conversations = settings.membership_cache_max.size() as u64;
    let answer_max = settings.neighbour_answer_max.0;
    let answer = answer_max.min(COMMON_ANSWER_BYTES_MAX as u64);
    let services = [&settings.conv_svc_addr, &settings.msg_svc_addr].into_iter().flatten().count();
    let large_answers = (services * LARGE_ANSWERS_MAX * ANSWER_COPIES) as u64 * answer_max;
    let catch_up = CatchUpConfig::default();
    let calls = settings.resume_calls_max.size() as u64;
    // Of the directory, and of the table.
    let logs = 1 + u64::from(settings.hand_off() == Some(HandOffMode::Log));
    vec![
        // In rings, shards and hub together. One event of each router may exceed the bound.
        (
            "events",
            event_bytes_max(settings, sizing) + routers * Encoding::COUNT as u64 * RECORD_BYTES,
        ),
        // Waiting to be accepted, and waiting for members.
        ("inbox", 2 * routers * router.inbox_bytes_max as u64),
        (
            "members",
            members * MEMBER_BYTES
                + conversations * CONVERSATION_BYTES
                + (CHANGES_BYTES_MAX + USER_LISTS_BYTES_MAX) as u64,
        ),
        ("audiences", routers * router.audience_bytes_max as u64),
        ("beginnings", logs * Beginnings::KEPT_MAX as u64 * USER_BYTES),
        ("member_questions", membership.fetches_max as u64 * answer),
        ("catch_up", catch_up.bytes_max() as u64 + calls * answer),
        ("large_answers", large_answers),
        ("revocations", manager::USERS_REVOKED_MAX as u64 * USER_BYTES),
        ("tokens", (manager::REQUESTS_WAITING_MAX * (TOKEN_BYTES_MAX + 2 * ID_BYTES_MAX)) as u64),
        (
            "dead_letters",
            match settings.dead_letter_topic {
                Some(_) => kafka::DEAD_LETTERS_BYTES_MAX,
                None => 0,
            },
        ),
        (
            "tail",
            match settings.hand_off() {
                Some(HandOffMode::Redis) => 0,
                Some(HandOffMode::Log) | None => settings.tail_bytes.0,
            },
        ),
        ("log", LINES_WAITING_MAX as u64 * LOG_LINE_BYTES),
    ]
}

/// Presence and the exchange with the other nodes.
fn other_services(settings: &Settings, sizing: &Sizing) -> PartSizes {
    let presence = presence_config("".into(), sizing);
    let waiting = presence.sessions_waiting_max + presence.ends_waiting_max;
    let fences = match settings.presence() {
        PresenceMode::Redis => sizing.sessions_max() * FENCE_BYTES,
        PresenceMode::Service | PresenceMode::Off => 0,
    };
    let mut amounts = vec![("presence", waiting as u64 * PRESENCE_BYTES + fences as u64)];
    if !settings.has_redis() {
        return amounts;
    }
    let fan_out = PresenceFanoutConfig::default();
    let answer = settings.neighbour_answer_max.bytes().min(COMMON_ANSWER_BYTES_MAX);
    let look_ups = fan_out.look_ups_max * answer;
    let changes = fan_out.users_waiting_max + fan_out.contacts_max;
    amounts.push(("presence_changes", look_ups as u64 + changes as u64 * USER_BYTES));
    let legacy = settings.expects_legacy_nodes();
    if !legacy && settings.hand_off() != Some(HandOffMode::Redis) {
        return amounts;
    }
    let nodes = NodesConfig::new("".into());
    let incoming = SubscriptionsConfig::new("".into());
    let locations = LocationsConfig::default();
    amounts.extend([
        // A batch in flight in addition to what is waiting.
        ("hand_offs", 2 * (nodes.bytes_max + nodes.records_max * HAND_OFF_BYTES) as u64),
        (
            // The log hands over as well, which has a name of its own.
            if legacy { "legacy_hand_offs_taken" } else { "hand_offs_taken" },
            2 * (incoming.bytes_max + incoming.records_max * HAND_OFF_BYTES) as u64,
        ),
        ("locations", locations.users_max as u64 * LOCATION_BYTES),
        ("moves", 2 * MOVES_MAX as u64 * USER_BYTES),
        ("gaps", GAP_USERS_MAX as u64 * USER_BYTES),
    ]);
    amounts
}

/// The hand-off through the log.
fn cluster(settings: &Settings, sizing: &Sizing) -> PartSizes {
    if settings.hand_off() != Some(HandOffMode::Log) {
        return Vec::new();
    }
    let router = router_config(settings);
    let inbox = (router.inbox_bytes_max + router.inbox_slots * HAND_OFF_BYTES) as u64;
    // Those that wait, and sessions replaced on other nodes.
    let changes = CHANGES_WAITING_MAX + 2 * sizing.sessions_max();
    // One record for all nodes, and the ids of its recipients.
    let unsent = RECORD_BYTES + settings.neighbour_answer_max.0;
    let held = Holder::SESSION_BYTES + Holder::YOUNG_BYTES;
    vec![
        ("table", CLUSTER_SESSIONS * SessionTable::ENTRY_BYTES as u64),
        ("newcomers", (NEWCOMERS_MAX * NEWCOMER_BYTES) as u64),
        ("cluster_topics", kafka::SESSIONS_BYTES_MAX + kafka::HAND_OFF_BYTES_MAX),
        ("janitor", kafka::JANITOR_BYTES_MAX + kafka::LOG_READER_BYTES_MAX),
        ("cluster_readers", 2 * kafka::LOG_READER_BYTES_MAX),
        ("hand_offs_taken", u64::from(sizing.routers) * inbox),
        ("changes", changes as u64 * PRESENCE_BYTES),
        ("unsent_hand_offs", u64::from(sizing.routers) * unsent),
        ("held_sessions", (sizing.sessions_max() * held) as u64),
    ]
}

/// The gRPC port, without the events.
fn streams(settings: &Settings, sizing: &Sizing) -> PartSizes {
    if settings.grpc_addr.is_none() {
        return Vec::new();
    }
    let streams = sizing.streams_max() as u64;
    let outbox = OutboxLimits::memory_max(&outbox_limits(settings)) as u64;
    let tls = if settings.has_tls() { grpc::TLS_BYTES_MAX } else { 0 };
    let connection = grpc::CONNECTION_BYTES_MAX + tls;
    vec![
        ("streams", streams * (outbox + grpc::STREAM_BYTES_MAX + connection)),
        ("stream_requests", (HUB_REQUESTS_MAX * grpc::REQUEST_BYTES_MAX) as u64),
    ]
}

fn total(amounts: &[(&str, u64)]) -> u64 {
    amounts.iter().map(|(_, bytes)| bytes).sum()
}

fn parts(amounts: &[(&str, u64)], show: impl Fn(u64) -> String) -> String {
    let parts: Vec<_> =
        amounts.iter().map(|(part, bytes)| format!("{part} {}", show(*bytes))).collect();
    parts.join(", ")
}

/// Formats with the largest unit that fits.
fn human(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes >= 1 << shift);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(shift, name)| {
            #[allow(clippy::cast_precision_loss, reason = "shown with one digit")]
            let amount = bytes as f64 / (1_u64 << shift) as f64;
            format!("{amount:.1} {name}")
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::config::dev_settings;

    fn budget(flags: &[(&'static str, &str)], connections_per_shard: u32) -> MemoryBudget {
        let settings = dev_settings(flags);
        let sizing = Sizing {
            shards: 2,
            routers: 1,
            service_threads: 2,
            connections_per_shard,
            connections: 2 * connections_per_shard,
        };
        let shard = super::super::shards::shard_config(&settings, &sizing);
        MemoryBudget::new(&settings, &sizing, &shard)
    }

    fn bound(flags: &[(&'static str, &str)], connections_per_shard: u32) -> u64 {
        total(&budget(flags, connections_per_shard).bound(0))
    }

    #[test]
    fn idle_session_stays_within_its_budget() {
        // The target: at most 400 bytes of process memory, presence state and allocator included.
        let session = total(&budget(&[], 1_000).session);
        assert!(session <= 350, "{session}");
        let registry = [("presence_mode", "redis"), ("redis_addr", "localhost:6379")];
        let session = total(&budget(&registry, 1_000).session);
        assert!(session <= 400, "{session}");
    }

    #[test]
    fn bound_grows_with_the_settings() {
        let base = bound(&[], 1_000);
        assert!(bound(&[], 2_000) > base);
        let events = bound(&[("shard_event_bytes_max", "257MiB")], 1_000);
        assert_eq!(events - base, 3 << 20, "two shards and the hub, one MiB more each");
        let messages = bound(&[("message_bytes_max", "65KiB")], 1_000);
        let waiting = 1_000 + HANDOFF_RING_SLOTS + PENDING_REPORTS_MAX;
        assert_eq!(messages - base, 2 * waiting as u64 * 1_024);
        let registry = ("presence_mode", "redis");
        assert!(bound(&[registry, ("redis_addr", "localhost:6379")], 1_000) > base);
        assert!(bound(&[registry, ("redis_url", "redis://localhost:6379")], 1_000) > base);
        assert!(bound(&[("dead_letter_topic", "dead")], 1_000) > base);
    }

    #[test]
    fn partitions_beyond_the_assumed_number_are_added() {
        let budget = budget(&[], 1_000);
        let of = |partitions| total(&budget.bound(partitions));
        assert_eq!(of(0), of(PARTITIONS));
        assert_eq!(of(PARTITIONS + 3) - of(PARTITIONS), 3 * total(&budget.partition));
    }

    #[test]
    fn sizes_are_formatted_with_a_unit() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(1_536), "1.5 KiB");
        assert_eq!(human(3 << 30), "3.0 GiB");
    }

    /// A stream catches up with several conversations at a time, each with a chunk in flight.
    #[test]
    fn what_a_stream_is_sent_at_once_fits_into_its_bounds() {
        let (config, limits) = (CatchUpConfig::default(), OutboxLimits::default());
        assert!(config.steps_at_once * config.chunk_messages_max <= limits.catch_up_messages_max);
        assert!(config.steps_at_once * config.chunk_bytes_max <= limits.catch_up_bytes_max);
    }
}
