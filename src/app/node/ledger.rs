//! What memory a session costs, and what everything may take at most: computed from the settings,
//! told at start and on the metrics page, so that a machine can be sized and a leak be seen.

use super::sizing::Sizing;
use crate::app::admin::{FamilyKind, Samples};
use crate::app::config::Settings;
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::limits::{HANDOFF_RING_SLOTS, ID_BYTES_MAX, RECEIVE_BUFFER_BYTES};
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::Connection;
use crate::reactor::queue::NodePool;
use crate::reactor::slab::Slab;
use crate::service::directory::Directory;
use crate::service::resume::ResumeConfig;
use crate::service::sessions;

/// The two counts of an `Arc`, and the length of the first id.
const IDS_OVERHEAD: usize = 2 * size_of::<usize>() + 2;
/// A user id (a UUID in text) and a device id as they are in the field, bytes.
const IDS_TYPICAL: usize = 36 + 16;
/// One cached member: a shared pointer to its id.
const MEMBER_BYTES: usize = 16;
/// The program itself and its threads' stacks as far as they are touched, bytes.
const PROCESS_BYTES: u64 = 64 << 20;

/// Partitions that are reckoned with: how many there are is Kafka's business.
const PARTITIONS: u64 = 64;

/// Named amounts, bytes.
type Amounts = Vec<(&'static str, u64)>;

/// See the module.
pub(super) struct Ledger {
    /// One idle session.
    session: Amounts,
    /// The whole process, each part as large as it can get.
    bound: Amounts,
}

impl Ledger {
    /// For these settings.
    pub(super) fn new(settings: &Settings, sizing: &Sizing, shard: &ShardConfig) -> Self {
        let slot = Slab::<Connection>::ENTRY_BYTES;
        let session = vec![
            ("slot", slot as u64),
            ("record", sessions::RECORD_BYTES as u64),
            ("directory", Directory::ENTRY_BYTES as u64),
            ("ids", (IDS_OVERHEAD + IDS_TYPICAL) as u64),
        ];
        let shards = u64::from(sizing.shards);
        let slots = u64::from(shard.slots_max());
        let connections = u64::from(shard.connections_max);
        let ids = (IDS_OVERHEAD + 2 * ID_BYTES_MAX) as u64;
        // A client is either in its handshake or in the middle of a message.
        let head = shard.upgrade.head_bytes_max as u64;
        let inbound = head.max(u64::from(shard.message_bytes_max));
        let queue = u64::from(shard.queue_frames_max + shard.hold_frames_max);
        let peers = u64::from(sizing.routers) + 1;
        let rings = HANDOFF_RING_SLOTS * (size_of::<ShardCommand>() + size_of::<ShardReport>());
        let resume = ResumeConfig::default();
        let members = settings.membership_members_max.size() * MEMBER_BYTES;
        let bound = vec![
            ("process", PROCESS_BYTES),
            ("slots", shards * slots * slot as u64),
            ("records", shards * slots * sessions::RECORD_BYTES as u64),
            ("directory", shards * connections * (Directory::ENTRY_BYTES as u64 * 2 + ids)),
            ("events_waiting", shards * shard.event_bytes_max),
            ("queues", shards * connections * queue * NodePool::NODE_BYTES as u64),
            ("partial_messages", shards * connections * inbound),
            (
                "receive_buffers",
                shards * u64::from(shard.receive_buffers) * RECEIVE_BUFFER_BYTES as u64,
            ),
            ("rings", shards * peers * rings as u64),
            ("members", members as u64),
            ("catch_up", (resume.pages_bytes_max + resume.requests_bytes_max) as u64),
            ("kafka_prefetch", PARTITIONS * settings.kafka_prefetch.0),
        ];
        Self { session, bound }
    }

    /// Writes it to the log.
    pub(super) fn announce(&self) {
        tracing::info!(
            "memory: {} B for an idle session ({}), and about 3.7 KB in the kernel",
            total(&self.session),
            parts(&self.session, |bytes| bytes.to_string()),
        );
        tracing::info!(
            "memory: at most {} with every limit reached at once ({})",
            human(total(&self.bound)),
            parts(&self.bound, human),
        );
    }

    /// For the metrics page.
    pub(super) fn samples(self) -> Samples {
        Box::new(move |page| {
            let families = [
                ("delivery_memory_session_bytes", "Memory of an idle session.", &self.session),
                ("delivery_memory_bound_bytes", "The most that each part may take.", &self.bound),
            ];
            for (name, help, amounts) in families {
                for (part, bytes) in amounts {
                    #[allow(clippy::cast_precision_loss, reason = "exact to 2^53")]
                    let bytes = *bytes as f64;
                    page.sample(FamilyKind::Gauge, name, help, &[("part", part)], bytes);
                }
            }
        })
    }
}

fn total(amounts: &Amounts) -> u64 {
    amounts.iter().map(|(_, bytes)| bytes).sum()
}

fn parts(amounts: &Amounts, show: impl Fn(u64) -> String) -> String {
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

    #[test]
    fn idle_session_stays_within_its_budget() {
        // Issue 6: at most 400 bytes of process memory, presence state and allocator included.
        let session = total(&ledger(&[], 1_000).session);
        assert!(session <= 350, "{session}");
    }

    #[test]
    fn bound_grows_with_what_it_is_computed_from() {
        let bound = |flags: &[_], connections| total(&ledger(flags, connections).bound);
        let base = bound(&[], 1_000);
        assert!(bound(&[], 2_000) > base);
        let events = bound(&[("shard_event_bytes_max", "257MiB")], 1_000);
        assert_eq!(events - base, 2 << 20, "two shards, a MiB more each");
        let messages = bound(&[("message_bytes_max", "65KiB")], 1_000);
        assert_eq!(messages - base, 2 * 1_000 * 1_024);
    }

    #[test]
    fn amounts_are_shown_for_people() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(1_536), "1.5 KiB");
        assert_eq!(human(3 << 30), "3.0 GiB");
    }
}
