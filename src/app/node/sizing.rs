//! Computes the number of threads and the sizes of the shards' tables from the settings, the cores and
//! the descriptor limit.

use std::time::Duration;

use std::num::NonZero;
use std::thread::available_parallelism;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::app::config::{Auto, Settings};
use crate::domain::counted::Counted;
use crate::domain::limits::CONNECTIONS_PER_SHARD_MAX;
use crate::reactor::config::ShardConfig;

/// Default number of connections per shard, if the descriptor limit allows it.
const CONNECTIONS_PER_SHARD_AUTO: u32 = 65_536;
/// Entries of a shard's file table besides its slots: the listener, the doorbell, and spare ones.
const TABLE_EXTRA: u32 = 16;
/// Descriptors of the process itself: Kafka, Redis, gRPC, admin, the rings. Client sockets take none.
const DESCRIPTORS_OWN: u64 = 1024;
/// With less address space the allocator or librdkafka fails while the process starts or runs, bytes. At rest a node
/// reserves 2.2 GiB.
const ADDRESS_SPACE_MIN: u64 = 4 << 30;

/// Maximum number of gRPC streams. A stream needs a task and buffers, a WebSocket only a slot.
const STREAMS_MAX: usize = 10_000;

/// The threads of the process, and the connections of each shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizing {
    pub shards: u16,
    pub routers: u16,
    pub service_threads: usize,
    pub connections_per_shard: u32,
    /// Maximum number of connections of all shards together.
    pub connections: u32,
}

impl Sizing {
    /// Maximum number of sessions: WebSockets and gRPC streams.
    pub(super) fn sessions_max(&self) -> usize {
        self.connections as usize + self.streams_max()
    }

    /// Maximum number of gRPC streams, and of the connections that carry them: the number of
    /// WebSockets, capped at [`STREAMS_MAX`].
    pub(super) fn streams_max(&self) -> usize {
        (self.connections as usize).min(STREAMS_MAX)
    }

    /// Number of threads for the handshakes of gRPC clients over TLS. A thread makes about a thousand a second with RSA,
    /// and ten times as many with ECDSA or tickets.
    pub(super) fn stream_handshake_threads(&self) -> usize {
        (self.service_threads / 2).max(1)
    }

    /// Number of threads for handshakes of both ports over TLS: each shard has one.
    pub(super) fn handshake_threads(&self) -> usize {
        usize::from(self.shards) + self.stream_handshake_threads()
    }
}

/// The resources of the machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// Cores this process may use.
    pub cores: usize,
    /// `RLIMIT_NOFILE`, raised to the hard limit.
    pub descriptors: u64,
    /// `RLIMIT_AS`, bytes.
    pub address_space: u64,
}

impl Machine {
    /// Reads the resources, after raising the soft descriptor limit to the hard one.
    pub(super) fn detect() -> Self {
        let limit = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
        let raised = setrlimit(Resource::Nofile, wanted).is_ok();
        let reached = if raised { limit.maximum } else { limit.current };
        Self {
            cores: available_parallelism().map_or(1, NonZero::get),
            descriptors: reached.unwrap_or(u64::MAX),
            address_space: getrlimit(Resource::As).current.unwrap_or(u64::MAX),
        }
    }
}

impl Sizing {
    /// Computes the sizes.
    ///
    /// # Errors
    /// The tables would exceed the descriptor limit. The text says what to do.
    pub(super) fn decide(settings: &Settings, machine: Machine) -> Result<Self, String> {
        if machine.descriptors < DESCRIPTORS_OWN {
            let have = machine.descriptors;
            return Err(format!(
                "the descriptor limit (RLIMIT_NOFILE) is {have}, but {DESCRIPTORS_OWN} are needed\n      \
                 example: ulimit -n 65536; in systemd LimitNOFILE=65536; in Docker --ulimit nofile=65536"
            ));
        }
        if machine.address_space < ADDRESS_SPACE_MIN {
            let (have, needed) = (machine.address_space / 1024, ADDRESS_SPACE_MIN / 1024);
            return Err(format!(
                "the limit of the address space (RLIMIT_AS) is {have} KiB, but the allocator and the stacks of the \
                 threads reserve more than 2 GiB, of which they use little\n      \
                 example: ulimit -v {needed}, or better `ulimit -v unlimited`; to limit the memory use MemoryMax= of \
                 systemd or --memory of Docker"
            ));
        }
        // One core in eight is for routing and Kafka: they cost about a tenth of what the sends
        // cost.
        let left_over = machine.cores.saturating_sub((machine.cores / 8).max(1)).max(1);
        let shards = match settings.shards {
            Auto::Auto => left_over.min(1024),
            Auto::Given(count) => count.size(),
        };
        let service_threads = match settings.service_threads {
            Auto::Auto => (machine.cores / 8).max(2),
            Auto::Given(count) => count.size(),
        };
        let refusals = ShardConfig::default().slots_max() - ShardConfig::default().connections_max;
        let beside = refusals + TABLE_EXTRA;
        let table_max = machine.descriptors.min(u64::from(CONNECTIONS_PER_SHARD_MAX));
        let table_max = u32::try_from(table_max).expect("at most 2^20").saturating_sub(beside);
        let most = table_max.min(CONNECTIONS_PER_SHARD_AUTO) * shards as u32;
        let connections = match settings.connections_max {
            Auto::Auto => most,
            Auto::Given(count) => count.u32(),
        };
        let connections_per_shard = connections.div_ceil(shards as u32);
        if connections_per_shard > table_max {
            return Err(too_many(connections_per_shard, shards, beside, machine));
        }
        Ok(Self {
            shards: u16::try_from(shards).expect("the table bounds shards to 1024"),
            routers: u16::try_from(settings.routers.0).expect("the table bounds routers to 64"),
            service_threads,
            connections_per_shard,
            connections,
        })
    }
}

fn too_many(connections: u32, shards: usize, beside: u32, machine: Machine) -> String {
    let needed = u64::from(connections) + u64::from(beside);
    let have = machine.descriptors;
    let most =
        u64::from(CONNECTIONS_PER_SHARD_MAX).min(have).saturating_sub(u64::from(beside)).max(1);
    let all = u64::from(connections) * shards as u64;
    let mut remedies = vec![format!("more shards: --shards {}", all.div_ceil(most))];
    if needed <= u64::from(CONNECTIONS_PER_SHARD_MAX) {
        remedies.push(format!(
            "a higher limit: `ulimit -n {needed}`, in systemd LimitNOFILE={needed}, in Docker \
             --ulimit nofile={needed}"
        ));
    }
    remedies.push(format!("fewer connections: --connections-max {}", most * shards as u64));
    format!(
        "connections_max: {} on each of {} need a table of {needed} sockets, but the hard descriptor limit \
         (RLIMIT_NOFILE) is {have} and a table has at most {CONNECTIONS_PER_SHARD_MAX}\n      \
         use {}",
        Counted(connections, "connection"),
        Counted(shards, "shard"),
        remedies.join("\n      or ")
    )
}

/// A time of the settings in ms.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::config::dev_settings;

    fn decide(
        flags: &[(&'static str, &str)],
        cores: usize,
        descriptors: u64,
    ) -> Result<Sizing, String> {
        let machine = Machine { cores, descriptors, address_space: u64::MAX };
        Sizing::decide(&dev_settings(flags), machine)
    }

    #[test]
    fn one_core_in_eight_is_not_for_shards() {
        let shards = |cores| decide(&[], cores, 1 << 20).unwrap().shards;
        assert_eq!([1, 2, 4, 8, 16, 64].map(shards), [1, 1, 3, 7, 14, 56]);
        assert_eq!(decide(&[("shards", "7")], 2, 1 << 20).unwrap().shards, 7);
    }

    #[test]
    fn tables_fit_the_descriptor_limit_or_the_error_says_what_would() {
        assert_eq!(decide(&[], 2, 20_000).unwrap().connections_per_shard, 20_000 - 304);
        assert_eq!(decide(&[], 2, 1 << 20).unwrap().connections_per_shard, 65_536);
        let flags = [("connections_max", "800000"), ("shards", "8")];
        assert_eq!(decide(&flags, 8, 1 << 20).unwrap().connections_per_shard, 100_000);
        let why = decide(&flags, 8, 20_000).unwrap_err();
        assert!(why.contains("LimitNOFILE=100304") && why.contains("--shards 41"), "{why}");
        let shards = [("connections_max", "800000"), ("shards", "41")];
        assert!(decide(&shards, 8, 20_000).is_ok());
        // Too few for the process itself, whatever the number of shards.
        let why = decide(&[("connections_max", "10")], 2, 100).unwrap_err();
        assert!(why.contains("ulimit -n 65536") && !why.contains("shards"), "{why}");
    }
}
