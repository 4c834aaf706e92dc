//! Tests of the Redis client against a real `redis-server`.

mod announcer;
mod link;
mod nodes;
mod presence;
mod server;
mod subscriptions;
