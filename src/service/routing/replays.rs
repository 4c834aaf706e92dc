//! Replays: what a session that returns with a cursor has missed, from the tails of the nodes.
//!
//! The session's catch-up pulls the records, chunk by chunk, at the pace of its socket. So a slow session waits only
//! for itself, and nothing is kept for it meanwhile but its position. If the tails move on below that position, it
//! gets [`CursorExpired::Overtaken`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::domain::cursor::{Cursor, CursorExpired};
use crate::domain::ids::SessionAddress;

/// A record that a session has missed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayedRecord {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The record's timestamp, Unix time in ms; 0 if it has none.
    pub appended_at_ms: u64,
    /// The key: the conversation's id (contract §2).
    pub key: Option<Box<[u8]>>,
    /// The value: a serialized `EventEnvelope` (contract §2).
    pub value: Bytes,
}

/// What [`ReplayReader::next`] returns.
pub type ReplayedChunk = Result<Option<Vec<ReplayedRecord>>, CursorExpired>;

/// A [`ReplayedChunk`] that is being collected.
pub type PendingChunk<'a> = Pin<Box<dyn Future<Output = ReplayedChunk> + Send + 'a>>;

/// What the client has of a partition after a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoveredLog {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// It has every record below this offset: from sessions before, or replayed.
    pub below: i64,
    /// But not these, ascending: they waited for their members, and come live.
    pub except: Arc<[i64]>,
}

/// Where the chunks of one replay come from.
pub trait ReplayChunks: Send {
    /// See [`ReplayReader::next`].
    fn next(&mut self) -> PendingChunk<'_>;

    /// See [`ReplayReader::covered`].
    fn covered(&self) -> Vec<CoveredLog> {
        Vec::new()
    }
}

/// The replay to one session.
pub struct ReplayReader(Box<dyn ReplayChunks>);

impl ReplayReader {
    /// Reads these chunks.
    pub fn new(chunks: impl ReplayChunks + 'static) -> Self {
        Self(Box::new(chunks))
    }

    /// A replay that is not possible.
    pub fn expired(why: CursorExpired) -> Self {
        Self::new(std::iter::once(Err(why)))
    }

    /// The next records, in the order of each partition, at least one; `None`: it is complete. The records of a chunk
    /// fit into one chunk of catch-up, or it is a single record. All partitions are checked before the first chunk is
    /// returned.
    ///
    /// # Errors
    /// The cursor cannot be used. After the first chunk only [`CursorExpired::Overtaken`]: the session has missed
    /// records that are gone.
    pub async fn next(&mut self) -> ReplayedChunk {
        self.0.next().await
    }

    /// After the end of a replay that is complete: what the client has, so that live events of it are duplicates. Those
    /// that precede the cursor are older than what was replayed. As far as it is known.
    pub fn covered(&self) -> Vec<CoveredLog> {
        self.0.covered()
    }
}

/// Chunks that are there already, then the end.
impl<I: Iterator<Item = ReplayedChunk> + Send> ReplayChunks for I {
    fn next(&mut self) -> PendingChunk<'_> {
        Box::pin(std::future::ready(Iterator::next(self).unwrap_or(Ok(None))))
    }
}

/// Starts replays.
pub trait TailReplays: Send + Sync + 'static {
    /// What the user of this session has missed since the cursor. The session is in the directory, and its live events
    /// are held: they follow what is replayed. Some of them may be replayed as well.
    ///
    /// `None`: the session has no cursor yet and wants none of its past, so no records are returned. In both cases the
    /// reader is complete only when a cursor may be sent: every node that owns a partition hands over to this session
    /// whatever it passes from now on.
    fn replay(
        &self,
        session: SessionAddress,
        user: Arc<str>,
        since: Option<Cursor>,
    ) -> ReplayReader;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reader_returns_the_chunks_and_then_the_end() {
        let record = ReplayedRecord {
            topic: "events".into(),
            partition: 0,
            offset: 7,
            appended_at_ms: 1,
            key: None,
            value: Bytes::from_static(b"value"),
        };
        let chunk = vec![record];
        let mut reader = ReplayReader::new(std::iter::once(Ok(Some(chunk.clone()))));
        assert_eq!(reader.next().await, Ok(Some(chunk)));
        assert_eq!(reader.next().await, Ok(None));
        let mut expired = ReplayReader::expired(CursorExpired::TooOld);
        assert_eq!(expired.next().await, Err(CursorExpired::TooOld));
    }
}
