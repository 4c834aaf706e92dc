//! What a session has missed since its cursor, from the tails of the nodes.
//!
//! Nobody else is asked, so nothing here is bounded by calls. A chunk of records is fetched when the socket has taken
//! the one before. A session holds one of the slots of all catch-ups, which bounds what the routers keep of replays,
//! except while its socket is slow.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::page::{CaughtUpEvent, chunks};
use super::replayed::ReplayedRuns;
use super::task::{CatchUpSlot, CatchUpTask};
use super::{CatchUpFailure, CatchUpResources};
use crate::domain::cursor::{Cursor, CursorExpired};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::service::events::conversation_key::log_position;
use crate::service::events::encode::Encoder;
use crate::service::events::envelope;
use crate::service::routing::replays::ReplayedRecord;

/// How long a session waits until every node knows it. Then it gets no cursors.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(300);

impl CatchUpResources {
    /// The events of these records, without those that cannot be expressed in this encoding.
    fn encode_records(&self, records: &[ReplayedRecord], encoding: Encoding) -> Vec<CaughtUpEvent> {
        let idle = self.encoders.lock().expect("no holder panics").pop();
        let mut encoder = idle.unwrap_or_else(|| Encoder::new(self.config.compression));
        let mut wanted = EncodingSet::default();
        wanted.insert(encoding);
        let event = |record: &ReplayedRecord| {
            let decoded = envelope::decode(&record.value).ok()?;
            // No time of append: what was missed does not count as latency.
            let event = encoder.encode(&decoded, wanted, 0);
            event.frame(encoding)?;
            let sequence = event.position.map_or(0, |position| position.sequence);
            let at = log_position(&record.topic, record.partition, record.offset);
            Some((sequence, Arc::new(event.at_log_position(at))))
        };
        let events = records.iter().filter_map(event).collect();
        self.encoders.lock().expect("no holder panics").push(encoder);
        events
    }
}

impl CatchUpTask {
    /// Sends everything since the cursor. What was sent is added to `replayed` also if the cursor turns out to be
    /// unusable.
    pub(super) async fn replay(
        &self,
        cursor: Cursor,
        replayed: &mut ReplayedRuns,
    ) -> Result<Result<(), CursorExpired>, CatchUpFailure> {
        let Some(replays) = self.resources.replays.get() else {
            return Ok(Err(CursorExpired::NotSupported));
        };
        let mut slot = Some(self.resources.slot().await?);
        let mut reader = replays.replay(self.address, Arc::clone(&self.user), Some(cursor));
        loop {
            match reader.next().await {
                Ok(None) => return Ok(Ok(())),
                Ok(Some(records)) => self.send_records(&records, replayed, &mut slot).await?,
                Err(why) => return Ok(Err(why)),
            }
        }
    }

    async fn send_records<'a>(
        &'a self,
        records: &[ReplayedRecord],
        replayed: &mut ReplayedRuns,
        slot: &mut Option<CatchUpSlot<'a>>,
    ) -> Result<(), CatchUpFailure> {
        let resources = &self.resources;
        let encoding = self.address.encoding;
        let events = resources.encode_records(records, encoding);
        events.iter().for_each(|(sequence, event)| replayed.add(event, *sequence > 0));
        for chunk in chunks(events, encoding, &resources.config) {
            resources.counters.replayed.add(chunk.len() as u64);
            if let Some(stalled) = self.send(chunk).await? {
                *slot = None;
                self.wait_for_socket(stalled).await?;
                *slot = Some(resources.slot().await?);
            }
        }
        Ok(())
    }

    /// Waits until everything that is routed from now on reaches the session. Returns false if that is never known, so
    /// that it gets no cursors.
    pub(super) async fn is_known(&self) -> bool {
        let Some(replays) = self.resources.replays.get() else { return false };
        let mut reader = replays.replay(self.address, Arc::clone(&self.user), None);
        timeout(KNOWN_TIMEOUT, reader.next()).await.is_ok_and(|known| known.is_ok())
    }
}
