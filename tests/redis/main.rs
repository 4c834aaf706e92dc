//! Tests of the Redis client against a real `redis-server`.

mod announcer;
mod fence;
mod gaps;
mod legacy;
mod link;
mod log;
mod nodes;
mod presence;
mod refusals;
mod sentinel;
mod sentinel_process;
mod server;
mod subscriptions;
