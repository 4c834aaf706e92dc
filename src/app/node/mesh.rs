//! The rings between the shards and their peers on the service side: a pair of rings per shard and
//! peer, and a doorbell per shard and per peer.

use std::io;
use std::sync::Arc;

use crate::domain::limits::HANDOFF_RING_SLOTS;
use crate::handoff::{Doorbell, PeerEnd, ShardEnd, connect};

/// The rings of one shard: first those of the session manager, then those of the routers.
pub(super) struct ShardSide {
    pub bell: Arc<Doorbell>,
    pub peers: Vec<ShardEnd>,
}

/// The rings of one peer, by shard number.
pub(super) struct PeerSide {
    pub bell: Arc<Doorbell>,
    pub shards: Vec<PeerEnd>,
}

/// All rings of a node.
pub(super) struct Mesh {
    pub shards: Vec<ShardSide>,
    pub session_manager: PeerSide,
    pub routers: Vec<PeerSide>,
}

impl Mesh {
    /// Creates the rings for this number of shards (including the gRPC hub) and routers.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub(super) fn new(shards: usize, routers: usize) -> io::Result<Self> {
        let bell = || Doorbell::new().map(Arc::new);
        let mut shard_sides = Vec::with_capacity(shards);
        for _ in 0..shards {
            shard_sides.push(ShardSide { bell: bell()?, peers: Vec::new() });
        }
        let mut connect = || -> io::Result<PeerSide> {
            let bell = bell()?;
            let mut ends = Vec::with_capacity(shards);
            for shard in &mut shard_sides {
                let (peer_end, shard_end) = connect([HANDOFF_RING_SLOTS; 2], &shard.bell, &bell);
                shard.peers.push(shard_end);
                ends.push(peer_end);
            }
            Ok(PeerSide { bell, shards: ends })
        };
        let session_manager = connect()?;
        let routers = (0..routers).map(|_| connect()).collect::<io::Result<_>>()?;
        Ok(Self { shards: shard_sides, session_manager, routers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::command::ShardCommand;
    use crate::domain::ids::ConnectionKey;
    use crate::handoff::Pushed;

    #[test]
    fn each_pair_of_peer_and_shard_has_its_own_rings() {
        let mut mesh = Mesh::new(3, 2).unwrap();
        let peers = std::iter::once(&mut mesh.session_manager).chain(&mut mesh.routers);
        for (peer, side) in peers.enumerate() {
            for (shard, end) in side.shards.iter_mut().enumerate() {
                let slot = u32::try_from(10 * peer + shard).unwrap();
                let connection = ConnectionKey { slot, generation: 0 };
                let pushed = end.commands.push(ShardCommand::Admit { connection });
                assert!(matches!(pushed, Pushed::Accepted));
            }
        }
        for (shard, side) in mesh.shards.iter_mut().enumerate() {
            assert_eq!(side.peers.len(), 3);
            for (peer, end) in side.peers.iter_mut().enumerate() {
                let Some(ShardCommand::Admit { connection }) = end.commands.pop() else {
                    panic!("no command")
                };
                assert_eq!(connection.slot as usize, 10 * peer + shard);
                assert!(end.commands.is_empty());
            }
        }
    }
}
