//! Identifiers: shards, connections, sessions, conversations.

use crate::domain::encoding::Encoding;

/// Greatest value of [`ConnectionKey::generation`]: it travels in 24 bits of a completion token.
pub const GENERATION_MAX: u32 = (1 << 24) - 1;

/// One reactor thread with its ring and its slab; numbered from 0. The gRPC stream hub takes the
/// number after the last reactor, so that a session is addressed the same way wherever it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub u16);

impl ShardId {
    /// As an index into per-shard tables.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// One connection of one shard. A slot is used again after its connection has ended; the
/// generation tells the successor from the predecessor, so a late completion or delivery for the
/// predecessor is recognised as stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionKey {
    /// Index into the shard's slab.
    pub slot: u32,
    /// Counts the uses of the slot, modulo [`GENERATION_MAX`] + 1.
    pub generation: u32,
}

/// Where a session lives and what it wants to be sent: all the router needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionAddress {
    /// The reactor (or the gRPC hub) that holds the connection.
    pub shard: ShardId,
    /// The encoding negotiated at the handshake.
    pub encoding: Encoding,
    /// The connection within its shard.
    pub connection: ConnectionKey,
}

/// One conversation as the shards see it: a number to compare, not a name to read. Made by
/// hashing the conversation id with a key drawn at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConversationKey(pub u64);

/// The place of a message within its conversation (`Message.sequence`, contract §1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConversationPosition {
    /// The conversation.
    pub conversation: ConversationKey,
    /// The message's sequence in it.
    pub sequence: i64,
}
