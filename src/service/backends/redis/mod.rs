//! Redis (contract §4): fenced registrations, users' locations, hand-offs to other nodes, and
//! subscriptions to what other nodes and the presence service publish.

mod address;
mod announcer;
mod cluster;
mod fence;
mod link;
mod locations;
mod nodes;
mod progress;
mod registry;
mod subscriptions;

pub use address::{RedisAddress, RedisAddressError};
pub use announcer::{Announcer, USERS_MAX as MOVES_MAX};
pub use fence::{
    DRAWN_AT_ONCE, FENCE_LIFETIME_S, Fence, FencedWrite, REGISTRATION_LIFETIME_S, RegistrationKeys,
};
pub use link::{RedisConfig, RedisFault, RedisLink, RedisLinkCounters, connect};
pub use locations::{Locations, LocationsConfig};
pub use nodes::{Nodes, NodesConfig, NodesCounters};
pub use subscriptions::{
    PresenceUpdates, Sinks, SubscriptionCounters, Subscriptions, SubscriptionsConfig,
};

/// The channel on which an instance receives hand-offs (contract §4).
fn channel_of(instance: &str) -> String {
    format!("delivery:{instance}")
}
