//! What crosses the wire to Redis, against a real `redis-server`.

mod link;
mod nodes;
mod server;
mod subscriptions;
