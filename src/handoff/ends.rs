//! The two ends of the rings between a peer and a shard (`domain::command`).

use std::sync::Arc;

use super::{Consumer, Doorbell, Producer, ring};
use crate::domain::command::{ShardCommand, ShardReport};

/// A peer's ends of the rings to and from one shard (or the gRPC hub).
#[derive(Debug)]
pub struct PeerEnd {
    /// Commands to the shard.
    pub commands: Producer<ShardCommand>,
    /// Reports of the shard.
    pub reports: Consumer<ShardReport>,
}

/// A shard's ends of the rings to and from one peer.
#[derive(Debug)]
pub struct ShardEnd {
    /// Commands from the peer.
    pub commands: Consumer<ShardCommand>,
    /// Reports to the peer.
    pub reports: Producer<ShardReport>,
}

/// Rings with this many slots for commands and for reports. Commands ring the shard's bell, reports
/// the peer's.
pub fn connect(
    [commands, reports]: [usize; 2],
    shard_bell: &Arc<Doorbell>,
    peer_bell: &Arc<Doorbell>,
) -> (PeerEnd, ShardEnd) {
    let (to_shard, commands) = ring(commands, Arc::clone(shard_bell));
    let (to_peer, reports) = ring(reports, Arc::clone(peer_bell));
    (PeerEnd { commands: to_shard, reports }, ShardEnd { commands, reports: to_peer })
}
