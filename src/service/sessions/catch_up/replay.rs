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
use crate::domain::caught_up::SequenceRun;
use crate::domain::cursor::{Cursor, CursorExpired};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::service::events::conversation_key::log_position;
use crate::service::events::encode::Encoder;
use crate::service::events::envelope;
use crate::service::routing::replays::{CoveredLog, ReplayedRecord};

/// How long a session waits until every node knows it. Then it gets no cursors.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(300);

impl CatchUpResources {
    /// The events of these records, without those that this encoding has no form for.
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
        self.counters.events_reduced.add(encoder.take_reduced());
        self.encoders.lock().expect("no holder panics").push(encoder);
        events
    }
}

/// The offsets of what the client has of a partition.
fn covered_runs(covered: &CoveredLog) -> Vec<SequenceRun> {
    let CoveredLog { topic, partition, below, except } = covered;
    let conversation = log_position(topic, *partition, 0).conversation;
    let mut first = 0;
    let mut runs = Vec::new();
    for end in except.iter().chain([below]) {
        if first < *end {
            runs.push(SequenceRun { conversation, first, last: end - 1 });
        }
        first = end + 1;
    }
    runs
}

impl CatchUpTask {
    /// Sends everything since the cursor. What was sent is added to `replayed` also if the cursor turns out to be
    /// unusable. Returns what the client has of the log then.
    pub(super) async fn replay(
        &self,
        cursor: Cursor,
        replayed: &mut ReplayedRuns,
    ) -> Result<Result<Vec<SequenceRun>, CursorExpired>, CatchUpFailure> {
        let Some(replays) = self.resources.replays.get() else {
            return Ok(Err(CursorExpired::NotSupported));
        };
        let mut slot = Some(self.resources.slot().await?);
        let mut reader = replays.replay(self.address, Arc::clone(&self.user), Some(cursor));
        loop {
            match reader.next().await {
                Ok(None) => {
                    return Ok(Ok(reader.covered().iter().flat_map(covered_runs).collect()));
                }
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
        events.iter().for_each(|(_, event)| replayed.add(event));
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

    #[test]
    fn client_has_what_is_below_the_end_of_a_replay_but_not_what_was_parked() {
        let runs = |below, except: &[i64]| {
            let covered =
                CoveredLog { topic: "t".into(), partition: 1, below, except: except.into() };
            let runs = covered_runs(&covered).into_iter();
            runs.map(|run| (run.first, run.last)).collect::<Vec<_>>()
        };
        assert_eq!(runs(0, &[]), []);
        assert_eq!(runs(9, &[]), [(0, 8)]);
        assert_eq!(runs(9, &[0, 3, 4]), [(1, 2), (5, 8)]);
        assert_eq!(runs(9, &[8]), [(0, 7)]);
    }
}
