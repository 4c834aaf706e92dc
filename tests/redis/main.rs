//! What crosses the wire to Redis, against a real `redis-server`.

mod announcer;
mod link;
mod nodes;
#[path = "../support/ports.rs"]
#[allow(unreachable_pub, reason = "shared with targets for which it is public")]
mod ports;
mod presence;
mod server;
mod subscriptions;
