//! The two ends of the rings between a peer and a shard (`domain::command`).

use std::sync::Arc;

use super::{Consumer, Doorbell, Producer, ring};
use crate::domain::command::{ShardCommand, ShardReport};

/// One side of the two rings between a peer and a shard (or the gRPC hub): its ends `C` of the ring of commands and `R`
/// of the ring of reports.
#[derive(Debug)]
pub struct Duplex<C, R> {
    /// Commands of the peer to the shard.
    pub commands: C,
    /// Reports of the shard to the peer.
    pub reports: R,
}

/// The side of the peer.
pub type PeerEnd = Duplex<Producer<ShardCommand>, Consumer<ShardReport>>;

/// The side of the shard.
pub type ShardEnd = Duplex<Consumer<ShardCommand>, Producer<ShardReport>>;

/// Rings with this many slots for commands and for reports. Commands ring the shard's bell, reports
/// the peer's.
pub fn connect(
    [commands, reports]: [usize; 2],
    shard_bell: &Arc<Doorbell>,
    peer_bell: &Arc<Doorbell>,
) -> (PeerEnd, ShardEnd) {
    let (to_shard, commands) = ring(commands, Arc::clone(shard_bell));
    let (to_peer, reports) = ring(reports, Arc::clone(peer_bell));
    (Duplex { commands: to_shard, reports }, Duplex { commands, reports: to_peer })
}
