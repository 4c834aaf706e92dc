//! What memory a session costs, and what everything may take at most: computed from the settings,
//! told at start and on the metrics page, so that a machine can be sized and a leak be seen.
//!
//! Each row of `docs/queues.md` names the part that covers it; a test compares the two.

use super::back_ends::presence_config;
use super::routing::{prefetch_kib, router_config};
use super::sizing::Sizing;
use super::streams::outbox_limits;
use crate::app::admin::{FamilyKind, Samples, number};
use crate::app::config::{RoutingMode, Settings};
use crate::app::telemetry::LINES_WAITING_MAX;
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::encoding::Encoding;
use crate::domain::limits::{
    HANDOFF_RING_SLOTS, ID_BYTES_MAX, RECEIVE_BUFFER_BYTES, TOKEN_BYTES_MAX,
};
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::Connection;
use crate::reactor::queue::NodePool;
use crate::reactor::shard::PENDING_REPORTS_MAX;
use crate::reactor::slab::Slab;
use crate::service::backends::neighbours::ANSWER_BYTES_MAX;
use crate::service::backends::redis::{
    LocationsConfig, MOVES_MAX, NodesConfig, SubscriptionsConfig,
};
use crate::service::members::directory::Directory;
use crate::service::members::membership::{Members, MembershipConfig};
use crate::service::routing::kafka;
use crate::service::routing::router::RECORD_UNDER_WAY_BYTES;
use crate::service::sessions::catch_up::CatchUpConfig;
use crate::service::sessions::manager;
use crate::service::sessions::presence_fanout::PresenceFanoutConfig;
use crate::service::streams::grpc;
use crate::service::streams::hub::{HUB_REQUESTS_MAX, OutboxLimits};

/// The two counts of an `Arc`, and the length of the first id.
const IDS_OVERHEAD: usize = 2 * size_of::<usize>() + 2;
/// A user id (a UUID in text) and a device id as they are in the field, bytes.
const IDS_TYPICAL: usize = 36 + 16;
/// A user id in a map of its own, bytes: shared text of a UUID, its counts, a slot of the table.
const USER_BYTES: u64 = 100;
/// A cached conversation beside its members, bytes: its id, its state, the changes remembered.
const CONVERSATION_BYTES: u64 = 1024;
/// What one entry of presence takes, in its map, its line and its wait, bytes.
const PRESENCE_BYTES: u64 = 400;
/// What goes with each record on its way to or from another node, bytes.
const HAND_OFF_BYTES: usize = 128;
/// The program itself and its threads' stacks as far as they are touched, bytes.
const PROCESS_BYTES: u64 = 64 << 20;
/// The largest record that Kafka takes by default, bytes.
const RECORD_BYTES: u64 = 1 << 20;
/// A log line, bytes.
const LOG_LINE_BYTES: u64 = 1024;

/// What the kernel holds for an idle session, bytes, as its slabs grow on Linux 6.18: the socket with
/// its inode, file and name; the poll that watches it; its place in the shard's table of files. Other
/// versions differ by some hundred bytes.
const KERNEL: [(&str, u64); 3] = [("socket", 3_840), ("watch", 256), ("place", 32)];

/// Partitions that are reckoned with at start: how many there are is Kafka's business. Once more
/// are read, the metrics page reckons with those.
const PARTITIONS: u64 = 64;

/// Named amounts, bytes.
type Amounts = Vec<(&'static str, u64)>;

/// See the module.
pub(super) struct Ledger {
    /// One idle session.
    session: Amounts,
    /// The whole process, each part as large as it can get, but for what comes with partitions.
    fixed: Amounts,
    /// What each partition adds.
    partition: Amounts,
}

impl Ledger {
    /// For these settings.
    pub(super) fn new(settings: &Settings, sizing: &Sizing, shard: &ShardConfig) -> Self {
        let session = vec![
            ("slot", Slab::<Connection>::ENTRY_BYTES as u64),
            ("record", manager::RECORD_BYTES as u64),
            ("directory", Directory::ENTRY_BYTES as u64),
            ("ids", (IDS_OVERHEAD + IDS_TYPICAL) as u64),
        ];
        let mut fixed = vec![("process", PROCESS_BYTES)];
        fixed.extend(shards(sizing, shard));
        fixed.extend(routing(settings, sizing));
        fixed.extend(neighbours(settings, sizing));
        fixed.extend(streams(settings, sizing));
        let router = router_config(settings, sizing);
        let prefetch = kafka::partition_bytes_max(prefetch_kib(settings));
        let partition = vec![
            // The reader's queue and the membership follower's.
            ("kafka", 2 * prefetch),
            ("windows", (router.window_records_max * RECORD_UNDER_WAY_BYTES) as u64),
            ("lookahead", router.lookahead_bytes_max as u64 + RECORD_BYTES),
        ];
        Self { session, fixed, partition }
    }

    /// With so many partitions.
    fn bound(&self, partitions: u64) -> Amounts {
        let partitions = partitions.max(PARTITIONS);
        let each = self.partition.iter().map(|(part, bytes)| (*part, bytes * partitions));
        self.fixed.iter().copied().chain(each).collect()
    }

    /// Writes it to the log.
    pub(super) fn announce(&self) {
        tracing::info!(
            "memory: {} B for an idle session ({}), and about {} B in the kernel ({})",
            total(&self.session),
            parts(&self.session, |bytes| bytes.to_string()),
            total(&KERNEL),
            parts(&KERNEL, |bytes| bytes.to_string()),
        );
        let bound = self.bound(PARTITIONS);
        tracing::info!(
            "memory: at most {} with every limit reached at once ({}); of partitions {PARTITIONS} are \
             reckoned with, each further one adds {}",
            human(total(&bound)),
            parts(&bound, human),
            human(total(&self.partition)),
        );
    }

    /// For the metrics page. `partitions` tells how many are read.
    pub(super) fn samples(self, partitions: impl Fn() -> usize + Send + Sync + 'static) -> Samples {
        Box::new(move |page| {
            let bound = self.bound(partitions() as u64);
            let families = [
                ("delivery_memory_session_bytes", "Memory of an idle session.", &*self.session),
                (
                    "delivery_memory_session_kernel_bytes",
                    "Kernel memory of an idle session.",
                    &KERNEL,
                ),
                ("delivery_memory_bound_bytes", "The most that each part may take.", &*bound),
            ];
            for (name, help, amounts) in families {
                for (part, bytes) in amounts {
                    page.sample(FamilyKind::Gauge, name, help, &[("part", part)], number(*bytes));
                }
            }
        })
    }
}

/// What the shards hold, and what stands between them and the rest.
fn shards(sizing: &Sizing, shard: &ShardConfig) -> Amounts {
    let shards = u64::from(sizing.shards);
    let slots = shards * u64::from(shard.slots_max());
    let connections = shards * u64::from(shard.connections_max);
    let ids = (IDS_OVERHEAD + 2 * ID_BYTES_MAX) as u64;
    // A client is either in its handshake or in the middle of a message.
    let head = shard.upgrade.head_bytes_max as u64;
    let inbound = head.max(u64::from(shard.message_bytes_max));
    let queue = u64::from(shard.queue_frames_max + shard.hold_frames_max);
    // The hub counts as one.
    let peers = (shards + 1) * (u64::from(sizing.routers) + 1);
    let (command, report) = (size_of::<ShardCommand>() as u64, size_of::<ShardReport>() as u64);
    let ring = HANDOFF_RING_SLOTS as u64;
    vec![
        ("slots", slots * Slab::<Connection>::ENTRY_BYTES as u64),
        ("records", slots * manager::RECORD_BYTES as u64),
        ("directory", connections * (Directory::ENTRY_BYTES as u64 * 2 + ids)),
        ("queues", connections * queue * NodePool::NODE_BYTES as u64),
        ("partial_messages", connections * inbound),
        (
            "receive_buffers",
            shards * u64::from(shard.receive_buffers) * RECEIVE_BUFFER_BYTES as u64,
        ),
        ("rings", peers * ring * (command + report)),
        // Beside the rings: a command and a report of each connection that found them full.
        ("commands", slots * (command + report)),
        // What clients say waits in the ring to the session manager, and before it.
        ("client_messages", shards * (ring + PENDING_REPORTS_MAX as u64) * inbound),
    ]
}

/// What the way of the events holds beside the partitions.
fn routing(settings: &Settings, sizing: &Sizing) -> Amounts {
    let routers = u64::from(sizing.routers);
    let router = router_config(settings, sizing);
    let membership = MembershipConfig::default();
    let members = settings.membership_members_max.size() as u64;
    let conversations = settings.membership_cache_max.size() as u64;
    let answer = ANSWER_BYTES_MAX as u64;
    let catch_up = CatchUpConfig::default();
    let calls = settings.resume_calls_max.size() as u64;
    vec![
        // In rings, shards and hub together.
        ("events", routers * (router.event_bytes_max + Encoding::COUNT as u64 * RECORD_BYTES)),
        // Waiting to be taken in, and waiting for members.
        ("inbox", 2 * routers * router.inbox_bytes_max as u64),
        (
            "members",
            members * (size_of::<Members>() as u64 + USER_BYTES)
                + conversations * CONVERSATION_BYTES,
        ),
        ("member_questions", membership.fetches_max as u64 * answer),
        (
            "catch_up",
            (catch_up.pages_bytes_max + catch_up.requests_bytes_max) as u64 + calls * answer,
        ),
        ("tokens", (manager::REQUESTS_WAITING_MAX * (TOKEN_BYTES_MAX + 2 * ID_BYTES_MAX)) as u64),
        (
            "dead_letters",
            match settings.dead_letter_topic {
                Some(_) => kafka::DEAD_LETTERS_BYTES_MAX,
                None => 0,
            },
        ),
        ("log", LINES_WAITING_MAX as u64 * LOG_LINE_BYTES),
    ]
}

/// What waits for presence and for the other nodes.
fn neighbours(settings: &Settings, sizing: &Sizing) -> Amounts {
    let presence = presence_config("".into(), sizing);
    let waiting = presence.sessions_waiting_max + presence.ends_waiting_max;
    let mut amounts = vec![("presence", waiting as u64 * PRESENCE_BYTES)];
    if settings.redis_addr.is_empty() {
        return amounts;
    }
    let fan_out = PresenceFanoutConfig::default();
    let look_ups = fan_out.look_ups_max * ANSWER_BYTES_MAX;
    let changes = fan_out.users_waiting_max + fan_out.remembered_max;
    amounts.push(("presence_changes", look_ups as u64 + changes as u64 * USER_BYTES));
    if settings.routing() != RoutingMode::Group {
        return amounts;
    }
    let nodes = NodesConfig::new("".into());
    let incoming = SubscriptionsConfig::new("".into());
    let locations = LocationsConfig::default();
    amounts.extend([
        // One batch of each is on its way beside what waits.
        ("hand_offs", 2 * (nodes.bytes_max + nodes.records_max * HAND_OFF_BYTES) as u64),
        (
            "hand_offs_taken",
            2 * (incoming.bytes_max + incoming.records_max * HAND_OFF_BYTES) as u64,
        ),
        ("locations", locations.users_max as u64 * USER_BYTES),
        ("moves", 2 * MOVES_MAX as u64 * USER_BYTES),
    ]);
    amounts
}

/// What the gRPC port holds beside the events.
fn streams(settings: &Settings, sizing: &Sizing) -> Amounts {
    if settings.grpc_addr.is_none() {
        return Vec::new();
    }
    let streams = sizing.streams_max() as u64;
    let outbox = OutboxLimits::memory_max(&outbox_limits(settings)) as u64;
    vec![
        ("streams", streams * (outbox + grpc::STREAM_BYTES_MAX + grpc::CONNECTION_BYTES_MAX)),
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

/// With the unit that leaves one to four digits.
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
    use crate::app::config::{Layers, Profile, load};

    fn ledger(flags: &[(&'static str, &str)], connections_per_shard: u32) -> Ledger {
        let flags = flags.iter().map(|(name, value)| (*name, (*value).to_owned()));
        let settings = load(Layers::new(Profile::Dev).with_flags(flags)).unwrap().settings;
        let sizing = Sizing { shards: 2, routers: 1, service_threads: 2, connections_per_shard };
        let shard = super::super::shards::shard_config(&settings, &sizing);
        Ledger::new(&settings, &sizing, &shard)
    }

    fn bound(flags: &[(&'static str, &str)], connections_per_shard: u32) -> u64 {
        total(&ledger(flags, connections_per_shard).bound(0))
    }

    #[test]
    fn idle_session_stays_within_its_budget() {
        // Issue 6: at most 400 bytes of process memory, presence state and allocator included.
        let session = total(&ledger(&[], 1_000).session);
        assert!(session <= 350, "{session}");
    }

    #[test]
    fn bound_grows_with_what_it_is_computed_from() {
        let base = bound(&[], 1_000);
        assert!(bound(&[], 2_000) > base);
        let events = bound(&[("shard_event_bytes_max", "257MiB")], 1_000);
        assert_eq!(events - base, 3 << 20, "two shards and the hub, a MiB more each");
        let messages = bound(&[("message_bytes_max", "65KiB")], 1_000);
        let waiting = 1_000 + HANDOFF_RING_SLOTS + PENDING_REPORTS_MAX;
        assert_eq!(messages - base, 2 * waiting as u64 * 1_024);
        assert!(bound(&[("redis_addr", "localhost:6379")], 1_000) > base);
        assert!(bound(&[("dead_letter_topic", "dead")], 1_000) > base);
    }

    #[test]
    fn partitions_beyond_those_reckoned_with_are_added() {
        let ledger = ledger(&[], 1_000);
        let of = |partitions| total(&ledger.bound(partitions));
        assert_eq!(of(0), of(PARTITIONS));
        assert_eq!(of(PARTITIONS + 3) - of(PARTITIONS), 3 * total(&ledger.partition));
    }

    #[test]
    fn amounts_are_shown_for_people() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(1_536), "1.5 KiB");
        assert_eq!(human(3 << 30), "3.0 GiB");
    }
}
