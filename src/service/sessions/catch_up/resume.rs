//! What a session gets first: everything since its cursor, or else what the message service has.

use std::sync::Arc;

use super::positions::RUNS_PER_SESSION_MAX;
use super::replayed::ReplayedRuns;
use super::task::CatchUpTask;
use super::{CatchUpFailure, CatchUpScope, CatchUpStep};
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::cursor::CursorRequest;

/// A session that has got what it missed.
pub(super) struct Resumed {
    pub(super) delivered: CaughtUp,
    /// It has got everything since its cursor, so that cursors may follow.
    pub(super) since_cursor: bool,
}

impl CatchUpTask {
    /// Sends what the session has missed: since its cursor, or else from the message service.
    pub(super) async fn resume(
        self: &Arc<Self>,
        scope: CatchUpScope,
        cursor: Option<CursorRequest>,
    ) -> Result<Resumed, CatchUpFailure> {
        let mut replayed = ReplayedRuns::default();
        self.resources.counters.cursor_requests.add(u64::from(cursor.is_some()));
        let expired = match cursor {
            None | Some(CursorRequest::First) => None,
            Some(CursorRequest::Unusable(why)) => Some(why),
            Some(CursorRequest::Since(cursor)) => match self.replay(cursor, &mut replayed).await? {
                Ok(mut runs) => {
                    self.resources.counters.cursor_resumes.add(1);
                    runs.truncate(RUNS_PER_SESSION_MAX);
                    runs.extend(self.replayed_runs(replayed));
                    let delivered = self.resources.remember(None, runs);
                    return Ok(Resumed { delivered, since_cursor: true });
                }
                Err(why) => Some(why),
            },
        };
        if let Some(why) = expired {
            self.resources.cursors_expired[why as usize].add(1);
            if matches!(scope, CatchUpScope::SinceCursor) {
                return Err(CatchUpFailure::CursorExpired(why));
            }
            self.report(CatchUpStep::CursorExpired(why)).await?;
        }
        let (only, caught_up) = match self.resources.messages {
            Some(_) => self.catch_up(scope).await?,
            None => (None, Vec::new()),
        };
        let mut runs = self.replayed_runs(replayed);
        runs.extend(caught_up);
        let delivered = self.resources.remember(only, runs);
        Ok(Resumed { delivered, since_cursor: false })
    }

    /// Counts the runs that are forgotten.
    fn replayed_runs(&self, replayed: ReplayedRuns) -> Vec<SequenceRun> {
        let (runs, forgotten) = replayed.into_runs();
        self.resources.counters.delivered_forgotten.add(forgotten);
        runs
    }
}
