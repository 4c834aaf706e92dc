//! The handshake as those see it who only carry its bytes.

use std::fmt;

use zeroize::Zeroizing;

use crate::domain::ids::ConnectionKey;
use crate::protocol::tls::keys::{RecordKeys, Suite};

/// Handshakes that one shard may have under way at a thread at a time.
pub const JOBS_MAX: usize = 512;

/// The handshake of one connection. Bytes in, bytes out; it is made on a thread of its own, because a signature takes
/// too long for a thread that has many clients.
pub trait TlsHandshake: Send + fmt::Debug {
    /// Handles the whole records at the start of `input`, until the handshake is complete, and removes them. Appends to
    /// `output` what must be sent, also if it fails.
    fn advance(&mut self, input: &mut Vec<u8>, output: &mut Vec<u8>) -> HandshakeProgress;
}

/// How far a handshake is.
#[derive(Debug)]
pub enum HandshakeProgress {
    /// The client has to send more.
    NeedMore,
    /// It is complete. What is left of the input was sent with these secrets.
    Done(Box<Secrets>),
    /// It has failed. The output ends with an alert.
    Failed,
}

/// What a handshake hands over.
pub struct Secrets {
    /// The suite of both directions.
    pub suite: Suite,
    /// The client's traffic secret.
    pub client: Zeroizing<Vec<u8>>,
    /// The server's.
    pub server: Zeroizing<Vec<u8>>,
    /// Records that the server has sealed with it: tickets.
    pub server_records: u64,
}

impl Secrets {
    /// The keys of what the client sends, and of what the server sends.
    pub fn keys(&self) -> [RecordKeys; 2] {
        [
            RecordKeys::new(self.suite, &self.client, 0),
            RecordKeys::new(self.suite, &self.server, self.server_records),
        ]
    }
}

impl fmt::Debug for Secrets {
    /// Omits the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("suite", &self.suite).finish_non_exhaustive()
    }
}

/// A handshake on its way between a shard and the thread that makes it.
#[derive(Debug)]
pub struct Job {
    /// Whose it is.
    pub connection: ConnectionKey,
    /// The handshake; `None`: it begins.
    pub handshake: Option<Box<dyn TlsHandshake>>,
    /// What the client has sent; back at the shard: what is left of it.
    pub input: Vec<u8>,
    /// Back at the shard: what is to be sent.
    pub output: Vec<u8>,
    /// Back at the shard: how far it is.
    pub progress: HandshakeProgress,
}
