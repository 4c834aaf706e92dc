//! What a session has missed since its cursor, from the tails of the nodes.
//!
//! Nobody else is asked, so nothing here is bounded by calls. A chunk of records is fetched when the socket has taken
//! the one before. A session holds one of the slots of all catch-ups, which bounds what the routers keep of replays,
//! except while its socket is slow.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::page::{CaughtUpEvent, chunks};
use super::positions::RUNS_PER_SESSION_MAX;
use super::task::{CatchUpSlot, CatchUpTask};
use super::{CatchUpFailure, CatchUpResources};
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::cursor::{Cursor, CursorExpired};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::service::events::encode::Encoder;
use crate::service::events::envelope;
use crate::service::routing::replays::ReplayedRecord;

/// How long a session waits until every node knows it. Then it gets no cursors.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(300);

/// The messages that were replayed.
#[derive(Debug, Default)]
pub(super) struct ReplayedRuns {
    runs: Vec<SequenceRun>,
    forgotten: u64,
}

impl ReplayedRuns {
    fn add(&mut self, event: &CaughtUpEvent) {
        self.runs.extend(event.1.position.map(SequenceRun::one));
        if self.runs.len() > 2 * RUNS_PER_SESSION_MAX {
            self.compact();
        }
    }

    /// Joins the runs. Beyond the bound those of the lowest sequences are forgotten.
    fn compact(&mut self) {
        self.runs = CaughtUp::new(None, std::mem::take(&mut self.runs)).runs().to_vec();
        let over = self.runs.len().saturating_sub(RUNS_PER_SESSION_MAX);
        if over > 0 {
            self.runs.sort_unstable_by_key(|run| run.last);
            self.runs.drain(..over);
            self.forgotten += over as u64;
        }
    }
}

impl CatchUpResources {
    /// The runs within the bound of a session. Counts those that are forgotten.
    pub(super) fn within_bound(&self, mut replayed: ReplayedRuns) -> Vec<SequenceRun> {
        replayed.compact();
        self.counters.delivered_forgotten.add(replayed.forgotten);
        replayed.runs
    }

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
            Some((sequence, Arc::new(event)))
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
        events.iter().for_each(|event| replayed.add(event));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::Event;
    use crate::domain::ids::{ConversationKey, ConversationPosition};

    #[test]
    fn runs_of_a_long_replay_are_bounded() {
        let mut replayed = ReplayedRuns::default();
        for sequence in 0..10 * RUNS_PER_SESSION_MAX as i64 {
            let conversation = ConversationKey(sequence as u64 % 3);
            // Each second message is missing, so that no two runs can be joined.
            let position = ConversationPosition { conversation, sequence: 2 * sequence };
            replayed.add(&(position.sequence, Arc::new(Event::new(Some(position), 0))));
            assert!(replayed.runs.len() <= 2 * RUNS_PER_SESSION_MAX);
        }
        replayed.compact();
        assert_eq!(replayed.runs.len(), RUNS_PER_SESSION_MAX);
        assert_eq!(replayed.forgotten, 9 * RUNS_PER_SESSION_MAX as u64);
        let newest = replayed.runs.last().expect("not empty").last;
        assert_eq!(newest, 2 * (10 * RUNS_PER_SESSION_MAX as i64 - 1), "the newest are kept");
    }
}
