//! Identifiers: shards, connections, sessions, conversations.

use crate::domain::encoding::Encoding;

/// Largest value of [`ConnectionKey::generation`]: a completion token has 24 bits for it.
pub const GENERATION_MAX: u32 = (1 << 24) - 1;

/// One reactor thread with its ring and its slab, numbered from 0. The gRPC stream hub has the
/// number after the last reactor, so that all sessions are addressed in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub u16);

impl ShardId {
    /// Index into per-shard tables.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// One connection of one shard. A slot is reused after its connection has ended. The generation
/// distinguishes the uses, so that late completions and deliveries for an earlier connection are
/// recognised as stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionKey {
    /// Index into the shard's slab.
    pub slot: u32,
    /// Distinguishes the uses of the slot. At most [`GENERATION_MAX`], then 0 again.
    pub generation: u32,
}

/// The shard, connection and encoding of a session: what the router needs to reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionAddress {
    /// The reactor, or the gRPC stream hub, that holds the connection.
    pub shard: ShardId,
    /// The encoding negotiated at the handshake.
    pub encoding: Encoding,
    /// The connection within its shard.
    pub connection: ConnectionKey,
}

/// A conversation as the shards see it: a number to compare, not a name. It is a hash of the
/// conversation id with a key drawn at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConversationKey(pub u64);

/// The position of a message within its conversation (`Message.sequence`, contract §1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConversationPosition {
    /// The conversation.
    pub conversation: ConversationKey,
    /// The sequence of the message.
    pub sequence: i64,
}
