//! What a shard keeps for TLS: a table beside its slab, so that plaintext connections pay nothing for it.

use crate::domain::ids::ConnectionKey;
use crate::handoff::{Consumer, Duplex, Producer};
use crate::protocol::tls::{Job, Opening, Sealing};

/// The shard's end of the rings to the thread that makes its handshakes.
pub type ShardHandshakeEnd = Duplex<Producer<Job>, Consumer<Job>>;

/// One connection over TLS.
#[derive(Debug, Default)]
pub struct TlsSession {
    /// The sending half. Before the end of the handshake it has no keys.
    pub sealing: Sealing,
    /// The receiving half; `None`: before the end of the handshake.
    pub opening: Option<Opening>,
}

impl TlsSession {
    /// Since when a record of the client is incomplete.
    pub fn incomplete_since(&self) -> Option<u64> {
        self.opening.as_ref()?.incomplete_since()
    }
}

/// The TLS sessions of a shard, by the slots of their connections. A connection has one from its accept to its end.
#[derive(Debug, Default)]
pub struct TlsTable {
    sessions: Vec<Option<Box<TlsSession>>>,
}

impl TlsTable {
    /// Memory of an idle session beyond that of a plaintext connection, bytes.
    pub const SESSION_BYTES: usize = size_of::<TlsSession>() + size_of::<Option<Box<TlsSession>>>();

    /// What a client may have sent of its handshake while it is not handled, bytes: more than its longest message, a client
    /// hello with a post-quantum key.
    pub const HANDSHAKE_INPUT_BYTES_MAX: usize = 16 * 1024;
    /// Heap memory of a handshake, bytes, at most: its input and one receive, doubled, and about 16 KiB of rustls.
    pub const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;

    /// A session without keys.
    pub fn insert(&mut self, key: ConnectionKey) {
        let slot = key.slot as usize;
        if slot >= self.sessions.len() {
            self.sessions.resize_with(slot + 1, || None);
        }
        assert!(self.sessions[slot].is_none(), "the connection before it has ended");
        self.sessions[slot] = Some(Box::default());
    }

    /// Forgets the keys.
    pub fn remove(&mut self, key: ConnectionKey) {
        if let Some(session) = self.sessions.get_mut(key.slot as usize) {
            *session = None;
        }
    }

    /// Whether the connection speaks TLS.
    pub fn has(&self, key: ConnectionKey) -> bool {
        self.get(key).is_some()
    }

    /// The session of a connection that exists; `None`: it speaks plaintext.
    pub fn get(&self, key: ConnectionKey) -> Option<&TlsSession> {
        self.sessions.get(key.slot as usize)?.as_deref()
    }

    /// The same.
    pub fn get_mut(&mut self, key: ConnectionKey) -> Option<&mut TlsSession> {
        self.sessions.get_mut(key.slot as usize)?.as_deref_mut()
    }
}

const _: () = assert!(TlsTable::SESSION_BYTES <= 264, "memory of an idle TLS session");
