//! One router with fakes around it: partitions, shards, the conversation service, other nodes. The test
//! calls the router's turns itself.

mod clocks;
mod conversations;
mod held_back;
mod returning;
mod returning_client;
mod routing;
mod unready;
mod unverified;
mod waiting;
pub(crate) mod world;
