//! Tests of the Redis client against a real `redis-server`.

mod announcer;
mod fence;
mod link;
mod nodes;
mod presence;
mod server;
mod subscriptions;
