//! One router with everything around it played by the test: partitions, shards, the conversation
//! service, other nodes. The test takes the router's turns itself.

mod routing;
mod waiting;
pub(crate) mod world;
