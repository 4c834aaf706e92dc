//! The messages that were replayed to a session, within its bound.

use super::positions::RUNS_PER_SESSION_MAX;
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::event::Event;

/// The messages that were replayed.
#[derive(Debug, Default)]
pub(super) struct ReplayedRuns {
    runs: Vec<SequenceRun>,
    forgotten: u64,
}

impl ReplayedRuns {
    pub(super) fn add(&mut self, event: &Event) {
        self.runs.extend(event.position.map(SequenceRun::one));
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

    /// The runs within the bound of a session, and how many are forgotten.
    pub(super) fn into_runs(mut self) -> (Vec<SequenceRun>, u64) {
        self.compact();
        (self.runs, self.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{ConversationKey, ConversationPosition};

    #[test]
    fn runs_of_a_long_replay_are_bounded() {
        let mut replayed = ReplayedRuns::default();
        for sequence in 0..10 * RUNS_PER_SESSION_MAX as i64 {
            let conversation = ConversationKey(sequence as u64 % 3);
            // Each second message is missing, so that no two runs can be joined.
            let position = ConversationPosition { conversation, sequence: 2 * sequence };
            replayed.add(&Event::new(Some(position), 0));
            assert!(replayed.runs.len() <= 2 * RUNS_PER_SESSION_MAX);
        }
        replayed.compact();
        assert_eq!(replayed.runs.len(), RUNS_PER_SESSION_MAX);
        assert_eq!(replayed.forgotten, 9 * RUNS_PER_SESSION_MAX as u64);
        let newest = replayed.runs.last().expect("not empty").last;
        assert_eq!(newest, 2 * (10 * RUNS_PER_SESSION_MAX as i64 - 1), "the newest are kept");
    }
}
