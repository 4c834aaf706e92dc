//! Redis (contract §4): fenced registrations, users' locations, hand-offs to other nodes, and
//! subscriptions to what other nodes and the presence service publish.

mod address;
mod announcer;
mod cluster;
mod config;
mod connection;
mod counters;
mod fence;
mod gaps;
mod handed_over;
mod legacy;
mod link;
mod locations;
mod nodes;
mod probe;
mod progress;
mod refusal;
mod registry;
mod sentinel;
mod subscriptions;

pub use address::{RedisAddress, RedisAddressError, SentinelAddress};
pub use announcer::{Announcer, USERS_MAX as MOVES_MAX};
pub use config::RedisConfig;
pub use counters::{LegacyCounters, NodesCounters, RedisLinkCounters, SubscriptionCounters};
pub use fence::{
    DRAWN_AT_ONCE, FENCE_LIFETIME_S, Fence, FencedWrite, REGISTRATION_LIFETIME_S, RegistrationKeys,
};
pub use gaps::USERS_REMEMBERED_MAX as GAP_USERS_MAX;
pub use legacy::{LegacyConfig, LegacyNodes, LegacyWatch, RegistryUse};
pub use link::{RedisFault, RedisLink, connect};
pub use locations::{Locations, LocationsConfig};
pub use nodes::{Nodes, NodesConfig};
pub use subscriptions::{PresenceUpdates, Sinks, Subscriptions, SubscriptionsConfig};

/// The channel on which an instance receives hand-offs (contract §4).
fn channel_of(instance: &str) -> String {
    format!("delivery:{instance}")
}
